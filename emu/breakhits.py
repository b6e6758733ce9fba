"""What the run loop does where the guest comes to a break in translated code, or to an int3 planted in its memory.

Rules: the machine's thread only; a part of `running.RunLoop`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from emu.clock import Clock
from emu.codebreaks import CodeBreaks
from emu.covered import INT3
from emu.cpustate import CpuState
from emu.engine import Engine
from emu.iface import BackEnd
from emu.planted import PlantedBytes
from emu.stops import Stop
from emu.text import ArmedText
from emu.traps import PF, Delivery, GuestFault, Traps


class Watcher:
    """An owner that is asked: a watch of the machine's own."""

    def __init__(self, call: Callable[[], Stop | None]) -> None:
        self.call = call


class BreakHits:
    """The parts, `_stop_for`, `_deliver` and `uncount` are the loop's."""

    engine: Engine
    cpu: CpuState
    clock: Clock
    text: ArmedText
    breaks: CodeBreaks
    planted: PlantedBytes
    traps: Traps
    trapped_ns: int
    _stop_requested: bool
    _passed: int | None
    _stop_for: Callable[[Stop], None]
    _deliver: Callable[[Delivery], None]
    uncount: Callable[[int], None]

    def __init__(self) -> None:
        self._hooked_breaks: dict[int, Watcher] = {}

    def _hook_break(self, vaddr: int, on: bool) -> None:
        """The client of the breaks is asked by a PC hook at `vaddr` from now on, or no longer."""
        if on:
            self._hooked_breaks[vaddr] = Watcher(lambda: self._on_hooked_break(vaddr))
            self.text.arm(vaddr, self._hooked_breaks[vaddr], BackEnd.HOOK)
        else:
            self.text.disarm(vaddr, self._hooked_breaks.pop(vaddr))

    def _on_hooked_break(self, vaddr: int) -> Stop | None:
        client = self.breaks.client
        return client.on_code_break(self.cpu, vaddr) if client is not None and client.stands(vaddr) else None

    def _on_break(self, pc: int) -> bool:
        """An int3 at `pc` that is in the translation only, or planted; False where another one is to be seen to."""
        cpu, breaks, client = self.cpu, self.breaks, self.breaks.client
        planted = self.planted.at(pc)
        if planted is None:
            other = not breaks.is_translated(pc) or breaks.in_memory(pc)
            ours = client is not None and breaks.is_armed(pc) and client.stands(pc)
            if not ours and other:
                return False
        else:
            other = self.planted.original(planted) == INT3 or self.text.place_at(pc) is not None
            ours = pc != breaks.lifted
        cpu.pc -= 1
        cpu.forget_exception()
        at, now, stop = cpu.pc, self.clock.instructions - 1, None
        if ours and (stored := self.traps.store_fault()) is not None:
            self._deliver(Delivery(PF, stored))
            return True
        if ours and client is not None and breaks.is_hit(pc, now):
            if self._stop_requested:
                self.engine.stop_here()
            began = time.perf_counter_ns()
            stop = client.on_code_break(cpu, pc)
            self.trapped_ns += time.perf_counter_ns() - began
        if stop is not None:
            self._stop_for(stop)
            breaks.passed(pc, now)
        elif cpu.pc == at and other:
            breaks.passed(pc, now)  # a debugger's, that may be gone when the guest goes on from here
            cpu.pc += 1
            return False
        elif cpu.pc == at:
            if planted is None and not ours:
                breaks.refresh(pc)  # a translation from when it was armed
            try:
                if breaks.emulate(pc, now, self.traps):
                    return True  # the int3 counts as the instruction
            except GuestFault as fault:
                cpu.set_cr(2, fault.address or 0)
                self._deliver(Delivery(fault.vector, fault.code))
                return True
            breaks.resume(pc, now)
        self.uncount(1)
        if self.text.hooked(pc) is not None:
            self._passed = pc  # asked a moment ago, for the same arrival
        return True
