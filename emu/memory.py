"""The guest's memory as a debugger sees it: virtual, across pages, without what we put there and without monitor RAM.

Rules: the machine's thread only, between runs or inside hooks. A debugger is no processor: it may read what the guest
could not (supervisor pages from ring 3, read-only pages), but never what is not mapped.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Protocol

from emu.cpustate import CpuState
from emu.engine import Engine
from emu.iface import MemoryFault
from emu.paging import Page, fault_code, mappings, walk
from emu.ram import PAGE, Ram
from emu.walks import Walks

_MAX_PAGES = 1 << 20


class Layer(Protocol):
    """What `text`, `planted` and `words` know of bytes in RAM that are not the guest's; the outermost comes first."""

    def reveal(self, paddr: int, data: bytes) -> bytes: ...

    def cover(self, paddr: int, data: bytes) -> bytes: ...


class GuestMemory:
    """Implements iface.Memory."""

    def __init__(self, ram: Ram, cpu: CpuState, engine: Engine, walks: Walks, *layers: Layer) -> None:
        self._ram = ram
        self._cpu = cpu
        self._engine = engine
        self._walks = walks
        self._layers = layers

    @property
    def size(self) -> int:
        """Bytes of RAM."""
        return self._ram.size

    def region(self, vaddr: int) -> tuple[int, int, str]:
        """See iface.Memory. Of hostile tables no more than _MAX_PAGES are looked at."""
        tables = self._cpu.tables()
        top = 1 << (64 if self._cpu.long_mode else 32)
        if not tables.paged:
            size = self._ram.size
            return (0, size, "rwx") if vaddr < size else (size, top - size, "")
        start = end = 0
        rights = ""
        for at, page in itertools.islice(mappings(self._ram, tables), _MAX_PAGES):
            at &= top - 1
            now = "r" + "w" * page.writable + "x" * page.executable
            if at == end and now == rights:
                end += page.size
                continue
            if start <= vaddr < end:
                break
            if vaddr < at:
                return end, at - end, ""
            start, end, rights = at, at + page.size, now
        return (start, end - start, rights) if start <= vaddr < end else (end, top - end, "")

    def translate(self, vaddr: int, root: int | None = None) -> int | None:
        """The physical address `vaddr` maps to; None where it maps to nothing or not to guest RAM.

        By the tables in force, or by others of their kind whose top level lies at physical address `root`; those map
        nothing before the guest has switched paging on.
        """
        if root is None:
            paddr = self._walks.locate(vaddr)
        else:
            page = self._page_from(root, vaddr)
            paddr = None if page is None else page.paddr
        return paddr if paddr is not None and paddr < self._ram.size else None

    def storable(self, vaddr: int, root: int) -> int | None:
        """See iface.Memory."""
        page = self._page_from(root, vaddr)
        if page is None or fault_code(page, write=True, user=True, wp=True) is not None or page.paddr >= self._ram.size:
            return None
        return page.paddr

    def _page_from(self, root: int, vaddr: int) -> Page | None:
        tables = self._cpu.tables()
        return walk(self._ram, tables._replace(cr3=root), vaddr) if tables.paged else None

    def _spans(self, vaddr: int, size: int, access: str) -> Iterator[tuple[int, int, int]]:
        """(virtual address, bytes, physical address) for each page the range touches."""
        mask = (1 << 64) - 1 if self._cpu.long_mode else (1 << 32) - 1
        vaddr &= mask
        while size > 0:
            paddr = self.translate(vaddr)
            if paddr is None:
                raise MemoryFault(vaddr, access)
            count = min(size, PAGE - (vaddr & (PAGE - 1)))
            yield vaddr, count, paddr
            vaddr, size = (vaddr + count) & mask, size - count

    def read(self, vaddr: int, size: int) -> bytes:
        """`size` bytes; MemoryFault names the first address that has none."""
        if 0 < size <= PAGE - (vaddr & PAGE - 1) and (paddr := self.translate(vaddr)) is not None:
            return self.read_physical(paddr, size)
        return b"".join(self.read_physical(paddr, count) for _, count, paddr in self._spans(vaddr, size, "read"))

    def write(self, vaddr: int, data: bytes) -> None:
        """All or nothing across pages. Armed places under it stay armed, over the new bytes."""
        for start, count in self.store(vaddr, data):
            self._engine.drop_code(start, count, reachable(self._cpu, self._walks.page(start)))

    def store(self, vaddr: int, data: bytes) -> list[tuple[int, int]]:
        """As `write`, to a stack: no code is there, so that none needs to be translated anew.

        -> (virtual address, bytes) of what each page got.
        """
        spans = list(self._spans(vaddr, len(data), "write"))
        at = 0
        for _, count, paddr in spans:
            self._ram.write(paddr, self._cover(paddr, data[at : at + count]))
            at += count
        return [(start, count) for start, count, _ in spans]

    def read_physical(self, paddr: int, size: int) -> bytes:
        data = self._ram.read(paddr, size)
        for layer in self._layers:
            data = layer.reveal(paddr, data)
        return data

    def write_physical(self, paddr: int, data: bytes) -> None:
        self._ram.write(paddr, self._cover(paddr, data))
        self._engine.drop_code(0, 0, False)

    def _cover(self, paddr: int, data: bytes) -> bytes:
        for layer in reversed(self._layers):
            data = layer.cover(paddr, data)
        return data


def reachable(cpu: CpuState, page: Page | None) -> bool:
    """The processor could execute there as it is now: what Engine.drop_code asks for (no SMEP on our models).

    The engine's own walk would set accessed bits: a page that has none yet is left alone, so that the guest's tables
    are as without us.
    """
    return page is not None and page.accessed and page.executable and (page.user or cpu.cpl < 3)
