"""The bytes of a slot: copies of instructions for another address, and what leads back from them.

Rules: pure; no machine. What each class of instruction needs is said by `x86_insn`.
"""

from __future__ import annotations

import errno

from emu.insn import Insn
from probes.arch.x86_insn import Boost, Fix, InsnClass, branch_target, is_repeated
from probes.errors import ProbeError


def taken_off(insn: Insn) -> int:
    """Int3s taken off the clock at the arrival: the probe's, and the one behind the copy, which comes at once or after
    as many iterations as the clock must not be wrong for."""
    return 1 if is_repeated(insn) else 2


def _fits_s32(value: int) -> bool:
    return -(1 << 31) <= value < 1 << 31


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def relocated(insn: Insn, address: int) -> bytes:
    """The instruction's bytes for another address; ProbeError EINVAL where its operand would be out of reach."""
    if not insn.rip_relative:
        return insn.data
    displacement = insn.displacement + insn.address - address
    if not _fits_s32(displacement) or insn.address_bits != 64:
        raise ProbeError(errno.EINVAL, "the RIP-relative operand cannot be reached from a slot")
    field = slice(insn.disp_offset, insn.disp_offset + 4)
    data = bytearray(insn.data)
    data[field] = displacement.to_bytes(4, "little", signed=True)
    return bytes(data)


def _jump(at: int, target: int, bits: int) -> bytes:
    """jmp rel32, or on amd64 jmp [rip+0] with the address behind it, which touches no register."""
    distance = _signed((target - at - 5) & ((1 << bits) - 1), bits)
    if _fits_s32(distance):
        return b"\xe9" + distance.to_bytes(4, "little", signed=True)
    return b"\xff\x25\0\0\0\0" + target.to_bytes(8, "little")


def push_of_call(insn: Insn, kind: InsnClass) -> bytes | None:
    """push imm32 of the true return address: what a call does to memory, faults included. None for other instructions,
    for a target in memory, whose load comes first, and where 32 bits cannot say the address."""
    if kind.fix not in (Fix.CALL_RELATIVE, Fix.CALL_ABSOLUTE):
        return None
    returns_to = _signed(insn.end, insn.bits)
    if not _fits_s32(returns_to) or (insn.modrm is not None and insn.register_operand is None):
        return None
    return b"\x68" + returns_to.to_bytes(4, "little", signed=True)


def boosted_code(insn: Insn, kind: InsnClass, address: int) -> tuple[bytes | None, int]:
    """Code that has the effect of `insn` and leaves the slot, and how many instructions to take off for it."""
    if kind.boost is Boost.NEVER or is_repeated(insn):
        return None, 0
    if kind.boost in (Boost.CALL_RELATIVE, Boost.CALL_REGISTER):
        push = push_of_call(insn, kind)
        if push is None:
            return None, 0
        if kind.boost is Boost.CALL_RELATIVE:
            return push + _jump(address + len(push), branch_target(insn), insn.bits), 2
        register = insn.register_operand or 0
        return push + (b"\x41" if register >= 8 else b"") + bytes([0xFF, 0xE0 | register & 7]), 2
    copy = relocated(insn, address)
    if kind.boost is Boost.LEAVES:
        return copy, 1
    return copy + _jump(address + len(copy), insn.end, insn.bits), 2
