"""What is known of one kernel image: its types, its release, and where its variables are.

Rules: pure; no guest memory is read. Types and addresses come from the image's own .BTF and
kallsyms, or, where a kernel has none (Debian's i386), from a profile that belongs to exactly that build (profile.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from emu.iface import Machine, SymbolTable
from probes.btf import Btf, BtfError, Kind, parse_btf
from probes.linux.profile import ProfileError, find_profile

# BTF has the types of per-cpu variables only (until 6.16). These are the ones drgn's helpers and ours ask for; the same
# from 5.10 to 6.12, unless said.
VARIABLES: Final = {
    "init_task": "struct task_struct",
    "init_pid_ns": "struct pid_namespace",
    "modules": "struct list_head",
    "prb": "struct printk_ringbuffer *",
    "__per_cpu_offset": "unsigned long [1]",
    "task_state_array": "const char * const [9]",  # fs/proc/array.c, since 4.14
    "vmemmap_base": "unsigned long",
    "page_offset_base": "unsigned long",
    "vmalloc_base": "unsigned long",
    "mem_section": "struct mem_section **",
    "mem_map": "struct page *",
}
_PAGE_TABLES: Final = ("init_top_pgt", "swapper_pg_dir")
_CODE: Final = "TtWw"  # nm's letters
_RELEASE: Final = re.compile(r"Linux version (\S+)")


class LinuxGuest(Protocol):
    """What is needed of emu.boot.Guest."""

    kind: str
    title: str
    bits: int
    build_id: bytes | None
    virtual_offset: int

    def btf(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class KernelTypes:
    """One kernel. `page_tables`: virtual address of the kernel's own top-level table. The image's physical addresses
    are its virtual ones less `virtual_offset`. `known`: name -> (address, type) of variables its symbols lack.
    """

    release: str
    btf: Btf
    symbols: SymbolTable
    page_tables: int
    virtual_offset: int
    known: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def profiled(self) -> bool:
        """Types and variables are a profile's: there are no types of functions."""
        return bool(self.known)

    @property
    def root(self) -> int:
        """Physical address of the kernel's own top-level page table."""
        return self.page_tables - self.virtual_offset

    def address(self, name: str) -> int | None:
        """Of a variable or function; of a per-cpu variable its offset."""
        if name in self.known:
            return self.known[name][0]
        found = self.symbols.lookup(name)
        return found[0].address if found else None

    def is_code(self, name: str) -> bool:
        """A function, whether its type is known or not: before 5.17 BTF has only those that ftrace traces."""
        found = self.symbols.lookup(name)
        return bool(found) and (found[0].kind in _CODE or self.profiled)  # a profile's symbols are functions only

    def variable_type(self, name: str) -> str | int | None:
        """The type of a variable: spelled, a BTF id, or unknown."""
        if name in self.known:
            return self.known[name][1]
        if name in VARIABLES:
            return VARIABLES[name]
        found = self.btf.find(name, Kind.VAR)
        return found.target if found else None


def kernel_types(machine: Machine) -> KernelTypes | str:
    """What is known of the kernel in `machine`, or why nothing is."""
    guest: LinuxGuest | None = getattr(machine, "guest", None)
    if guest is None or guest.kind != "linux":
        return "the guest is no Linux"
    release = _RELEASE.search(guest.title)
    if release is None:
        return "the kernel's release is not known"
    known: Mapping[str, tuple[int, str]] = {}
    try:
        data = guest.btf()
        if not data:
            profile = find_profile(guest.build_id)
            if profile is None:
                return (
                    f"the kernel has no type information of its own (BTF), and there is no profile of {release[1]}: "
                    "`gdbstub fetch --debug` makes one of a Debian kernel"
                )
            data, known = profile.btf, profile.variables
        btf = parse_btf(data, guest.bits // 8)
    except (BtfError, ProfileError) as error:
        return f"the kernel's type information is wrong: {error}"
    kernel = KernelTypes(release[1], btf, machine.symbols, 0, guest.virtual_offset, known)
    tables = next((found for name in _PAGE_TABLES if (found := kernel.address(name)) is not None), None)
    if tables is None:
        return "the kernel's symbols do not say where its page tables are"
    return replace(kernel, page_tables=tables)
