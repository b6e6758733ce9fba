"""Arrivals at armed places whose usual course is decided beforehand, so that they cost little.

Rules: the machine's thread, in the interrupt hook. A shortcut is taken only while all that it was decided on is still
so: the processor's mode, ring 0 and flat segments, TF clear, each table entry on the way to the armed byte and to where
the guest goes on, the code itself. Who changes anything else about a place drops its shortcut. Nothing may depend on
one: the same happens without it, more slowly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from emu.cpustate import HF_CPL, HF_CS32, HF_CS64, HF_LMA, HF_PE, NO_EXCEPTION, TF, CpuState
from emu.engine import Engine
from emu.ram import Ram
from emu.walks import Trail, Walks

_SAMPLED = 16  # one call of so many is timed
_MODE = HF_CPL | HF_PE | HF_CS32 | HF_LMA | HF_CS64


class _Shortcut(NamedTuple):
    """`mode`, `trail` and `code`, the bytes in RAM from `start` to `end`, must be as they were.

    `protected`: segments have bases, and the mode is more than `mode` tells. What is needed of the trail is here again,
    so that one unpacking gives everything.
    """

    mode: int
    protected: bool
    cr3: int
    look: Callable[[memoryview], object]
    view: memoryview
    values: object
    trail: Trail
    code: bytes
    start: int
    end: int
    call: Callable[[], int | None]
    uncount: int


class Shortcuts:
    """The shortcuts of one machine, by the address of the int3."""

    def __init__(self, ram: Ram, cpu: CpuState, engine: Engine, walks: Walks) -> None:
        self._ram = ram
        self._cpu = cpu
        self._walks = walks
        self._known: dict[int, _Shortcut] = {}
        self._spent = [0]
        self.take = self._taker(engine)

    @property
    def spent_ns(self) -> int:
        """Host time in what shortcuts called, from a sample."""
        return self._spent[0]

    def make(self, vaddr: int, paddr: int, code: bytes, to: int, call: Callable[[], int | None], uncount: int) -> None:
        """At `vaddr`, whose byte is at `paddr`, where `code` stands: see iface.Text.shorten."""
        trail = self._walks.trail(vaddr, to)
        if trail is None or self._ram.map[paddr : paddr + len(code)] != code or self._walks.locate(vaddr) != paddr:
            return
        mode = self._cpu.hflags & _MODE & ~HF_CPL
        self._known[vaddr] = _Shortcut(
            mode,
            not mode & HF_CS64,
            trail.cr3,
            trail.look,
            trail.view,
            trail.values,
            trail,
            code,
            paddr,
            paddr + len(code),
            call,
            uncount,
        )

    def drop(self, vaddr: int) -> None:
        self._known.pop(vaddr, None)

    def drop_range(self, start: int, size: int) -> None:
        for vaddr in self._known.keys() & range(start, start + size):
            del self._known[vaddr]

    def clear(self) -> None:
        self._known.clear()

    def _taker(self, engine: Engine) -> Callable[[], bool]:
        """A closure: there are so many looks that each `self` would show."""
        lookup, memory, walks = self._known.get, self._ram.map, self._walks
        registers, halves, counter = self._cpu.words, self._cpu.dwords, engine.counter
        cpu = self._cpu
        now, spent, calls = time.perf_counter_ns, self._spent, 0
        pc_at, eflags_at, hflags_at, cs_base_at = cpu.pc_at, cpu.eflags_at, cpu.hflags_at, cpu.cs_base_at
        old_exception_at, cr3_at = cpu.old_exception_at, cpu.control_at[1]

        def take() -> bool:
            """An int3 has run: True if it was one with a shortcut, and the guest is where that leads."""
            pc = registers[pc_at] - 1
            known = lookup(pc)
            if known is None:
                return False
            mode, protected, cr3, look, view, values, trail, code, start, end, call, uncount = known
            if halves[hflags_at] & _MODE != mode or registers[eflags_at] & TF:
                return False
            if protected and (registers[cs_base_at] or not walks.holds(trail)):
                return False
            if registers[cr3_at] == cr3:
                if look(view) != values:
                    return False
            elif not walks.leads_on(trail):
                return False
            if memory[start:end] != code:
                return False
            registers[pc_at] = pc
            nonlocal calls
            calls += 1
            if calls % _SAMPLED:
                to = call()
            else:
                began = now()
                to = call()
                spent[0] += _SAMPLED * (now() - began)
            if to is None:
                registers[pc_at] = pc + 1
                return False
            registers[pc_at] = to
            counter[0] -= uncount
            halves[old_exception_at] = NO_EXCEPTION
            return True

        return take
