"""Page walks agree with SDM vol. 3, chapter 4, and with a model that is written from its tables alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.paging import (
    CR0_PG,
    CR4_PAE,
    CR4_PSE,
    EFER_LMA,
    EFER_NXE,
    Tables,
    canonical,
    entry_addresses,
    fault_code,
    touch,
    walk,
)
from emu.ram import Ram

PRESENT, WRITABLE, USER, ACCESSED, DIRTY, LARGE, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
TABLE_PAGES = 8
RAM = Ram(2 << 20)

LEGACY = Tables(CR0_PG, 0, 0, 0)
PSE = Tables(CR0_PG, 0, CR4_PSE, 0)
PAE = Tables(CR0_PG, 0, CR4_PAE, EFER_NXE)
LONG = Tables(CR0_PG, 0, CR4_PAE, EFER_LMA | EFER_NXE)
LONG_WITHOUT_NX = Tables(CR0_PG, 0, CR4_PAE, EFER_LMA)
LEVELS = {LEGACY: (22, 12), PSE: (22, 12), PAE: (30, 21, 12), LONG: (39, 30, 21, 12), LONG_WITHOUT_NX: (39, 30, 21, 12)}


def model(tables: Tables, vaddr: int) -> tuple[int, bool, bool, bool] | None:
    """(physical address, writable, user, executable), entry by entry as the manual's figures 4-2 to 4-11 read."""
    wide = bool(tables.cr4 & CR4_PAE)
    size, table = (8, tables.cr3) if wide else (4, tables.cr3)
    writable = user = executable = True
    shifts = LEVELS[tables]
    for depth, shift in enumerate(shifts):
        index_bits = 10 if not wide else 2 if shift == 30 and len(shifts) == 3 else 9
        at = table + (vaddr >> shift) % (1 << index_bits) * size
        entry = int.from_bytes(RAM.read(at, size), "little")
        if not entry & PRESENT:
            return None
        pointer = shift == 30 and len(shifts) == 3  # a PDPTE of PAE paging has no rights and no size bit
        if not pointer:
            writable &= bool(entry & WRITABLE)
            user &= bool(entry & USER)
            executable &= not (entry & NX and tables.efer & EFER_NXE)
        last = depth == len(shifts) - 1
        may_be_large = not pointer and shift != 39 and (wide or bool(tables.cr4 & CR4_PSE))
        if last or (may_be_large and entry & LARGE):
            frame = entry & 0x000FFFFFFFFFF000
            if not wide and not last:
                frame = (entry & 0xFFC00000) | ((entry >> 13) & 0xFF) << 32
            offset = (1 << shift) - 1
            return (frame & ~offset) | (vaddr & offset), writable, user, executable
        table = entry & 0x000FFFFFFFFFF000
    raise AssertionError("the last level always answers")


entries = st.builds(
    lambda page, flags, high: page << 12 | flags | high,
    st.integers(0, TABLE_PAGES - 1),
    st.sampled_from([0, 1, 3, 5, 7, 7, 7, 7, 0x87, 0x83, 0x27]),
    st.sampled_from([0, 0, NX]),
)


@given(
    tables=st.sampled_from(list(LEVELS)),
    rows=st.lists(st.lists(entries, min_size=4, max_size=4), min_size=TABLE_PAGES, max_size=TABLE_PAGES),
    indices=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    offset=st.integers(0, 4095),
)
def test_walk_agrees_with_the_manual(tables: Tables, rows: list[list[int]], indices: list[int], offset: int) -> None:
    """Any tables in eight pages, four entries used in each: address, rights and absence are the model's."""
    wide = bool(tables.cr4 & CR4_PAE)
    size = 8 if wide else 4
    for page, row in enumerate(rows):
        data = b"".join((entry & ((1 << 8 * size) - 1)).to_bytes(size, "little") for entry in row)
        RAM.write(page << 12, data)
    shifts = LEVELS[tables]
    vaddr = offset | sum(index << shift for index, shift in zip(indices, shifts, strict=False))
    page_found = walk(RAM, tables, vaddr)
    found = None
    if page_found is not None:
        found = (page_found.paddr, page_found.writable, page_found.user, page_found.executable)
    assert found == model(tables, vaddr)


def test_unpaged_addresses_are_physical_and_32_bits_wide() -> None:
    page = walk(RAM, Tables(0, 0, 0, 0), 0x1_0000_1234)
    assert page is not None
    assert (page.paddr, page.writable, page.user, page.executable) == (0x1234, True, True, True)


@pytest.mark.parametrize(("vaddr", "expected"), [(0x7FFF_FFFF_FFFF, True), (0x8000_0000_0000, False)])
def test_addresses_that_are_not_canonical_map_nothing(vaddr: int, expected: bool) -> None:
    """Bits 63 to 47 must be equal; both halves of an otherwise same walk are told apart."""
    assert canonical(vaddr) is expected
    assert canonical(~vaddr & 0xFFFF_FFFF_FFFF_FFFF) is expected
    RAM.write(0, b"\x07".ljust(8, b"\0") * 512)
    page = walk(RAM, LONG, vaddr & ~0xFFF)
    assert (page is not None) is expected


def test_tables_outside_ram_map_nothing() -> None:
    """CR3 or an entry that points past the end of RAM: no page, no error of ours."""
    for tables in LEVELS:
        beyond = Tables(tables.cr0, 0xFFFF_F000, tables.cr4, tables.efer)
        assert walk(RAM, beyond, 0x1234) is None
        RAM.write(0, (0xFFFF_F007).to_bytes(8, "little"))
        assert walk(RAM, tables, 0x1234) is None


@pytest.mark.parametrize(
    ("flags", "write", "user", "wp", "code"),
    [
        (0, False, False, True, 0),  # not there
        (0, True, True, True, 2 | 4),
        (PRESENT, False, False, True, None),
        (PRESENT, False, True, True, 1 | 4),  # the kernel's page
        (PRESENT, True, False, True, 1 | 2),  # read-only, CR0.WP
        (PRESENT, True, False, False, None),  # read-only, WP clear
        (PRESENT | USER, True, True, False, 1 | 2 | 4),  # WP is nothing to ring 3
        (PRESENT | WRITABLE, True, False, True, None),
        (PRESENT | WRITABLE | USER, True, True, True, None),
    ],
)
def test_error_code_of_an_access(flags: int, write: bool, user: bool, wp: bool, code: int | None) -> None:
    """SDM vol. 3, 4.6.1 and 4.7."""
    RAM.write(0, (0x1007).to_bytes(4, "little"))
    RAM.write(0x1000, flags.to_bytes(4, "little"))
    assert fault_code(walk(RAM, LEGACY, 0), write=write, user=user, wp=wp) == code


@pytest.mark.parametrize("tables", LEVELS)
def test_entry_that_ends_a_walk_is_told(tables: Tables) -> None:
    """At each level: who waits for a page to be mapped must look at the entry that is not there."""
    for missing in range(len(LEVELS[tables])):
        for page in range(4):
            RAM.write(page << 12, ((page + 1) << 12 | 7 * (page != missing)).to_bytes(8, "little"))
        assert entry_addresses(RAM, tables, 0) == [page << 12 for page in range(missing + 1)]


@pytest.mark.parametrize(("write", "bits"), [(False, ACCESSED), (True, ACCESSED | DIRTY)])
def test_touch_sets_the_bits_of_the_leaf(write: bool, bits: int) -> None:
    """In both entry sizes, and nothing else in the entry."""
    for tables, size in ((LEGACY, 4), (PAE, 8)):
        for page in range(4):
            RAM.write(page << 12, ((page + 1) << 12 | 7).to_bytes(8, "little"))
        found = walk(RAM, tables, 0)
        assert found is not None
        leaf = RAM.read(found.entry, size)
        touch(RAM, found, write)
        assert int.from_bytes(RAM.read(found.entry, size), "little") == int.from_bytes(leaf, "little") | bits
