"""Kprobes on x86, both word sizes: slots, arming, and the step out of line.

Rules: called by `probes.core` in the engine's thread; instruction classes come from `x86_insn`, and everything that
touches the machine goes through `emu.iface`. One step is in progress at a time: the machine takes no interrupt while
pc is inside the slot window, and a fault ends the step.

A slot is 64 bytes of the window. Its first half runs unobserved (the copy and a jump back, or what replaces a call),
its second half is the bare copy for stepping under EFLAGS.TF. An int3 costs the clock one instruction; each way of
executing takes off what the bare program would not have retired, so that time passes as if no probe were there.
"""

from __future__ import annotations

import contextlib
import errno
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Final

from emu.iface import BackEnd, Cpu, Machine, MachineError, MemoryFault
from emu.insn import MAX_INSN_SIZE, Insn, InvalidInstruction, boundaries, decode
from probes.arch import Begin, Convention, Finish, Prepared, Short
from probes.arch.x86_code import boosted_code, push_of_call, relocated, taken_off
from probes.arch.x86_insn import (
    PLAIN,
    RF,
    TF,
    ZF,
    Boost,
    Emulator,
    Fix,
    InsnClass,
    branch_target,
    classify,
    is_repeated,
    tests_zero_flag,
)
from probes.errors import ProbeError

SLOT_SIZE: Final = 64
_STEP_HALF: Final = 32
_SP: Final = 4
_BP: Final = 3  # the vector of int3
_INT3, _RET = 0xCC, 0xC3
_CX, _SI, _DI = 1, 6, 7
_EMULATION_PREFIXES: Final = (b"\x0f\x0bkvm", b"\x0f\x0bxen")  # arch/x86/include/asm/emulate_prefix.h
_PAGE: Final = 4096
_MAX_REPEATS: Final = 64  # interrupted string instructions remembered, one per stack

_LOW: Final = {"ax": 0, "cx": 1, "dx": 2, "bx": 3, "sp": 4, "bp": 5, "si": 6, "di": 7}

# Names are those of regoffset_table in arch/x86/kernel/ptrace.c; i386 keeps its data segments in pt_regs.
AMD64: Final = Convention(
    bits=64,
    word=8,
    registers={**_LOW, **{f"r{number}": number for number in range(8, 16)}},
    segments=("cs", "ss"),
    argument_registers=(7, 6, 2, 1, 8, 9),
    return_register=0,
    stack_pointer=_SP,
)
I386: Final = Convention(
    bits=32,
    word=4,
    registers=_LOW,
    segments=("cs", "ss", "ds", "es", "fs", "gs"),
    argument_registers=(0, 2, 1),  # the kernel is built with -mregparm=3
    return_register=0,
    stack_pointer=_SP,
)


I386_USER: Final = replace(I386, argument_registers=())  # System V ABI, i386 supplement: all on the stack


def convention_for(bits: int) -> Convention:
    """The parameter set of a machine whose processor is `bits` wide; real mode counts as i386."""
    return AMD64 if bits == 64 else I386


@dataclass(slots=True)
class X86Probe:
    """What one probed address needs at a hit, worked out beforehand.

    `slot` is the slot's number and `code` the virtual address its code was made for; both None without a slot.
    `boosted` says the first half may run unobserved and `boost_uncount` how many instructions that takes off.
    `pushes` says the second half holds a push of a call's true return address instead of the call's copy. `undefined`
    bytes are for the guest to meet where they stand: Linux probes them too, and newer processors may have them.
    """

    address: int
    insn: Insn | None = None
    kind: InsnClass = PLAIN
    emulate: Emulator | None = None
    slot: int | None = None
    code: int | None = None
    boosted: bool = False
    boost_uncount: int = 0
    pushes: bool = False
    short: Short | None = None
    undefined: bool = False

    @property
    def needs_hook(self) -> str | None:
        if self.undefined:
            return "no processor that is known here has this instruction"
        if self.insn is None:
            return None
        if self.insn.bits == 16:
            return "16-bit code cannot reach the slots"
        return self.kind.hook

    @property
    def linux_refusal(self) -> tuple[int, str] | None:
        return self.kind.linux


@dataclass(slots=True)
class _Step:
    """The step in progress: where the stepped bytes lie, whether the guest itself had TF set, cx and DR6 before it, and
    where a call whose return address is being pushed goes next."""

    probe: X86Probe
    at: int
    guest_tf: int
    count: int
    dr6: int
    target: int | None


class X86Arch:
    """ProbeArch for i386 and amd64: one class, two `Convention`s."""

    step_flag = TF

    def __init__(self, machine: Machine, owner: object) -> None:
        self.convention = convention_for(machine.bits)
        self._machine = machine
        self._owner = owner
        self._free: deque[int] = deque()
        self._used: dict[int, X86Probe] = {}
        self._gates: dict[Hashable, X86Probe] = {}
        self._step: _Step | None = None
        self._repeats: dict[tuple[int, int], tuple[int, int, int, int, int]] = {}

    def user_convention(self, bits: int) -> Convention:
        return AMD64 if bits == 64 else I386_USER

    def arch_init(self) -> None:
        # First in, first out: a slot that is being executed when its probe goes is not reused at once.
        self._free = deque(range(self._machine.window.size // SLOT_SIZE))

    # ---------------------------------------------------------------------------------------- preparing and arming

    def arch_prepare(self, address: int, function: int | None) -> X86Probe:
        if (gate := self._gate_at(address)) is not None:
            return gate
        probe = X86Probe(address)
        try:
            self._check_boundary(address, function)
            self._decode(probe, self.convention.bits)
        except MemoryFault:
            return probe
        except InvalidInstruction as error:
            if error.address != address:
                raise ProbeError(errno.EILSEQ, str(error)) from error
            probe.undefined = True
        return probe

    def arch_arm(self, prepared: Prepared, back_end: BackEnd) -> None:
        probe = _ours(prepared)
        if self._is_gate(probe):
            return  # its slot holds an int3 for good
        if back_end is BackEnd.INT3:
            self._make_slot(probe)
        self._machine.text.arm(probe.address, self._owner, back_end)

    def gate(self, key: Hashable) -> int:
        probe, window = self._gates.get(key), self._machine.window
        if probe is None:
            if not self._free:
                raise ProbeError(errno.ENOMEM, "no instruction slot is free")
            probe = self._gates[key] = X86Probe(0, slot=self._free.popleft())
        offset = (probe.slot or 0) * SLOT_SIZE
        address = window.address(offset)
        if address != probe.code:
            window.write(offset, b"\xcc" * SLOT_SIZE)
            probe.address = probe.code = address
        return address

    def gate_trap(self, cpu: Cpu, vector: int) -> tuple[int, BackEnd] | None:
        if vector == _BP and self._gate_at(cpu.pc - 1) is not None:
            cpu.pc -= 1
            return cpu.pc, BackEnd.INT3
        return (cpu.pc, BackEnd.HOOK) if self._gate_at(cpu.pc) is not None else None

    def _gate_at(self, address: int) -> X86Probe | None:
        return next((gate for gate in self._gates.values() if gate.code == address), None)

    def _is_gate(self, probe: X86Probe) -> bool:
        return any(gate is probe for gate in self._gates.values())

    def arch_refresh(self, prepared: Prepared) -> bool:
        probe = _ours(prepared)
        insn = probe.insn
        if insn is None:
            return True
        now = self._machine.text.code(probe.address, insn.size)
        if now == insn.data or (now is not None and len(now) < insn.size and insn.data.startswith(now)):
            return True
        try:
            if now is None and self._read_code(probe.address).startswith(insn.data):
                return True
            self._decode(probe, self.convention.bits)
            if probe.needs_hook is not None:
                return False
            if probe.slot is not None:
                self._write_slot(probe, probe.slot)
        except (MachineError, InvalidInstruction, ProbeError):
            return False
        return True

    def arch_persists(self, prepared: Prepared) -> bool:
        probe = _ours(prepared)
        insn = probe.insn
        now = None if insn is None else self._machine.text.code(probe.address, insn.size)
        if insn is None or now is None or insn.data.startswith(now):
            return True
        if now[0] == _INT3:
            return False  # what Linux fills freed code with
        try:
            following = decode(self._read_code(probe.address), probe.address, self.convention.bits)
        except (MemoryFault, InvalidInstruction):
            return False
        # Static keys, ftrace and static calls put one instruction in another's place, or a `ret` in a call's.
        return following.size == insn.size or following.opcode == _RET

    def shorten(
        self,
        prepared: Prepared,
        observe: bool,
        arrive: Callable[[Short], Callable[[], int | None]],
        finish: Callable[[Short], Callable[[], int | None]],
    ) -> None:
        probe = _ours(prepared)
        window, insn = self._machine.window, probe.insn
        probe.short = None
        if self._is_gate(probe):
            returned = Short(observe=False, uncount=1, to=probe.address)
            window.shorten((probe.slot or 0) * SLOT_SIZE, arrive(returned), 1)
            return
        if insn is None or probe.slot is None or probe.kind.is_breakpoint:
            return
        try:
            short = self._short(probe, insn, self._code(probe), observe)
        except (MachineError, ProbeError):
            return
        if short is None:
            return
        text, probe.short = self._machine.text, short
        text.shorten(probe.address, self._owner, insn.data, short.to, arrive(short), short.uncount)
        if short.over >= 0:
            window.shorten(short.over - window.address(0), finish(short), 2 - short.uncount)

    def _short(self, probe: X86Probe, insn: Insn, code: int, observe: bool) -> Short | None:
        if probe.emulate is not None:
            return Short(observe, 0, code, probe.emulate)
        if not is_repeated(insn):
            if not observe:
                return Short(observe, probe.boost_uncount, code) if probe.boosted else None
            if probe.kind.boost is not Boost.JUMP_BACK:
                return None  # it does not come to the int3 behind its copy, or must not see one there
        over = code + _STEP_HALF + insn.size
        return Short(observe, taken_off(insn), code + _STEP_HALF, over=over, end=insn.end)

    def is_over(self, cpu: Cpu, vector: int, prepared: Prepared) -> bool:
        probe = _ours(prepared)
        if vector != _BP or self._step is not None or cpu.pc != self._over(probe) + 1:
            return False
        assert probe.insn is not None
        cpu.pc = probe.insn.end
        self._machine.uncount(2 - taken_off(probe.insn))
        return True

    def leave_slot(self, cpu: Cpu, prepared: Prepared) -> Finish | None:
        probe = _ours(prepared)
        insn = probe.insn
        assert insn is not None  # nothing is stepped undecoded
        if not is_repeated(insn):
            return None
        if self._step is None and cpu.pc == self._over(probe):
            cpu.pc = insn.end
            return Finish.DONE
        if cpu.pc == self._over(probe) - insn.size:
            self.abort_step(cpu, prepared)
            return Finish.DIVIDED
        return None

    def position(self, cpu: Cpu) -> Hashable:
        gpr = cpu.gpr
        return gpr[_SP], gpr[_CX], gpr[_SI], gpr[_DI]

    def _over(self, probe: X86Probe) -> int:
        """The address of the int3 behind the copy."""
        assert probe.insn is not None
        return self._code(probe) + _STEP_HALF + probe.insn.size

    def arch_disarm(self, prepared: Prepared) -> None:
        self._machine.text.disarm(prepared.address, self._owner)

    def arch_remove(self, prepared: Prepared) -> None:
        if self._is_gate(_ours(prepared)):
            return  # its slot stays reserved
        # The copy stays findable until its slot is taken again: a handler may remove the very probe that was hit.
        slot = _ours(prepared).slot
        if slot is not None:
            self._free.append(slot)

    def find_slot(self, vaddr: int) -> X86Probe | None:
        return self._used.get((vaddr - self._machine.window.address(0)) // SLOT_SIZE)

    # ------------------------------------------------------------------------------------------------- at a hit

    def begin_step(self, cpu: Cpu, prepared: Prepared, back_end: BackEnd, observe: bool) -> Begin:
        probe = _ours(prepared)
        if back_end is BackEnd.HOOK:
            return self._begin_at_hook(cpu, probe) if observe else Begin.RUNNING
        if probe.kind.is_breakpoint:
            assert probe.insn is not None
            cpu.pc += probe.insn.size - 1  # prefixes: the trap adds the one byte of the int3 that was executed
            return Begin.TRAP
        guest_tf = cpu.system_flags & TF
        if probe.emulate is not None and not guest_tf:
            probe.emulate(cpu)  # the int3 counts as the instruction
            return Begin.EXECUTED
        code = self._code(probe)
        if probe.boosted and not observe and not guest_tf:
            self._machine.uncount(probe.boost_uncount)
            cpu.pc = code
            return Begin.RUNNING
        self._machine.uncount(1)
        return self._begin_copy(cpu, probe, code + _STEP_HALF)

    def finish_step(self, cpu: Cpu, prepared: Prepared) -> Finish:
        step, probe = self._taken_step(), _ours(prepared)
        insn = probe.insn
        assert insn is not None  # nothing is stepped undecoded
        if is_repeated(insn):
            if cpu.pc == step.at:
                self._step = step
                if step.at == probe.address:
                    return Finish.AGAIN
                self.abort_step(cpu, prepared)  # the guest steps itself through the iterations
                return Finish.DIVIDED
            if step.at == probe.address:
                self._settle_repeat(cpu, insn, step)
        fix, delta, mask = probe.kind.fix, probe.address - step.at, self.convention.mask
        if step.target is not None:
            cpu.pc = step.target
            fix, delta = Fix.ABSOLUTE, 0
        if fix not in (Fix.ABSOLUTE, Fix.CALL_ABSOLUTE):
            cpu.pc = (cpu.pc + delta) & mask
        if fix in (Fix.CALL_RELATIVE, Fix.CALL_ABSOLUTE) and delta:
            self._machine.memory.write(self._stack_top(cpu), insn.end.to_bytes(self.convention.word, "little"))
        elif fix is Fix.PUSH_FLAGS:
            self._restore_pushed_tf(cpu, step.guest_tf)
        if fix is not Fix.POP_FLAGS:
            cpu.system_flags = (cpu.system_flags & ~TF) | step.guest_tf
        if not step.guest_tf:
            cpu.set_debug_register(6, step.dr6)  # our step's bit, and those of breakpoint registers that name this pc
        return Finish.DONE_TRAP if step.guest_tf else Finish.DONE

    def abort_step(self, cpu: Cpu, prepared: Prepared) -> None:
        probe = _ours(prepared)
        if self._step is not None:
            step = self._taken_step()
            cpu.pc = (cpu.pc + probe.address - step.at) & self.convention.mask
            cpu.system_flags = (cpu.system_flags & ~TF) | step.guest_tf
            return
        # A fault retires nothing more than the attempt itself, so what was taken off for the way back is owed.
        at = self._code(probe)
        if cpu.pc >= at + _STEP_HALF:
            at += _STEP_HALF
            assert probe.insn is not None
            self._machine.uncount(1 - taken_off(probe.insn))
        else:
            self._machine.uncount(1 - probe.boost_uncount)
        cpu.pc = (cpu.pc + probe.address - at) & self.convention.mask

    def cancel_step(self) -> None:
        self._step = None

    def skip(self, back_end: BackEnd) -> None:
        if back_end is BackEnd.INT3:
            self._machine.uncount(1)

    def is_repeat(self, cpu: Cpu, prepared: Prepared) -> bool:
        """A PC hook fires before each iteration of a rep, and once more with cx at 0; the first is the hit.

        A further one follows its predecessor within one instruction or, where an interrupt came between, finds the
        count, the pointers and the stack as the predecessor must have left them; or all of them as they were, with RF
        set, where its predecessor has faulted and starts anew.
        """
        probe = _ours(prepared)
        insn = probe.insn
        if insn is None or not is_repeated(insn):
            return False
        mask = (1 << insn.address_bits) - 1
        now = self._machine.clock.instructions
        count, stack = cpu.gpr[_CX] & mask, (cpu.cr3, cpu.gpr[_SP])
        before = self._repeats.pop(stack, None)
        if count:
            if len(self._repeats) >= _MAX_REPEATS:
                self._repeats.clear()
            self._repeats[stack] = (probe.address, count - 1, cpu.gpr[_SI], cpu.gpr[_DI], now)
        if before is None:
            return False
        if before[:4] == (probe.address, count - 1, cpu.gpr[_SI], cpu.gpr[_DI]):
            return bool(cpu.system_flags & RF)
        if before[:2] != (probe.address, count):
            return False
        if now - before[4] <= 1:
            return True
        moved = before[2:4] != (cpu.gpr[_SI], cpu.gpr[_DI])
        return moved and not tests_zero_flag(insn)

    # ------------------------------------------------------------------------------------------------ internals

    def _begin_at_hook(self, cpu: Cpu, probe: X86Probe) -> Begin:
        """A PC hook with a post-handler: out of line as with int3, or in place where there's no way to a slot.

        A hook that moves pc takes its instruction off the clock by itself.
        """
        if probe.insn is None:
            try:
                self._decode(probe, cpu.bits)
            except (MemoryFault, InvalidInstruction):
                return Begin.RUNNING  # the guest is about to take the fault itself
        elif not self.arch_refresh(probe):
            return Begin.RUNNING
        if probe.kind.hook is not None or probe.kind.is_breakpoint:
            return Begin.RUNNING
        if probe.emulate is not None and not cpu.system_flags & TF:
            count = cpu.gpr[_CX]
            probe.emulate(cpu)
            if cpu.pc != probe.address:
                self._machine.uncount(-1)
                return Begin.EXECUTED
            cpu.gpr[_CX] = count  # a branch to itself: the hook would be taken for answered at the next arrival
        at = probe.address
        if cpu.cpl != 3:
            with contextlib.suppress(ProbeError, MachineError):
                self._make_slot(probe)
                at = self._code(probe) + _STEP_HALF
        return self._begin_copy(cpu, probe, at)

    def _begin_copy(self, cpu: Cpu, probe: X86Probe, at: int) -> Begin:
        """Step what lies at `at`; a string instruction in a slot runs to the int3 behind it, at full speed."""
        assert probe.insn is not None
        if at == probe.address or cpu.system_flags & TF or not is_repeated(probe.insn):
            return self._trap_after(cpu, probe, at)
        cpu.pc = at
        return Begin.STEPPING

    def _trap_after(self, cpu: Cpu, probe: X86Probe, at: int) -> Begin:
        target = self._call_target(cpu, probe) if probe.pushes and at != probe.address else None
        self._step = _Step(probe, at, cpu.system_flags & TF, cpu.gpr[_CX], cpu.debug_register(6), target)
        cpu.system_flags |= TF
        cpu.pc = at
        return Begin.STEPPING

    def _call_target(self, cpu: Cpu, probe: X86Probe) -> int:
        """Where the call goes, read before the push moves the stack pointer."""
        assert probe.insn is not None
        register = probe.insn.register_operand
        return branch_target(probe.insn) if register is None else cpu.gpr[register] & self.convention.mask

    def _taken_step(self) -> _Step:
        step, self._step = self._step, None
        assert step is not None  # core tracks who is stepping
        return step

    def _decode(self, probe: X86Probe, bits: int) -> None:
        data = self._read_code(probe.address)
        insn = decode(data, probe.address, bits)
        kind = classify(insn)
        if data.startswith(_EMULATION_PREFIXES):
            kind = replace(kind, linux=(errno.EINVAL, "an emulation prefix"))
        probe.undefined = False
        probe.insn, probe.kind = insn, kind
        probe.emulate = None if kind.emulate is None else kind.emulate(insn)

    def _read_code(self, address: int) -> bytes:
        """Up to 15 bytes, fewer where the next page is missing, as the processor fetches them."""
        memory = self._machine.memory
        here = min(MAX_INSN_SIZE, _PAGE - address % _PAGE)
        data = memory.read(address, here)
        if here == MAX_INSN_SIZE:
            return data
        try:
            return data + memory.read(address + here, MAX_INSN_SIZE - here)
        except MemoryFault:
            return data

    def _check_boundary(self, address: int, function: int | None) -> None:
        """The kernel's can_probe: decode from the function's start; ProbeError EILSEQ inside an instruction."""
        if function is None or function == address:
            return
        text = self._machine.memory.read(function, address - function)
        starts = boundaries(
            lambda vaddr, size: text[vaddr - function :][:size], function, address, self.convention.bits
        )
        at = max(starts)
        if at + decode(self._read_code(at), at, self.convention.bits).size != address:
            raise ProbeError(errno.EILSEQ, "Probe point is not an instruction boundary", token="BAD_INSN_BNDRY")

    def _make_slot(self, probe: X86Probe) -> None:
        if probe.slot is not None:
            return
        if probe.insn is None and not probe.undefined:
            try:
                self._decode(probe, self.convention.bits)
            except InvalidInstruction as error:
                raise ProbeError(errno.EILSEQ, str(error)) from error
        if (reason := probe.needs_hook) is not None:
            raise ProbeError(errno.EINVAL, f"cannot run out of line: {reason}")
        if not self._free:
            raise ProbeError(errno.ENOMEM, "no instruction slot is free")
        slot = self._free.popleft()
        try:
            self._write_slot(probe, slot)
        except MachineError as error:
            self._free.append(slot)
            raise ProbeError(errno.ENOMEM, str(error)) from error
        except ProbeError:
            self._free.append(slot)
            raise
        probe.slot = slot
        self._used[slot] = probe

    def _code(self, probe: X86Probe) -> int:
        """Where the slot lies in the address space in force; its code is made anew if the window has moved."""
        assert probe.slot is not None  # armed by int3
        address = self._machine.window.address(probe.slot * SLOT_SIZE)
        if address != probe.code:
            self._write_slot(probe, probe.slot)
        return address

    def _write_slot(self, probe: X86Probe, slot: int) -> None:
        window = self._machine.window
        address = window.address(slot * SLOT_SIZE)
        assert probe.insn is not None
        push = push_of_call(probe.insn, probe.kind)
        probe.pushes = push is not None
        copy = relocated(probe.insn, address + _STEP_HALF) if push is None else push
        boosted, probe.boost_uncount = boosted_code(probe.insn, probe.kind, address)
        probe.boosted = boosted is not None
        window.write(slot * SLOT_SIZE, (boosted or b"").ljust(_STEP_HALF, b"\xcc") + copy + b"\xcc")
        probe.code = address

    def _settle_repeat(self, cpu: Cpu, insn: Insn, step: _Step) -> None:
        """Without TF the engine retires a rep that runs out of count once more, to find cx at 0; count that too."""
        mask = (1 << insn.address_bits) - 1
        if not step.count & mask or cpu.gpr[_CX] & mask:
            return
        if tests_zero_flag(insn) and (cpu.eflags & ZF != 0) == (0xF2 in insn.prefixes):
            return  # ended by ZF, before cx was looked at
        self._machine.uncount(-1)

    def _stack_top(self, cpu: Cpu) -> int:
        return (cpu.segment_base("ss") + cpu.gpr[_SP]) & self.convention.mask

    def _restore_pushed_tf(self, cpu: Cpu, guest_tf: int) -> None:
        """Bit 8 of a pushed flags image is bit 0 of its second byte, whatever the operand size."""
        at, memory = self._stack_top(cpu) + 1, self._machine.memory
        memory.write(at, bytes([memory.read(at, 1)[0] & ~1 | guest_tf >> 8]))


def _ours(prepared: Prepared) -> X86Probe:
    """`core` hands back what `arch_prepare` gave it."""
    assert isinstance(prepared, X86Probe)
    return prepared
