"""What is known of one kernel image: its types, its release, and where its variables are.

Rules: pure; no guest memory is read. Types and addresses come from the image's own .BTF and kallsyms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from emu.iface import Machine, SymbolTable
from probes.btf import Btf, BtfError, Kind, parse_btf

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
    are its virtual ones less `virtual_offset`. `known`: addresses of variables that the kernel's symbols lack.
    """

    release: str
    btf: Btf
    symbols: SymbolTable
    page_tables: int
    virtual_offset: int
    known: Mapping[str, int] = field(default_factory=dict)

    @property
    def root(self) -> int:
        """Physical address of the kernel's own top-level page table."""
        return self.page_tables - self.virtual_offset

    def address(self, name: str) -> int | None:
        """Of a variable or function; of a per-cpu variable its offset."""
        if name in self.known:
            return self.known[name]
        found = self.symbols.lookup(name)
        return found[0].address if found else None

    def variable_type(self, name: str) -> str | int | None:
        """The type of a variable: spelled, a BTF id, or unknown."""
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
    data = guest.btf()
    if not data:
        return "the kernel has no type information of its own (BTF)"
    try:
        btf = parse_btf(data, guest.bits // 8)
    except BtfError as error:
        return f"the kernel's type information is wrong: {error}"
    tables = next((found[0].address for name in _PAGE_TABLES if (found := machine.symbols.lookup(name))), None)
    if tables is None:
        return "its symbols do not say where its page tables are"
    return KernelTypes(release[1], btf, machine.symbols, tables, guest.virtual_offset)
