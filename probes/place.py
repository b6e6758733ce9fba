"""A probed address with its probes, which is the kernel's aggregate (aggr_kprobe), and a hit of it.

Rules: handlers are called here and nowhere else in the room. One that raises counts as one that returned None, and the
run ends after the instruction.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final

from emu.iface import BackEnd, Machine
from probes.arch import Prepared
from probes.blame import ask, end_run_of
from probes.kprobe import Kprobe
from probes.regs import Regs


class Status(enum.Enum):
    """Where a hit stands, by the kernel's names (kprobe_status)."""

    HIT_ACTIVE = 1  # pre-handlers run
    HIT_SS = 2  # the instruction runs
    REENTER = 4  # the instruction runs for a probe met inside a handler
    HIT_SSDONE = 8  # post-handlers run


# looking up a member of an enumeration costs as much as a call
HIT_ACTIVE: Final = Status.HIT_ACTIVE
HIT_SS: Final = Status.HIT_SS
HIT_SSDONE: Final = Status.HIT_SSDONE


@dataclass(slots=True, eq=False)
class Place:
    """A probed address and its probes, newest first."""

    machine: Machine
    address: int
    prepared: Prepared
    probes: list[Kprobe] = field(default_factory=list)
    armed: BackEnd | None = None
    active: tuple[Kprobe, ...] = ()  # those enabled
    observed: bool = False  # one of them has a post-handler
    long_hits: int = 0  # those that found no shortcut

    def refresh(self) -> None:
        self.active = tuple(probe for probe in self.probes if not probe.disabled and not probe.gone)
        self.observed = any(probe.post_handler is not None for probe in self.active)

    def insert(self, probe: Kprobe) -> None:
        """The newest is the first whose handlers run, but for those that ask to be first or last."""
        ahead = 0 if probe.first else sum(known.first for known in self.probes)
        self.probes.insert(len(self.probes) if probe.last else ahead, probe)

    def run_pre(self, regs: Regs) -> bool:
        """aggr_pre_handler(): true where a handler has set the registers, and then the rest are missed."""
        probes = self.active
        for probe in probes:
            if probe.address is None:
                continue  # a handler before it has unregistered it
            probe.hits += 1
            try:
                skips = probe.pre_handler is not None and probe.pre_handler(probe, regs)
            except Exception as error:  # noqa: BLE001  # `ask`, without the cost of a call at every hit
                end_run_of(self.machine, self.address, error)
                continue
            if skips:
                at = probes.index(probe)
                for done in probes[:at]:
                    if done.on_skip is not None:
                        done.on_skip(done, regs)
                regs.cpu.pc = regs.ip & regs.convention.mask
                for missed in probes[at + 1 :]:
                    missed.nmissed += 1
                return True
        return False

    def run_post(self, regs: Regs) -> None:
        """aggr_post_handler()."""
        for probe in self.active:
            if probe.post_handler is not None:
                ask(self.machine, self.address, probe.post_handler, probe, regs)

    def run_fault(self, regs: Regs, vector: int) -> bool:
        """aggr_fault_handler(): true where a handler has seen to it, and the registers are as it wants them."""
        for probe in self.active:
            handler = probe.fault_handler
            if handler is not None and ask(self.machine, self.address, handler, probe, regs, vector):
                regs.cpu.pc = regs.ip & regs.convention.mask
                return True
        return False


@dataclass(slots=True)
class Hit:
    """One hit of a place, from its trap until its instruction is over."""

    place: Place
    status: Status
    stepping: bool = False
