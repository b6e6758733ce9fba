"""Guest memory as a debugger reads and writes it: across pages, all or nothing, never a byte that is not there."""

from __future__ import annotations

import pytest

from emu.iface import MachineError, MemoryFault
from emu.ram import MAX_SIZE, Ram
from emu.stops import Halted
from tests.support.tiny import DATA, MEMORY, NX, UNMAPPED, Tiny

PAGE = 0x1000


@pytest.fixture(params=[32, 64])
def guest(request: pytest.FixtureRequest) -> Tiny:
    return Tiny(request.param, "hlt")


def test_read_and_write_cross_pages_that_lie_apart(guest: Tiny) -> None:
    """Two neighbouring virtual pages, far apart and in reverse order in RAM."""
    guest.map(0x100000, 0xB0007)
    guest.map(0x101000, 0xA0007)
    memory = guest.machine.memory
    memory.write(0x100FFC, b"abcdefgh")
    assert memory.read(0x100FFC, 8) == b"abcdefgh"
    assert memory.read_physical(0xB0FFC, 4) == b"abcd"
    assert memory.read_physical(0xA0000, 4) == b"efgh"


@pytest.mark.parametrize("access", ["read", "write"])
def test_fault_names_the_first_address_without_a_byte(guest: Tiny, access: str) -> None:
    """Whatever was before it; nothing of a write has happened."""
    guest.map(DATA + PAGE, 0)
    memory = guest.machine.memory
    before = guest.machine.ram.sha256()
    with pytest.raises(MemoryFault) as caught:
        memory.read(DATA + PAGE - 3, 5000) if access == "read" else memory.write(DATA + PAGE - 3, bytes(5000))
    assert (caught.value.address, caught.value.access) == (DATA + PAGE, access)
    assert guest.machine.ram.sha256() == before


def test_debugger_reads_and_writes_what_ring_3_may_not(guest: Tiny) -> None:
    """A supervisor page, read-only: from ring 3 as well."""
    guest.map(DATA, DATA | 1)
    guest.enter_ring3()
    guest.machine.memory.write(DATA, b"x")
    assert guest.machine.memory.read(DATA, 1) == b"x"


def test_page_that_is_not_executable_can_be_written() -> None:
    guest = Tiny(64, "hlt")
    guest.map(DATA, NX | DATA | 7)
    guest.machine.memory.write(DATA, b"data")
    assert guest.machine.memory.read(DATA, 4) == b"data"


def test_page_beyond_ram_has_no_bytes(guest: Tiny) -> None:
    """Mapped to where devices or nothing would be: a fault, no zeros and none of our own memory behind RAM."""
    guest.map(DATA, MEMORY | 7)
    with pytest.raises(MemoryFault):
        guest.machine.memory.read(DATA, 1)
    assert guest.machine.memory.translate(DATA) is None


@pytest.mark.parametrize("paddr", [MEMORY, MEMORY - 1, -1])
def test_physical_access_outside_ram_is_a_fault(guest: Tiny, paddr: int) -> None:
    with pytest.raises(MemoryFault):
        guest.machine.memory.read_physical(paddr, 2)
    with pytest.raises(MemoryFault):
        guest.machine.memory.write_physical(paddr, b"ab")


def test_translate_is_none_where_nothing_is_mapped(guest: Tiny) -> None:
    assert guest.machine.memory.translate(UNMAPPED) is None
    assert guest.machine.memory.translate(DATA + 5) == DATA + 5


def test_nothing_is_read_from_anywhere(guest: Tiny) -> None:
    """Zero bytes are there, even where nothing is mapped."""
    assert guest.machine.memory.read(UNMAPPED, 0) == b""


def test_written_code_is_what_runs_next(guest: Tiny) -> None:
    """A block already translated is dropped when a debugger writes into it."""
    guest = Tiny(guest.bits, "again: inc ebx; jmp again")
    guest.run(10)
    at = guest.machine.cpu.pc
    guest.machine.memory.write(at, b"\xf4")
    stop = guest.run(10)
    assert isinstance(stop, Halted)
    assert (stop.pc, guest.machine.cpu.gpr[3]) == (at + 1, 5)


@pytest.mark.parametrize("size", [0, 1 << 20, (4 << 20) + 1, MAX_SIZE + (2 << 20)])
def test_impossible_memory_size_is_refused(size: int) -> None:
    with pytest.raises(MachineError, match="is not possible: a multiple of 2 MiB, 2 to 3072 MiB"):
        Ram(size)
