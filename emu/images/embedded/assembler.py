"""From assembly text to bytes and symbols: keystone behind a small dialect that spells both word sizes at once.

Rules: the only module that imports keystone; any thread. Intel syntax, `//` comments, one statement
a line. The dialect:

===================  =====================================  ========================================
written              64 bits                                32 bits
===================  =====================================  ========================================
xax xbx .. xsp       rax rbx .. rsp                         eax ebx .. esp
arg1 arg2 arg3       rdi rsi rdx (SysV)                     eax edx ecx (regparm(3))
WORD ptr             qword ptr                              dword ptr
[REL(name)]          [rip + name]                           [name]
.pointer a, b        .quad a, b                             .long a, b
pushfx popfx iretx   pushfq popfq iretq                     pushfd popfd iretd
jxcxz                jrcxz                                  jecxz
===================  =====================================  ========================================

`SYM_FUNC_START(name)` .. `SYM_FUNC_END(name)` and `SYM_DATA_START(name)` .. `SYM_DATA_END(name)` (Linux's names, see
Documentation/core-api/asm-annotations.rst) make symbols; a function is aligned to 16 bytes. `COUNT(name)` adds one to
the word `count_name`; all of them together, in order of appearance, are the table `counters` at the end of the image.
Words given by the caller stand for numbers.

Keystone 0.9.2 gets some things wrong without saying so; what the sources avoid, and tests/emu/test_embedded.py checks:
`pushf`/`popf` without a suffix and 32-bit `lgdt`/`lidt` get an operand-size prefix; `.set` symbols are refused inside
memory operands, and so are labels that begin with a dot; of two labels in one memory operand the second is lost;
alignment counts from the start of the text, so the base address must be a page's.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import keystone

from emu.iface import MachineError
from emu.symbols import Symbol

_REGISTERS = ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp")
_DIALECT = {
    64: {f"x{name}": f"r{name}" for name in _REGISTERS}
    | {"arg1": "rdi", "arg2": "rsi", "arg3": "rdx", "WORD": "qword", ".pointer": ".quad"}
    | {"pushfx": "pushfq", "popfx": "popfq", "iretx": "iretq", "jxcxz": "jrcxz"},
    32: {f"x{name}": f"e{name}" for name in _REGISTERS}
    | {"arg1": "eax", "arg2": "edx", "arg3": "ecx", "WORD": "dword", ".pointer": ".long"}
    | {"pushfx": "pushfd", "popfx": "popfd", "iretx": "iretd", "jxcxz": "jecxz"},
}
_COMMENT = re.compile(r"\s*//.*$", re.MULTILINE)
_WORDS = re.compile(r"\.?[A-Za-z_][\w.]*")
_RELATIVE = re.compile(r"\bREL\(([^)]*)\)")
_ANNOTATION = re.compile(r"^(SYM_FUNC|SYM_DATA)_(START_UNALIGNED|START|END)\((\w+)\)$", re.MULTILINE)
_COUNT = re.compile(r"\bCOUNT\((\w+)\)")


class AssemblyError(MachineError):
    """Text that keystone refuses; it does not say on which line."""


@dataclass(frozen=True, slots=True)
class Assembled:
    """`code` for address `base`, its symbols (kind "T" functions, "D" data) and the names counted in `counters`."""

    base: int
    code: bytes
    symbols: tuple[Symbol, ...]
    counters: tuple[str, ...]

    def offset(self, name: str) -> int:
        """Of the symbol `name` into `code`; KeyError if there is none."""
        for symbol in self.symbols:
            if symbol.name == name:
                return symbol.address - self.base
        raise KeyError(name)


def encode(source: str, bits: int, address: int) -> bytes:
    """The machine code of `source`, plain Intel syntax, for `address`. AssemblyError says what keystone objects to."""
    mode = keystone.KS_MODE_64 if bits == 64 else keystone.KS_MODE_32
    try:
        code, _ = keystone.Ks(keystone.KS_ARCH_X86, mode).asm(source, address, as_bytes=True)
    except keystone.KsError as error:
        raise AssemblyError(f"cannot assemble: {error}") from error
    return bytes(code or b"")


def translate(source: str, bits: int, words: Mapping[str, str]) -> str:
    """`source` from the dialect to what keystone reads, table of counters included.

    A symbol `name` starts at the label `name` and ends at `name.end`.
    """
    table = _DIALECT[bits] | dict(words)
    text = _COMMENT.sub("", source)
    counters = _counters(text)
    if counters:
        rows = "".join(f"count_{name}:\n    .pointer 0\n" for name in counters)
        text += f"\n    .balign 8\nSYM_DATA_START(counters)\n{rows}SYM_DATA_END(counters)\n"
    text = _COUNT.sub(r"inc WORD ptr [REL(count_\1)]", text)
    text = _RELATIVE.sub(r"rip + \1" if bits == 64 else r"\1", text)
    text = _ANNOTATION.sub(_annotate, text)
    lines = (
        line if '"' in line else _WORDS.sub(lambda match: table.get(match[0], match[0]), line)
        for line in text.split("\n")
    )
    return "\n".join(lines)


def assemble(source: str, bits: int, base: int, words: Mapping[str, str]) -> Assembled:
    """`source` in the dialect, linked at `base` (a page boundary); `words` are the caller's names for numbers."""
    plain = _COMMENT.sub("", source)
    counters = _counters(plain)
    kinds = {match[3]: match[1] for match in _ANNOTATION.finditer(plain)}
    if counters:
        kinds["counters"] = "SYM_DATA"
    # Keystone reports no label's address; a table of them behind the code does, and costs no second pass of ours.
    pairs = "".join(f"\n    .quad {name}, {name}.end" for name in kinds)
    code = encode(translate(source, bits, words) + pairs + "\n", bits, base)
    end = len(code) - 16 * len(kinds)
    ranges = dict(zip(kinds, struct.iter_unpack("<QQ", code[end:]), strict=True))
    symbols = [
        Symbol(name, start, stop - start, "T" if kinds[name] == "SYM_FUNC" else "D")
        for name, (start, stop) in ranges.items()
    ]
    width = bits // 8
    for index, name in enumerate(counters):
        symbols.append(Symbol(f"count_{name}", ranges["counters"][0] + index * width, width, "D"))
    return Assembled(base, code[:end], tuple(symbols), counters)


def _counters(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_COUNT.findall(text)))


def _annotate(match: re.Match[str]) -> str:
    kind, edge, name = match.groups()
    if edge == "END":
        return f"{name}.end:"
    return f"    .balign 16\n{name}:" if kind == "SYM_FUNC" and edge == "START" else f"{name}:"
