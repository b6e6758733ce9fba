"""The order in which Linux shows a histogram's rows, those with equal sort keys included.

Rules: pure. tracing_map_sort_entries() (kernel/trace/tracing_map.c) first sorts by the bytes of the keys, to find
doubles, then by the first sort key, then runs of equal ones by the second, each time with the heap sort of lib/sort.c,
which moves equal elements about in its own way: since Linux 6.9 by taking two off the heap at a time. Compared with
6.1 and 6.12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, Final, Protocol, TypeAlias, TypeVar

_PAIRS_SINCE: Final = (6, 9)

Row = TypeVar("Row")
_Ranked: TypeAlias = tuple[int, Row]


class _Comparable(Protocol):
    def __lt__(self, other: Any, /) -> bool: ...


def kernel_order(
    rows: Iterable[Row],
    key_bytes: Callable[[Row], bytes],
    sorts: Sequence[tuple[Callable[[Row], _Comparable], bool]],
    release: tuple[int, int] = (0, 0),
) -> list[Row]:
    """`key_bytes` is a row's key as the kernel's map has it; `sorts` are one or two values, each with whether it is
    descending. `release` is the kernel's, (0, 0) for one of today."""
    heap_sorted = _sorted_singly if (0, 0) < release < _PAIRS_SINCE else _sorted_in_pairs
    (first, descending), *second = sorts
    ranked = heap_sorted(_ranked(sorted(rows, key=key_bytes), first, descending))
    if not second:
        return [row for _, row in ranked]
    found: list[Row] = []
    for _, run in groupby(ranked, key=lambda one: one[0]):
        equal = [row for _, row in run]
        found += [row for _, row in heap_sorted(_ranked(equal, *second[0]))]
    return found


def _ranked(rows: Sequence[Row], value: Callable[[Row], _Comparable], descending: bool) -> list[_Ranked[Row]]:
    """Each row with a number that compares as its value does."""
    values = [value(row) for row in rows]
    ranks = {one: rank for rank, one in enumerate(sorted(set(values), reverse=descending))}
    return [(ranks[one], row) for one, row in zip(values, rows, strict=True)]


def _sorted_singly(items: list[_Ranked[Row]]) -> list[_Ranked[Row]]:
    """sort_r() until 6.8, in place."""
    end = len(items)
    top = end // 2
    while end > 1:
        if top:
            top -= 1
        else:
            end -= 1
            items[0], items[end] = items[end], items[0]
        _sift(items, top, end, first=True)
    return items


def _sorted_in_pairs(items: list[_Ranked[Row]]) -> list[_Ranked[Row]]:
    """sort_r() of today, in place: from `end` on all is in order, before it is the heap, in which `top` sinks next."""
    end = len(items)
    top, taken = end // 2, 0
    while end > 1:
        if top:
            top -= 1 << taken  # the heap is being built, or its second largest element was taken, too
        elif end > 3:
            end -= 1
            items[0], items[end] = items[end], items[0]
            taken = int(items[1][0] <= items[2][0])
            top = 1 << taken
            end -= 1
            items[top], items[end] = items[end], items[top]
        else:
            break
        _sift(items, top, end, first=False)
    if end > 1:
        items[0], items[end - 1] = items[end - 1], items[0]
        if end == 3 and items[0][0] > items[1][0]:
            items[0], items[1] = items[1], items[0]
    return items


def _sift(items: list[_Ranked[Row]], top: int, end: int, *, first: bool) -> None:
    """Let items[top] find its place in the heap: along the larger children to a leaf, then up again.

    `first`: of two equal children the first is taken.
    """
    at = top
    while (right := 2 * at + 2) < end:
        left, other = items[right - 1][0], items[right][0]
        at = right - 1 if left > other or (first and left == other) else right
    if right == end:
        at = right - 1  # the last leaf has no sibling
    while at != top and items[top][0] >= items[at][0]:
        at = (at - 1) // 2
    place = at
    while at != top:
        at = (at - 1) // 2
        items[at], items[place] = items[place], items[at]
