"""Breakpoints with conditions, and following the guest instruction by instruction, on the embedded guest."""

from __future__ import annotations

import pytest

from emu.breakpoints import FEW_HOOKS
from emu.machine import Machine
from emu.stops import Breakpoint, Budget, Interrupted
from tests.support.embedded import Guest, power_on

BOOT = 60_000  # instructions until it idles; it then calls `schedule` every 120


@pytest.fixture(params=[64, 32])
def machine(request: pytest.FixtureRequest) -> Machine:
    """At work, past its boot."""
    machine = power_on(request.param)
    assert machine.run(BOOT) == Budget(machine.instructions)
    return machine


def busy(machine: Machine) -> int:
    """The address of a function that the guest calls often."""
    return Guest(machine, machine.bits).address("schedule")


def test_a_false_condition_never_stops(machine: Machine):
    """It is asked at each hit, and the guest goes exactly as far as it would without."""
    asked = 0

    def condition() -> bool:
        nonlocal asked
        assert machine.registers.read(machine.registers.arch.pc) == busy(machine)
        asked += 1
        return False

    calls = Guest(machine, machine.bits).counters["schedule"]
    start = machine.instructions
    machine.insert_breakpoint(busy(machine), condition=condition)
    assert machine.run(BOOT) == Budget(start + BOOT)
    assert asked == Guest(machine, machine.bits).counters["schedule"] - calls > 1


def test_the_guest_sees_no_difference(machine: Machine):
    """Memory after a run under a condition is that of a run without one."""
    bare = power_on(machine.bits)
    bare.run(BOOT)
    bare.run(BOOT)
    machine.insert_breakpoint(busy(machine), condition=lambda: False)
    machine.run(BOOT)
    assert machine.ram_sha256() == bare.ram_sha256()


def test_a_condition_that_becomes_true_stops(machine: Machine):
    """At the hit where it does, once for each."""
    hits = iter([False, False, True, True])
    machine.insert_breakpoint(busy(machine), condition=lambda: next(hits))
    calls = Guest(machine, machine.bits).counters["schedule"]
    assert machine.run(10 * BOOT) == Breakpoint(busy(machine))
    assert Guest(machine, machine.bits).counters["schedule"] - calls == 2
    assert machine.run(10 * BOOT) == Breakpoint(busy(machine))
    assert Guest(machine, machine.bits).counters["schedule"] - calls == 3


def test_the_last_condition_counts(machine: Machine):
    """None takes one away; removing the breakpoint does too."""
    machine.insert_breakpoint(busy(machine), condition=lambda: False)
    machine.insert_breakpoint(busy(machine))
    assert machine.run(BOOT) == Breakpoint(busy(machine))
    machine.insert_breakpoint(busy(machine), condition=lambda: False)
    machine.remove_breakpoint(busy(machine))
    machine.insert_breakpoint(busy(machine))
    assert machine.run(BOOT) == Breakpoint(busy(machine))


def test_many_conditions_work_as_few_do(machine: Machine):
    """Beyond the number that is armed without touching memory."""
    hits = set()
    places = [symbol.address for symbol in machine.symbols.glob("sys_*")][: FEW_HOOKS + 4]
    for place in [*places, busy(machine)]:
        machine.insert_breakpoint(place, condition=lambda place=place: hits.add(place) is not None)
    start = machine.instructions
    assert machine.run(BOOT) == Budget(start + BOOT)
    assert busy(machine) in hits


def test_following_sees_each_instruction(machine: Machine):
    """From the instruction with the breakpoint on, as stepping by hand sees them; then the guest runs on."""
    machine.insert_breakpoint(busy(machine))
    machine.run(BOOT)
    snapshot = machine.snapshot()
    expected = []
    for _ in range(20):
        machine.step()
        expected.append((machine.cpu.pc, machine.instructions))
    machine.restore(snapshot)
    seen = []

    def look() -> bool:
        seen.append((machine.cpu.pc, machine.instructions))
        return len(seen) < 20

    machine.remove_breakpoint(busy(machine))
    machine.follow(look)
    assert machine.run(1000) == Budget(snapshot.state["instructions"] + 1000)
    assert seen == expected


def test_a_run_full_of_hits_ends_soon_when_asked(machine: Machine):
    """At the next hit, not at the end of the slice."""
    asked = 0

    def condition() -> bool:
        nonlocal asked
        asked += 1
        machine.request_stop()
        return False

    machine.insert_breakpoint(busy(machine), condition=condition)
    assert isinstance(machine.run(BOOT), Interrupted)
    assert asked <= 2
