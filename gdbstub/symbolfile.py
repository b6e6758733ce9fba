"""The guest's symbols as an ELF file, made from what is known of it: what debuggers and drgn read in place of vmlinux.

Rules: bytes in memory, in the machine's thread; nothing is opened.
"""

from __future__ import annotations

from collections.abc import Iterable

from emu.boot import GuestMachine
from emu.images.plan import Section
from emu.images.symbolelf import symbol_elf


def kernel_elf(machine: GuestMachine, modules: Iterable[Section] = ()) -> bytes:
    """Its sections with all symbols and unwind tables, and those of `modules`."""
    guest = machine.guest
    return symbol_elf(
        machine.symbols,
        bits=guest.bits,
        sections=(*guest.sections, *modules),
        build_id=guest.build_id,
        frames=guest.frames(),
    )


class SymbolFile:
    """The same with the modules that are loaded: made when somebody asks and modules have come or gone since."""

    def __init__(self, machine: GuestMachine) -> None:
        self._machine = machine
        self._version: int | None = None
        self._made = b""

    def __call__(self) -> bytes:
        symbols = self._machine.symbols
        if self._version != symbols.version:
            modules = (Section(f".text.{name}", at, end - at, False, True) for name, at, end in symbols.code())
            self._version, self._made = symbols.version, kernel_elf(self._machine, modules)
        return self._made
