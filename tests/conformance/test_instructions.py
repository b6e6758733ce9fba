"""What Linux answers to a probe on each kind of instruction, and that ours changes nothing where theirs does or not.

cases/insn_kprobe_register.tsv: register_kprobe() on each encoding, measured on Linux 6.12.117 x86_64.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from probes import Kprobe, Manager, ProbeError
from probes.errors import errno_name
from tests.probes.lockstep import run_bare, run_probed
from tests.probes.sequences import one_cell
from tests.support.fake_cpu import ProbedMachine

CASES = Path(__file__).parent / "cases" / "insn_kprobe_register.tsv"
TEXT = 0x10000
CELL_AT = -16  # from the body's end


def cases() -> list[tuple[str, str, str]]:
    """(bytes in hex, what they are, 0 or -ERRNO) of each row, once."""
    rows = (line.split("\t") for line in CASES.read_text().splitlines() if not line.startswith(("#", "bytes\t")))
    return list(dict.fromkeys((code, name, answer) for code, name, answer, *_ in rows))


@pytest.mark.parametrize(("code", "name", "answer"), cases(), ids=[name for _, name, _ in cases()])
def test_linux_s_answer_is_a_note_or_the_refusal(code: str, name: str, answer: str) -> None:
    """The probe is accepted with a note that names the kernel's errno; under its limits it is refused with that."""
    machine = ProbedMachine()
    machine.memory.map(TEXT, bytes.fromhex(code).ljust(16, b"\0"))
    probe = Kprobe(addr=TEXT)
    Manager(machine).register(probe)
    noted = [note.split(": ")[1].split(",")[0] for note in probe.notes if note.startswith("Linux would refuse")]
    assert noted == ([] if answer == "0" else [answer.removeprefix("-")])
    strict = Manager(machine, linux_limits=True)
    if answer == "0":
        strict.register(Kprobe(addr=TEXT))
        return
    with pytest.raises(ProbeError) as refusal:
        strict.register(Kprobe(addr=TEXT))
    assert f"-{errno_name(refusal.value.errno)}" == answer


@pytest.mark.parametrize(("code", "name"), [case[:2] for case in cases()], ids=[name for _, name, _ in cases()])
def test_a_probe_on_it_changes_nothing(code: str, name: str) -> None:
    """Executed on the real machine, bare and probed by either back end: registers, memory and clock are the same."""
    body = one_cell(bytes.fromhex(code))
    bare, at = run_bare(body), len(body.code) + CELL_AT
    for arm in ("auto", "hook"):
        end, ((hits, _),) = run_probed(body, [at], arm, post=False)
        assert end == bare
        assert hits >= 1
