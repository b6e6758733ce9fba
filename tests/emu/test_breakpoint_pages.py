"""Breakpoints and the memory under them: when the byte is there, pages that move, address spaces, the guest's int3."""

from __future__ import annotations

import pytest

from emu.boot import GuestMachine, boot_embedded
from emu.stops import Breakpoint, ExceptionRaised, Halted, Step
from tests.support.tiny import CODE, PRESENT, TABLES, USER, WRITABLE, Tiny, assemble

EVERY = PRESENT | WRITABLE | USER
FUNCTION, COPY, OTHER_TABLES = 0x40000, 0x50000, 0x60000
INT3 = 0xCC


@pytest.fixture(params=[32, 64])
def bits(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


def facts(machine: GuestMachine) -> tuple[object, ...]:
    return (machine.instructions, machine.ram_sha256(), machine.cpu.linear_pc, machine.cpu.gpr[1])


def guest_with_function(bits: int, source: str) -> Tiny:
    """`source` may call FUNCTION, which adds 1 to ECX; at COPY there is one that adds 16."""
    guest = Tiny(bits, source)
    guest.machine.ram.write(FUNCTION, assemble("inc ecx; ret", bits, FUNCTION))
    guest.machine.ram.write(COPY, assemble("add ecx, 16; ret", bits, FUNCTION))
    return guest


def test_the_byte_is_written_when_the_guest_is_about_to_run(bits: int):
    """Not when a debugger asks; what it takes out and puts in again at one stop stays where it is."""
    machine = Tiny(bits, "nop; nop; nop; hlt").machine
    machine.insert_breakpoint(CODE + 1)
    assert machine.ram.map[CODE + 1] == 0x90
    assert machine.run() == Breakpoint(CODE + 1)
    assert machine.ram.map[CODE + 1] == INT3
    assert machine.memory.read(CODE, 3) == b"\x90" * 3
    for insert in (False, True, False):
        if insert:
            machine.insert_breakpoint(CODE + 1)
        else:
            machine.remove_breakpoint(CODE + 1)
    assert isinstance(machine.step(), Step)
    assert machine.ram.map[CODE + 1] == 0x90
    assert isinstance(machine.run(), Halted)


def remap(bits: int) -> str:
    """Code that maps COPY where FUNCTION is."""
    leaf = Tiny(bits, "hlt")._leaf_at(FUNCTION)
    return f"mov dword ptr [{leaf}], {COPY | EVERY}; mov xax, {FUNCTION}; invlpg [xax]"


@pytest.mark.parametrize("hardware", [False, True])
def test_a_breakpoint_follows_its_page(bits: int, hardware: bool):
    """Another page comes to stand at the address: the breakpoint is there, and the old page has its byte again."""
    source = f"xor ecx, ecx; mov xbx, {FUNCTION}; call xbx; {remap(bits)}; call xbx; call xbx; hlt"
    guest, bare = guest_with_function(bits, source), guest_with_function(bits, source)
    guest.machine.insert_breakpoint(FUNCTION, hardware)
    seen = []
    while isinstance(stop := guest.run(), Breakpoint):
        assert stop == Breakpoint(FUNCTION, hardware)
        seen.append(guest.machine.cpu.gpr[1])
    assert seen == [0, 1, 17]
    assert guest.machine.ram.map[FUNCTION] != INT3
    assert (stop, facts(guest.machine)) == (bare.run(), facts(bare.machine))


def other_space(guest: Tiny) -> None:
    """At OTHER_TABLES, tables that differ in FUNCTION alone: COPY is there."""
    ram, levels = guest.machine.ram, 4 if guest.bits == 64 else 2
    ram.write(OTHER_TABLES, ram.read(TABLES, 0x1000 * levels))
    for level in range(levels - 1):
        entry = OTHER_TABLES + 0x1000 * (level + 1) | EVERY
        ram.write(OTHER_TABLES + 0x1000 * level, entry.to_bytes(guest.word, "little"))
    leaf = OTHER_TABLES + 0x1000 * (levels - 1) + (FUNCTION >> 12) * guest.word
    ram.write(leaf, (COPY | EVERY).to_bytes(guest.word, "little"))


SPACES = f"""
    xor ecx, ecx; mov xbx, {FUNCTION}; mov xdx, cr3; mov xsi, {OTHER_TABLES}
    call xbx; mov cr3, xsi; call xbx; nop; mov cr3, xdx; call xbx; hlt
"""


def test_a_user_pages_breakpoint_is_of_its_address_space(bits: int):
    """Another program has another page at that address, which is left alone."""
    guest, bare = guest_with_function(bits, SPACES), guest_with_function(bits, SPACES)
    for each in (guest, bare):
        other_space(each)
    guest.machine.insert_breakpoint(FUNCTION)
    seen = []
    while isinstance(stop := guest.run(), Breakpoint):
        seen.append(guest.machine.cpu.gpr[1])
        assert guest.machine.ram.map[COPY] != INT3
    assert seen == [0, 17]
    assert (stop, facts(guest.machine)) == (bare.run(), facts(bare.machine))


def test_a_breakpoint_is_taken_out_from_another_address_space(bits: int):
    """No translation with its int3 is left where it was: the program that runs there would be killed by it."""
    guest, bare = guest_with_function(bits, SPACES), guest_with_function(bits, SPACES)
    for each in (guest, bare):
        other_space(each)
    guest.machine.insert_breakpoint(FUNCTION)
    assert isinstance(guest.run(), Breakpoint)
    while guest.machine.cpu.cr3 != OTHER_TABLES:
        guest.machine.step()
    guest.machine.remove_breakpoint(FUNCTION)
    assert (guest.run(), facts(guest.machine)) == (bare.run(), facts(bare.machine))


@pytest.mark.parametrize("hardware", [False, True])
def test_the_guests_own_int3_under_a_breakpoint(bits: int, hardware: bool):
    """It is told of before, and then the guest's handler has it, as without a breakpoint."""
    source = "nop; int3; nop; hlt"
    guest, bare = (Tiny(bits, source, handlers={3: "iretq" if bits == 64 else "iretd"}) for _ in range(2))
    guest.machine.insert_breakpoint(CODE + 1, hardware)
    assert guest.run() == Breakpoint(CODE + 1, hardware)
    assert guest.machine.memory.read(CODE + 1, 1) == b"\xcc"
    assert (guest.run(), facts(guest.machine)) == (bare.run(), facts(bare.machine))


def test_a_step_over_an_instruction_that_rewrites_its_own_block(bits: int):
    """The engine begins such an instruction anew, which one-instruction runs must see through; it takes one step."""
    target = CODE + 16
    source = f"mov xax, {target}; mov byte ptr [xax], 0x90; inc ecx; inc ecx; inc ecx; inc ecx; inc ecx; hlt"
    guest, bare = Tiny(bits, source), Tiny(bits, source)
    pcs = [guest.machine.cpu.linear_pc]
    while isinstance(guest.machine.step(), Step) and len(pcs) < 20:
        pcs.append(guest.machine.cpu.linear_pc)
    assert pcs == sorted(set(pcs))
    bare.run()
    assert facts(guest.machine)[0:2] == facts(bare.machine)[0:2]


@pytest.mark.parametrize("source", ["jmp here; here: jmp here", "xor ecx, ecx; here: jmp here"])
def test_a_step_over_a_jump_to_itself_is_one_instruction(bits: int, source: str):
    """Which looks alike from outside."""
    machine = Tiny(bits, source).machine
    for count in range(1, 5):
        assert isinstance(machine.step(), Step)
        assert machine.instructions == count


def test_a_hardware_breakpoint_of_the_kernels_is_removed_in_user_mode():
    """Right before a program's call into a page that is not there yet: its fault is the guest's first, not a second."""
    machine, bare = (boot_embedded(64, "opens=2 user=1 exit=5") for _ in range(2))
    place = machine.symbols.lookup("sys_work_done")[0].address
    machine.insert_breakpoint(place, hardware=True)
    assert isinstance(machine.run(3_000_000), Breakpoint)
    machine.catch_exceptions(frozenset({14}))
    while not isinstance(stop := machine.run(3_000_000), ExceptionRaised) or stop.pc != stop.address:
        pass
    assert machine.cpu.cpl == 3
    machine.catch_exceptions(frozenset())
    machine.remove_breakpoint(place, hardware=True)
    assert (machine.run(3_000_000), facts(machine)) == (bare.run(3_000_000), facts(bare))
