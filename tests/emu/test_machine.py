"""Every stop as a value, exact time, and debugging that the guest cannot notice; on the embedded guest."""

from __future__ import annotations

import random
import threading

import pytest

from emu import GuestMachine, boot_embedded
from emu.stops import (
    Breakpoint,
    Budget,
    ConsoleMatch,
    Defect,
    GuestExit,
    Halted,
    Interrupted,
    PowerOff,
    Reset,
    Step,
    Stop,
    TripleFault,
)
from tests.support.tiny import HANDLERS, Tiny

WORKLOAD = "calls=2 sleep=2 faults=1 opens=3 traps=1 user=1 exit=5"
ENOUGH = 2_000_000


@pytest.fixture(params=[32, 64])
def bits(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


def state(machine: GuestMachine) -> tuple[object, ...]:
    """What two equal machines share."""
    return (machine.instructions, machine.clock.now_ns, machine.ram_sha256(), machine.console.text)


# --------------------------------------------------------------------------------------------------------------- stops


@pytest.mark.parametrize(
    ("append", "expected"), [("exit=3", GuestExit(3)), ("reset", Reset()), ("poweroff", PowerOff())]
)
def test_guest_that_ends_the_machine_is_a_stop(bits: int, append: str, expected: Stop) -> None:
    assert boot_embedded(bits, append).run(ENOUGH) == expected


def test_guest_that_can_never_wake_is_a_stop(bits: int) -> None:
    stop = boot_embedded(bits, "halt").run(ENOUGH)
    assert isinstance(stop, Halted)
    assert "interrupts off" in stop.reason


def test_triple_fault_is_a_stop_with_its_facts(bits: int) -> None:
    machine = boot_embedded(bits, "triple")
    stop = machine.run(ENOUGH)
    assert isinstance(stop, TripleFault)
    assert machine.memory.read(stop.pc, 2) == b"\x0f\x0b"
    assert stop.vector == 6


def test_console_match_ends_the_run_at_that_byte(bits: int) -> None:
    """The line is not even complete."""
    machine = boot_embedded(bits, "idle")
    machine.console.expect("embedded: rea", lambda match: ConsoleMatch(match.string))
    assert machine.run(ENOUGH) == ConsoleMatch("embedded: rea")
    assert machine.console.text.endswith("embedded: rea")


def test_script_reads_writes_and_stops(bits: int) -> None:
    """By the machine's own methods: what was written is read back, and a stop asked for ends the next run."""
    machine = boot_embedded(bits, WORKLOAD)
    machine.run(50_000)
    (symbol,) = machine.symbols.lookup("count_target")
    machine.write(symbol.address, b"\x12\x34")
    assert machine.read(symbol.address, 2) == b"\x12\x34"
    machine.stop()
    assert isinstance(machine.run(ENOUGH), Interrupted)


def test_stop_asked_for_before_the_run_ends_it_at_once(bits: int) -> None:
    machine = boot_embedded(bits, "loop")
    machine.run(10_000)
    machine.request_stop()
    assert machine.run() == Interrupted(machine.cpu.linear_pc)
    assert machine.instructions == 10_000


def test_stop_asked_for_can_be_taken_back(bits: int) -> None:
    machine = boot_embedded(bits, "loop")
    machine.request_stop()
    machine.cancel_stop()
    assert machine.run(10) == Budget(10)


def test_device_that_fails_is_a_defect_with_its_traceback(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of ours in a hook ends the run as a value; nothing is raised."""
    machine = boot_embedded(bits, "exit=0")

    def broken(port: int, size: int, value: int) -> None:
        raise ZeroDivisionError("a device's mistake")

    monkeypatch.setattr(machine.devices.bus, "write", broken)
    stop = machine.run(ENOUGH)
    assert isinstance(stop, Defect)
    assert "ZeroDivisionError: a device's mistake" in stop.report
    assert "Traceback" in stop.report


@pytest.mark.parametrize("go", ["run", "step"])
def test_timer_that_fails_is_a_defect(bits: int, go: str) -> None:
    """So is one outside the engine's hooks."""
    machine = boot_embedded(bits, "loop")
    machine.run(5_000)

    def broken() -> None:
        raise ZeroDivisionError("a timer's mistake")

    machine.clock.schedule(machine.clock.now_ns, broken)
    stop = machine.run(100) if go == "run" else machine.step()
    assert isinstance(stop, Defect)
    assert "a timer's mistake" in stop.report


@pytest.mark.parametrize("target", [0x8000_0000, 0xFFFF_F000])
def test_code_where_no_memory_is_is_undefined(bits: int, target: int) -> None:
    """A jump to a page mapped beyond RAM: nothing answers the fetch, and all ones are no instruction."""
    guest = Tiny(bits, "mov eax, 0x90000; jmp xax")
    guest.map(0x90000, target | 7)
    frame = guest.trap()
    assert (frame.vector, frame.pc) == (6, 0x90000)


# -------------------------------------------------------------------------------------------------- time, determinism


def test_two_runs_are_the_same_to_the_instruction(bits: int) -> None:
    """At the same console line, and at the end."""
    seen = []
    for _ in range(2):
        machine = boot_embedded(bits, WORKLOAD)
        machine.console.expect("ready", lambda match: ConsoleMatch(match.string))
        machine.run(ENOUGH)
        at_line = state(machine)
        machine.run(ENOUGH)
        seen.append((at_line, state(machine)))
    assert seen[0] == seen[1]


def test_splitting_a_run_changes_nothing(bits: int) -> None:
    whole, split = boot_embedded(bits, WORKLOAD), boot_embedded(bits, WORKLOAD)
    assert whole.run(ENOUGH) == GuestExit(5)
    chance, stop = random.Random(1), None
    while not isinstance(stop, GuestExit):
        stop = split.run(chance.randrange(1, 400))
    assert state(split) == state(whole)


def test_run_ends_after_exactly_its_budget(bits: int) -> None:
    machine = boot_embedded(bits, "loop")
    for budget in (1, 2, 77, 1_000, 4_321):
        before = machine.instructions
        assert machine.run(budget) == Budget(before + budget)
    assert machine.run(0) == Budget(machine.instructions)


def test_timer_fires_at_its_instruction(bits: int) -> None:
    """The clock says so inside the callback, before and after the guest slept."""
    machine = boot_embedded(bits, "loop")
    fired: list[int] = []
    for at in (1_000, 1_001, 7_777, 50_000):
        machine.clock.schedule(at, lambda: fired.append(machine.clock.now_ns))
    machine.run(60_000)
    assert fired == [1_000, 1_001, 7_777, 50_000]


# --------------------------------------------------------------------------------------------------- neutral debugging


def test_two_hundred_interruptions_change_nothing(bits: int) -> None:
    """Ctrl-C from another thread at scattered moments: the end is the bare run's."""
    bare = boot_embedded(bits, f"loop {WORKLOAD}")
    bare.run(1_500_000)
    machine = boot_embedded(bits, f"loop {WORKLOAD}")
    chance, interrupted = random.Random(2), 0
    for _ in range(200):
        stopper = threading.Timer(chance.uniform(0, 0.0005), machine.request_stop)
        stopper.start()
        stop = machine.run(chance.randrange(1, 7_000))
        stopper.join()
        interrupted += isinstance(stop, Interrupted)
        machine.cancel_stop()
    assert interrupted > 0
    machine.run(1_500_000 - machine.instructions)
    assert state(machine) == state(bare)


def test_steps_breakpoints_and_detaching_change_nothing(bits: int) -> None:
    """Hundreds of steps, breakpoints of both kinds at the pc and elsewhere, all taken away again."""
    bare, machine = boot_embedded(bits, WORKLOAD), boot_embedded(bits, WORKLOAD)
    assert bare.run(ENOUGH) == GuestExit(5)
    total, chance, steps = bare.instructions, random.Random(3), 0
    while machine.instructions < total - 200:
        left = total - 100 - machine.instructions
        if chance.random() < 0.4:
            for _ in range(chance.randrange(1, 20)):
                steps += machine.step() == Step(machine.cpu.linear_pc)
        elif chance.random() < 0.5:
            machine.run(min(left, chance.randrange(1, 600)))
        else:
            at, hardware = machine.cpu.linear_pc, chance.random() < 0.3
            machine.insert_breakpoint(at, hardware)
            machine.run(min(left, chance.randrange(1, 600)))
            machine.remove_breakpoint(at, hardware)
    assert steps > 100
    assert machine.run(ENOUGH) == GuestExit(5)
    assert state(machine) == state(bare)


def interruptible(bits: int, end: str = "") -> Tiny:
    """Twenty `inc ebx` with interrupts on, two of them done; IRQ 0's handler counts in EDI and returns, or does `end`
    instead."""
    end = end or ("iretq" if bits == 64 else "iretd")
    handler = f"inc edi; push xax; mov al, 0x20; out 0x20, al; pop xax; {end}"
    source = "pushfx; or WORD ptr [xsp], 0x200; popfx" + "; inc ebx" * 20
    guest = Tiny(bits, source, handlers={0x20: handler})
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xFE)):
        guest.machine.devices.bus.write(port, 1, value)
    guest.run(5)
    return guest


def test_step_takes_an_interrupt_that_is_due_first(bits: int) -> None:
    """The handler runs to its end, then the one instruction: a step never lands in a handler."""
    guest = interruptible(bits)
    machine, before = guest.machine, guest.machine.cpu.linear_pc
    machine.clock.schedule(machine.clock.now_ns, lambda: machine.devices.pic.set_irq(0, True))
    assert machine.step() == Step(before + (1 if bits == 32 else 2))
    assert (machine.cpu.gpr[7], machine.cpu.gpr[3]) == (1, 3)


def test_step_ends_though_its_interrupt_never_returns(bits: int) -> None:
    """An idle task is left for good by the tick that wakes another one: the step ends there, and says so."""
    guest = interruptible(bits, "here: jmp here")
    machine, before = guest.machine, guest.machine.cpu.linear_pc
    machine.clock.schedule(machine.clock.now_ns, lambda: machine.devices.pic.set_irq(0, True))
    assert machine.step() == Step(machine.cpu.linear_pc, left=before)
    assert machine.cpu.linear_pc != before
    assert machine.cpu.gpr[3] == 2, "the instruction was not executed"
    assert machine.step() == Step(machine.cpu.linear_pc), "what follows is stepped as ever"


def test_breakpoint_inside_a_handler_is_reported_by_a_step(bits: int) -> None:
    """Stepping runs the due handler, and a breakpoint in it stops there."""
    guest = interruptible(bits)
    guest.machine.clock.schedule(guest.machine.clock.now_ns, lambda: guest.machine.devices.pic.set_irq(0, True))
    guest.machine.insert_breakpoint(HANDLERS + 16 * 0x20)
    assert guest.machine.step() == Breakpoint(HANDLERS + 16 * 0x20)
