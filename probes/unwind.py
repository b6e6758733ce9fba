"""The guest's call stack at a hit, read from outside: by the kernel's own ORC tables, or by frame pointers.

Rules: called in the engine's thread inside a trap; reads guest memory only, and ends a stack where something cannot be
read. Source: Linux 6.1 and 6.12, arch/x86/include/asm/orc_types.h and arch/x86/kernel/unwind_orc.c.
"""

from __future__ import annotations

import contextlib
import struct
from array import array
from dataclasses import dataclass
from typing import Final

from emu.iface import Cpu, Machine, MemoryFault
from probes.arch import Convention

MAX_FRAMES: Final = 64
_ENDBR: Final = 4
_MAX_TABLE: Final = 4 << 20  # rows; an allyesconfig kernel has fewer
_PIECE: Final = 1 << 16
_ROW: Final = struct.Struct("<hhH")  # sp_offset, bp_offset, then bit fields: sp_reg 0-3, bp_reg 4-7, type from 8
_DX, _SP, _BP, _DI, _R10, _R13 = 2, 4, 5, 7, 10, 13  # numbers of registers as instructions encode them
_DIRECT: Final = {2: _DX, 3: _DI, 4: _BP, 5: _SP, 6: _R10, 7: _R13}
_BP_INDIRECT, _SP_INDIRECT, _PREV_SP, _SAVED_BP = 8, 9, 1, 4
_CALL, _REGS, _PARTIAL = "call", "regs", "partial"
_OLD_KINDS: Final = {0: _CALL, 1: _REGS, 2: _PARTIAL}  # two bits until 6.3
_NEW_KINDS: Final = {2: _CALL, 3: _REGS, 4: _PARTIAL}  # three since
_PT_BP, _PT_IP, _PT_SP = 32, 128, 152  # in struct pt_regs
_IRET_IP, _IRET_SP = 0, 24  # in what the processor pushes


class Unwinder:
    """Stacks of one machine's guest."""

    def __init__(self, machine: Machine, convention: Convention) -> None:
        self._machine = machine
        self._word = convention.word
        self._mask = convention.mask
        self._orc: _Orc | None = None
        self._looked = False

    def stack(self, cpu: Cpu) -> tuple[int, ...]:
        """The pc and return addresses from it outwards, at most MAX_FRAMES; only the kernel's part."""
        if not self._looked:
            self._looked = True
            self._orc = _find_orc(self._machine) if self._word == 8 else None
        walk = self._by_orc if self._orc is not None else self._by_frames
        found = [cpu.pc & self._mask]
        with contextlib.suppress(MemoryFault):  # as far as it can be followed
            walk(cpu, found)
        return tuple(found)

    def _read(self, address: int) -> int:
        return int.from_bytes(self._machine.memory.read(address & self._mask, self._word), "little")

    def _is_code(self, address: int) -> bool:
        return address >> (8 * self._word - 1) == 1 or self._machine.symbols.find(address) is not None

    def _by_frames(self, cpu: Cpu, found: list[int]) -> None:
        """A chain of saved frame pointers; at a function's entry the return address is still on top of the stack."""
        sp, bp = cpu.gpr[_SP] & self._mask, cpu.gpr[_BP] & self._mask
        covering = self._machine.symbols.find(found[0])
        if covering is not None and covering[1] in (0, _ENDBR):
            found.append(self._read(sp))
        while len(found) < MAX_FRAMES and bp >= sp and bp % self._word == 0:
            address = self._read(bp + self._word)
            if not self._is_code(address):
                return
            found.append(address)
            sp, bp = bp + 1, self._read(bp)

    def _by_orc(self, cpu: Cpu, found: list[int]) -> None:
        orc = self._orc
        assert orc is not None  # as asked for
        known = {number: cpu.gpr[number] & self._mask for number in _DIRECT.values()}
        ip, top, exact = found[0], known[_SP], True
        while len(found) < MAX_FRAMES:
            sp_offset, bp_offset, fields = orc.row(ip if exact else ip - 1)
            sp_register, bp_register = fields & 15, fields >> 4 & 15
            kind = orc.kinds.get(fields >> 8 & orc.kind_mask)
            if sp_register == _BP_INDIRECT:
                sp = self._read(known[_BP] + sp_offset)
            elif sp_register == _SP_INDIRECT:
                sp = self._read(known[_SP]) + sp_offset
            elif _DIRECT.get(sp_register) in known:
                sp = known[_DIRECT[sp_register]] + sp_offset
            else:
                return
            if kind == _CALL:
                ip, known[_SP] = self._read(sp - self._word), sp
                if bp_register == _PREV_SP:
                    known[_BP] = self._read(sp + bp_offset)
                elif bp_register == _SAVED_BP:
                    known[_BP] = self._read(known[_BP] + bp_offset)
            elif kind == _REGS:
                ip, known[_SP], known[_BP] = (self._read(sp + at) for at in (_PT_IP, _PT_SP, _PT_BP))
            elif kind == _PARTIAL:
                ip, known[_SP] = self._read(sp + _IRET_IP), self._read(sp + _IRET_SP)
            else:
                return
            if not ip >> 63 or (kind == _CALL and known[_SP] <= top):
                return  # a program's, or no stack that grows outwards
            known = {_SP: known[_SP], _BP: known[_BP]}
            top, exact = known[_SP], kind != _CALL
            found.append(ip)


@dataclass(slots=True)
class _Orc:
    """The kernel's tables: `offsets[i]`, relative to its own address, is where row i begins to hold."""

    start: int
    offsets: array[int]
    rows: bytes
    kinds: dict[int, str]
    kind_mask: int

    def row(self, ip: int) -> tuple[int, int, int]:
        low, high = 0, len(self.offsets)
        while low < high:
            middle = (low + high) // 2
            if self.start + 4 * middle + self.offsets[middle] <= ip:
                low = middle + 1
            else:
                high = middle
        return _ROW.unpack_from(self.rows, _ROW.size * max(low - 1, 0))


def _find_orc(machine: Machine) -> _Orc | None:
    """The tables between the linker's symbols, in the running guest; None for a kernel without."""
    names = ("__start_orc_unwind_ip", "__stop_orc_unwind_ip", "__start_orc_unwind")
    symbols = [machine.symbols.lookup(name) for name in names]
    if not all(symbols):
        return None
    start, stop, rows_at = (found[0].address for found in symbols)
    count = (stop - start) // 4
    if not 0 < count <= _MAX_TABLE:
        return None
    try:
        offsets = array("i", _read_all(machine, start, 4 * count))
        rows = _read_all(machine, rows_at, _ROW.size * count)
    except MemoryFault:
        return None
    # The first row of a function is that of a call: type 0 until 6.3, 2 since, when 0 came to mean "nothing known".
    newer = sum(rows[at + 5] & 7 == 2 for at in range(0, len(rows), _ROW.size * 64))
    older = sum(rows[at + 5] & 7 == 0 for at in range(0, len(rows), _ROW.size * 64))
    return _Orc(start, offsets, rows, _NEW_KINDS, 7) if newer > older else _Orc(start, offsets, rows, _OLD_KINDS, 3)


def _read_all(machine: Machine, address: int, size: int) -> bytes:
    pieces = [machine.memory.read(address + at, min(_PIECE, size - at)) for at in range(0, size, _PIECE)]
    return b"".join(pieces)
