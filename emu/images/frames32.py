"""Unwind tables for gdb out of an i386 kernel's prologues, which keep frame pointers (CONFIG_UNWINDER_FRAME_POINTER).

Without them gdb's own analysis stops at the nop that ftrace leaves where the call to __fentry__ was, before
`push %ebp`, and takes a wrong word for the return address.

Rules: pure, bytes in and bytes out. A function with another prologue is left to gdb. Source: DWARF 4, 6.4; the i386
ABI's register numbers.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence

from emu.images.plan import Segment
from emu.symbols import Symbol

_ESP, _EBP, _EIP = 4, 5, 8
_CFA_ADVANCE, _CFA_OFFSET, _CFA_SAME, _CFA_DEF, _CFA_DEF_REGISTER, _CFA_DEF_OFFSET = 0x40, 0x80, 0x08, 0x0C, 0x0D, 0x0E
# code counts in bytes, offsets in -4, the return address is register 8; at the entry it lies at esp
_CIE = struct.pack("<IBBBBB", 0xFFFF_FFFF, 1, 0, 1, 0x7C, _EIP) + bytes([_CFA_DEF, _ESP, 4, _CFA_OFFSET | _EIP, 1])
_PROLOGUE = re.compile(rb"(?:\xf3\x0f\x1e\xfb)?(?:\xe8....|\x0f\x1f\x44\0\0)?\x55\x89\xe5", re.DOTALL)
_EPILOGUE = re.compile(rb"[\x5d\xc9](?=[\xc3\xc2])")  # pop %ebp or leave, and then ret


def frame_pointer_frames(segments: Sequence[Segment], symbols: Sequence[Symbol], virtual_offset: int) -> bytes:
    """A .debug_frame section for the functions among `symbols`; `virtual_offset` is virtual minus physical address."""
    out = bytearray(_entry(_CIE))
    for address, code in _functions(segments, symbols, virtual_offset):
        prologue = _PROLOGUE.match(code)
        if prologue is None:
            continue
        span = struct.pack("<III", 0, address, len(code))
        out += _entry(span + _instructions(code, prologue.end()))
    return bytes(out)


def _functions(
    segments: Sequence[Segment], symbols: Sequence[Symbol], virtual_offset: int
) -> Iterator[tuple[int, bytes]]:
    starts = sorted({symbol.address for symbol in symbols if symbol.kind in "Tt"})
    for segment in segments:
        low, high = segment.paddr + virtual_offset, segment.paddr + virtual_offset + len(segment.data)
        inside = [start for start in starts if low <= start < high]
        for start, end in zip(inside, [*inside[1:], high], strict=True):
            yield start, bytes(segment.data[start - low : end - low])


def _instructions(code: bytes, framed: int) -> bytes:
    """Where the frame is made (`framed` is behind `mov %esp,%ebp`), and each place where it is gone before a ret."""
    saved = bytes([_CFA_OFFSET | _EBP, 2])
    out = bytearray(_advance(framed - 2) + bytes([_CFA_DEF_OFFSET, 8]) + saved)
    out += _advance(2) + bytes([_CFA_DEF_REGISTER, _EBP])
    at = framed
    for epilogue in _EPILOGUE.finditer(code, framed):
        gone = epilogue.end()
        back = gone + (3 if code[gone] == 0xC2 else 1)
        out += _advance(gone - at) + bytes([_CFA_DEF, _ESP, 4, _CFA_SAME, _EBP])
        out += _advance(back - gone) + bytes([_CFA_DEF, _EBP, 8]) + saved
        at = back
    return bytes(out)


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
