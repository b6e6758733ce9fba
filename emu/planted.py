"""Int3s in guest memory by physical address: what executes the byte meets them, by whatever mapping.

Rules: the machine's thread only. Unlike `text`, which owns virtual addresses, this owns bytes of pages, those of a
file's page cache above all. The guest finds the int3 where it reads the page; a debugger, a hash and a snapshot are
shown its own byte. To `text` the int3 is the guest's byte, so either may come and go first. Hits are `codebreaks`'.
"""

from __future__ import annotations

from emu.covered import INT3, CoveredBytes
from emu.engine import Engine
from emu.iface import MemoryFault
from emu.ram import Ram
from emu.text import ArmedText
from emu.walks import Walks


class PlantedBytes:
    """Implements iface.Planted, and memory.Layer."""

    def __init__(self, ram: Ram, engine: Engine, walks: Walks, text: ArmedText) -> None:
        self._ram = ram
        self._engine = engine
        self._walks = walks
        self._text = text
        self._covered = CoveredBytes()
        self.reveal, self.cover = self._covered.reveal, self._covered.cover

    def plant(self, paddr: int, *, fresh: bool = False) -> None:
        """See iface.Planted."""
        if self.stands(paddr):
            return
        if not 0 <= paddr < self._ram.size:
            raise MemoryFault(paddr, "plant a breakpoint in")
        self._covered.keep(paddr, self._guest_byte(paddr))
        self._write(paddr, INT3)
        if not fresh:
            self._engine.drop_code(0, 0, False)

    def adopt(self, paddr: int, original: int) -> None:
        """See iface.Planted."""
        if paddr not in self._covered and 0 <= paddr < self._ram.size:
            self._covered.keep(paddr, original)

    def remove(self, paddr: int) -> None:
        """See iface.Planted."""
        if self.stands(paddr):
            self._write(paddr, self._covered[paddr])
            self._engine.drop_code(0, 0, False)
        self._covered.drop(paddr)

    def forget_one(self, paddr: int) -> None:
        """See iface.Planted."""
        self._covered.drop(paddr)

    def stands(self, paddr: int) -> bool:
        """See iface.Planted."""
        return paddr in self._covered and self._guest_byte(paddr) == INT3

    def original(self, paddr: int) -> int | None:
        """See iface.Planted."""
        return self._covered.get(paddr)

    def at(self, vaddr: int) -> int | None:
        """The physical address of the int3 of ours that stands at a virtual one now, or None."""
        if not self._covered:
            return None
        paddr = self._walks.locate(vaddr)
        return paddr if paddr is not None and self.stands(paddr) else None

    def forget(self) -> None:
        """RAM was replaced by RAM without our bytes."""
        self._covered.clear()

    def guest_bytes(self) -> dict[int, int]:
        """Physical address -> the guest's byte, of every int3 that stands."""
        return {paddr: byte for paddr, byte in self._covered.items() if self.stands(paddr)}

    def _guest_byte(self, paddr: int) -> int:
        """What stands there for all but `text`."""
        return self._text.reveal(paddr, self._ram.map[paddr : paddr + 1])[0]

    def _write(self, paddr: int, byte: int) -> None:
        self._ram.map[paddr] = self._text.cover(paddr, bytes((byte,)))[0]
