"""The embedded guest with probes in its page cache, for tests: shared names and steps."""

from __future__ import annotations

from typing import Any

from emu.images.embedded import embedded_program
from emu.machine import Machine
from emu.stops import ConsoleMatch
from probes import Manager, Uprobe
from probes.aops import PageReads
from tests.support.embedded import power_on
from tests.support.kernels import run_until

PROGRAM = "/bin/program"
BUDGET = 200_000_000
INT3 = 0xCC
DENIED = -26  # ETXTBSY


def started(bits: int, append: str, reads: type[PageReads] = PageReads) -> tuple[Machine, Manager]:
    """A guest that has page tables and no page of a file. `reads`: the mechanism, ours or one that is worse."""
    machine = power_on(bits, append)
    assert isinstance(run_until(machine, "embedded: ready", 1_000_000), ConsoleMatch)
    manager = Manager(machine)
    manager.uprobes.planting.reads = reads
    return machine, manager


def finish(machine: Machine) -> None:
    assert isinstance(run_until(machine, "embedded: done", BUDGET), ConsoleMatch)


def in_cache(bits: int, function: str, *, offset: int = 0, arm: str = "aops", **more: Any) -> Uprobe:
    """A probe on a function of the guest's program."""
    return Uprobe(PROGRAM, embedded_program(bits).offset(function) + offset, arm=arm, **more)
