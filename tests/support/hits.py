"""Hits of an event without a machine."""

from __future__ import annotations

from emu.iface import Cpu
from probes.arch.x86 import AMD64
from probes.fetch import Task, Value
from probes.hit import Hit
from probes.regs import Regs
from tests.support.fake_cpu import FakeCpu, ProbedMachine


class Shell:
    """TaskInfo of a guest that runs one shell."""

    def current(self, cpu: Cpu) -> Task:
        return Task("sh", 142)


class Guest:
    """Implements hist.Guest and filters.Names: one function, `known`, at 0x1000."""

    word = 8
    release = (6, 12)

    def describe(self, address: int, /) -> str:
        return f"known+{address - 0x1000:#x}/0x10" if 0x1000 <= address < 0x1010 else f"{address:#x}"

    def stack(self, hit: Hit, /) -> tuple[int, ...]:
        return (0x1004, 0x2000)

    def syscall(self, number: int, /) -> str:
        return "sys_read" if number == 0 else "unknown_syscall"

    def span(self, function: str | int, /) -> range | None:
        known = function == "known" or (isinstance(function, int) and function != 1)
        return range(0x1000, 0x1010) if known or function == "do_sys_openat2" else None


def hit(values: tuple[Value, ...]) -> Hit:
    """With interrupts on."""
    machine = ProbedMachine()
    return Hit(Regs(machine, AMD64, FakeCpu(eflags=0x202), 0), Shell(), values, 1_000, 10, 0x1000)
