"""Unwind tables for gdb out of a kernel's own: ORC rows made into a DWARF .debug_frame section.

A stock amd64 kernel has neither frame pointers nor DWARF; without this, gdb's `bt` guesses after two frames.

Rules: pure, bytes in and bytes out; standard library and `elf`. Source: Linux 6.1 and 6.12,
arch/x86/include/asm/orc_types.h and arch/x86/kernel/unwind_orc.c; DWARF 4, 6.4; the AMD64 ABI's register numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from emu.images.elf import ElfFile

_ROW = struct.Struct("<hhH")  # sp_offset, bp_offset, then bit fields: sp_reg 0-3, bp_reg 4-7, type from 8
_RBP, _RSP, _RIP = 6, 7, 16
_DWARF = {2: 1, 3: 5, 4: _RBP, 5: _RSP, 6: 10, 7: 13}
"""ORC_REG_DX, DI, BP, SP, R10, R13 -> DWARF register."""
_ORC_PREV_SP, _ORC_BP, _ORC_BP_INDIRECT, _ORC_SP_INDIRECT = 1, 4, 8, 9
_PT_REGS = (15, 14, 13, 12, _RBP, 3, 11, 10, 9, 8, 0, 2, 1, 4, 5)
"""DWARF registers in the order struct pt_regs has them, 8 bytes each, from r15; after them orig_ax."""
_REGS_IP, _REGS_SP, _IRET_SP = 128, 152, 24
"""Offsets of ip and sp in pt_regs, and of sp in what the processor pushes for an interrupt, ip being first."""

_CFA_UNDEFINED, _CFA_SAME, _CFA_DEF, _CFA_EXPRESSION_DEF, _CFA_EXPRESSION = 0x07, 0x08, 0x0C, 0x0F, 0x10
_CFA_OFFSET_SF, _CFA_ADVANCE = 0x11, 0x40
_OP_DEREF, _OP_CONSTS, _OP_PLUS, _OP_BREG = 0x06, 0x11, 0x22, 0x70
_DATA_ALIGN = -8
_CIE = 0xFFFF_FFFF
_NO_AUGMENTATION = b"\0"  # the length of augmentation data, where "z" announces it

_ROWS_IN_ONE = 48
"""Rows an FDE may have: gdb runs its instructions from the start for every frame it unwinds."""
_CALL, _REGS, _PARTIAL, _END = "call", "regs", "iret", "end"
_KINDS_OLD = (_CALL, _REGS, _PARTIAL)  # to 6.3, two bits; without a register it is the end
_KINDS_NEW = (_END, _END, _CALL, _REGS, _PARTIAL)  # 6.4 on, three bits


@dataclass(frozen=True, slots=True)
class _State:
    """What one ORC row says: how the frame was entered, and the instructions for the CFA and the caller's rbp."""

    kind: str
    cfa: bytes
    rbp: bytes


def debug_frame(elf: ElfFile) -> bytes:
    """A .debug_frame section for the kernel's text; empty where the image has no ORC tables or they make no sense.

    Of a frame entered by an exception, every register of the interrupted code is found; of one entered by a call, the
    stack pointer, rbp and the return address.
    """
    sections = {section.name: section for section in elf.sections()}
    addresses, table = sections.get(".orc_unwind_ip"), sections.get(".orc_unwind")
    if elf.bits != 64 or addresses is None or table is None:
        return b""
    count = addresses.size // 4
    end = max(table.offset + table.size, addresses.offset + addresses.size)
    if table.size != count * _ROW.size or end > len(elf.data):
        return b""
    relative = struct.unpack_from(f"<{count}i", elf.data, addresses.offset)
    places = [addresses.address + 4 * index + value for index, value in enumerate(relative)]
    rows = elf.data[table.offset : table.offset + table.size]
    return frames_of(places, rows, new_types=".orc_header" in sections)


def frames_of(places: Sequence[int], rows: bytes | memoryview, *, new_types: bool) -> bytes:
    """The section for struct orc_entry `rows`, 6 bytes each, the n-th of which is in force from `places[n]` on.

    `new_types`: type is numbered as from Linux 6.4 on (a kernel with .orc_header), else as before.
    """
    kinds = _KINDS_NEW if new_types else _KINDS_OLD
    known: dict[tuple[int, int, int], _State] = {}
    states: list[_State] = []
    for row in _ROW.iter_unpack(rows):
        state = known.get(row)
        if state is None:
            state = known[row] = _state(row, kinds)
        states.append(state)
    # Two CIEs, version 1: addresses count in bytes, offsets in -8, the return address is register 16. The second is for
    # frames of exceptions ("S"): the pc they hold is that of an instruction, not of the one after a call, and gdb must
    # not look up the place before it.
    counting = b"\x01" + _sleb(_DATA_ALIGN) + bytes([_RIP])
    out = bytearray(_entry(_CIE, b"\x01" + b"\0" + counting))
    exceptions = len(out)
    out += _entry(_CIE, b"\x01" + b"zS\0" + counting + _NO_AUGMENTATION)
    for first, last in _groups(places, states):
        span = struct.pack("<QQ", places[first] & 0xFFFF_FFFF_FFFF_FFFF, places[last] - places[first])
        instructions = _instructions(places, states, first, last)
        if states[first].kind in (_REGS, _PARTIAL):
            out += _entry(exceptions, span + _NO_AUGMENTATION + instructions)
        else:
            out += _entry(0, span + instructions)
    return bytes(out)


def _groups(places: Sequence[int], states: Sequence[_State]) -> Iterator[tuple[int, int]]:
    """Row ranges for one FDE each: of one kind, ascending, not too many. The last row of all only ends the others."""
    first = 0
    for index in range(1, len(states)):
        ascending = places[index] > places[index - 1]
        last = index == len(states) - 1
        if index - first >= _ROWS_IN_ONE or states[index].kind != states[first].kind or not ascending or last:
            if ascending:
                yield first, index
            first = index


def _instructions(places: Sequence[int], states: Sequence[_State], first: int, last: int) -> bytes:
    """What the FDE for rows `first` to `last - 1` says."""
    out = bytearray(_ENTERED[states[first].kind])
    cfa = rbp = b""
    place = places[first]
    for index in range(first, last):
        state = states[index]
        if state.cfa == cfa and state.rbp == rbp:
            continue
        if places[index] != place:
            out += _advance(places[index] - place)
            place = places[index]
        if state.cfa != cfa:
            out += state.cfa
        if state.rbp != rbp:
            out += state.rbp
        cfa, rbp = state.cfa, state.rbp
    return bytes(out)


def _state(row: tuple[int, int, int], kinds: Sequence[str]) -> _State:
    sp_offset, bp_offset, bits = row
    sp_reg, bp_reg = bits & 15, bits >> 4 & 15
    number = bits >> 8 & (7 if kinds is _KINDS_NEW else 3)
    kind = kinds[number] if number < len(kinds) else _END
    cfa = _cfa(sp_reg, sp_offset)
    if kind == _END or cfa is None:
        return _State(_END, b"", b"")
    if kind == _REGS:
        return _State(kind, cfa, b"")  # rbp is in pt_regs, with all the others
    if bp_reg == _ORC_PREV_SP:
        rbp = _saved_at(_RBP, bp_offset)
    elif bp_reg == _ORC_BP:
        rbp = _block(bytes([_CFA_EXPRESSION, _RBP]), bytes([_OP_BREG + _RBP]) + _sleb(bp_offset))
    else:
        rbp = bytes([_CFA_SAME, _RBP])
    return _State(kind, cfa, rbp)


def _cfa(register: int, offset: int) -> bytes | None:
    """The instruction that defines the CFA; None for a register that tells nothing: the end of the stack."""
    if register in _DWARF:
        if offset >= 0:
            return bytes([_CFA_DEF, _DWARF[register]]) + _uleb(offset)
        return _block(bytes([_CFA_EXPRESSION_DEF]), bytes([_OP_BREG + _DWARF[register]]) + _sleb(offset))
    if register == _ORC_BP_INDIRECT:  # *(rbp + offset)
        return _block(bytes([_CFA_EXPRESSION_DEF]), bytes([_OP_BREG + _RBP]) + _sleb(offset) + bytes([_OP_DEREF]))
    if register == _ORC_SP_INDIRECT:  # *rsp + offset
        code = bytes([_OP_BREG + _RSP, 0, _OP_DEREF, _OP_CONSTS]) + _sleb(offset) + bytes([_OP_PLUS])
        return _block(bytes([_CFA_EXPRESSION_DEF]), code)
    return None


def _saved_at(register: int, offset: int) -> bytes:
    """The register's value is in memory at CFA + `offset`, a multiple of 8."""
    return bytes([_CFA_OFFSET_SF]) + _uleb(register) + _sleb(offset // _DATA_ALIGN)


def _advance(distance: int) -> bytes:
    if distance < 0x40:
        return bytes([_CFA_ADVANCE | distance])
    if distance < 0x100:
        return struct.pack("<BB", 2, distance)
    return struct.pack("<BH", 3, distance) if distance < 0x1_0000 else struct.pack("<BI", 4, distance)


def _entry(identity: int, body: bytes) -> bytes:
    """A CIE (identity _CIE) or an FDE (identity: its CIE's offset), padded with DW_CFA_nop to 8 bytes."""
    padded = body + bytes(-(8 + len(body)) % 8)
    return struct.pack("<II", 4 + len(padded), identity) + padded


def _block(start: bytes, code: bytes) -> bytes:
    return start + _uleb(len(code)) + code


def _uleb(value: int) -> bytes:
    return _leb(value, lambda rest, _: rest == 0)


def _sleb(value: int) -> bytes:
    return _leb(value, lambda rest, byte: rest == (-1 if byte & 0x40 else 0))


def _leb(value: int, finished: Callable[[int, int], bool]) -> bytes:
    out = bytearray()
    while True:
        byte = value & 0x7F
        value >>= 7
        if finished(value, byte):
            out.append(byte)
            return bytes(out)
        out.append(byte | 0x80)


_ENTERED = {
    _CALL: _saved_at(_RIP, -8),
    _REGS: b"".join(_saved_at(register, 8 * index) for index, register in enumerate(_PT_REGS))
    + _saved_at(_RIP, _REGS_IP)
    + _saved_at(_RSP, _REGS_SP),
    _PARTIAL: _saved_at(_RIP, 0) + _saved_at(_RSP, _IRET_SP),
    _END: bytes([_CFA_DEF, _RSP, 8, _CFA_UNDEFINED, _RIP]),
}
"""Instructions at the start of an FDE of each kind: where the caller's registers are, relative to the CFA."""
