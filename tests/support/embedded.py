"""The embedded guest on a machine, for tests: switched on, and its memory read by symbol."""

from __future__ import annotations

from emu.images.embedded import embedded_guest, embedded_kernel, layout
from emu.machine import Machine
from emu.symbols import SymbolTable

MEMORY = 32 << 20


def power_on(bits: int, append: str = "", *, pae: bool = False) -> Machine:
    """A machine about to execute the guest's first instruction; its symbols are there."""
    image = embedded_guest(bits, append, pae=pae)
    machine = Machine(MEMORY, symbols=SymbolTable(image.symbols), long_mode=bits == 64)
    machine.power_on(image)
    return machine


class Guest:
    """What the embedded guest has in memory."""

    def __init__(self, machine: Machine, bits: int) -> None:
        self.machine = machine
        self.bits = bits

    def address(self, name: str) -> int:
        (symbol,) = self.machine.symbols.lookup(name)
        return symbol.address

    def word(self, address: int) -> int:
        return int.from_bytes(self.machine.memory.read(address, self.bits // 8), "little")

    def value(self, name: str) -> int:
        """The word at the symbol `name`."""
        return self.word(self.address(name))

    def member(self, address: int, structure: str, name: str) -> int:
        """A field of a structure of `layout`."""
        return self.word(address + layout.offset(self.bits, structure, name))

    def string(self, address: int) -> str:
        return self.machine.memory.read(address, 64).partition(b"\0")[0].decode("ascii")

    @property
    def counters(self) -> dict[str, int]:
        """How often each function that counts itself was called; those never called are left out."""
        every = {name: self.value(f"count_{name}") for name in embedded_kernel(self.bits).counters}
        return {name: count for name, count in every.items() if count}
