"""Int3s in guest memory by physical address: what executes the byte meets them, by whatever mapping.

Rules: the machine's thread only. Unlike `text`, which owns virtual addresses, this owns bytes of pages, those of a
file's page cache above all. The guest finds the int3 where it reads the page; a debugger, a hash and a snapshot are
shown its own byte. To `text` the int3 is the guest's byte, so either may come and go first. Hits are `codebreaks`'.
"""

from __future__ import annotations

import bisect

from emu.engine import Engine
from emu.iface import MemoryFault
from emu.ram import Ram
from emu.text import INT3, ArmedText
from emu.walks import Walks


class PlantedBytes:
    """Implements iface.Planted, and memory.Layer."""

    def __init__(self, ram: Ram, engine: Engine, walks: Walks, text: ArmedText) -> None:
        self._ram = ram
        self._engine = engine
        self._walks = walks
        self._text = text
        self._bytes: dict[int, int] = {}  # physical address -> the guest's byte
        self._paddrs: list[int] = []  # sorted

    def plant(self, paddr: int, *, fresh: bool = False) -> None:
        """See iface.Planted."""
        if paddr in self._bytes:
            if self.stands(paddr):
                return
            self.forget_one(paddr)  # the guest has put something else there
        if not 0 <= paddr < self._ram.size:
            raise MemoryFault(paddr, "plant a breakpoint in")
        self._keep(paddr, self._guest_byte(paddr))
        self._write(paddr, INT3)
        if not fresh:
            self._engine.drop_code(0, 0, False)

    def adopt(self, paddr: int, original: int) -> None:
        """See iface.Planted."""
        if paddr not in self._bytes and 0 <= paddr < self._ram.size:
            self._keep(paddr, original)

    def remove(self, paddr: int) -> None:
        """See iface.Planted."""
        if paddr not in self._bytes:
            return
        if self.stands(paddr):
            self._write(paddr, self._bytes[paddr])
            self._engine.drop_code(0, 0, False)
        self.forget_one(paddr)

    def forget_one(self, paddr: int) -> None:
        """See iface.Planted."""
        if self._bytes.pop(paddr, None) is not None:
            del self._paddrs[bisect.bisect_left(self._paddrs, paddr)]

    def stands(self, paddr: int) -> bool:
        """See iface.Planted."""
        return paddr in self._bytes and self._guest_byte(paddr) == INT3

    def original(self, paddr: int) -> int | None:
        """See iface.Planted."""
        return self._bytes.get(paddr)

    def at(self, vaddr: int) -> int | None:
        """The physical address of the int3 of ours that stands at a virtual one now, or None."""
        if not self._bytes:
            return None
        paddr = self._walks.locate(vaddr)
        return paddr if paddr is not None and self.stands(paddr) else None

    def forget(self) -> None:
        """RAM was replaced by RAM without our bytes."""
        self._bytes.clear()
        self._paddrs.clear()

    def guest_bytes(self) -> dict[int, int]:
        """Physical address -> the guest's byte, of every int3 that stands."""
        return {paddr: byte for paddr, byte in self._bytes.items() if self.stands(paddr)}

    # ------------------------------------------------------------------------------------- between a debugger and RAM

    def reveal(self, paddr: int, data: bytes) -> bytes:
        """`data` read from `paddr`, with the guest's bytes where ours stand."""
        covered = self._covered(paddr, len(data))
        if not covered:
            return data
        shown = bytearray(data)
        for at in covered:
            if shown[at - paddr] == INT3:
                shown[at - paddr] = self._bytes[at]
        return bytes(shown)

    def cover(self, paddr: int, data: bytes) -> bytes:
        """`data` about to be written to `paddr`: our bytes stay and remember the new ones."""
        covered = self._covered(paddr, len(data))
        if not covered:
            return data
        written = bytearray(data)
        for at in covered:
            self._bytes[at], written[at - paddr] = written[at - paddr], INT3
        return bytes(written)

    def _covered(self, paddr: int, size: int) -> list[int]:
        low = bisect.bisect_left(self._paddrs, paddr)
        return self._paddrs[low : bisect.bisect_left(self._paddrs, paddr + size, low)]

    def _keep(self, paddr: int, original: int) -> None:
        self._bytes[paddr] = original
        bisect.insort(self._paddrs, paddr)

    def _guest_byte(self, paddr: int) -> int:
        """What stands there for all but `text`."""
        return self._text.reveal(paddr, self._ram.map[paddr : paddr + 1])[0]

    def _write(self, paddr: int, byte: int) -> None:
        self._ram.map[paddr] = self._text.cover(paddr, bytes((byte,)))[0]
