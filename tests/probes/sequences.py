"""Code that nobody wrote: hypothesis strategies for the lock-step oracle's bodies.

A body is made of cells of 16 bytes. In each are one or two instructions, of any opcode there is, and no-ops up to the
next: so a fault has somewhere to go on, and relative branches lead to where an instruction begins. Registers start as
pointers to data, small numbers and extremes.
"""

from __future__ import annotations

import contextlib

from hypothesis import strategies as st

from emu.insn import Insn, InvalidInstruction, decode
from tests.probes.lockstep import CELL, CODE, Body, place

DATA = 0x1A0000
"""Sums of small multiples of it and of CODE are not where the slots are, which the guest could see there."""
NOPS = {
    1: "90",
    2: "6690",
    3: "0f1f00",
    4: "0f1f4000",
    5: "0f1f440000",
    6: "660f1f440000",
    7: "0f1f8000000000",
    8: "0f1f840000000000",
    9: "660f1f840000000000",
}
PREFIXES = [b"", b"\x66", b"\x67", b"\xf2", b"\xf3", b"\xf0", b"\x2e", b"\x3e", b"\x64", b"\x65"]
VALUES = [0, 1, 2, 3, 0x7F, 0x80, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, CODE + 0x800, DATA, DATA + 0x801]
POINTERS = {3: DATA + 0x100, 6: DATA + 0x200, 7: DATA + 0x400}  # bx, si, di
_ENTRY_CELLS = 8  # what sets the registers
# rdrand and rdseed, rdpid: not the same every time
_UNREPEATABLE = {(1, 0xC7, 6), (1, 0xC7, 7)}


def one_cell(code: bytes) -> Body:
    """64-bit code of a single instruction, its operand in data and registers set as for the others."""
    start = place(Body("", 64, ""), 0)
    values = b"".join(
        bytes([0xB8 | register]) + POINTERS.get(register, 1).to_bytes(4, "little") for register in range(4)
    )
    entry = _pad(values, 3 * CELL - (start - CODE))
    with contextlib.suppress(InvalidInstruction):
        insn = decode(code, start + len(entry), 64)
        code = bytes(_aimed(insn)) if insn.rip_relative else code
    return Body("cell", 64, (entry + _pad(code, CELL)).hex(), cells=True)


@st.composite
def bodies(draw: st.DrawFn, bits: int) -> Body:
    """Between 4 and 12 cells of code, after some that set the registers."""
    start = place(Body("", bits, ""), 0)
    code = _pad(_entry(draw, bits), _ENTRY_CELLS * CELL - (start - CODE))
    end = start + len(code) + draw(st.integers(4, 12)) * CELL
    while (at := start + len(code)) < end:
        cell = draw(_instructions(bits, at, end))
        more = draw(_instructions(bits, at + len(cell), end))
        code += _pad(cell + more if len(cell) + len(more) <= CELL else cell, CELL)
    return Body("sequence", bits, code.hex(), cells=True)


def drawn(body: Body) -> list[int]:
    """Offsets of the instructions that were drawn: neither those that set registers nor what fills the cells."""
    code, first = body.code, _ENTRY_CELLS * CELL
    nops = [bytes.fromhex(nop) for nop in NOPS.values()]
    return [at for at in body.offsets if at >= first - CELL and not any(code.startswith(nop, at) for nop in nops)]


def _entry(draw: st.DrawFn, bits: int) -> bytes:
    """mov reg,imm32 for each register but the stack pointer, and some flags."""
    code = b""
    for register in range(8):
        if register != 4:
            value = POINTERS.get(register) or draw(st.sampled_from(VALUES))
            code += bytes([0xB8 | register]) + value.to_bytes(4, "little")
    flags = draw(st.sampled_from([0x2, 0x3, 0x42, 0x8D7, 0x402, 0x202, 0x102]))
    return code + b"\x68" + flags.to_bytes(4, "little") + b"\x9d"


@st.composite
def _instructions(draw: st.DrawFn, bits: int, address: int, end: int) -> bytes:
    """One that can be decoded, its operand and its target within reach; a no-op where the draw makes none."""
    prefix = b"".join(draw(st.lists(st.sampled_from(PREFIXES), max_size=2)))
    if bits == 64 and draw(st.booleans()):
        prefix += bytes([draw(st.integers(0x40, 0x4F))])
    opcode = draw(_opcodes())
    modrm = draw(st.integers(0, 255))
    rest = draw(st.sampled_from([b"\0\0\0\0", b"\x01\0\0\0", b"\xff\xff\xff\xff", b"\x10\x00\x20\x00"]))
    data = (prefix + opcode + bytes([modrm]) + rest * 3)[:15]
    try:
        insn = decode(data, address, bits)
    except InvalidInstruction:
        return b"\x90"
    if (insn.map, insn.opcode, insn.reg) in _UNREPEATABLE and insn.modrm is not None and insn.modrm >> 6 == 3:
        return b"\x90"
    code = _aimed(insn)
    if insn.imm_size and "branch_relative" in insn.groups:
        goal = draw(st.integers(CODE // CELL + _ENTRY_CELLS, end // CELL)) * CELL
        reach = max(-128, min(goal - insn.end, 127)) if insn.imm_size == 1 else goal - insn.end
        size = min(insn.imm_size, 4)
        code[insn.imm_offset : insn.imm_offset + size] = (reach % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(code)


def _aimed(insn: Insn) -> bytearray:
    """Its bytes with a displacement that leads to data."""
    code = bytearray(insn.data)
    if insn.disp_size == 4:
        target = DATA + 0x300 - insn.end if insn.rip_relative else DATA + 0x300 if _is_absolute(insn) else 0x300
        code[insn.disp_offset : insn.disp_offset + 4] = target.to_bytes(4, "little", signed=True)
    return code


def _is_absolute(insn: Insn) -> bool:
    """Its displacement is the whole address."""
    return insn.modrm is not None and insn.modrm & 0xC7 in (0x04, 0x05)


def _opcodes() -> st.SearchStrategy[bytes]:
    """One byte; two; and the three-byte maps, less often."""
    byte = st.integers(0, 255)
    one, two = byte.map(lambda b: bytes([b])), byte.map(lambda b: bytes([0x0F, b]))
    three = st.tuples(st.sampled_from([0x38, 0x3A]), byte).map(lambda pair: bytes([0x0F, *pair]))
    return st.one_of(one, one, two, three)


def _pad(code: bytes, size: int) -> bytes:
    while len(code) < size:
        code += bytes.fromhex(NOPS[min(size - len(code), 9)])
    return code
