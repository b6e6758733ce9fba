"""The machine: what can be done with a guest beside running it. Its loop is in `running`.

Rules: one thread runs a machine; only `request_stop` may be called from another. Starting states, snapshots, a
debugger's steps and breakpoints, watches of our own and calls into the guest: none of them moves the guest's time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from emu.breakhits import Watcher
from emu.breakpoints import Condition
from emu.calls import GuestCalls
from emu.cpustate import FLAT_CODE32, FLAT_CODE64, FLAT_DATA
from emu.iface import BackEnd, MachineError
from emu.images.plan import Image
from emu.running import RunLoop, Watch
from emu.snapshot import Snapshot, pack_ram, unpack_ram
from emu.stops import Breakpoint, Budget, Interrupted, ProbeStop, Step, Stop, WatchKind
from emu.symbols import SymbolTable
from emu.traps import Delivery

LONGEST_ABSENCE = 20_000_000  # instructions until a step's interrupt must be over: several turns of other tasks


class Machine(RunLoop):
    """Implements iface.Machine. Empty until `power_on` or `restore`."""

    def __init__(self, memory: int, *, symbols: SymbolTable | None = None, long_mode: bool = True) -> None:
        """`memory` bytes of RAM. `long_mode`: a processor that has it (Nehalem); else a Pentium III."""
        super().__init__(memory, symbols=symbols, long_mode=long_mode)
        self.calls = GuestCalls(self)
        self._blank = True  # RAM is zero
        self._masks: dict[object, Callable[[], Mapping[int, bytes]]] = {}

    @property
    def handler_ns(self) -> int:
        """Host time spent in the trap client, about."""
        return self.trapped_ns + self.shortcuts.spent_ns

    # ------------------------------------------------------------------------------------------------ starting states

    def power_on(self, image: Image) -> None:
        """Load the image's segments and put the processor into its start state; ImageError if it does not fit."""
        image.check_fits(self.ram.size)
        self._blank = False
        for segment in image.segments:
            self.ram.write(segment.paddr, bytes(segment.data))
        start, cpu = image.start, self.cpu
        for index in range(16):
            cpu.gpr[index] = 0
        cpu.eflags = 2
        registers = dict(start.registers)
        cpu.set_cr(0, registers.get("cr0", 0x10 if start.mode == "real" else 0x11))
        cpu.set_cr(3, registers.get("cr3", 0))
        cpu.set_cr(4, registers.get("cr4", 0))
        cpu.efer = 0x500 if start.mode == "long" else 0
        cpu.set_system_segment("idt", 0, 0, 0x3FF if start.mode == "real" else 0)
        cpu.set_system_segment("tr", 0, 0, 0xFFFF, 0x8B00)
        gdt = start.gdt
        if gdt is None:
            for index in range(6):
                cpu.set_segment(index, 0, 0, 0xFFFF, 0x9B00 if index == 1 else 0x9300)
        else:
            cpu.set_system_segment("gdt", 0, gdt.base, gdt.limit)
            for index in range(6):
                cpu.set_segment(index, gdt.data, 0, 0xFFFFFFFF, FLAT_DATA)
            cpu.set_segment(1, gdt.code, 0, 0xFFFFFFFF, FLAT_CODE64 if start.mode == "long" else FLAT_CODE32)
        cpu.hflags = 0
        cpu.recompute_hflags()
        self.registers.write("fctrl", 0x40)  # of the x87 and SSE what a reset leaves (SDM vol. 3, table 9-1)
        self.registers.write("mxcsr", 0x1F80)
        for name, value in registers.items():
            if name not in ("cr0", "cr3", "cr4"):
                self.registers.write(name, value)
        cpu.recompute_hflags()
        cpu.pc = start.pc
        self.engine.flush()

    def snapshot(self, about: Mapping[str, Any] | None = None) -> Snapshot:
        """Everything that decides how the guest goes on; `about` is kept with it. Between runs only."""
        with self._guest_bytes():
            chunks = pack_ram(self.ram)
        state = {
            "instructions": self._base,
            "clock": self.clock.state(),
            "devices": self.devices.state(),
            "poll_at": self._poll_at,
            "halted": self.halted,
            "held": self._held_values(),
            "console": self.console.text,
            "about": dict(about or {}),
        }
        return Snapshot(self.ram.size, self.long_mode, chunks, self.cpu.image(), state)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from `snapshot`, of a machine of the same size and processor. Armed places are armed again over it."""
        if (snapshot.memory, snapshot.long_mode) != (self.ram.size, self.long_mode):
            theirs, ours = ("64" if wide else "32" for wide in (snapshot.long_mode, self.long_mode))
            raise MachineError(
                f"the snapshot is of a machine with {snapshot.memory >> 20} MiB and a {theirs}-bit processor, "
                f"this has {self.ram.size >> 20} MiB and a {ours}-bit one"
            )
        state = snapshot.state
        self.breakpoints.disarm()
        unpack_ram(self.ram, snapshot.ram, blank=self._blank)
        self._blank = False
        self.cpu.load_image(snapshot.cpu)
        self.engine.flush()
        self._base = state["instructions"]
        self.clock.load(state["clock"])
        self.devices.load(state["devices"])
        self._poll_at, self.halted = state["poll_at"], state["halted"]
        self._stop, self._passed, self._in_place, self._skip_breakpoint = None, None, None, None
        self._hold_again(state.get("held"))
        self._followers.clear()
        self.watched.forget()
        self.console.reset(state["console"])
        self.shortcuts.clear()
        self.window.forget()
        self.words.forget()
        self.planted.forget()
        self.breaks.forget()
        self.text.rearm()
        if self.trap_client is not None:
            self.trap_client.on_restore()

    def _held_values(self) -> list[int] | None:
        """See Snapshot.state."""
        if self._held is None:
            return None
        delivery, pc, sp = self._held
        return [
            delivery.vector,
            -1 if delivery.code is None else delivery.code,
            delivery.software,
            delivery.length,
            pc,
            sp,
        ]

    def _hold_again(self, values: Sequence[int] | None) -> None:
        if values is None:
            self._held = None
            return
        vector, code, software, length, pc, sp = values
        delivery = Delivery(vector, None if code < 0 else code, bool(software), length=length, seen=True)
        self._held = delivery, pc, sp

    @contextlib.contextmanager
    def _guest_bytes(self) -> Iterator[None]:
        """RAM as the guest alone would have it: no int3, no window, no trampoline on a stack, and what `mask` knows."""
        ours = {**self.text.armed_bytes(), **self.window.foreign_bytes(), **self.words.guest_bytes()}
        ours.update(self.planted.guest_bytes())
        for call in self._masks.values():
            ours |= {paddr + at: byte for paddr, data in call().items() for at, byte in enumerate(data)}
        kept = {paddr: self.ram.map[paddr] for paddr in ours}
        for paddr, byte in ours.items():
            self.ram.map[paddr] = byte
        try:
            yield
        finally:
            for paddr, byte in kept.items():
                self.ram.map[paddr] = byte

    def ram_sha256(self) -> str:
        """Of guest RAM without what probes and breakpoints put there."""
        with self._guest_bytes():
            return self.ram.sha256()

    # ------------------------------------------------------------------------------------------ for those who script it

    def stop(self) -> None:
        """`request_stop`, by the name that goes with `run` and `step`."""
        self.request_stop()

    def read(self, vaddr: int, size: int) -> bytes:
        """`memory.read`: guest memory as a debugger sees it; MemoryFault where there is none."""
        return self.memory.read(vaddr, size)

    def write(self, vaddr: int, data: bytes) -> None:
        """`memory.write`."""
        self.memory.write(vaddr, data)

    # -------------------------------------------------------------------------------------------------------- stepping

    def step(self, *, into_interrupts: bool = False) -> Stop:
        """One instruction, whatever stands on it. Interrupts that are due are taken and finished first, so that a
        step neither lands in a handler nor moves the guest's timeline; or with `into_interrupts`, entered. One that
        leads to another task for good, as in the idle loop, ends the step there (`Step.left`)."""
        self.breakpoints.settle()
        self.watched.forget()
        return self._stepped(self._guarded(lambda: self._step(into_interrupts)))

    def _stepped(self, stop: Stop) -> Stop:
        """What is told of the end of a step, whose budget is one instruction."""
        if isinstance(stop, Breakpoint | ProbeStop):
            return self._reported(stop)
        if isinstance(stop, Budget):
            stop = Step(self.cpu.linear_pc)
        self._skip_breakpoint = None
        return stop

    def _step(self, into_interrupts: bool) -> Stop:
        start, sp, cr3 = self.cpu.linear_pc, self.cpu.gpr[4], self.cpu.cr3
        self._skip_breakpoint = (start, sp)
        delivered = self._release()  # which was the instruction
        if into_interrupts and not delivered:
            if self._take_due(start):
                return Step(self.cpu.linear_pc)
        elif not delivered:
            while self._settle_interrupt(start, sp, cr3):
                pass
        if self._stop is None and not self._shall_stop():
            goal = self.clock.instructions + (not delivered)
            return self._loop(lambda: self.clock.instructions >= goal, goal)
        if self._stop is not None:
            stop, self._stop = self._stop, None
            return stop
        return self._stop_as_requested()

    def _settle_interrupt(self, pc: int, sp: int, cr3: int) -> bool:
        """Deliver what is due here and run the guest until it is back at this instruction of this stack.

        -> whether there was something and it is over; if its end is not to be had, `_stop` says why.
        """
        if not self._take_due(pc):
            return False
        returned = False

        def back() -> Stop | None:
            nonlocal returned
            returned = self.cpu.gpr[4] == sp and self.cpu.cr3 == cr3
            return Step(pc) if returned else None

        owner = Watcher(back)
        self.text.arm(pc, owner, BackEnd.HOOK)
        end = self.clock.instructions + LONGEST_ABSENCE
        try:
            stop = self._loop(lambda: self.clock.instructions >= end, end)
        finally:
            self.text.disarm(pc, owner)
        self._passed = None
        if not returned:
            self._stop = Step(self.cpu.linear_pc, left=pc) if isinstance(stop, Budget) else stop
        return returned

    def step_at_once(self) -> Stop | None:
        """See iface.Machine: what `step` comes to where none of the things it allows for is the case."""
        pc, goal, event = self.cpu.linear_pc, self.clock.instructions + 1, self._next_event()
        if self.halted or self._stop_requested or self.breakpoints.unsettled or (event is not None and event < goal):
            return None
        if self._held or self._followers or self._in_place or self.stop_at or self.breakpoints.stands(pc):
            return None

        def go() -> Stop:
            self._enter(1)
            over = self.clock.instructions >= goal and not self.window.contains(self.cpu.pc)
            if over and not (self._stop or self.watched.hit or self._stop_requested):
                return Step(self.cpu.linear_pc)
            return self._loop(lambda: self.clock.instructions >= goal, goal)

        self.watched.forget()
        self._skip_breakpoint = (pc, self.cpu.gpr[4])
        return self._stepped(self._guarded(go))

    def _take_due(self, pc: int) -> bool:
        """Timers and interrupts that are due now. -> whether the processor, which was at `pc`, is in a handler."""
        if self.halted:
            self._idle()
        self._take_events()
        return self._stop is None and self.cpu.linear_pc != pc

    def insert_breakpoint(self, vaddr: int, hardware: bool = False, condition: Condition | None = None) -> None:
        """Idempotent; the last `condition` counts. It is put into memory when the guest is about to run.

        An address that is not mapped then is watched without memory, so it waits until it is; so is, among few, one
        with a condition, as the guest then goes on inside the engine."""
        self.breakpoints.insert(vaddr, hardware, condition)

    def remove_breakpoint(self, vaddr: int, hardware: bool = False) -> None:
        self.breakpoints.remove(vaddr, hardware)

    def insert_watchpoint(self, kind: WatchKind, vaddr: int, size: int) -> None:
        """See iface.Machine.insert_watchpoint; `watched` does it."""
        self.watched.insert(kind, vaddr, size)

    def remove_watchpoint(self, kind: WatchKind, vaddr: int, size: int) -> None:
        self.watched.remove(kind, vaddr, size)

    def catch_exceptions(self, vectors: frozenset[int]) -> None:
        """See iface.Machine.catch_exceptions."""
        self.traps.caught = vectors

    @property
    def caught_exceptions(self) -> frozenset[int]:
        return self.traps.caught

    def follow(self, call: Condition) -> None:
        """See iface.Machine.follow."""
        self._followers.append(call)
        if self.cpu.running:
            self.engine.stop_here()

    def watch(self, vaddr: int, call: Watch, paddr: int | None = None) -> Callable[[], None]:
        """Have `call` asked each time the guest is about to execute `vaddr`; a Stop it returns ends the run.

        `paddr`: where its byte is, if the guest has not mapped it yet. -> a call that ends the watch.
        """
        owner = Watcher(call)
        self.text.arm(vaddr, owner, BackEnd.INT3, paddr)
        return lambda: self.text.disarm(vaddr, owner)

    # ------------------------------------------------------------------------------------------- calls into the guest

    def call(self, target: int, gpr: Mapping[int, int], stack: bytes, budget: int) -> Sequence[int]:
        """See iface.Machine.call; `calls` does it."""
        return self.calls.call(target, gpr, stack, budget)

    def before_entry(self, call: Callable[[], int | None] | None) -> None:
        """See iface.Machine; `traps` asks it."""
        self.traps.before_entry = call

    def mask(self, call: Callable[[], Mapping[int, bytes]]) -> Callable[[], None]:
        """See iface.Machine.mask."""
        owner = object()
        self._masks[owner] = call

        def end() -> None:
            self._masks.pop(owner, None)

        return end

    @property
    def call_exit(self) -> int:
        return self.calls.exit

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, the processor is free for something else; afterwards it, the clock and the run are as before.

        A nested run overwrites the engine's counter and limit and leaves its flags as they are between runs.
        """
        engine, cpu = self.engine, self.cpu
        counted, limit, kept, base = engine.counter[0], engine.limit[0], cpu.set_aside(), self._base
        run = (self._in_place, self._passed, self._skip_breakpoint, self.halted)
        poll_at, muted, caught = self._poll_at, self.watched.muted, self.traps.caught
        self.watched.muted, self.traps.caught = True, frozenset()
        self._base, engine.counter[0] = base + counted, 0
        self._in_place, self._passed, self._skip_breakpoint, self.halted = None, None, None, False
        finished = False
        try:
            yield
            finished = True
        finally:
            if cpu.put_back(kept, keep_system=finished):
                engine.flush_tlb()
            cpu.forget_exception()
            self._base, engine.counter[0], engine.limit[0] = base, counted, limit
            self._in_place, self._passed, self._skip_breakpoint, self.halted = run
            self.watched.muted, self.traps.caught = muted, caught
            if self._poll_at != poll_at:
                self._poll_at = self.clock.instructions  # an interrupt was raised, at a time that has not come
            self._look_again()

    def _look_again(self) -> None:
        """What a nested run left to do: an end of the run, a timer or an interrupt earlier than the engine's limit."""
        if not self.cpu.running:
            return
        if self._stop is not None:
            self.engine.stop_here()
        elif (event := self._next_event()) is not None:
            self._tighten(event)

    def run_aside(self, budget: int) -> Stop | None:
        """Inside `aside`: execute until HLT (`halted` says so), a stop, or at most `budget` instructions."""
        place, self._in_place = self._in_place, None
        if place is not None:
            self._step_over(place)
        else:
            self._enter(budget)
        stop = self._stop
        if isinstance(stop, Interrupted):  # a watch of the caller's own, not the run's end
            self._stop = None
        return stop
