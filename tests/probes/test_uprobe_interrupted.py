"""Signals, faults and other tasks in the middle of a probed instruction of a program's, armed either way."""

from __future__ import annotations

import pytest

from probes import Manager, Regs, Uprobe
from tests.support.kernels import another, run_shell
from tests.support.programs import GUESTS, bring, build

INTERRUPTED = ("interrupted.c", "-nostdlib", "-static", "-fno-stack-protector", "-fno-pic", "-no-pie")
ROUNDS = 400
CONTROL_C = b"\x03"


@pytest.mark.parametrize("arm", ["hook", "int3"])
@pytest.mark.parametrize(("kernel", "bits"), GUESTS, indirect=["kernel"])
def test_signals_find_the_program_at_its_own_instructions(kernel: str, bits: int, arm: str) -> None:
    """Ctrl-C is typed between a hit and its instruction, at each of three, whose second faults every 50 rounds: every
    signal's context has an address of the program's and no trap flag, every pass is one hit, the result is right."""
    machine = another(kernel)
    manager = Manager(machine)
    bring(machine, manager.linux, {"/tmp/interrupted": build(*INTERRUPTED, f"-m{bits}")})
    bare = run_shell(machine, "/tmp/interrupted; echo $?")
    assert bare == "interrupted: seldom faulted\n0"

    def interrupt(up: Uprobe, regs: Regs) -> None:
        if up.hits % 97 == 0:
            machine.devices.uart.receive(CONTROL_C)

    probes = [Uprobe("/tmp/interrupted", name, interrupt, arm=arm) for name in ("looked_at", "loads", "jumps")]
    for probe in probes:
        manager.register(probe)
    assert run_shell(machine, "/tmp/interrupted; echo $?").endswith("interrupted: often faulted\n0")
    assert [probe.hits for probe in probes] == [ROUNDS] * 3


@pytest.mark.parametrize("arm", ["hook", "int3"])
def test_two_programs_take_turns_inside_probed_instructions(kernel: str, arm: str) -> None:
    """What is typed at the hits of two wakes the shell, which runs in between: every pass of either is one hit."""
    machine = another(kernel)
    manager = Manager(machine)
    bring(machine, manager.linux, {"/tmp/interrupted": build(*INTERRUPTED, f"-m{machine.guest.bits}")})

    def wake(up: Uprobe, regs: Regs) -> None:
        if up.hits % 50 == 0:
            machine.devices.uart.receive(b" ")

    probes = [Uprobe("/tmp/interrupted", name, wake, arm=arm) for name in ("looked_at", "loads", "jumps")]
    for probe in probes:
        manager.register(probe)
    ran = run_shell(machine, "/tmp/interrupted & /tmp/interrupted & wait; echo over")
    assert ran.count("faulted") == 2
    assert [probe.hits for probe in probes] == [2 * ROUNDS] * 3
