"""Exceptions that a debugger catches: before the guest's handler, once each, and nothing changes by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from emu import boot_embedded
from emu.boot import GuestMachine
from emu.snapshot import Snapshot
from emu.stops import Breakpoint, ExceptionRaised, Halted, Step, Stop, TripleFault
from tests.support.tiny import CODE, DATA, FLAGS_TF, HANDLERS, STACK, UNMAPPED, Tiny

EVERY = frozenset(range(32))


@pytest.fixture(params=[32, 64])
def bits(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


def run(machine: GuestMachine, budget: int = 100_000) -> tuple[list[ExceptionRaised], Stop]:
    found = []
    while isinstance(stop := machine.run(budget), ExceptionRaised):
        found.append(stop)
    return found, stop


def facts(machine: GuestMachine) -> tuple[object, ...]:
    return (machine.instructions, machine.clock.now_ns, machine.ram_sha256(), machine.cpu.linear_pc, machine.cpu.cr(2))


FAULTS = {
    "divide": ("xor ecx, ecx; div ecx; hlt", 0, 2, None, None),
    "breakpoint": ("nop; int3; hlt", 3, 1, None, None),
    "undefined": ("nop; ud2; hlt", 6, 1, None, None),
    "protection": ("mov eax, 0x1234; mov ds, eax; hlt", 13, 5, 0x1234, None),
    "page": (f"mov xax, {UNMAPPED}; mov [xax + 8], ecx; hlt", 14, None, 2, UNMAPPED + 8),
    "jump": (f"mov xax, {UNMAPPED}; jmp xax; hlt", 14, None, 0, UNMAPPED),
    "gate": ("nop; int 0x21; hlt", 13, 1, 0x21 * 8 + 2, None),
    "vex": ("nop; vzeroupper; hlt", 6, 1, None, None),
}


@pytest.mark.parametrize("name", sorted(FAULTS.keys() - {"gate"}))
def test_a_snapshot_of_a_caught_exception_has_it(bits: int, name: str, tmp_path: Path) -> None:
    """Going on from it, by way of a file or not, is going on from the stop: the faulting instruction counts once."""
    guest, other = Tiny(bits, FAULTS[name][0]), Tiny(bits, FAULTS[name][0])
    guest.machine.catch_exceptions(EVERY)
    stop = guest.run()
    assert isinstance(stop, ExceptionRaised), stop
    snapshot = guest.machine.snapshot()
    assert isinstance(guest.run(), Halted | TripleFault | ExceptionRaised)
    bare = facts(guest.machine)
    snapshot.save(tmp_path / "s")
    for kept in (snapshot, Snapshot.open(tmp_path / "s")):
        other.machine.restore(kept)
        other.machine.catch_exceptions(EVERY)
        other.run()
        assert facts(other.machine) == bare


@pytest.mark.parametrize("name", FAULTS)
def test_an_exception_stops_at_its_instruction_and_is_then_delivered(bits: int, name: str):
    """With its error code and address, nothing pushed yet; going on, the guest is the bare one in every detail."""
    source, vector, offset, code, address = FAULTS[name]
    guest, bare = Tiny(bits, source), Tiny(bits, source)
    for each in (guest, bare):
        each.gate(0x21, 0x0E, dpl=3)
        if name == "gate":
            each.gate(0x21, 0x05)  # a task gate or none: #GP in 64-bit code
        each.machine.catch_exceptions(EVERY if each is guest else frozenset())
    stop = guest.run()
    assert isinstance(stop, ExceptionRaised), stop
    if name != "gate":
        assert (stop.vector, stop.code, stop.address) == (vector, code, address)
    assert stop.pc == guest.machine.cpu.linear_pc
    if offset is not None:
        assert stop.pc == CODE + offset
    assert guest.stack == STACK
    found, end = run(guest.machine)
    assert (end, facts(guest.machine)) == (bare.run(), facts(bare.machine))
    assert isinstance(end, Halted) == (not found)


def test_only_what_is_caught_stops(bits: int):
    guest = Tiny(bits, "ud2; hlt")
    guest.machine.catch_exceptions(EVERY - {6})
    assert isinstance(guest.run(), Halted)


def test_a_step_delivers_what_was_caught(bits: int):
    """As a processor's single step over an instruction that faults: it ends at the handler's first instruction."""
    guest = Tiny(bits, "nop; ud2; hlt", handlers={6: "nop; hlt"})
    guest.machine.catch_exceptions(EVERY)
    assert isinstance(guest.machine.step(), Step)
    assert guest.machine.step() == ExceptionRaised(CODE + 1, 6)
    assert guest.machine.step() == Step(HANDLERS + 16 * 6)
    assert guest.machine.instructions == 2


def test_a_debugger_that_goes_elsewhere_takes_the_exception_back(bits: int):
    """The pc is set behind the instruction: it never happened."""
    guest = Tiny(bits, "ud2; nop; hlt")
    guest.machine.catch_exceptions(EVERY)
    assert isinstance(guest.run(), ExceptionRaised)
    guest.machine.cpu.pc += 2
    assert isinstance(guest.run(), Halted)
    assert guest.machine.cpu.linear_pc == CODE + len(guest.code)


@pytest.mark.parametrize("hardware", [False, True])
def test_a_breakpoint_at_the_instruction_comes_first(bits: int, hardware: bool):
    """And each is told of once."""
    guest = Tiny(bits, "nop; ud2; hlt")
    guest.machine.catch_exceptions(EVERY)
    guest.machine.insert_breakpoint(CODE + 1, hardware)
    assert [guest.run(), guest.run()] == [Breakpoint(CODE + 1, hardware), ExceptionRaised(CODE + 1, 6)]
    assert isinstance(guest.run(), Halted)


def test_the_guests_own_single_step_trap_is_caught_behind_its_instruction(bits: int):
    guest, bare = (Tiny(bits, "nop; nop; hlt", handlers={1: "hlt"}) for _ in range(2))
    for each in (guest, bare):
        each.machine.cpu.eflags |= FLAGS_TF
    guest.machine.catch_exceptions(EVERY)
    assert guest.run() == ExceptionRaised(CODE + 1, 1)
    assert (guest.run(), facts(guest.machine)) == (bare.run(), facts(bare.machine))


def test_a_double_fault_and_what_led_to_it_are_both_caught(bits: int):
    """An undefined instruction whose gate is absent, and the handler of that is absent too."""
    guest = Tiny(bits, "ud2; hlt")
    for vector in (6, 11, 13):
        guest.gate(vector, 0x0E)
    guest.machine.catch_exceptions(EVERY)
    found, _ = run(guest.machine)
    assert [stop.vector for stop in found] == [6, 11, 8]
    assert {stop.pc for stop in found} == {CODE}


def test_a_triple_fault_after_caught_ones(bits: int):
    guest = Tiny(bits, "ud2; hlt")
    for vector in (6, 8, 11, 13):
        guest.gate(vector, 0x0E)
    guest.machine.catch_exceptions(EVERY)
    assert isinstance(run(guest.machine)[1], TripleFault)


def test_caught_exceptions_change_nothing_in_a_kernel(bits: int):
    """Page faults of its programs, int3 and all: told of, and then as ever."""
    append = "calls=1 faults=1 opens=2 traps=2 user=1 exit=5"
    bare, machine = boot_embedded(bits, append), boot_embedded(bits, append)
    machine.catch_exceptions(EVERY)
    found, stop = run(machine, 3_000_000)
    assert {0, 3, 6, 13, 14} <= {exception.vector for exception in found}
    assert (bare.run(3_000_000), facts(bare)) == (stop, facts(machine))


def test_restoring_forgets_what_was_caught(bits: int):
    machine = Tiny(bits, f"mov xax, {DATA}; ud2; hlt").machine
    start = machine.snapshot()
    machine.catch_exceptions(EVERY)
    first = machine.run()
    machine.restore(start)
    assert machine.run() == first
