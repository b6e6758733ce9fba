"""VEX instructions are undefined: our processors have none, and the engine executes the 128-bit ones wrongly.

Rules: the machine's thread only. Each block the engine translates is looked through before it runs; where it holds a
VEX instruction, a PC hook is put there, at which the machine delivers #UD. Only what the engine takes for VEX counts:
in 64-bit code each c4 or c5 in an opcode's place, in 32-bit code those with two high bits after them (else it is LES
or LDS; SDM vol. 2, 2.3.5.1), in 16-bit code none. After a 66, f2, f3, f0 or REX prefix the engine gives #UD itself.
"""

from __future__ import annotations

import re

from emu.cpustate import CpuState
from emu.engine import Engine
from emu.iface import BackEnd
from emu.insn import MAX_INSN_SIZE, spans
from emu.text import ArmedText

_PREFIXES = b"\x26\x2e\x36\x3e\x64\x65\x67"
_MAX_PLACES = 64  # PC hooks slow the whole engine; the oldest goes, and comes back when its block is translated again


def _pattern(lowest: int) -> re.Pattern[bytes]:
    """VEX2, or VEX3 of a map that exists (1 to 3), whose second byte is at least `lowest`."""
    maps = b"".join(b"\\x%02x" % byte for byte in range(lowest, 256) if byte & 0x1F in (1, 2, 3))
    return re.compile(rb"\xc5[\x%02x-\xff].|\xc4[%b].." % (lowest, maps), re.DOTALL)


_SUSPECT = {32: _pattern(0xC0), 64: _pattern(0)}  # what is one in 32-bit code would be one in 64-bit code


def begins_with_vex(code: bytes, bits: int) -> bool:
    """The first instruction of `code`, of `bits` 16, 32 or 64, is one."""
    suspect = _SUSPECT.get(bits)
    return suspect is not None and suspect.match(code, len(code) - len(code.lstrip(_PREFIXES))) is not None


def find_vex(code: bytes, bits: int) -> int | None:
    """Offset of the first one in straight-line code of `bits`, or None."""
    pattern = _SUSPECT.get(bits)
    suspect = None if pattern is None else pattern.search(code)
    if pattern is None or suspect is None:
        return None
    for start, end in spans(code, bits):
        if end <= suspect.start():
            continue
        if begins_with_vex(code[start:], bits):
            return start
        suspect = pattern.search(code, end)  # the last one was an operand
        if suspect is None:
            return None
    return None


class VexGuard:
    """Finds VEX instructions before they run and knows where they stand. `owner` is what their places belong to."""

    def __init__(self, cpu: CpuState, engine: Engine, text: ArmedText, owner: object) -> None:
        self._cpu = cpu
        self._engine = engine
        self._text = text
        self._owner = owner
        self._places: dict[int, None] = {}  # in the order they were found
        self._found: int | None = None

    def look(self, pc: int, code: bytes) -> None:
        """From the engine, about a new block: where it has a VEX instruction, stop before its first instruction."""
        if _SUSPECT[64].search(code) is None:  # nineteen blocks of twenty; the others are decoded
            return
        at = find_vex(code, self._cpu.bits)
        if at is not None and pc + at not in self._places:
            self._found = pc + at
            self._engine.stop_here()

    def arm(self) -> bool:
        """After a run: put a hook on what `look` found; False where it found nothing."""
        if self._found is None:
            return False
        if len(self._places) >= _MAX_PLACES:
            oldest = next(iter(self._places))
            del self._places[oldest]
            self._text.disarm(oldest, self._owner)
        self._text.arm(self._found, self._owner, BackEnd.HOOK)
        self._places[self._found] = None
        self._found = None
        return True

    def stands_at(self, pc: int) -> bool:
        """In a PC hook: a VEX instruction is there now, in this address space and this mode."""
        return pc in self._places and begins_with_vex(self._engine.fetch(pc, MAX_INSN_SIZE), self._cpu.bits)
