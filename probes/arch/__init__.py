"""The contract between the generic probe core and a processor, as kernel/kprobes.c has it with arch/*/kprobes.

Rules: types only; a processor lives in a module of its own beside this one, and `probes.core` imports none of them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

from emu.iface import BackEnd, Cpu
from emu.insn import Insn


class Begin(enum.Enum):
    """What `begin_step` set in motion."""

    EXECUTED = 0  # emulated: cpu.pc is the next instruction
    RUNNING = 1  # the guest executes it with nobody watching: no #DB comes
    STEPPING = 2  # `finish_step` is due at the next #DB
    TRAP = 3  # the guest must see the trap the probed instruction is (its own int3)


class Finish(enum.Enum):
    """What a #DB meant to the step in progress."""

    AGAIN = 0  # one iteration of a repeated string instruction; the step goes on
    DIVIDED = 3  # the same, and it goes on later: cpu.pc is the instruction's own address
    DONE = 1  # stepped; the guest goes on at cpu.pc
    DONE_TRAP = 2  # stepped, and the guest was single-stepping itself: it is owed this #DB


@dataclass(frozen=True, slots=True)
class Short:
    """The usual course of a hit by int3: no trap flag, code and tables as they were when it was worked out.

    `observe`: it is for a place with post-handlers. `emulate`, where there is one, executes the instruction; else the
    guest goes on at `to`. There `over` is the address of an int3 that ends the step, and `end` where the guest goes on
    then; -1 where nobody waits for the end. `uncount`: instructions of ours to take off at the arrival;
    what is left of two int3s comes off at the step's end.
    """

    observe: bool
    uncount: int
    to: int
    emulate: Callable[[Cpu], None] | None = None
    over: int = -1
    end: int = -1


@dataclass(frozen=True, slots=True)
class Convention:
    """One word size as data: what registers are called, how arguments travel.

    Register numbers are those of `Cpu.gpr`. `argument_registers` hold `$arg1` on; the rest lie on the stack above the
    return address. `registers` maps pt_regs' names to numbers; `word` is in bytes.
    """

    bits: int
    word: int
    registers: Mapping[str, int]
    segments: tuple[str, ...]
    argument_registers: tuple[int, ...]
    return_register: int
    stack_pointer: int

    @property
    def mask(self) -> int:
        return (1 << self.bits) - 1


class Prepared(Protocol):
    """What a processor keeps for one probed address."""

    address: int
    insn: Insn | None

    @property
    def needs_hook(self) -> str | None:
        """Why this instruction cannot run out of line and is armed by a PC hook; None where it can."""
        ...

    @property
    def linux_refusal(self) -> tuple[int, str] | None:
        """The errno and reason by which mainline Linux would refuse this instruction."""
        ...


class ProbeArch(Protocol):
    """What `core` asks of a processor. One step can be in progress at a time."""

    convention: Convention
    step_flag: int  # of Cpu.system_flags: the guest single-steps itself

    def user_convention(self, bits: int) -> Convention:
        """How functions of programs are called, in code of that many bits."""
        ...

    def arch_init(self) -> None:
        """Once, before the first probe."""
        ...

    def arch_prepare(self, address: int, function: int | None) -> Prepared:
        """Decode, and check the boundary from `function`'s start where known.

        ProbeError EILSEQ at no instruction boundary or undecodable bytes. An address that is not mapped yet is
        decoded at its first hit.
        """
        ...

    def arch_arm(self, prepared: Prepared, back_end: BackEnd) -> None:
        """Arm; INT3 makes the out-of-line copy first.

        ProbeError ENOMEM without a slot, EINVAL where the instruction cannot run out of line; MemoryFault where
        INT3 is asked for and the page is not there.
        """
        ...

    def arch_refresh(self, prepared: Prepared) -> bool:
        """At a hit: take over what the guest has made of the instruction since; False if it can't run out of line."""
        ...

    def arch_persists(self, prepared: Prepared) -> bool:
        """False where the guest has put code there that does not begin at this address, as far as can be told."""
        ...

    def shorten(
        self,
        prepared: Prepared,
        observe: bool,
        arrive: Callable[[Short], Callable[[], int | None]],
        finish: Callable[[Short], Callable[[], int | None]],
    ) -> None:
        """For a place armed by INT3: have usual hits call what `arrive` returns, and ends of steps what `finish` does.

        Those say where the guest goes on, or None to have it the long way. Without effect where no way is usual.
        """
        ...

    def arch_disarm(self, prepared: Prepared) -> None: ...

    def arch_remove(self, prepared: Prepared) -> None: ...

    def begin_step(self, cpu: Cpu, prepared: Prepared, back_end: BackEnd, observe: bool) -> Begin:
        """Have the probed instruction executed once; `observe`: a post-handler waits for its end.

        Some instructions can't be observed in place (see `needs_hook`); they answer RUNNING all the same.
        """
        ...

    def finish_step(self, cpu: Cpu, prepared: Prepared) -> Finish:
        """At #DB: make registers and stack what they'd be had the instruction run at its own address."""
        ...

    def abort_step(self, cpu: Cpu, prepared: Prepared) -> None:
        """At a fault: put pc and flags back to where the hardware would report it."""
        ...

    def cancel_step(self) -> None:
        """The step in progress, if any, will not end: the call into the guest that it was part of was given up."""
        ...

    def is_over(self, cpu: Cpu, vector: int, prepared: Prepared) -> bool:
        """The trap is the int3 that ends a step, met the long way; then `cpu.pc` is the next instruction."""
        ...

    def leave_slot(self, cpu: Cpu, prepared: Prepared) -> Finish | None:
        """Between runs, in a step: end it or divide it where that can be, as the guest is to stop or be interrupted."""
        ...

    def position(self, cpu: Cpu) -> Hashable:
        """What tells the arrival at the rest of a divided instruction from other ones."""
        ...

    def find_slot(self, vaddr: int) -> Prepared | None:
        """The probe whose copy covers `vaddr`."""
        ...

    def is_repeat(self, cpu: Cpu, prepared: Prepared) -> bool:
        """True where a PC hook fired for a further iteration of a string instruction already counted."""
        ...

    def gate(self, key: Hashable) -> int:
        """An address where the guest comes to us: an int3 in the slot window, the same one for the same `key`.

        Return probes put one on a stack in place of a return address. It may change when the guest's tables or the
        machine's state do. ProbeError ENOMEM or MachineError without one.
        """
        ...

    def gate_trap(self, cpu: Cpu, vector: int) -> tuple[int, BackEnd] | None:
        """Whether a trap in the window came at a gate, whose address is then `cpu.pc`.

        INT3: its own int3 has run. HOOK: another trap came first, which the guest must see once it has returned.
        """
        ...

    def skip(self, back_end: BackEnd) -> None:
        """A handler has set pc: the probed instruction doesn't run, so it isn't counted either."""
        ...
