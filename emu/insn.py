"""Instructions as values: what a debugger, a tracer or the probe engine must know of the bytes at an address.

Rules: the only module that imports capstone; pure, callable from any thread; knows nothing of a running machine.

Opcodes are told apart by (encoding, map, opcode), never by the opcode byte alone: VEX `c5 f1 eb c0` (vpor) is no `jmp`,
the mistake for which mainline kprobes corrupt AVX code.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import capstone
from capstone import x86_const

MAX_INSN_SIZE: Final = 15  # SDM vol. 2, 2.3.11

_MODES: Final = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
_LEGACY_PREFIXES: Final = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
# One-byte opcodes that carry a ModRM byte are asked of capstone; these escapes only choose the map.
_ESCAPE_0F: Final = 0x0F
_DISASSEMBLERS: dict[int, Any] = {}


class InvalidInstruction(ValueError):
    """No instruction can be decoded at `address`."""

    def __init__(self, address: int, data: bytes) -> None:
        super().__init__(f"no instruction at {address:#x}: {data.hex() or 'no bytes'}")
        self.address = address
        self.data = data


class Encoding(enum.Enum):
    """The prefix family that decides what an opcode byte means."""

    LEGACY = "legacy"
    VEX = "vex"
    EVEX = "evex"
    XOP = "xop"


@dataclass(frozen=True, slots=True)
class Insn:
    """One decoded instruction.

    `map` is 0 for one-byte opcodes, 1 for 0f, 2 for 0f38, 3 for 0f3a; VEX, EVEX and XOP carry it in their payload.
    Offsets are from the first byte, sizes in bytes; both are 0 where there is no displacement or immediate.
    `operand_bits` and `address_bits` are the effective sizes after prefixes.
    """

    address: int
    size: int
    data: bytes
    bits: int
    mnemonic: str
    op_str: str
    encoding: Encoding
    map: int
    opcode: int
    prefixes: bytes
    rex: int
    modrm: int | None
    modrm_offset: int
    disp_offset: int
    disp_size: int
    imm_offset: int
    imm_size: int
    rip_relative: bool
    operand_bits: int
    address_bits: int
    groups: frozenset[str]

    @property
    def end(self) -> int:
        """Address of the instruction after this one."""
        return (self.address + self.size) & ((1 << self.bits) - 1)

    @property
    def reg(self) -> int | None:
        """ModRM.reg as written: the /digit of a group."""
        return None if self.modrm is None else (self.modrm >> 3) & 7

    @property
    def register_operand(self) -> int | None:
        """The register ModRM.rm names, extended by REX.B; None where it is memory."""
        if self.modrm is None or self.modrm >> 6 != 3:
            return None
        return (self.modrm & 7) | (self.rex & 1) << 3

    @property
    def displacement(self) -> int:
        """The displacement, signed."""
        return int.from_bytes(self.data[self.disp_offset : self.disp_offset + self.disp_size], "little", signed=True)

    @property
    def immediate(self) -> int:
        """The immediate, signed; a relative branch's distance is one too."""
        return int.from_bytes(self.data[self.imm_offset : self.imm_offset + self.imm_size], "little", signed=True)

    @property
    def text(self) -> str:
        """As a disassembler prints it."""
        return f"{self.mnemonic} {self.op_str}".strip()


def decode(data: bytes, address: int, bits: int) -> Insn:
    """The first instruction of `data`, which lies at `address` in code of `bits` 16, 32 or 64; cached.

    InvalidInstruction where there is none; bytes after it don't matter.
    """
    return _decode(bytes(data[:MAX_INSN_SIZE]), address, bits)


def boundaries(read: Callable[[int, int], bytes], start: int, end: int, bits: int) -> Iterator[int]:
    """Addresses of the instructions from `start` up to, not including, `end`.

    `read(vaddr, size)` gives code. Ends early, like the kernel's `can_probe`, at bytes that are no instruction.
    """
    address = start
    while address < end:
        yield address
        try:
            address += decode(read(address, min(MAX_INSN_SIZE, end - address)), address, bits).size
        except InvalidInstruction:
            return


def spans(code: bytes, bits: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the instructions in straight-line code, up to bytes that are none. Lengths only: it is quick."""
    for start, size, _mnemonic, _operands in _plain_disassembler(bits).disasm_lite(code, 0):
        yield start, start + size


@dataclass(frozen=True, slots=True)
class _Lead:
    """What stands before the operands: prefixes, the opcode's family and the opcode itself."""

    prefixes: bytes
    rex: int
    encoding: Encoding
    map: int
    opcode: int


def _lead(data: bytes, bits: int) -> _Lead:
    """Walk prefixes and escapes (SDM vol. 2, 2.1, 2.3.5; EVEX 2.7). A REX counts right before the opcode only."""
    at = rex = 0
    legacy = bytearray()
    while data[at] in _LEGACY_PREFIXES or (bits == 64 and data[at] & 0xF0 == 0x40):
        rex = data[at] if data[at] not in _LEGACY_PREFIXES else 0
        if not rex:
            legacy.append(data[at])
        at += 1
    prefixes = bytes(legacy)
    first, rest = data[at], data[at + 1 :]
    # Outside 64-bit mode c4, c5 and 62 are LES, LDS and BOUND unless the byte after looks like a register ModRM.
    vector = bool(rest) and (bits == 64 or rest[0] >= 0xC0)
    if first == 0xC5 and vector and len(rest) >= 2:
        return _Lead(prefixes, rex, Encoding.VEX, 1, rest[1])
    if first == 0xC4 and vector and len(rest) >= 3:
        return _Lead(prefixes, _inverted_rex(rest[0]), Encoding.VEX, rest[0] & 0x1F, rest[2])
    if first == 0x62 and vector and len(rest) >= 4:
        return _Lead(prefixes, _inverted_rex(rest[0]), Encoding.EVEX, rest[0] & 0x07, rest[3])
    if first == 0x8F and len(rest) >= 3 and rest[0] & 0x1F >= 8:
        return _Lead(prefixes, _inverted_rex(rest[0]), Encoding.XOP, rest[0] & 0x1F, rest[2])
    if first != _ESCAPE_0F:
        return _Lead(prefixes, rex, Encoding.LEGACY, 0, first)
    if rest[0] == 0x38:
        return _Lead(prefixes, rex, Encoding.LEGACY, 2, rest[1])
    if rest[0] == 0x3A:
        return _Lead(prefixes, rex, Encoding.LEGACY, 3, rest[1])
    return _Lead(prefixes, rex, Encoding.LEGACY, 1, rest[0])


def _inverted_rex(payload: int) -> int:
    """REX-like R, X, B bits from a VEX, EVEX or XOP payload byte, where they are stored inverted."""
    return 0x40 | (~payload >> 5) & 7


@lru_cache
def _plain_disassembler(bits: int) -> Any:
    return capstone.Cs(capstone.CS_ARCH_X86, _MODES[bits])


def _disassembler(bits: int) -> Any:
    found = _DISASSEMBLERS.get(bits)
    if found is None:
        found = capstone.Cs(capstone.CS_ARCH_X86, _MODES[bits])
        found.detail = True
        _DISASSEMBLERS[bits] = found
    return found


def _sizes(lead: _Lead, bits: int) -> tuple[int, int]:
    """Effective operand and address size in bits (SDM vol. 1, 3.6.1)."""
    operand = {16: 16, 32: 32, 64: 32}[bits]
    if lead.rex & 8 and lead.encoding is Encoding.LEGACY:
        operand = 64
    elif 0x66 in lead.prefixes:
        operand = 32 if bits == 16 else 16
    address = bits
    if 0x67 in lead.prefixes:
        address = {16: 32, 32: 16, 64: 32}[bits]
    return operand, address


@lru_cache(maxsize=65536)
def _decode(data: bytes, address: int, bits: int) -> Insn:
    found = next(_disassembler(bits).disasm(data, address, 1), None)
    if found is None:
        raise InvalidInstruction(address, data)
    lead = _lead(bytes(found.bytes), bits)
    operand_bits, address_bits = _sizes(lead, bits)
    modrm_offset = found.encoding.modrm_offset
    modrm = found.bytes[modrm_offset] if modrm_offset else None
    disp_offset, disp_size = found.encoding.disp_offset, found.encoding.disp_size
    rip_relative = any(
        operand.type == x86_const.X86_OP_MEM and operand.mem.base in (x86_const.X86_REG_RIP, x86_const.X86_REG_EIP)
        for operand in found.operands
    )
    if rip_relative and modrm_offset:
        # Capstone leaves the field out for some vector forms; RIP-relative always means disp32 right after ModRM.
        disp_offset, disp_size = modrm_offset + 1, 4
    return Insn(
        address=address,
        size=found.size,
        data=bytes(found.bytes),
        bits=bits,
        mnemonic=found.mnemonic,
        op_str=found.op_str,
        encoding=lead.encoding,
        map=lead.map,
        opcode=lead.opcode,
        prefixes=lead.prefixes,
        rex=lead.rex,
        modrm=modrm,
        modrm_offset=modrm_offset,
        disp_offset=disp_offset if disp_size else 0,
        disp_size=disp_size,
        imm_offset=found.encoding.imm_offset,
        imm_size=found.encoding.imm_size,
        rip_relative=rip_relative,
        operand_bits=operand_bits,
        address_bits=address_bits,
        groups=frozenset(found.group_name(group) for group in found.groups),
    )
