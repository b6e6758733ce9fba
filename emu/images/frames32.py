"""Unwind tables for gdb out of an i386 kernel's text, which keeps frame pointers (CONFIG_UNWINDER_FRAME_POINTER).

Without them gdb's own analysis stops at the nop that ftrace leaves where the call to __fentry__ was, before
`push %ebp`, and takes a wrong word for the return address; and it knows nothing of the kernel's entry code, where the
caller is what was interrupted.

Rules: pure, bytes in and bytes out. A function of another kind is left to gdb. Source: DWARF 4, 6.4; the i386 ABI's
register numbers; Linux 6.1, arch/x86/entry/entry_32.S and struct pt_regs in asm/ptrace.h.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence

from emu.images.plan import Segment
from emu.symbols import Symbol

_EAX, _ECX, _EDX, _EBX, _ESP, _EBP, _ESI, _EDI, _EIP, _EFLAGS = range(10)
_CFA_ADVANCE, _CFA_OFFSET, _CFA_UNDEFINED, _CFA_SAME = 0x40, 0x80, 0x07, 0x08
_CFA_DEF, _CFA_DEF_REGISTER, _CFA_DEF_OFFSET, _CFA_VAL_EXPRESSION = 0x0C, 0x0D, 0x0E, 0x16

# Two CIEs, version 1: code counts in bytes, offsets in -4, the return address is register 8 and lies at esp first. The
# second is for frames the processor made ("S"): the pc they hold is not one after a call.
_COUNTING = struct.pack("<BBB", 1, 0x7C, _EIP)
_CALLED = bytes([_CFA_DEF, _ESP, 4, _CFA_OFFSET | _EIP, 1])
_CIE = b"\xff\xff\xff\xff\x01\0" + _COUNTING + _CALLED
_CIE_INTERRUPTED = b"\xff\xff\xff\xff\x01zS\0" + _COUNTING + b"\0" + _CALLED
_NO_AUGMENTATION = b"\0"

_PUSH_EBP, _MOV_ESP_EBP = b"\x55", b"\x89\xe5"
_FRAME_WITHIN = 48  # bytes from push %ebp to mov %esp,%ebp: the compiler moves instructions in between
_EPILOGUE = re.compile(rb"[\x5d\xc9](?=[\xc3\xc2\xe9])")  # pop %ebp or leave, and then ret or the jmp of a tail call
_BEHIND = {0xC3: 1, 0xC2: 3, 0xE9: 5}
_MOVES_ESP = re.compile(rb"[\x50-\x57\x60\x68\x6a\x9c]|[\x81\x83]\xec|\x89\xcc|\xff[\x30-\x37\x70-\x77\xb0-\xb7]")
"""Bytes of instructions that move esp, and of many others: code without any of them leaves it where it was."""

_SWITCHES_STACKS = re.compile(rb"\x87[\xdc\xe3].{0,8}\xff[\xd0-\xd7]", re.DOTALL)
"""xchg %ebx,%esp and the call through a register, of call_on_stack in arch/x86/kernel/irq_32.c. gdb lets callers be on
a stack below only behind a frame of the processor's, so these are given out as such."""

_PT_REGS = {
    _EBX: 0x00, _ECX: 0x04, _EDX: 0x08, _ESI: 0x0C, _EDI: 0x10, _EBP: 0x14, _EAX: 0x18,
    _EIP: 0x30, _EFLAGS: 0x38, _ESP: 0x3C,
}  # fmt: skip
_PT_REGS_SIZE = 0x44
_SAVE = b"\x55\x57\x56\x52\x51\x53"  # push %ebp, %edi, %esi, %edx, %ecx, %ebx: the end of SAVE_ALL, pt_regs is whole
_RESTORE = b"\x5b\x59\x5a\x5e\x5f\x5d"  # RESTORE_INT_REGS
_ON_REGS, _OUTERMOST, _GATES = ("ret_to_user",), ("ret_from_fork",), ("asm_", "entry_")
_GATE = re.compile(rb"(?:\x8d\x76\0|\x0f\x01\xca|\x90|\xfc|\x50|\x6a.|\x68....)*", re.DOTALL)
"""What entry code begins with: clac or the nop in its place, cld, and pushes."""
_GATE_INSN = re.compile(rb"(?P<push>\x50|\x6a.|\x68....)|\x8d\x76\0|\x0f\x01\xca|\x90|\xfc", re.DOTALL)
_INTERRUPTED_ESP = bytes([0x12, 0x38, 0x1C, 0x06, 0x33, 0x1A, 0x28, 3, 0, 0x2F, 1, 0, 0x06])
"""A DWARF expression on the CFA, which is behind the eflags that the processor pushed: dup lit8 minus deref lit3 and,
which is the ring of cs; bra: esp was pushed too, deref; else it was the CFA itself."""


def frame_pointer_frames(segments: Sequence[Segment], symbols: Sequence[Symbol], virtual_offset: int) -> bytes:
    """A .debug_frame section for the functions among `symbols`; `virtual_offset` is virtual minus physical address."""
    out = bytearray(_entry(_CIE))
    interrupted = len(out)
    out += _entry(_CIE_INTERRUPTED)
    for address, name, code in _functions(segments, symbols, virtual_offset):
        regions = _entry_code(name, code)
        for start, end, instructions in regions:
            span = struct.pack("<III", interrupted, address + start, end - start)
            out += _entry(span + _NO_AUGMENTATION + instructions)
        if not regions and (body := _function(code)) is not None:
            switches = _SWITCHES_STACKS.search(code) is not None
            cie = interrupted if switches else 0
            out += _entry(struct.pack("<III", cie, address, len(code)) + _NO_AUGMENTATION * switches + body)
    return bytes(out)


def _functions(
    segments: Sequence[Segment], symbols: Sequence[Symbol], virtual_offset: int
) -> Iterator[tuple[int, str, bytes]]:
    names: dict[int, str] = {}
    for symbol in symbols:
        if symbol.kind in "Tt" and (symbol.address not in names or symbol.name.startswith(_GATES)):
            names[symbol.address] = symbol.name
    starts = sorted(names)
    for segment in segments:
        low, high = segment.paddr + virtual_offset, segment.paddr + virtual_offset + len(segment.data)
        inside = [start for start in starts if low <= start < high]
        for start, end in zip(inside, [*inside[1:], high], strict=True):
            yield start, names[start], bytes(segment.data[start - low : end - low])


# --------------------------------------------------------------------------------------------------- compiled functions


def _function(code: bytes) -> bytes | None:
    """The instructions of a function with a frame pointer, or of one that never moves esp; None for others."""
    move = code.find(_MOV_ESP_EBP)
    push = code.rfind(_PUSH_EBP, max(move - _FRAME_WITHIN, 0), move) if move >= 0 else -1
    if push >= 0:
        return _framed(code, push + 1, move + len(_MOV_ESP_EBP))
    return b"" if _MOVES_ESP.search(code) is None else None


def _framed(code: bytes, pushed: int, framed: int) -> bytes:
    """Where the frame is made (`pushed` is behind `push %ebp`, `framed` behind `mov %esp,%ebp`), and where it is gone
    before each ret."""
    saved = bytes([_CFA_OFFSET | _EBP, 2])
    out = bytearray(_advance(pushed) + bytes([_CFA_DEF_OFFSET, 8]) + saved)
    out += _advance(framed - pushed) + bytes([_CFA_DEF_REGISTER, _EBP])
    at = framed
    for epilogue in _EPILOGUE.finditer(code, framed):
        gone = epilogue.end()
        back = gone + _BEHIND[code[gone]]
        out += _advance(gone - at) + bytes([_CFA_DEF, _ESP, 4, _CFA_SAME, _EBP])
        out += _advance(back - gone) + bytes([_CFA_DEF, _EBP, 8]) + saved
        at = back
    return bytes(out)


# ----------------------------------------------------------------------------------------------------------- entry code


def _entry_code(name: str, code: bytes) -> list[tuple[int, int, bytes]]:
    """Start, end and instructions of each part of a piece of entry code; none for other functions.

    Where the processor's own frame lies on top, or a whole pt_regs, the caller is what was interrupted. In between, and
    where pt_regs is taken down again, backtraces end.
    """
    save, restore = code.find(_SAVE), code.find(_RESTORE)
    gate = name.startswith(_GATES)
    if name in _OUTERMOST:
        return [(0, len(code), _ended())]
    if save < 0 and restore < 0 and not gate and name not in _ON_REGS:
        return []
    whole = save + len(_SAVE) if save >= 0 else 0
    parts = []
    if gate:
        whole = whole or len(code)
        begun, instructions = _gate(code[:whole])
        parts = [(0, begun, instructions), (begun, whole, _ended())]
    elif save >= 0:
        parts = [(0, whole, _ended())]
    taken_down = restore if restore >= whole else len(code)
    parts += [(whole, taken_down, _registers()), (taken_down, len(code), _ended())]
    return [part for part in parts if part[0] < part[1]]


def _gate(code: bytes) -> tuple[int, bytes]:
    """Where the first instructions end, and what they say: they complete the frame by an error code, where the
    processor has pushed none, and the word that is gs or the handler."""
    begun = _GATE.match(code)
    insns = list(_GATE_INSN.finditer(code, 0, begun.end() if begun else 0))
    depth = 12 + 8 - 4 * sum(insn["push"] is not None for insn in insns)
    out = bytearray(_cfa(depth) + bytes([_CFA_OFFSET | _EIP, 3, _CFA_OFFSET | _EFLAGS, 1]))
    out += bytes([_CFA_VAL_EXPRESSION, _ESP, len(_INTERRUPTED_ESP)]) + _INTERRUPTED_ESP
    end = at = 0
    for insn in insns:
        end = insn.end()
        if insn["push"] is not None:
            depth += 4
            out += _advance(end - at) + _cfa(depth)
            at = end
    # the last one's end is the jump to the common code, which has the same frame
    return (len(code) if code[end : end + 1] == b"\xe9" else end), bytes(out)


def _registers() -> bytes:
    """A whole pt_regs at esp."""
    saved = [bytes([_CFA_OFFSET | register, (_PT_REGS_SIZE - at) // 4]) for register, at in _PT_REGS.items()]
    return _cfa(_PT_REGS_SIZE) + b"".join(saved)


def _ended() -> bytes:
    return _cfa(4) + bytes([_CFA_UNDEFINED, _EIP])


def _cfa(offset: int) -> bytes:
    """It is esp + `offset`, which is below 128."""
    return bytes([_CFA_DEF, _ESP, offset])


# ------------------------------------------------------------------------------------------------------------- encoding


def _advance(distance: int) -> bytes:
    if distance < 0x40:
        return bytes([_CFA_ADVANCE | distance])
    if distance < 0x100:
        return struct.pack("<BB", 2, distance)
    return struct.pack("<BH", 3, distance) if distance < 0x1_0000 else struct.pack("<BI", 4, distance)


def _entry(body: bytes) -> bytes:
    """A CIE or FDE, padded with DW_CFA_nop to 4 bytes."""
    padded = body + bytes(-len(body) % 4)
    return struct.pack("<I", len(padded)) + padded
