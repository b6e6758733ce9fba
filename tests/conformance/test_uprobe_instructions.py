"""Uprobes on each instruction that Linux was measured on: where its own change the program's result, ours do not.

cases/insn_uprobe.tsv: uprobe_events on Linux 6.12.117, each instruction run bare ("native") and probed, and the errno
of enabling the probe. cases/insn_uprobe_code.tsv: code for each, as assembled by GNU as 2.40.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from emu.vex import begins_with_vex
from probes import Manager
from probes.arch.x86 import X86Arch
from probes.core import Kprobes
from probes.planting import Planting, UserArm
from probes.room import Room
from probes.uprobe import Uprobe
from probes.uprobes import Uprobes
from tests.conformance.ring3 import CODE_OFFSET, EXIT, PATH, End, OneProgram, build, finish

CASES = Path(__file__).parent / "cases"
UNDEFINED = 6
FAULTS = {"int3": 3, "ud2": UNDEFINED, "hlt": 13, "cli": 13}
REPEATED = {"rep_movsb"}  # armed in translated code, whatever is asked for
OF_THE_PROCESSOR = {"cpuid", "jmp66", "in"}
"""Ours has another maker, and takes 66 e9 for a jump of 16 bits, as AMD's do (APM vol. 3, JMP) and Intel's do not. The
engine lets ring 3 use ports, whatever the task state segment says."""


@dataclass(frozen=True)
class Case:
    """A row of both tables. `native` "-": the program does not live to have a result."""

    bits: int
    name: str
    native: str
    at: int
    code: bytes

    @property
    def is_avx(self) -> bool:
        return self.name == "evex" or begins_with_vex(self.code[self.at :], self.bits)


def rows(name: str) -> list[list[str]]:
    lines = (line for line in (CASES / name).read_text().splitlines() if not line.startswith(("#", "bits\t")))
    return [line.split("\t") for line in lines]


def cases() -> list[Case]:
    code = {
        (bits, name): (int(at, 16), bytes.fromhex(data)) for bits, name, at, data, _ in rows("insn_uprobe_code.tsv")
    }
    found = []
    for bits, name, native, *_ in rows("insn_uprobe.tsv"):
        at, data = code[bits, name]
        if name == "straddle":  # the instruction's bytes are on two pages
            data = b"\x90" * at + data
        found.append(Case(int(bits[2:]), name, native, at, data))
    return found


def probed(case: Case, arm: UserArm) -> tuple[End, Uprobe]:
    machine = build(case.code, case.bits)
    arch, programs = X86Arch(machine, Manager(machine)), OneProgram(case.code, case.bits)
    planting = Planting(machine, arch, Kprobes(machine, arch), Room(machine.window), programs)
    uprobes = Uprobes(machine, arch, programs, planting)
    probe = Uprobe(PATH, CODE_OFFSET + case.at, arm=arm)
    uprobes.register(probe)
    end = finish(machine)
    assert (len(machine.planted.guest_bytes()) == 1) is (arm == "int3" and probe.hits > 0 and case.name not in REPEATED)
    return end, probe


CASES_READ = cases()


@pytest.mark.parametrize("arm", ["auto", "int3"])
@pytest.mark.parametrize("case", CASES_READ, ids=[f"{case.name}-{case.bits}" for case in CASES_READ])
def test_the_probed_program_is_the_bare_one(case: Case, arm: UserArm) -> None:
    """Registers, flags, clock and RAM at the end; its result is what the processor gave Linux's program, unprobed."""
    bare = finish(build(case.code, case.bits))
    end, probe = probed(case, arm)
    assert end == bare
    if case.is_avx:
        assert (end.vector, probe.hits) == (UNDEFINED, case.name == "evex")  # VEX faults before anyone is asked
        assert "#UD" in probe.notes[0]
        return
    assert (probe.hits, probe.notes) == (1, ())
    if case.name in OF_THE_PROCESSOR:
        return
    if case.native == "-":
        assert end.vector == FAULTS[case.name]
    else:
        assert (end.vector, end.result) == (EXIT, int(case.native, 16))


def test_the_table_is_whole() -> None:
    assert len(CASES_READ) == 83
    assert sum(case.is_avx for case in CASES_READ) == 11
