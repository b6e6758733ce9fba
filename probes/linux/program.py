"""A drgn Program over a guest's RAM: the kernel's own types, names and memory, without a file on the host.

Rules: called in the machine's thread; reads guest memory only, always the guest's own bytes. The one place that makes
a drgn Program. What drgn's helpers ask for is answered from three sources: types from a `Btf` (types.py), addresses
from `KernelTypes.address`, memory by a walk of the kernel's own page tables, so that it does not matter what runs now.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import drgn

from emu.iface import Machine, MemoryFault
from probes.btf import BtfError
from probes.errors import ProbeError
from probes.linux.kernel import KernelTypes
from probes.linux.types import TypeMaker

_PAGE: Final = 0x1000
_PHYSICAL: Final = 1 << 32
"""Bytes below which RAM ends; what there is of it is for the machine to say."""
_ALLOWANCE: Final = 1_000_000
"""Reads of one question. The longest there are take a tenth; structures that a guest has made a ring of end here."""


class NotAvailable(ProbeError):
    """Something that this guest, at this moment, does not tell; the text says what and why."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(errno.EOPNOTSUPP, f"{what} not available because {why}")

    def lines(self) -> list[str]:
        return [self.reason]


class _Endless(Exception):
    """A question has used up its allowance."""


class KernelMemory:
    """The kernel's half of the address space, by the tables at physical address `root`, whatever CR3 holds."""

    def __init__(self, machine: Machine, root: int) -> None:
        self._memory = machine.memory
        self._root = root
        self._left = _ALLOWANCE
        self.bounded = True

    def translate(self, vaddr: int) -> int | None:
        """Physical address of a kernel address; None where there is none."""
        return self._memory.translate(vaddr, self._root)

    def begin(self) -> None:
        """A new question."""
        self._left = _ALLOWANCE

    def virtual(self, address: int, count: int, _offset: int, _physical: bool) -> bytes:
        """What drgn calls to read a kernel address."""
        self._spend()
        found = []
        while count > 0:
            size = min(count, _PAGE - address % _PAGE)
            paddr = self.translate(address)
            if paddr is None:
                raise drgn.FaultError("no memory there", address)
            found.append(self._read(paddr, size))
            address, count = address + size, count - size
        return b"".join(found)

    def physical(self, address: int, count: int, _offset: int, _physical: bool) -> bytes:
        self._spend()
        return self._read(address, count)

    def _spend(self) -> None:
        self._left -= 1
        if self._left < 0 and self.bounded:
            raise _Endless

    def _read(self, paddr: int, size: int) -> bytes:
        try:
            return self._memory.read_physical(paddr, size)
        except MemoryFault as error:
            raise drgn.FaultError("no memory there", error.address) from None


def make_program(kernel: KernelTypes, memory: KernelMemory) -> drgn.Program:
    """A Program for drgn's helpers. Nothing is read of the guest yet."""
    wide = kernel.btf.pointer_size == 8
    program = drgn.Program(drgn.Platform(drgn.Architecture.X86_64 if wide else drgn.Architecture.I386))
    types = TypeMaker(program, kernel.btf)
    program.register_type_finder("btf", types.find, enable_index=0)
    program.register_object_finder("kernel", _object_finder(kernel, types), enable_index=0)
    program.register_symbol_finder("kallsyms", _symbol_finder(kernel), enable_index=0)
    # drgn wants to know the release and the page size; the rest of the kernel's own vmcoreinfo it finds by name.
    program.set_linux_kernel_custom(_vmcoreinfo(kernel), True)
    program.add_memory_segment(0, _PHYSICAL, memory.physical, True)
    half = 1 << (63 if wide else 31)
    program.add_memory_segment(half, half, memory.virtual, False)
    return program


@contextmanager
def question(what: str, memory: KernelMemory) -> Iterator[None]:
    """One question to the guest: bounded, and whatever it lacks or has destroyed becomes one NotAvailable."""
    memory.begin()
    try:
        yield
    except drgn.FaultError as error:
        near_null = (error.address + _PAGE) % (1 << 64) < 2 * _PAGE  # a member's offset away, in either direction
        why = "is not set yet" if near_null else f"leads to {error.address:#x}, where nothing is"
        raise NotAvailable(what, f"a pointer in the kernel's data {why}") from error
    except _Endless:
        raise NotAvailable(what, "the kernel's data does not come to an end") from None
    except (LookupError, AttributeError, BtfError) as error:
        raise NotAvailable(what, f"this kernel does not say: {error}") from error
    except (ValueError, NotImplementedError, drgn.OutOfBoundsError) as error:  # drgn's, of types it cannot evaluate
        raise NotAvailable(what, f"the kernel's data makes no sense: {error}") from error


def _vmcoreinfo(kernel: KernelTypes) -> str:
    lines = (
        f"OSRELEASE={kernel.release}",
        f"PAGESIZE={_PAGE}",
        f"SYMBOL(swapper_pg_dir)={kernel.page_tables:x}",
        "KERNELOFFSET=0",
        "LENGTH(mem_section)=1",  # of the roots those that speak of RAM; one is for 32 GiB (include/linux/mmzone.h)
        "",
    )
    return "\n".join(lines)


_Flags = drgn.FindObjectFlags
_ObjectFinder = Callable[[drgn.Program, str, drgn.FindObjectFlags, str | None], drgn.Object | None]
_SymbolFinder = Callable[[drgn.Program, str | None, int | None, bool], list[drgn.Symbol]]


def _object_finder(kernel: KernelTypes, types: TypeMaker) -> _ObjectFinder:
    def find(program: drgn.Program, name: str, flags: drgn.FindObjectFlags, _file: str | None) -> drgn.Object | None:
        if flags & _Flags.VARIABLE:
            spelled, address = kernel.variable_type(name), kernel.address(name)
            if address is not None:
                if isinstance(spelled, str):
                    return drgn.Object(program, program.type(spelled), address=address)
                if spelled is not None:
                    return drgn.Object(program, types.make(spelled), address=address)
        if flags & _Flags.FUNCTION:
            function, address = types.function(name), kernel.address(name)
            if function is None and kernel.is_code(name):
                function = program.function_type(program.void_type(), (), False)
            if function is not None and address is not None:
                return drgn.Object(program, function, address=address)
        return types.constant(name) if flags & _Flags.CONSTANT else None

    return find


def _symbol_finder(kernel: KernelTypes) -> _SymbolFinder:
    def find(_program: drgn.Program, name: str | None, address: int | None, _one: bool) -> list[drgn.Symbol]:
        found = []
        if name is not None:
            found = list(kernel.symbols.lookup(name))
        elif address is not None:
            covering = kernel.symbols.find(address)
            found = [covering[0]] if covering is not None else []
        return [
            drgn.Symbol(one.name, one.address, one.size, drgn.SymbolBinding.GLOBAL, drgn.SymbolKind.UNKNOWN)
            for one in found
        ]

    return find
