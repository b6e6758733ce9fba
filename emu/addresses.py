"""Sets of addresses kept in ascending order, so that those of a range are found without a look at the others.

Rules: standard library only; whoever has one says whether its addresses are virtual or physical.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence


class AddressSet:
    """Distinct addresses, iterated in ascending order."""

    __slots__ = ("_sorted",)

    def __init__(self) -> None:
        self._sorted: list[int] = []

    def add(self, address: int) -> bool:
        """Whether it was not there."""
        if address in self:
            return False
        insort(self._sorted, address)
        return True

    def discard(self, address: int) -> bool:
        """Whether it was there."""
        if address not in self:
            return False
        del self._sorted[bisect_left(self._sorted, address)]
        return True

    def clear(self) -> None:
        self._sorted.clear()

    def within(self, start: int, end: int) -> Sequence[int]:
        """Those from `start` up to, not including, `end`."""
        known = self._sorted
        low = bisect_left(known, start)
        if low == len(known) or known[low] >= end:
            return ()
        return known[low : bisect_left(known, end, low)]

    def __contains__(self, address: int) -> bool:
        at = bisect_left(self._sorted, address)
        return at < len(self._sorted) and self._sorted[at] == address

    def __iter__(self) -> Iterator[int]:
        return iter(self._sorted)

    def __len__(self) -> int:
        return len(self._sorted)
