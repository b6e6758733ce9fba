"""Breaks in translated code under every instruction class: the machine ends as the bare one, in pieces, too."""

from __future__ import annotations

from collections import Counter

import pytest

from emu.codebreaks import REPEATED
from emu.iface import Cpu
from emu.machine import Machine
from emu.stops import Stop
from emu.vex import begins_with_vex
from tests.probes.bodies import BODIES
from tests.probes.lockstep import Body, build, cut, executions, finish, place, run_bare

NAMES = [body.name for body in BODIES]
CUT = [body for body in BODIES if body.name.rpartition("_")[0] in ("strings", "frames", "call_register", "ports")]
FAULTING = ("demand_page",)  # those whose repetition `executions` counts


class Counting:
    """A BreakClient that lets everything go on."""

    def __init__(self, machine: Machine, body: Body, offsets: list[int]) -> None:
        self.hits: Counter[int] = Counter()
        machine.breaks.client = self
        for offset in offsets:
            machine.breaks.arm(place(body, offset))

    def stands(self, vaddr: int) -> bool:
        return True

    def on_code_break(self, cpu: Cpu, vaddr: int) -> Stop | None:
        self.hits[vaddr] += 1
        return None


@pytest.mark.parametrize("body", BODIES, ids=NAMES)
def test_all_instructions_broken_end_as_bare(body: Body) -> None:
    """Registers, clock, RAM; each instruction is told as often as it runs: a repeated one for each iteration, one that
    faults and comes again once, and none of VEX, which this processor does not have."""
    machine = build(body)
    client = Counting(machine, body, body.offsets)
    assert finish(machine, body.budget) == run_bare(body)
    ran = executions(body)
    for offset in body.offsets:
        at, code = place(body, offset), body.code[offset:]
        if REPEATED.match(code):
            assert client.hits[at] >= ran[at]
        elif not begins_with_vex(code, body.bits) and body.name.rpartition("_")[0] not in FAULTING:
            assert client.hits[at] == ran[at], f"at +{offset:#x}"


@pytest.mark.parametrize("body", CUT, ids=[body.name for body in CUT])
def test_each_second_instruction_broken_in_pieces(body: Body) -> None:
    """A run that is cut every three instructions shows what the bare one shows at each cut."""
    machine = build(body)
    Counting(machine, body, body.offsets[::2])
    assert cut(machine, 3) == cut(build(body), 3)
