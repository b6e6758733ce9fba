"""Bytes of RAM where int3s of ours stand, and the guest's own that they cover: a layer between a debugger and RAM.

Rules: the machine's thread only; physical addresses. This is what is remembered; who owns one (`text`, `planted`)
changes RAM by it. Where the guest has written over an int3, its byte in RAM is the truth.
"""

from __future__ import annotations

from collections.abc import ItemsView

from emu.addresses import AddressSet

INT3 = 0xCC


class CoveredBytes:
    """Physical address -> the guest's byte. Implements memory.Layer."""

    def __init__(self) -> None:
        self._guest: dict[int, int] = {}
        self._paddrs = AddressSet()

    def keep(self, paddr: int, byte: int) -> None:
        """`byte` is the guest's from now on."""
        self._guest[paddr] = byte
        self._paddrs.add(paddr)

    def get(self, paddr: int) -> int | None:
        return self._guest.get(paddr)

    def drop(self, paddr: int) -> None:
        """No error where nothing is covered."""
        if self._guest.pop(paddr, None) is not None:
            self._paddrs.discard(paddr)

    def clear(self) -> None:
        self._guest.clear()
        self._paddrs.clear()

    def items(self) -> ItemsView[int, int]:
        return self._guest.items()

    def __contains__(self, paddr: int) -> bool:
        return paddr in self._guest

    def __getitem__(self, paddr: int) -> int:
        return self._guest[paddr]

    def __len__(self) -> int:
        return len(self._guest)

    def reveal(self, paddr: int, data: bytes) -> bytes:
        """`data` read from `paddr`, with the guest's bytes where int3s stand."""
        if not self._guest:
            return data
        covered = self._paddrs.within(paddr, paddr + len(data))
        if not covered:
            return data
        shown = bytearray(data)
        for at in covered:
            if shown[at - paddr] == INT3:
                shown[at - paddr] = self._guest[at]
        return bytes(shown)

    def cover(self, paddr: int, data: bytes) -> bytes:
        """`data` about to be written to `paddr`: int3s stay and the new bytes are remembered under them."""
        covered = self._paddrs.within(paddr, paddr + len(data))
        if not covered:
            return data
        written = bytearray(data)
        for at in covered:
            self._guest[at], written[at - paddr] = written[at - paddr], INT3
        return bytes(written)
