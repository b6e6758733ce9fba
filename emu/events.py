"""Timers and interrupts of the run loop: when the next one is due, taking it, and waiting for it in HLT.

Rules: the machine's thread only; a part of `running.RunLoop`. Everything here happens at an exact instruction count
that depends on the guest alone.
"""

from __future__ import annotations

from collections.abc import Callable

from emu.cpustate import IF
from emu.devices.pc import Devices
from emu.iface import TrapClient
from emu.stopping import Stopping
from emu.stops import Halted
from emu.traps import PF, Delivery, Traps
from emu.window import SlotWindow

POLL = 128  # instructions between looks at IF while an interrupt is pending
IDLE_TIMERS = 10_000  # timers that may fire in HLT without an interrupt before it counts as halted for good


class Events(Stopping):
    """What a run loop knows of time. The parts and `_deliver` are the loop's."""

    traps: Traps
    devices: Devices
    window: SlotWindow
    trap_client: TrapClient | None
    _skip_since: int
    _deliver: Callable[[Delivery], None]

    def __init__(self) -> None:
        super().__init__()
        self.log: Callable[[str, str], None] | None = None  # (topic, line) for --log int,syscall
        self.halted = False
        self._base = 0  # instructions retired before the engine was entered last
        self._poll_at: int | None = None  # instruction count of the next look at a pending interrupt

    def _next_event(self) -> int | None:
        """Instruction count of the next timer or interrupt poll."""
        event = self.clock.next_count()
        if self._poll_at is not None and (event is None or self._poll_at < event):
            event = self._poll_at
        return event

    def _take_events(self) -> None:
        deadline = self.clock.next_deadline_ns()
        if deadline is not None and deadline <= self.clock.now_ns:
            self.clock.run_due()
        if self._poll_at is None or self._poll_at > self.clock.instructions:
            return
        pic, cpu = self.devices.pic, self.cpu
        if not pic.pending():
            self._poll_at = None
        elif cpu.eflags & IF and not cpu.interrupt_shadow and self._is_outside():
            stored = self.traps.store_fault()
            if stored is not None:
                self._deliver(Delivery(PF, stored))
                self._poll_at = self.clock.instructions + POLL
                return
            vector = pic.acknowledge()
            if self.log is not None:
                self.log("int", f"irq vector {vector:#x} at {cpu.linear_pc:#x}")
            self._deliver(Delivery(vector, external=True))
            self._skip_since = -1
            self._poll_at = self.clock.instructions + POLL if pic.pending() else None
        else:  # a shadow and a slot last one instruction; IF can only be looked at now and then
            self._poll_at = self.clock.instructions + (1 if cpu.eflags & IF else POLL)

    def _is_outside(self) -> bool:
        """The pc is the guest's own: it was, or the step that was in progress there could be ended or divided."""
        client = self.trap_client
        return not self.window.contains(self.cpu.pc) or (client is not None and client.leave_slot(self.cpu))

    def _tighten_to_deadline(self) -> None:
        """A device scheduled something earlier than the engine's limit."""
        event = self.clock.next_count()
        if self.cpu.running and event is not None:
            self._tighten(event)

    def _tighten(self, at: int) -> None:
        counter, limit = self.engine.counter, self.engine.limit
        limit[0] = min(limit[0], max(at - self._base, counter[0], 0))

    def _interrupt_raised(self) -> None:
        self._poll_at = self.clock.instructions
        if self.cpu.running:
            self._tighten(self._poll_at)

    def _idle(self) -> None:
        """HLT: wait for the next interrupt, in virtual time or with the pacer in the world's."""
        cpu, pic = self.cpu, self.devices.pic
        if not cpu.eflags & IF:
            self._stop = Halted(cpu.linear_pc, "HLT with interrupts off")
            return
        for _ in range(IDLE_TIMERS):
            if pic.pending():
                self.halted = False
                self._poll_at = self.clock.instructions
                return
            deadline = self.clock.next_deadline_ns()
            if self.pacer is not None:
                now = self.pacer.idle(deadline)
                if self._stop_requested or pic.pending():
                    return
                deadline = deadline if now is None else now
            if deadline is None:
                self._stop = Halted(cpu.linear_pc, "HLT, no timer is set and nobody can press a key")
                return
            self.clock.skip_to(max(deadline, self.clock.now_ns))
            self.clock.run_due()
        self._stop = Halted(cpu.linear_pc, f"HLT, {IDLE_TIMERS} timers fired and none could interrupt")
