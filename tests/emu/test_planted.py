"""Int3s planted in the guest's memory: met by every mapping, run at their own place, shown to the guest alone."""

from __future__ import annotations

import pytest

from emu.stops import Breakpoint, Budget, Halted
from tests.support.breaks import after, go_back, planted
from tests.support.tiny import CODE, DATA, ENOUGH, Tiny

BITS = pytest.mark.parametrize("bits", [64, 32])
INT3 = 0xCC


@BITS
@pytest.mark.parametrize("ring", [0, 3])
def test_counts_every_execution_in_the_guest_s_own_time(bits: int, ring: int) -> None:
    """A loop with pushf and flags in it: same registers, instruction count and hash of RAM as without."""
    lead = "mov xcx, 100; xor eax, eax"
    loop = "add eax, ecx; pushfx; pop xdx; add eax, edx; pause; dec ecx; jnz "
    start = after(lead, bits)
    results = []
    for probed in (False, True):
        guest = Tiny(bits, f"{lead}; {loop} {start}; int 0x30", ring=ring)
        places = (start, start + 2, start + 6) if probed else ()
        client = planted(guest, *places)
        assert isinstance(guest.machine.run(ENOUGH), Halted)
        machine = guest.machine
        results.append((machine.cpu.gpr[0], machine.clock.instructions, machine.ram_sha256()))
    assert results[0] == results[1]
    assert client.hits == [start, start + 2, start + 6] * 100


@BITS
def test_guest_reads_the_int3_and_a_debugger_its_own_byte(bits: int) -> None:
    guest = Tiny(bits, f"movzx eax, byte ptr [{CODE + 0x100}]; int 0x30")
    machine = guest.machine
    machine.ram.write(CODE + 0x100, b"\x55\x90")
    planted(guest, CODE + 0x100)
    assert isinstance(guest.run(), Halted)
    assert machine.cpu.gpr[0] == INT3
    assert machine.memory.read(CODE + 0x100, 2) == b"\x55\x90"
    machine.memory.write(CODE + 0x100, b"\x56\x91")  # a debugger's write goes under it
    assert (machine.ram.map[CODE + 0x100], machine.memory.read(CODE + 0x100, 2)) == (INT3, b"\x56\x91")
    machine.planted.remove(CODE + 0x100)
    assert machine.ram.map[CODE + 0x100] == 0x56


@BITS
def test_every_mapping_of_the_page_meets_it(bits: int) -> None:
    """One frame at two addresses and only the byte planted: calls through either are hits, at their own addresses."""
    first, second, frame = CODE + 0x3000, CODE + 0x4000, CODE + 0x5000
    guest = Tiny(bits, f"mov xax, {first}; call xax; mov xax, {second}; call xax; int 0x30", ring=3)
    guest.machine.ram.write(frame, b"\x90\xc3")
    for address in (first, second):
        guest.map(address, frame | 7)
    client = planted(guest, frame)
    assert guest.trap().vector == 13
    assert client.hits == [first, second]


@BITS
def test_planted_under_code_that_has_run_and_removed_again(bits: int) -> None:
    guest = Tiny(bits, f"inc eax; jmp {CODE}", ring=3)
    machine = guest.machine
    machine.run(100)
    client = planted(guest, CODE)
    machine.run(100)
    assert len(client.hits) == 50
    machine.planted.remove(CODE)
    machine.run(100)
    assert (len(client.hits), machine.cpu.gpr[0], machine.clock.instructions) == (50, 150, 300)


@BITS
def test_instruction_whose_end_lies_on_a_page_that_is_not_there(bits: int) -> None:
    """The int3 is on the last byte of a page: #PF names the next page, the int3 stands meanwhile, one hit a pass."""
    page = CODE + 0x4000
    guest = Tiny(bits, f"mov xax, {page - 1}; call xax; call xax; int 0x30", ring=3)
    guest.machine.ram.write(page - 1, b"\xb9\x44\x33\x22\x11\xc3")  # mov ecx, 0x11223344; ret
    guest.map(page, 0)
    client = planted(guest, page - 1)
    frame = guest.trap()
    assert (frame.vector, frame.pc, guest.machine.cpu.cr(2), client.hits) == (14, page - 1, page, [page - 1])
    assert guest.machine.ram.map[page - 1] == INT3
    guest.map(page, page | 7)
    go_back(guest)
    assert guest.trap().vector == 13
    assert (guest.machine.cpu.gpr[1], client.hits) == (0x11223344, [page - 1] * 2)


def test_rip_relative_operand_is_the_instruction_s_own() -> None:
    guest = Tiny(64, f"mov rax, [rip + {DATA - CODE - 7}]; int 0x30", ring=3)
    guest.machine.ram.write(DATA, (0x1122334455667788).to_bytes(8, "little"))
    client = planted(guest, CODE)
    assert guest.trap().vector == 13
    assert (guest.machine.cpu.gpr[0], client.hits) == (0x1122334455667788, [CODE])


@BITS
@pytest.mark.parametrize("planted_first", [True, False])
def test_debugger_s_breakpoint_on_the_same_byte(bits: int, planted_first: bool) -> None:
    """Each is told once an arrival, whoever came first, and either may go first."""
    guest = Tiny(bits, f"inc eax; jmp {CODE}", ring=3)
    machine = guest.machine
    if planted_first:
        client = planted(guest, CODE)
        machine.insert_breakpoint(CODE)
    else:
        machine.insert_breakpoint(CODE)
        assert machine.run(5) == Breakpoint(CODE)
        client = planted(guest, CODE)
        assert isinstance(machine.run(1), Budget)
        client.hits.clear()
    for _ in range(3):
        assert machine.run(100) == Breakpoint(CODE)
    assert len(client.hits) == 3
    if planted_first:
        machine.remove_breakpoint(CODE)
        machine.run(20)
        assert len(client.hits) == 3 + 9
    else:
        machine.planted.remove(CODE)
        assert machine.run(100) == Breakpoint(CODE)
    assert machine.memory.read(CODE, 1) == guest.code[:1]


@BITS
def test_own_int3_under_a_planted_one_is_the_guest_s_trap(bits: int) -> None:
    guest = Tiny(bits, "int3; int 0x30")
    client = planted(guest, CODE)
    frame = guest.trap()
    assert (frame.vector, frame.pc, client.hits) == (3, CODE + 1, [CODE])


@BITS
def test_copy_of_a_planted_page_is_adopted(bits: int) -> None:
    """The guest has copied the page, int3 and all: once adopted the copy's is met too, and gives its byte back."""
    copy = CODE + 0x5000
    guest = Tiny(bits, f"mov xax, {copy}; call xax; int 0x30", ring=3)
    machine = guest.machine
    machine.ram.write(copy, bytes((INT3, 0xC3)))
    client = planted(guest)
    machine.planted.adopt(copy, 0x90)
    assert guest.trap().vector == 13
    assert client.hits == [copy]
    machine.planted.remove(copy)
    assert machine.ram.map[copy] == 0x90


@BITS
def test_restored_machine_has_none(bits: int) -> None:
    """A snapshot is of the guest's own bytes."""
    guest = Tiny(bits, f"inc eax; jmp {CODE}", ring=3)
    client = planted(guest, CODE)
    saved = guest.machine.snapshot()
    guest.machine.restore(saved)
    guest.machine.run(20)
    assert (client.hits, guest.machine.ram.map[CODE]) == ([], guest.code[0])
