"""Calls into the guest: one of its functions runs to its return while a trap handler, or the stopped machine, waits.

Rules: the machine's thread only. A call is off the clock: inside it time runs, or a callee that waits for time would
wait for ever, and afterwards it is what it was. No interrupt is delivered, no timer fires, a debugger's breakpoints are
passed; faults are delivered to the guest, so that demand paging in the callee works. What the callee wrote to memory
and devices stays, also where the call is given up: nothing of that is undone. A callee given up in the middle may so
leave a lock held or a timer queued on a stack frame that is gone; one that may sleep is better not called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Final, Protocol

from emu.cpustate import AC, DF, IF, NT, RF, TF, CpuState
from emu.iface import CallAborted, MemoryFault
from emu.memory import GuestMemory
from emu.stops import Interrupted, Stop
from emu.symbols import GuestSymbols
from emu.window import GATES, SlotWindow

# A call through a register, as retpoline kernels make every indirect call: r11 on amd64, where rax counts vector
# arguments; ebx on i386, where regparm(3) takes the others. It returns to the HLT behind it, which ends the run.
_GATE: Final = {64: b"\x41\xff\xd3\xf4", 32: b"\xff\xd3\xf4"}
_TARGET_REGISTER: Final = {64: 11, 32: 3}
_EXIT: Final = GATES + 16
_HLT: Final = b"\xf4"
_SP: Final = 4

# What a task enters to give up the processor: the first that the guest has. Linux's schedule() calls __schedule().
_SLEEPERS: Final = ("__schedule", "schedule", "__switch_to_asm", "switch_to")
_MAY_YIELD: Final = "__cond_resched"  # Linux; to a task with interrupts off nothing is due, and it returns 0
_RED_ZONE: Final = 128  # of the amd64 ABI: kernels have none, bare images may
_ROOM: Final = 512  # bytes below the stack pointer that must be there before anything is tried
_ALIGNMENT: Final = 16  # of the stack arguments, in both ABIs


class CallHost(Protocol):
    """What a call needs of the machine."""

    cpu: CpuState
    memory: GuestMemory
    window: SlotWindow
    symbols: GuestSymbols
    halted: bool

    @property
    def instructions(self) -> int: ...

    def aside(self) -> AbstractContextManager[None]:
        """Inside, the processor is free for something else; afterwards it, the clock and the run are as before."""
        ...

    def run_aside(self, budget: int) -> Stop | None:
        """Execute until HLT (`halted` says so), a stop, or at most `budget` instructions."""
        ...

    def watch(self, vaddr: int, call: Callable[[], Stop | None], /) -> Callable[[], None]: ...


class GuestCalls:
    """The calls of one machine; see iface.Machine.call."""

    def __init__(self, host: CallHost) -> None:
        self._host = host
        self.depth = 0
        self._ready = False
        self._slept = ""

    @property
    def exit(self) -> int:
        """An address that ends the call in progress when it is reached, by a jump or by a return to it."""
        self._prepare()
        return self._host.window.address(_EXIT)

    def call(self, target: int, gpr: Mapping[int, int], stack: bytes, budget: int) -> Sequence[int]:
        """See iface.Machine.call."""
        cpu = self._host.cpu
        bits = 64 if cpu.long_mode else 32
        if cpu.cpl or cpu.bits != bits:
            raise CallAborted("the processor is not in the kernel's code")
        self._prepare()
        with contextlib.ExitStack() as undo:
            undo.enter_context(self._host.aside())
            self._enter(target, gpr, stack, bits)
            if not self.depth:
                self._slept = ""
                self._watch_sleep(undo)
            self.depth += 1
            try:
                self._run(budget)
            finally:
                self.depth -= 1
            return list(cpu.gpr)

    def _prepare(self) -> None:
        if not self._ready:
            window, bits = self._host.window, 64 if self._host.cpu.long_mode else 32
            window.write(GATES, _GATE[bits])
            window.write(_EXIT, _HLT)
            self._ready = True

    def _enter(self, target: int, gpr: Mapping[int, int], stack: bytes, bits: int) -> None:
        """Make the processor what it is at the gate."""
        cpu, memory = self._host.cpu, self._host.memory
        mask = (1 << bits) - 1
        for number, value in gpr.items():
            cpu.gpr[number] = value & mask
        cpu.gpr[_TARGET_REGISTER[bits]] = target & mask
        sp = ((cpu.gpr[_SP] - _RED_ZONE - len(stack)) & mask) // _ALIGNMENT * _ALIGNMENT
        try:
            memory.read(cpu.segment_base("ss") + sp - _ROOM, _ROOM)
            if stack:
                memory.store(cpu.segment_base("ss") + sp, stack)
        except MemoryFault as fault:
            raise CallAborted(f"no room on the stack at {fault.address:#x}") from fault
        cpu.gpr[_SP] = sp
        cpu.eflags &= ~(TF | IF | DF | NT | RF | AC)
        cpu.pc = self._host.window.address(GATES)

    def _run(self, budget: int) -> None:
        """From the gate to one of the two ends; CallAborted anywhere else."""
        host = self._host
        ends = (host.cpu.pc + len(_GATE[host.cpu.bits]), host.cpu.pc + _EXIT - GATES + 1)
        last = host.instructions + budget
        while True:
            left = last - host.instructions
            if left <= 0:
                raise CallAborted(f"it did not return within {budget:,} instructions")
            stop = host.run_aside(left)
            if host.halted:
                if host.cpu.pc in ends:
                    return
                raise CallAborted(f"it would sleep: HLT at {host.cpu.linear_pc - 1:#x}")
            if stop is not None:
                raise CallAborted(self._slept or f"the machine stopped in it: {stop}", None if self._slept else stop)

    def _watch_sleep(self, undo: contextlib.ExitStack) -> None:
        """Until `undo` ends, a sleep ends the call, and an offer to be preempted is declined."""
        for name in _SLEEPERS:
            found = self._host.symbols.lookup(name)
            if found:
                self._watch(found[0].address, partial(self._sleep, name, found[0].address), undo)
                break
        for symbol in self._host.symbols.lookup(_MAY_YIELD)[:1]:
            self._watch(symbol.address, self._return_zero, undo)

    def _watch(self, vaddr: int, call: Callable[[], Stop | None], undo: contextlib.ExitStack) -> None:
        with contextlib.suppress(MemoryFault):
            undo.callback(self._host.watch(vaddr, call))

    def _sleep(self, name: str, vaddr: int) -> Stop:
        self._slept = f"it would sleep: it entered {name}"
        return Interrupted(vaddr)

    def _return_zero(self) -> None:
        """From the entry of a function, as its `xor eax, eax; ret` would."""
        cpu, word = self._host.cpu, self._host.cpu.bits // 8
        returns_to = self._host.memory.read(cpu.segment_base("ss") + cpu.gpr[_SP], word)
        cpu.gpr[0], cpu.gpr[_SP], cpu.pc = 0, cpu.gpr[_SP] + word, int.from_bytes(returns_to, "little")
