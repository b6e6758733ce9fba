"""How each class of x86 instruction is executed when it is probed, so that the guest cannot tell.

Rules: pure; tables and closures over a `Cpu`, no machine. Instructions are told apart by (encoding, map, opcode) alone.
The classes are those of the single-step table in the project's probe reference; sources are SDM vol. 2 and, for what
Linux refuses, arch/x86/kernel/kprobes/core.c (6.12).

Four ways to run one:
- *emulate*: branches that touch no memory and no-ops only move pc (and cx).
- *boost*: the copy runs in its slot and a jump (or the instruction itself) leads out; nobody is called back.
- *step*: the copy runs under EFLAGS.TF and its traces are put right at the #DB.
- *hook*: the instruction must run at its own address, because the address or a stepping flag would show.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from emu.iface import Cpu
from emu.insn import Encoding, Insn

Emulator: TypeAlias = Callable[[Cpu], None]

CF, PF, ZF, SF, TF, OF, RF = 0x1, 0x4, 0x40, 0x80, 0x100, 0x800, 0x10000
_CX: Final = 1
_SP: Final = 4
_STRING_OPCODES: Final = frozenset((*range(0x6C, 0x70), *range(0xA4, 0xA8), *range(0xAA, 0xB0)))


class Boost(enum.Enum):
    """How a copy that runs unobserved gets back to the program."""

    NEVER = 0  # only under TF: what it does depends on the instruction count or the interrupt shadow
    JUMP_BACK = 1  # copy, then a jump to the next instruction
    LEAVES = 2  # the copy itself goes to an absolute address
    CALL_RELATIVE = 3  # push of the true return address, then a jump to the target
    CALL_REGISTER = 4  # the same with the target in a register


class Fix(enum.Enum):
    """What must be put right after the copy ran under TF."""

    ADVANCE = 0  # pc moved relative to the copy
    ABSOLUTE = 1  # pc is right
    CALL_RELATIVE = 2  # pc moved relative to the copy; the pushed return address too
    CALL_ABSOLUTE = 3  # pc is right, the pushed return address relative to the copy
    PUSH_FLAGS = 4  # the pushed image shows our TF
    POP_FLAGS = 5  # TF is now what the program popped


@dataclass(frozen=True, slots=True)
class InsnClass:
    """The behaviour of one class; `hook` says why it must run in place, `linux` what mainline would answer."""

    boost: Boost = Boost.JUMP_BACK
    fix: Fix = Fix.ADVANCE
    emulate: Callable[[Insn], Emulator] | None = None
    hook: str | None = None
    linux: tuple[int, str] | None = None
    is_breakpoint: bool = False


# ----------------------------------------------------------------------------------------------------------- emulators


def condition(code: int) -> Callable[[int], bool]:
    """The test of condition `code` (the low four bits of a jcc opcode) on EFLAGS; SDM vol. 1, appendix B."""
    tests: tuple[Callable[[int], bool], ...] = (
        lambda flags: flags & OF != 0,
        lambda flags: flags & CF != 0,
        lambda flags: flags & ZF != 0,
        lambda flags: flags & (CF | ZF) != 0,
        lambda flags: flags & SF != 0,
        lambda flags: flags & PF != 0,
        lambda flags: (flags & SF != 0) != (flags & OF != 0),
        lambda flags: flags & ZF != 0 or (flags & SF != 0) != (flags & OF != 0),
    )
    test = tests[code >> 1]
    return (lambda flags: not test(flags)) if code & 1 else test


def branch_target(insn: Insn) -> int:
    """Where a relative branch leads."""
    return (insn.address + insn.size + insn.immediate) & ((1 << insn.bits) - 1)


def _advance(insn: Insn) -> Emulator:
    following = insn.end

    def emulate(cpu: Cpu) -> None:
        cpu.pc = following

    return emulate


def _jump(insn: Insn) -> Emulator:
    target = branch_target(insn)

    def emulate(cpu: Cpu) -> None:
        cpu.pc = target

    return emulate


def _jump_if(insn: Insn) -> Emulator:
    target, following, test = branch_target(insn), insn.end, condition(insn.opcode & 0xF)

    def emulate(cpu: Cpu) -> None:
        cpu.pc = target if test(cpu.eflags) else following

    return emulate


def _jump_register(insn: Insn) -> Emulator:
    register, mask = insn.register_operand or 0, (1 << insn.bits) - 1

    def emulate(cpu: Cpu) -> None:
        cpu.pc = cpu.gpr[register] & mask

    return emulate


def _loop(insn: Insn) -> Emulator:
    """loopne, loope, loop, jcxz (e0..e3): the count is as wide as the address size; a 32-bit one zero-extends rcx."""
    target, following = branch_target(insn), insn.end
    mask = (1 << insn.address_bits) - 1
    kept = 0xFFFF_FFFF_FFFF_0000 if insn.address_bits == 16 else 0
    kind = insn.opcode & 3

    def emulate(cpu: Cpu) -> None:
        count = cpu.gpr[_CX] & mask
        if kind == 3:
            cpu.pc = target if count == 0 else following
            return
        count = (count - 1) & mask
        cpu.gpr[_CX] = (cpu.gpr[_CX] & kept) | count
        wanted = kind == 2 or (cpu.eflags & ZF != 0) == (kind == 1)
        cpu.pc = target if count and wanted else following

    return emulate


# -------------------------------------------------------------------------------------------------------------- tables

_NOT_SUPPORTED: Final = errno.EOPNOTSUPP
PLAIN: Final = InsnClass()
_NOP: Final = InsnClass(emulate=_advance)
_TIMED: Final = InsnClass(boost=Boost.NEVER)  # reads or moves the clock, a device, or the ground under the slot
_FAR_LINUX: Final = (_NOT_SUPPORTED, "far transfer")
_TRAPPING: Final = InsnClass(linux=(errno.EILSEQ, "the instruction is a trap"))
_SHADOW: Final = "the interrupt shadow of a stack-segment load must fall on the next instruction"
_OUTSIDE: Final = InsnClass(hook="the processor stores or compares the instruction's own address")
_CALL_FAR: Final = replace(_OUTSIDE, linux=_FAR_LINUX)
_WIDTH_BRANCH: Final = InsnClass(
    hook="an operand-size prefix on a branch means different things on different processors"
)

_ONE_BYTE: Final[dict[int, InsnClass]] = {
    **dict.fromkeys(range(0x70, 0x80), InsnClass(emulate=_jump_if)),
    **dict.fromkeys(range(0xE0, 0xE4), InsnClass(emulate=_loop)),
    **dict.fromkeys((*range(0x6C, 0x70), *range(0xE4, 0xE8), *range(0xEC, 0xF0)), _TIMED),
    0x17: InsnClass(hook=_SHADOW, linux=(errno.EINVAL, "pop ss")),
    0x9A: _CALL_FAR,
    0x9C: InsnClass(fix=Fix.PUSH_FLAGS),
    0x9D: InsnClass(boost=Boost.NEVER, fix=Fix.POP_FLAGS),
    0xC2: InsnClass(boost=Boost.LEAVES, fix=Fix.ABSOLUTE),
    0xC3: InsnClass(boost=Boost.LEAVES, fix=Fix.ABSOLUTE),
    0xCA: InsnClass(boost=Boost.LEAVES, fix=Fix.ABSOLUTE),
    0xCB: InsnClass(boost=Boost.LEAVES, fix=Fix.ABSOLUTE),
    0xCC: InsnClass(is_breakpoint=True, linux=(errno.EILSEQ, "the instruction is a trap")),
    0xCD: _TRAPPING,
    0xCE: _TRAPPING,
    0xCF: InsnClass(hook="iret loads the stepping flag and the next context itself", linux=(_NOT_SUPPORTED, "iret")),
    **dict.fromkeys(range(0xD8, 0xE0), InsnClass(hook="the FPU keeps the address of its last instruction")),
    0xE8: InsnClass(boost=Boost.CALL_RELATIVE, fix=Fix.CALL_RELATIVE),
    0xE9: InsnClass(emulate=_jump),
    0xEA: InsnClass(boost=Boost.LEAVES, fix=Fix.ABSOLUTE, linux=_FAR_LINUX),
    0xEB: InsnClass(emulate=_jump),
    0xF1: InsnClass(
        hook="int1 cannot be told from the end of a step", linux=(errno.EILSEQ, "the instruction is a trap")
    ),
    0xF4: InsnClass(hook="hlt wakes at the next instruction's address"),
    0xFB: InsnClass(boost=Boost.NEVER),  # sti: its shadow must fall on the next instruction, not on a jump back
}
_TWO_BYTE: Final[dict[int, InsnClass]] = {
    **dict.fromkeys(range(0x80, 0x90), InsnClass(emulate=_jump_if)),
    **dict.fromkeys((0x20, 0x21, 0x22, 0x23, 0x30, 0x31, 0x32, 0x33), _TIMED),
    **dict.fromkeys((0x05, 0x07, 0x34, 0x35), _OUTSIDE),
    **dict.fromkeys((0x0B, 0xB9, 0xFF), _TRAPPING),
    0x1F: _NOP,
    0xB2: InsnClass(hook=_SHADOW),
}
_GROUP_5: Final[dict[tuple[int, bool], InsnClass]] = {  # ff /reg: (reg, operand is memory)
    (2, False): InsnClass(boost=Boost.CALL_REGISTER, fix=Fix.CALL_ABSOLUTE),
    (2, True): InsnClass(
        boost=Boost.NEVER, fix=Fix.CALL_ABSOLUTE, linux=(_NOT_SUPPORTED, "indirect call through memory")
    ),
    (3, True): _CALL_FAR,
    (4, False): InsnClass(fix=Fix.ABSOLUTE, emulate=_jump_register),
    (4, True): InsnClass(boost=Boost.LEAVES, fix=Fix.ABSOLUTE, linux=(_NOT_SUPPORTED, "indirect jump through memory")),
    (5, True): InsnClass(boost=Boost.LEAVES, fix=Fix.ABSOLUTE, linux=_FAR_LINUX),
}
_BRANCHES: Final = frozenset((*range(0x70, 0x80), *range(0xE0, 0xE4), 0xC2, 0xC3, 0xE8, 0xE9, 0xEB))


def classify(insn: Insn) -> InsnClass:
    """The class of a decoded instruction."""
    if insn.encoding is not Encoding.LEGACY:
        return PLAIN
    found = PLAIN
    if insn.map == 0:
        found = _classify_one_byte(insn)
    elif insn.map == 1:
        found = _classify_two_byte(insn)
    if insn.size == 15 and found.linux is None:
        return replace(found, linux=(errno.ENOSPC, "15-byte instruction"))
    return found


def _classify_one_byte(insn: Insn) -> InsnClass:
    opcode = insn.opcode
    if opcode == 0xFF:
        found = _GROUP_5.get((insn.reg or 0, insn.register_operand is None), PLAIN)
        if found is not PLAIN and 0x66 in insn.prefixes:
            return _WIDTH_BRANCH
        if found.boost is Boost.CALL_REGISTER and insn.register_operand == _SP:
            return replace(found, boost=Boost.NEVER)  # the target is sp before the push
        return found
    if opcode in _BRANCHES and 0x66 in insn.prefixes:
        return _WIDTH_BRANCH
    if opcode == 0x8E and insn.reg == 2:
        return InsnClass(hook=_SHADOW, linux=(errno.EINVAL, "mov ss"))
    if opcode == 0xC7 and insn.modrm == 0xF8:
        return InsnClass(hook="an aborted transaction resumes relative to xbegin's own address")
    if opcode == 0x90 and not insn.rex & 1:  # pause too: the engine leaves its loop there and traps one late
        return _NOP
    return _ONE_BYTE.get(opcode, PLAIN)


def _classify_two_byte(insn: Insn) -> InsnClass:
    opcode = insn.opcode
    if 0x80 <= opcode < 0x90 and 0x66 in insn.prefixes:
        return _WIDTH_BRANCH
    if opcode == 0x1E and insn.mnemonic.startswith("endbr"):
        return _NOP
    if opcode == 0x01 and insn.modrm == 0xF9:
        return _TIMED  # rdtscp
    if opcode == 0x01 and insn.modrm == 0xC9:
        return InsnClass(hook="mwait wakes at the next instruction's address")
    if opcode == 0x01 and insn.modrm is not None and 0xC1 <= insn.modrm <= 0xC7:
        return InsnClass(linux=(_NOT_SUPPORTED, "virtualization instruction"))
    return _TWO_BYTE.get(opcode, PLAIN)


def is_repeated(insn: Insn) -> bool:
    """A string instruction under rep: it traps once per iteration."""
    return (
        insn.encoding is Encoding.LEGACY
        and insn.map == 0
        and insn.opcode in _STRING_OPCODES
        and (0xF2 in insn.prefixes or 0xF3 in insn.prefixes)
    )


def tests_zero_flag(insn: Insn) -> bool:
    """cmps and scas: under rep they also end by ZF."""
    return insn.opcode in (0xA6, 0xA7, 0xAE, 0xAF)
