"""Page walks over shared RAM: unpaged, 2-level with PSE, PAE, 4-level. SDM vol. 3, chapter 4.

Rules: pure functions of RAM and control registers; no side effects but `touch`, which sets the accessed and dirty
bits that a processor would. Called in the machine's thread only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from emu.ram import PAGE, Ram

CR0_WP = 1 << 16
CR0_PG = 1 << 31
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
EFER_LMA = 1 << 10
EFER_NXE = 1 << 11

PRESENT, WRITABLE, USER, ACCESSED, DIRTY, LARGE = 1, 2, 4, 0x20, 0x40, 0x80
NX = 1 << 63
ADDRESS = 0x000FFFFFFFFFF000


class Tables(NamedTuple):
    """The control registers a walk depends on."""

    cr0: int
    cr3: int
    cr4: int
    efer: int

    @property
    def paged(self) -> bool:
        return bool(self.cr0 & CR0_PG)


class Page(NamedTuple):
    """One translation: where `vaddr` is, how large its page is, and what all levels together allow."""

    paddr: int
    size: int
    writable: bool
    user: bool
    executable: bool
    entry: int  # physical address of the leaf entry
    wide: bool  # entries are 8 bytes
    accessed: bool = True  # the leaf entry says so: the processor has been there since it was cleared


def canonical(vaddr: int) -> bool:
    """Bits 63 to 47 of a 64-bit address are equal (SDM vol. 1, 3.3.7.1)."""
    return (vaddr >> 47) in (0, 0x1FFFF)


def entry_addresses(ram: Ram, tables: Tables, vaddr: int) -> list[int]:
    """Physical addresses of the entries a walk of `vaddr` reads, as far as it gets; for `window` and diagnostics."""
    found: list[int] = []
    _walk(ram, tables, vaddr, found)
    return found


def root_of(tables: Tables) -> int:
    """Physical address of the root table."""
    if tables.efer & EFER_LMA:
        return tables.cr3 & ADDRESS
    return tables.cr3 & (0xFFFFFFE0 if tables.cr4 & CR4_PAE else 0xFFFFF000)


def entries_are_wide(tables: Tables) -> bool:
    """They have 8 bytes, else 4."""
    return bool(tables.efer & EFER_LMA or tables.cr4 & CR4_PAE)


def walk(ram: Ram, tables: Tables, vaddr: int) -> Page | None:
    """The page that `vaddr` lies in, or None where it is not mapped (or its tables lie outside RAM)."""
    if not tables.paged:
        vaddr &= 0xFFFFFFFF
        return Page(vaddr, 1 << 32, True, True, True, -1, False)
    return _walk(ram, tables, vaddr, None)


def _walk(ram: Ram, tables: Tables, vaddr: int, found: list[int] | None) -> Page | None:
    if tables.efer & EFER_LMA:
        if not canonical(vaddr):
            return None
        return _walk_wide(ram, tables.cr3 & ADDRESS, vaddr, (39, 30, 21, 12), tables, found)
    vaddr &= 0xFFFFFFFF
    if tables.cr4 & CR4_PAE:
        return _walk_pae(ram, tables, vaddr, found)
    return _walk_legacy(ram, tables, vaddr, found)


def _walk_wide(
    ram: Ram, table: int, vaddr: int, shifts: tuple[int, ...], tables: Tables, found: list[int] | None
) -> Page | None:
    words, size = ram.words, ram.size
    writable, user, nx = WRITABLE, USER, 0
    for shift in shifts:
        at = table + ((vaddr >> shift) & 511) * 8
        if at + 8 > size:
            return None
        if found is not None:
            found.append(at)
        entry = words[at >> 3]
        if not entry & PRESENT:
            return None
        writable &= entry
        user &= entry
        nx |= entry & NX
        if shift == 12 or (entry & LARGE and shift != 39):
            mask = (1 << shift) - 1
            executable = not (nx and tables.efer & EFER_NXE)
            paddr = (entry & ADDRESS & ~mask) | (vaddr & mask)
            return Page(paddr, mask + 1, bool(writable), bool(user), executable, at, True, bool(entry & ACCESSED))
        table = entry & ADDRESS
    return None


def _walk_pae(ram: Ram, tables: Tables, vaddr: int, found: list[int] | None) -> Page | None:
    at = (tables.cr3 & 0xFFFFFFE0) + (vaddr >> 30) * 8
    if at + 8 > ram.size:
        return None
    if found is not None:
        found.append(at)
    pdpte = ram.words[at >> 3]
    if not pdpte & PRESENT:
        return None
    return _walk_wide(ram, pdpte & ADDRESS, vaddr, (21, 12), tables, found)


def _walk_legacy(ram: Ram, tables: Tables, vaddr: int, found: list[int] | None) -> Page | None:
    dwords = ram.dwords
    at = (tables.cr3 & 0xFFFFF000) + (vaddr >> 22) * 4
    if at + 4 > ram.size:
        return None
    if found is not None:
        found.append(at)
    pde = dwords[at >> 2]
    if not pde & PRESENT:
        return None
    if pde & LARGE and tables.cr4 & CR4_PSE:
        paddr = ((pde & 0x1FE000) << 19) | (pde & 0xFFC00000) | (vaddr & 0x3FFFFF)  # PSE-36: bits 13-20 are 32-39
        return Page(paddr, 1 << 22, bool(pde & WRITABLE), bool(pde & USER), True, at, False, bool(pde & ACCESSED))
    at = (pde & 0xFFFFF000) + ((vaddr >> 12) & 1023) * 4
    if at + 4 > ram.size:
        return None
    if found is not None:
        found.append(at)
    pte = dwords[at >> 2]
    if not pte & PRESENT:
        return None
    both = pde & pte
    paddr = (pte & 0xFFFFF000) | (vaddr & 0xFFF)
    return Page(paddr, 1 << 12, bool(both & WRITABLE), bool(both & USER), True, at, False, bool(pte & ACCESSED))


def touch(ram: Ram, page: Page, write: bool) -> None:
    """Set the accessed (and dirty) bit of the leaf entry, as an access by the processor would."""
    bits = ACCESSED | (DIRTY if write else 0)
    if page.entry < 0:
        return
    view = ram.words if page.wide else ram.dwords
    index = page.entry >> (3 if page.wide else 2)
    if view[index] & bits != bits:
        view[index] |= bits


PF_PRESENT, PF_WRITE, PF_USER, PF_FETCH = 1, 2, 4, 16


def fault_code(page: Page | None, *, write: bool, user: bool, wp: bool) -> int | None:
    """The page-fault error code of an access, or None where it is allowed. SDM vol. 3, 4.7."""
    code = (PF_WRITE if write else 0) | (PF_USER if user else 0)
    if page is None:
        return code
    if (user and not page.user) or (write and not page.writable and (user or wp)):
        return code | PF_PRESENT
    return None


def mappings(ram: Ram, tables: Tables) -> Iterator[tuple[int, Page]]:
    """(virtual address, page) of everything mapped, in address order; 64-bit addresses are canonical."""
    if not tables.paged:
        yield 0, Page(0, 1 << 32, True, True, True, -1, False)
    elif tables.efer & EFER_LMA:
        yield from _entries(ram, tables, tables.cr3 & ADDRESS, (39, 30, 21, 12), 0)
    elif tables.cr4 & CR4_PAE:
        for index in range(4):
            at = (tables.cr3 & 0xFFFFFFE0) + index * 8
            if at + 8 <= ram.size and ram.words[at >> 3] & PRESENT:
                yield from _entries(ram, tables, ram.words[at >> 3] & ADDRESS, (21, 12), index << 30)
    else:
        yield from _legacy_entries(ram, tables)


def _entries(ram: Ram, tables: Tables, table: int, shifts: tuple[int, ...], start: int) -> Iterator[tuple[int, Page]]:
    if table + 0x1000 > ram.size:
        return
    shift = shifts[0]
    for index in range(512):
        entry = ram.words[(table >> 3) + index]
        if not entry & PRESENT:
            continue
        vaddr = start | index << shift
        if shift == 39 and index >= 256:
            vaddr |= 0xFFFF << 48
        if shift == 12 or (entry & LARGE and shift != 39):
            page = walk(ram, tables, vaddr)
            if page is not None:
                yield vaddr, page
        else:
            yield from _entries(ram, tables, entry & ADDRESS, shifts[1:], vaddr)


def _legacy_entries(ram: Ram, tables: Tables) -> Iterator[tuple[int, Page]]:
    directory = tables.cr3 & 0xFFFFF000
    if directory + 0x1000 > ram.size:
        return
    for index in range(1024):
        if not ram.dwords[(directory >> 2) + index] & PRESENT:
            continue
        for low in range(1024):
            page = walk(ram, tables, index << 22 | low << 12)
            if page is None:
                continue
            yield index << 22 | low << 12, page
            if page.size > PAGE:
                break
