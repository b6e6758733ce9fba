"""The measured definitions (cases/probe_events.tsv), and a judge over the kernel they were measured on.

Rules: tests only. The kernel is read, never booted.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emu.kernelfile import KernelFile, open_kernel
from gdbstub.check import scope_of
from gdbstub.guestfiles import GuestFiles, fetched_initramfs
from probes.arch.x86 import convention_for
from probes.judge import Judge, Verdict
from tests.support.images import REAL_KERNELS, fetch_real_kernel

CASES = Path(__file__).parent / "cases" / "probe_events.tsv"
MEASURED_ON = "amd64 6.12"


@dataclass(frozen=True)
class Case:
    """One row. `caret` and `listing` are empty where there is none; `setup` lines were written before."""

    definition: str
    verdict: str
    text: str
    errno: str
    caret: str
    file: str
    setup: tuple[str, ...]
    listing: str

    @property
    def kind(self) -> Literal["kprobe", "uprobe", "auto"]:
        return {"kprobe_events": "kprobe", "uprobe_events": "uprobe"}.get(self.file, "auto")  # type: ignore[return-value]

    @property
    def is_ours(self) -> bool:
        """p, r, - and comment lines; e, f and t are other systems'."""
        return self.definition.lstrip()[:1] not in ("e", "f", "t")


def read_cases() -> list[Case]:
    rows = [line.split("\t") for line in CASES.read_text().split("\n") if "\t" in line]
    cases = []
    for row in rows:
        definition, verdict, text, _, errno, caret, _, file, setup, listing = [*row, *[""] * 10][:10]
        if verdict in ("accept", "reject"):
            steps = tuple(step.partition(":")[2] for step in setup.split(" && ") if step)
            cases.append(Case(definition, verdict, text, errno, caret, file, steps, listing))
    return cases


@functools.cache
def kernel_file(name: str = MEASURED_ON) -> KernelFile:
    fetch_real_kernel(name)
    architecture, package, _ = REAL_KERNELS[name]
    return open_kernel(package or architecture)


@functools.cache
def judge_of(name: str = MEASURED_ON) -> Judge:
    """A judge without events; whoever uses it forgets first."""
    kernel = kernel_file(name)
    convention = convention_for(kernel.bits)
    assert kernel.fetched is not None
    files = GuestFiles(convention, fetched_initramfs(kernel.fetched))
    return Judge(kernel, scope_of(kernel), files)


def judged(case: Case) -> Verdict:
    judge = judge_of()
    judge.forget()
    for line in case.setup:
        assert judge.judge(line).error is None or line.startswith("e:"), line
    return judge.judge(case.definition, case.kind)
