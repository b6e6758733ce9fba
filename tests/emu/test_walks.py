"""Remembered page walks are those that would be made now, whatever the guest has done to its tables since."""

from __future__ import annotations

import struct

import pytest

from emu.machine import Machine
from emu.walks import Walks
from tests.support.trapping import CODE, MEMORY, trapping_image

SPARE = 0x80000  # 4 pages that nobody uses


@pytest.fixture
def machine() -> Machine:
    made = Machine(MEMORY)
    made.power_on(trapping_image(b"\xeb\xfe", 0, ring=0))
    made.run(50)
    return made


@pytest.mark.parametrize("level", range(4))
def test_a_changed_entry_is_followed(machine: Machine, level: int):
    """Of each level: it leads to a copy of the next table, whose last entry leads to another page."""
    walks, tables = Walks(machine.ram, machine.cpu), machine.cpu.cr3
    assert walks.locate(CODE + 5) == CODE + 5
    for table in range(level + 1, 4):
        machine.ram.write(SPARE + 0x1000 * table, machine.ram.read(tables + 0x1000 * table, 0x1000))
        if table > level + 1:
            machine.ram.write(SPARE + 0x1000 * (table - 1), struct.pack("<Q", SPARE + 0x1000 * table | 7))
    leaf = tables + 0x3000 if level == 3 else SPARE + 0x3000
    machine.ram.write(leaf + 8 * (CODE >> 12), struct.pack("<Q", 0x123000 | 7))
    if level < 3:
        machine.ram.write(tables + 0x1000 * level, struct.pack("<Q", SPARE + 0x1000 * (level + 1) | 7))
    assert walks.locate(CODE + 5) == 0x123005


def test_a_page_taken_away_is_gone(machine: Machine):
    """And back again when its entry is."""
    walks, entry = Walks(machine.ram, machine.cpu), machine.cpu.cr3 + 0x3000 + 8 * (CODE >> 12)
    kept = machine.ram.read(entry, 8)
    assert walks.locate(CODE) == CODE
    machine.ram.write(entry, bytes(8))
    assert walks.locate(CODE) is None
    machine.ram.write(entry, kept)
    assert walks.locate(CODE) == CODE


def test_a_root_out_of_ram_leads_nowhere(machine: Machine):
    """CR3 is the guest's to load with anything; so are the modes."""
    walks = Walks(machine.ram, machine.cpu)
    assert walks.locate(CODE) == CODE
    machine.cpu.set_cr(3, 0x7FFF_F000)
    assert walks.locate(CODE) is None
    machine.cpu.set_cr(0, machine.cpu.cr(0) & ~(1 << 31))
    assert walks.locate(CODE) == CODE


def test_a_trail_over_several_addresses_holds_until_one_of_them_moves(machine: Machine):
    """As for an armed byte and the slot it leads to."""
    walks, entry = Walks(machine.ram, machine.cpu), machine.cpu.cr3 + 0x3000 + 8 * (CODE >> 12)
    trail = walks.trail(CODE, 0x30000)
    assert trail is not None
    assert walks.holds(trail)
    machine.ram.write(SPARE, machine.ram.read(machine.cpu.cr3, 0x1000))
    machine.cpu.set_cr(3, SPARE)
    assert walks.holds(trail)  # another root, the same entries
    machine.ram.write(entry, struct.pack("<Q", 0x123000 | 7))
    assert not walks.holds(trail)
    assert walks.trail(CODE, 0x100000) is None  # the absent page
