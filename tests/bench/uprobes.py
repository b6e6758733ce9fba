"""Uprobes on a stock kernel: what a hit and a return cost, and what programs pay that are not probed.

Rules: the guest executes the same instructions on both sides of a ratio; what is compared is the time they take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from emu.boot import GuestMachine
from emu.stops import Budget
from probes import Manager, Uprobe
from probes.linux import linux_of
from probes.planting import UserArm
from tests.bench.hits import AGAINST, bare_hits
from tests.bench.row import Effort, Row, interleaved, seconds
from tests.support.disks import PROGRAM, with_disk
from tests.support.kernels import type_line
from tests.support.programs import bring, build

_PROGRAM: Final = "/bin/busy"
_BUSY: Final = ("busy.c", "-nostdlib", "-static", "-fno-stack-protector")
_FILE: Final = "/bin/busybox"  # whose pages the faults are of
_START: Final = 5_000_000  # instructions until the program is in its loop
_CALLS: Final = 200_000
_FAULTS: Final = 5_000_000


def uprobes(effort: Effort) -> Iterator[Row]:
    """Each with an empty handler; faults by a program that writes to a private mapping of a file, page by page."""
    uprobe = _hits(Uprobe(_PROGRAM, "called", _nothing))
    int3 = _hits(Uprobe(_PROGRAM, "called", _nothing, arm="int3"))
    event = _hits("p:called /bin/busy:called ip=%ip")
    uretprobe = _hits(Uprobe(_PROGRAM, "called", ret_handler=_nothing))
    *ours, theirs = interleaved(effort.rounds, uprobe, int3, event, uretprobe, bare_hits())
    names = (
        "uprobe hit",
        "uprobe hit by int3",
        "uprobe event with an argument, recorded",
        "uretprobe, entry and return",
    )
    for what, value in zip(names, ours, strict=True):
        yield Row(what, value, "us", theirs, AGAINST)
    *probed, without = interleaved(effort.rounds, *map(_faults, ("auto", "int3", "aops", None)))
    for arm, each in zip(("", " by int3", " by aops"), probed, strict=True):
        what = f"page faults of a file that is not probed, a uprobe{arm} on another"
        yield Row(what, 1 / each, "/s", 1 / without, "no uprobe")


def _nothing(*_: object) -> None: ...


def _busy(argument: str = "") -> GuestMachine:
    """The program runs, and goes on for ever."""
    machine = with_disk("amd64")
    bring(machine, linux_of(machine), {_PROGRAM: build(*_BUSY)})
    type_line(machine, f"{_PROGRAM} {argument}")
    assert isinstance(machine.run(_START), Budget)
    return machine


def _hits(probe: Uprobe | str) -> Callable[[], float]:
    """Microseconds of each hit, the loop included."""
    machine = _busy()
    manager = Manager(machine)
    if isinstance(probe, str):
        manager.add("uprobe", probe)
        return lambda: _each(machine, _CALLS, lambda: manager.status()[0].hits) * 1e6
    manager.register(probe)
    return lambda: _each(machine, _CALLS, lambda: probe.hits) * 1e6


def _faults(arm: UserArm | None) -> Callable[[], float]:
    """Seconds of each fault, with a probe on a file of ext4's armed by `arm`."""
    machine = _busy(_FILE)
    if arm is not None:
        Manager(machine).register(Uprobe(PROGRAM, "cold", _nothing, arm=arm))
    linux = linux_of(machine)
    return lambda: _each(machine, _FAULTS, lambda: linux.current().min_flt.value_())


def _each(machine: GuestMachine, instructions: int, count: Callable[[], int]) -> float:
    before = count()
    taken = seconds(lambda: machine.run(instructions))
    return taken / (count() - before)
