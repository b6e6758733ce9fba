"""The loop that runs a guest, and what the engine calls while it does.

Rules: the machine's thread only, but `request_stop`. Time is instructions retired plus what HLT skipped, and everything
that can change the guest's course (timers, interrupts) happens at an exact instruction count that depends on the guest
alone: a slice that ends early for a debugger changes nothing. Traps are asked for in order: debugger's breakpoints, our
own watches, the probe engine, the guest. What a machine can do beside running stands in `machine`.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

from emu import traps as t
from emu.breakhits import BreakHits, Watcher
from emu.breakpoints import Breakpoints, Condition, Debugger
from emu.calls import GuestCalls
from emu.clock import Clock
from emu.codebreaks import CodeBreaks
from emu.console import Console
from emu.cpustate import MSR_TSC_AUX, CpuState
from emu.devices.pc import Devices
from emu.engine import Engine, FetchError
from emu.events import Events
from emu.iface import BackEnd, MemoryFault, TrapClient, Verdict
from emu.insn import MAX_INSN_SIZE, InvalidInstruction, decode
from emu.memory import GuestMemory
from emu.planted import PlantedBytes
from emu.ram import Ram
from emu.registers import GuestRegisters
from emu.shortcuts import Shortcuts
from emu.stops import (
    Breakpoint,
    Budget,
    Defect,
    ExceptionRaised,
    GuestExit,
    PowerOff,
    ProbeStop,
    Reset,
    Stop,
    TripleFault,
    Watchpoint,
)
from emu.symbols import GuestSymbols, SymbolTable
from emu.text import ArmedText, Place
from emu.traps import CaughtException, Delivery, GuestFault, Traps, TripleFaulted
from emu.vex import VexGuard
from emu.walks import Walks
from emu.watch import WatchedMemory
from emu.window import SlotWindow
from emu.words import SubstitutedWords

SLICE = 250_000  # instructions between looks at `request_stop`: 5 to 10 ms

Watch = Callable[[], Stop | None]


class RunLoop(Events, BreakHits):
    """Processor, memory, devices and time put together and running. `machine.Machine` is the whole."""

    calls: GuestCalls  # those in progress pass a debugger's breakpoints; Machine makes it

    def __init__(self, memory: int, *, symbols: SymbolTable | None = None, long_mode: bool = True) -> None:
        """`memory` bytes of RAM. `long_mode`: a processor that has it (Nehalem); else a Pentium III."""
        Events.__init__(self)
        BreakHits.__init__(self)
        self.long_mode = long_mode
        self.ram = Ram(memory)
        self.engine = Engine(self.ram, self, long_mode=long_mode)
        self.cpu = CpuState(self.engine)
        walks = Walks(self.ram, self.cpu)
        self.traps = Traps(self.cpu, self.ram, walks)
        self.clock = Clock(lambda: self._base + self.engine.counter[0])
        self.devices = Devices(self.clock, memory)
        self.shortcuts = Shortcuts(self.ram, self.cpu, self.engine, walks)
        self.text = ArmedText(self.ram, self.cpu, self.engine, walks, self.shortcuts, self._on_pc_hook)
        self.planted = PlantedBytes(self.ram, self.engine, walks, self.text)
        self.breaks = CodeBreaks(self.ram, self.cpu, self.engine, self.planted)
        self.window = SlotWindow(self.ram, self.cpu, self.engine, walks, self.shortcuts)
        self._vex = VexGuard(self.cpu, self.engine, self.text, Watcher(lambda: None))
        self.watched = WatchedMemory(
            self.ram, self.cpu, self.engine, self.text, self.traps, Watcher(self._before_control_write)
        )
        self.words = SubstitutedWords(self.ram, walks)
        self.memory = GuestMemory(self.ram, self.cpu, self.engine, walks, self.text, self.planted, self.words)
        self.breakpoints = Breakpoints(self.cpu, self.memory, self.text)
        self.registers = GuestRegisters(self.cpu, self.engine, self.traps, self._leave_halt)
        self.symbols = GuestSymbols(symbols if symbols is not None else SymbolTable())
        self.console = Console(self._stop_for)
        self.trap_client: TrapClient | None = None
        self.budget_end: int | None = None  # instruction count at which every run ends with Budget
        self.trapped_ns = 0  # host time spent in the trap client, but for shortcuts
        self._followers: list[Condition] = []
        self._passed: int | None = None  # a PC hook here was answered already
        self._in_place: Place | None = None  # an int3 whose instruction runs once without it
        self._skip_breakpoint: tuple[int, int] | None = None  # pc and sp of one reported, until its instruction has run
        self._skip_since = -1  # instruction count of that report, -1 once the guest has gone on from it
        self._held: tuple[Delivery, int, int] | None = None  # a caught exception, with pc and sp
        self._wire()

    def _wire(self) -> None:
        devices = self.devices
        self.clock.on_change = self._tighten_to_deadline
        self.breaks.hook = self._hook_break
        devices.pic.on_raise = self._interrupt_raised
        devices.uart.on_output = self.console.feed
        devices.debug.on_output = self.console.feed
        devices.system.on_reset = lambda: self._stop_for(Reset())
        devices.system.on_power_off = lambda: self._stop_for(PowerOff())
        devices.system.on_exit = lambda status: self._stop_for(GuestExit(status))

    # ------------------------------------------------------------------------------------------------------- running

    @property
    def bits(self) -> int:
        return self.cpu.bits

    @property
    def instructions(self) -> int:
        return self.clock.instructions

    def run(self, budget: int | None = None) -> Stop:
        """Run until something stops it; at most `budget` instructions."""
        self.breakpoints.settle()
        end = self.budget_end if budget is None else self.clock.instructions + budget
        pc, skip = self.cpu.linear_pc, self._skip_breakpoint
        if self._passed != pc:
            self._passed = None
        if skip is not None and skip[0] != pc and self._skip_since == self.clock.instructions:
            self._skip_breakpoint = None  # a debugger has moved the pc away
        elif skip is not None and skip[0] == pc and not (self.text.place_at(pc) or self.text.hooked(pc)):
            self._skip_breakpoint = None  # ... or has taken the breakpoint out: one that is set there later is another
        self.watched.forget()
        return self._reported(
            self._guarded(lambda: self._loop(lambda: end is not None and self.clock.instructions >= end, end))
        )

    def _reported(self, stop: Stop) -> Stop:
        """Keep in mind which breakpoint need not be reported again when the guest goes on."""
        if isinstance(stop, Breakpoint | ProbeStop):
            self._skip_breakpoint, self._skip_since = (stop.pc, self.cpu.gpr[4]), self.clock.instructions
        return stop

    def _guarded(self, go: Callable[[], Stop]) -> Stop:
        """`go`, with whatever escapes it as a stop: who runs a machine gets values, not errors of ours."""
        try:
            return go()
        except Exception:  # noqa: BLE001  # the boundary of a run: timers and events have no hook's guard around them
            self._stop = None
            return Defect(self.cpu.linear_pc, traceback.format_exc())

    def _loop(self, done: Callable[[], bool], end: int | None) -> Stop:
        while self._stop is None:
            hit = self.watched.hit
            if hit is not None and self._is_outside():
                self.watched.forget()
                return Watchpoint(self.cpu.linear_pc, hit.kind, hit.address)
            if self._shall_stop() and self._is_outside():
                return self._stop_as_requested()
            if done() and self._is_outside():
                return Budget(self.clock.instructions)
            before = self.clock.instructions
            self._advance(end)
            if self._followers and self.clock.instructions > before and self._is_outside():
                self._followers = [call for call in self._followers if call()]
        stop, self._stop = self._stop, None
        return stop

    def _advance(self, end: int | None) -> None:
        """One stretch of guest execution: up to the next event, the slice's end, or `end`."""
        if self.halted:
            self._idle()
            return
        if self._held is not None:
            self._release()
            return
        self._take_events()
        if self._stop is not None or (self.watched.hit is not None and self._is_outside()):
            return
        place = self._in_place or self._breakpoint_to_skip()
        if place is not None:
            self._in_place = None
            self._step_over(place)
            return
        now = self.clock.instructions
        hurry = self._followers or self._stop_requested or self.watched.hit is not None  # out of a slot, then stop
        limit = now + (1 if hurry else SLICE)
        event = self._next_event()
        if event is not None and event < limit:
            limit = event
        if self.stop_at is not None and now < self.stop_at[0] < limit:
            limit = self.stop_at[0]
        if end is not None and end < limit:
            limit = end
        self._enter(max(limit - now, 1))

    def _enter(self, limit: int) -> None:
        engine, cpu = self.engine, self.cpu
        self.watched.prepare()
        self.breaks.put_in()
        cpu.running = True
        engine.counter[0] = 0
        nowhere = False
        before = cpu.integer_state() if limit == 1 else b""
        try:
            retired, halted = engine.run(cpu.pc, limit)
        except FetchError:
            retired, halted, nowhere = max(engine.counter[0], 1), False, True
        finally:
            cpu.running = False
            engine.counter[0] = 0
            self.breaks.take_out()
        self._base += retired
        self.breaks.pause(self._base)
        if nowhere:
            self._deliver(Delivery(t.UD))  # no device answers a fetch: all ones, which is no instruction
        if engine.failure is not None:
            self._report_failure()
        self.halted = halted and self._stop is None
        again = self._vex.arm() | self.watched.arm() | self.text.reclaim() | self.breaks.reclaim()
        if again and not retired:
            self._enter(limit)  # nothing has happened yet: the same stretch, with the places armed
        elif before and retired == 1 and before == cpu.integer_state() and self._rewrites_itself():
            self._base -= 1
            self._enter(2)

    def _rewrites_itself(self) -> bool:
        """Whether the instruction at pc, which was counted and changed nothing, has not been executed.

        The engine begins one anew, and counts it again, that stores into the block it translated it with.
        What that is depends on where runs and int3s divide code, so a guest that does it (Linux does not) has one
        instruction more or less where a debugger has looked on: the one thing known that moves its time.
        """
        if self.halted or self._stop is not None:
            return False
        try:
            insn = decode(self.memory.read(self.cpu.linear_pc, MAX_INSN_SIZE), self.cpu.linear_pc, self.cpu.bits)
        except (MemoryFault, InvalidInstruction):
            return False
        return "jump" not in insn.groups  # one to itself

    def _leave_halt(self) -> None:
        """A debugger sends the processor elsewhere: it is not in HLT there."""
        self.halted = False

    def _breakpoint_to_skip(self) -> Place | None:
        """An int3 under the pc that only debugger breakpoints own, already reported: it is stepped over."""
        pc = self.cpu.linear_pc
        if self._skip_breakpoint != (pc, self.cpu.gpr[4]):
            return None
        place = self.text.place_at(pc) if self.text.has_byte(pc) else None
        if place is None or not all(isinstance(owner, Debugger) for owner in place.owners):
            return None
        return place

    def _step_over(self, place: Place) -> None:
        self.text.lift(place)
        self.breaks.lifted = self.cpu.linear_pc
        try:
            self._enter(1)
        finally:
            self.breaks.lifted = None
            self.text.settle(place)
            self._skip_breakpoint = None

    # ----------------------------------------------------------------------------------------------- the engine's hooks

    def on_interrupt(self, vector: int) -> None:
        cpu = self.cpu
        if vector == t.BP:
            skip = self._skip_breakpoint
            usual = not self._stop_requested and (skip is None or skip[0] != cpu.linear_pc - 1)
            if (usual and self.shortcuts.take()) or self._on_int3():
                return
        if vector in t.FAULTS:
            self.watched.forget()  # what this instruction accessed before it faulted
        if vector == t.PF and cpu.cr(2) == cpu.linear_pc and self._breaks_at_fetch():
            return
        client = self.trap_client
        if vector == t.DB and client is not None and self._answered(client.on_debug(cpu)):
            return
        if vector == t.PF and self.window.repair(cpu.cr(2)):
            if cpu.cr(2) != cpu.linear_pc:
                self.uncount(1)  # it is executed again; one that could not be fetched was not counted
            cpu.forget_exception()
            return
        ours = self.window.contains(cpu.pc) or (vector in t.FAULTS and self.calls.depth > 0)
        if client is not None and ours and self._answered(client.on_fault(cpu, vector)):
            return
        software = cpu.software_interrupt
        length = (1 if vector in (t.BP, t.OF, t.DB) and not self._is_int_n(vector) else 2) if software else 0
        if self.log is not None:
            self.log("int", f"vector {vector:#x} code {cpu.error_code:#x} at {cpu.linear_pc:#x} cr2 {cpu.cr(2):#x}")
        self._deliver(Delivery(vector, None if software else cpu.error_code, software, length=length))

    def _breaks_at_fetch(self) -> bool:
        """A debugger's breakpoint where nothing can be fetched comes before the fault of it (SDM vol. 3, table 6-2).

        gdb has functions that it calls return to one on the stack, which 64-bit kernels do not execute.
        """
        pc = self.cpu.linear_pc
        place = self.text.place_at(pc) or self.text.hooked(pc)
        if place is None or self.calls.depth or self._skip_breakpoint == (pc, self.cpu.gpr[4]):
            return False
        for owner in place.owners:
            if isinstance(owner, Debugger) and self.breakpoints.holds(place.vaddr, owner.hardware):
                self._stop_for(Breakpoint(pc, owner.hardware))
                self.engine.break_here()  # nothing is retired, so the limit is never looked at ...
                self.uncount(-1)  # ... and no instruction was counted that did not execute
                self.cpu.forget_exception()
                return True
        return False

    def _is_int_n(self, vector: int) -> bool:
        """The instruction before the pc is `int n`, not the one-byte form of these vectors."""
        try:
            return self.traps.read(self.cpu.linear_pc - 2, 2) == bytes((0xCD, vector))
        except GuestFault:
            return False

    def on_invalid(self) -> None:
        client, cpu = self.trap_client, self.cpu
        if client is not None and self.window.contains(cpu.pc) and self._answered(client.on_fault(cpu, t.UD)):
            return
        self._deliver(Delivery(t.UD))

    def on_syscall(self) -> None:
        self._fast_entry(lambda length: self.traps.syscall(self.cpu.pc + length), "syscall")

    def on_sysenter(self) -> None:
        self._fast_entry(lambda _: self.traps.sysenter(), "sysenter")

    def _fast_entry(self, enter: Callable[[int], None], name: str) -> None:
        """The engine adds the instruction's length to the pc after its hook."""
        cpu = self.cpu
        planted, length = self.planted.at(cpu.linear_pc), 2
        if planted is None or self.planted.original(planted) != 0x0F:  # else the opcode is under an int3 of ours
            length = next(n for n in range(2, 16) if n == 15 or self.traps.read(cpu.linear_pc + n - 2, 1) == b"\x0f")
        if self.log is not None:
            self.log("syscall", f"{name} {cpu.gpr[0]} at {cpu.linear_pc:#x}")
        try:
            enter(length)
        except GuestFault as fault:
            self._deliver(Delivery(fault.vector, fault.code))
        cpu.pc = (cpu.pc - length) & ((1 << 64) - 1)

    def on_timestamp(self, with_processor: bool) -> None:
        gpr, now = self.cpu.gpr, self.clock.now_ns
        gpr[0], gpr[2] = now & 0xFFFFFFFF, now >> 32 & 0xFFFFFFFF  # EAX, EDX
        if with_processor:
            gpr[1] = self.engine.read_msr(MSR_TSC_AUX) & 0xFFFFFFFF  # ECX

    def on_in(self, port: int, size: int) -> int:
        return self.devices.bus.read(port, size)

    def on_out(self, port: int, size: int, value: int) -> None:
        self.devices.bus.write(port, size, value)

    def on_translated(self, pc: int, code: bytes) -> None:
        self._vex.look(pc, code)
        self.watched.look(pc, code)
        self.text.look(pc, code)
        self.breaks.look(pc, code)

    def _before_control_write(self) -> None:
        """Page tables are about to be switched: watchpoints are translated anew before the next instruction."""
        if self.cpu.running:
            self.engine.stop_here()

    def uncount(self, instructions: int) -> None:
        """Inside a trap handler: take instructions of ours (an int3, a jump back) off the clock."""
        self.engine.counter[0] -= instructions

    def _deliver(self, delivery: Delivery) -> None:
        """`Traps.deliver`, and what its outcome means for the run."""
        self.breaks.faulted(self._base + self.engine.counter[0])
        self.cpu.end_shadow()  # none outlasts a delivery
        try:
            self.traps.deliver(delivery)
        except TripleFaulted as fault:
            self._stop_for(TripleFault(self.cpu.linear_pc, fault.vector))
            if self.cpu.running:
                self.engine.break_here()  # a fault of the fetch itself retires nothing, so the limit is never looked at
        except CaughtException as caught:
            self._hold(caught.delivery)
        if self.traps.switched_tables:
            self.traps.switched_tables = False
            self.engine.flush_tlb()
            self._before_control_write()

    def _hold(self, delivery: Delivery) -> None:
        """Stop before the guest sees it; the next run delivers it."""
        cpu, vector = self.cpu, delivery.vector
        self._held = (delivery, cpu.linear_pc, cpu.gpr[4])
        code = delivery.code if vector in t.WITH_ERROR_CODE else None
        self._stop_for(ExceptionRaised(cpu.linear_pc, vector, code, cpu.cr(2) if vector == t.PF else None))
        if cpu.running:
            self.engine.break_here()
            self.uncount(-1)  # all that was counted was executed

    def _release(self) -> bool:
        """Deliver what was held, if the debugger has not gone elsewhere. -> whether that was so."""
        (delivery, pc, sp), self._held = self._held or (None, 0, 0), None
        if delivery is None or (self.cpu.linear_pc, self.cpu.gpr[4]) != (pc, sp):
            return False
        self.cpu.pc += delivery.length
        self._deliver(delivery)
        return True

    def _answered(self, verdict: Verdict | Stop) -> bool:
        """Carry out a trap client's answer; False if the guest must see the trap."""
        if verdict is Verdict.NOT_MINE or verdict is Verdict.DELIVER:
            return False
        if not isinstance(verdict, Verdict):
            self._stop_for(verdict)
        self.cpu.forget_exception()
        return True

    def _on_int3(self) -> bool:
        """An int3 ran: ours if an armed place is under it."""
        cpu = self.cpu
        pc = (cpu.linear_pc - 1) & ((1 << 64) - 1)
        if self._on_break(pc):
            return True
        place = self.text.place_at(pc)
        if place is None:
            return False
        cpu.pc -= 1
        if self.text.hooked(pc) is not None:
            self._passed = pc  # asked a moment ago, for the same arrival
        verdict = self._ask(place, pc)
        if verdict is None:  # nobody wants it: the guest's own instruction runs without the int3
            self.uncount(1)
            if self.text.place_at(pc) is place:  # else it was disarmed just now
                self._in_place = place
                self.engine.stop_here()
            self.cpu.forget_exception()
            return True
        if verdict is Verdict.DELIVER:
            cpu.pc += 1
            return False
        if not isinstance(verdict, Verdict):
            self.uncount(1)
        return self._answered(verdict)

    def _ask(self, place: Place, pc: int) -> Verdict | Stop | None:
        """The owners of an armed place, in order; None where all let it pass."""
        if self._stop_requested:
            self.engine.stop_here()  # a slice full of hits lasts a hundred times as long as one without
        wanted = False
        for owner in list(place.owners):
            if isinstance(owner, Debugger):
                if self._skip_breakpoint == (pc, self.cpu.gpr[4]) or self.calls.depth:
                    continue
                if self.breakpoints.holds(place.vaddr, owner.hardware):
                    return Breakpoint(pc, owner.hardware)
                continue
            if isinstance(owner, Watcher):
                stop = owner.call()
                if stop is not None:
                    return stop
            else:
                wanted = True
        if self._skip_breakpoint == (pc, self.cpu.gpr[4]) and (
            place.back_end is BackEnd.INT3 or not self.text.has_byte(pc)  # else the int3 behind the hook is asked next
        ):
            self._skip_breakpoint = None
        if not wanted or self.trap_client is None:
            return None
        began = time.perf_counter_ns()
        verdict = self.trap_client.on_break(self.cpu, pc, place.back_end)
        self.trapped_ns += time.perf_counter_ns() - began
        return None if verdict is Verdict.NOT_MINE else verdict

    def _on_pc_hook(self, pc: int) -> None:
        """Before the instruction at `pc`, without an int3. It is counted already and executes when this returns."""
        place = self.text.hooked(pc)
        if self._passed == pc:
            self._passed = None
        elif place is not None and self._taken_at_hook(place, pc):
            return
        if self._vex.stands_at(pc):
            self.on_invalid()
            self.engine.continue_at(self.cpu.pc)

    def _taken_at_hook(self, place: Place, pc: int) -> bool:
        """Ask the owners; True if the instruction must not execute now."""
        cpu = self.cpu
        before, at = cpu.integer_state(), cpu.pc
        verdict = self._ask(place, pc)
        if (verdict is None or verdict is Verdict.HANDLED) and before == cpu.integer_state():
            return False
        if verdict is None or isinstance(verdict, Verdict):
            # changed state takes effect when the instruction is entered anew, with the hook answered
            self._passed = pc if cpu.pc == at else None
            self.uncount(1)
        else:
            self._stop_for(verdict)
            self.engine.break_here()
        self.engine.continue_at(cpu.pc)
        return True
