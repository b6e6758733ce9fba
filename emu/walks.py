"""Page walks remembered, and whether they would still go the same way.

Rules: the machine's thread. A walk is good for as long as the registers that say how to walk and every entry it read
are the same; where the root table is does not matter while its entry does not differ, as among the address spaces of
Linux. So nothing has to be told of what a guest does to its tables.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from emu.cpustate import CpuState
from emu.paging import Page, entries_are_wide, entry_addresses, root_of, walk
from emu.ram import PAGE, Ram

_KNOWN: Final = 1024  # pages; an idle guest's handlers touch some tens


class Trail(NamedTuple):
    """The ways from the root table to some pages.

    `view` is RAM as table entries; `look(view)` gives all that were read, `values` what they were. `roots` are those of
    the root table by their index in it, `rest` the others by that in RAM, for another root.
    """

    cr3: int
    cr0: int
    cr4: int
    efer: int
    view: memoryview
    look: Callable[[memoryview], object]
    values: object
    roots: dict[int, int]
    rest: dict[int, int]


class Walks:
    """The walks of one processor."""

    def __init__(self, ram: Ram, cpu: CpuState) -> None:
        self._ram = ram
        self._cpu = cpu
        self.holds = self._holder()
        self._known: dict[int, tuple[Trail, Page]] = {}  # by page number; the Page of its first byte
        self._trails: dict[tuple[int, ...], Trail] = {}  # by page numbers

    def page(self, vaddr: int) -> Page | None:
        """As `paging.walk`, but of the first byte of the 4 KiB that `vaddr` lies in."""
        known = self._known.get(vaddr >> 12)
        if known is not None and self.holds(known[0]):
            return known[1]
        start = vaddr & -PAGE
        page = walk(self._ram, self._cpu.tables(), start)
        if page is not None:
            trail = self.trail(start)
            if trail is not None:
                if len(self._known) >= _KNOWN:
                    self._known.clear()
                self._known[vaddr >> 12] = trail, page
        return page

    def locate(self, vaddr: int) -> int | None:
        """The physical address, or None where nothing is mapped."""
        page = self.page(vaddr)
        return None if page is None else page.paddr + (vaddr & PAGE - 1)

    def trail(self, *vaddrs: int) -> Trail | None:
        """The ways to several addresses as they are now; None where they cannot be told, as one is not mapped."""
        pages = tuple(vaddr >> 12 for vaddr in vaddrs)
        known = self._trails.get(pages)
        if known is not None and self.holds(known) and known.cr3 == self._cpu.cr3:
            return known
        made = self._make_trail(vaddrs)
        if made is not None:
            if len(self._trails) >= _KNOWN:
                self._trails.clear()
            self._trails[pages] = made
        return made

    def _make_trail(self, vaddrs: Sequence[int]) -> Trail | None:
        ram, tables = self._ram, self._cpu.tables()
        mode = tables.cr3, tables.cr0, tables.cr4, tables.efer
        if not tables.paged:
            return Trail(*mode, ram.words, _nothing, None, {}, {})
        wide = entries_are_wide(tables)
        view, shift = (ram.words, 3) if wide else (ram.dwords, 2)
        root = root_of(tables) >> shift
        roots: dict[int, int] = {}
        rest: dict[int, int] = {}
        for vaddr in vaddrs:
            if walk(ram, tables, vaddr) is None:
                return None
            first, *more = entry_addresses(ram, tables, vaddr)
            roots[(first >> shift) - root] = view[first >> shift]
            rest |= {at >> shift: view[at >> shift] for at in more}
        look = operator.itemgetter(*(root + index for index in roots), *rest)
        return Trail(*mode, view, look, look(view), roots, rest)

    def _holder(self) -> Callable[[Trail], bool]:
        """A closure, as each trap and each memory access of a handler asks."""
        registers, (cr0_at, cr3_at, cr4_at, efer_at) = self._cpu.words, self._cpu.control_at

        def holds(trail: Trail) -> bool:
            """The walks of `trail` would go the same way now."""
            cr3, cr0, cr4, efer, view, look, values, _, _ = trail
            if registers[cr0_at] != cr0 or registers[cr4_at] != cr4 or registers[efer_at] != efer:
                return False
            return look(view) == values if registers[cr3_at] == cr3 else self.leads_on(trail)

        return holds

    def leads_on(self, trail: Trail) -> bool:
        """As `holds`, from another root and where the mode is known to be the same."""
        view = trail.view
        root = root_of(self._cpu.tables()) // view.itemsize
        try:
            return all(view[root + index] == value for index, value in trail.roots.items()) and all(
                view[index] == value for index, value in trail.rest.items()
            )
        except IndexError:
            return False  # CR3 leads out of RAM


def _nothing(_: memoryview) -> None:
    """What an unpaged processor reads of tables."""
