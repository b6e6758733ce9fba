"""A symbol file for stock gdb: an ELF with a kernel's symbols and section ranges, and none of its bytes.

Rules: pure, values in and bytes out; standard library and this package. The sections are NOBITS, so gdb takes names
from the file and memory from the target: what it disassembles is what runs, not what was in an image. Checked with
gdb 13 and 18; layouts as in `elf`.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from emu.images.plan import Section
from emu.symbols import Symbol

_SHT_PROGBITS, _SHT_SYMTAB, _SHT_STRTAB, _SHT_NOTE, _SHT_NOBITS = 1, 2, 3, 7, 8
_SHF_WRITE, _SHF_ALLOC, _SHF_EXECINSTR = 1, 2, 4
_SHN_ABS = 0xFFF1
_STB_LOCAL, _STB_GLOBAL, _STB_WEAK = 0, 1, 2
_STT_NOTYPE, _STT_OBJECT, _STT_FUNC = 0, 1, 2
_NT_GNU_BUILD_ID = 3
_ET_EXEC = 2


@dataclass(frozen=True, slots=True)
class _Format:
    machine: int
    header: struct.Struct
    section: struct.Struct
    symbol: struct.Struct


_FORMATS = {
    32: _Format(3, struct.Struct("<16sHHIIIIIHHHHHH"), struct.Struct("<10I"), struct.Struct("<IIIBBH")),
    64: _Format(62, struct.Struct("<16sHHIQQQIHHHHHH"), struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IBBHQQ")),
}


def symbol_elf(
    symbols: Iterable[Symbol],
    *,
    bits: int,
    sections: Sequence[Section],
    build_id: bytes | None = None,
    frames: bytes = b"",
) -> bytes:
    """An ELF executable of `bits` (32, 64) naming `symbols` inside `sections`, with a build-id note where one is given.

    `frames` is a .debug_frame section (see `orc`), by which gdb unwinds.

    Text symbols become functions, data, bss and read-only ones objects, with their sizes; a symbol in no section is
    absolute. No sections at all: everything is absolute, and gdb still resolves the names.
    """
    form = _FORMATS[bits]
    ordered = sorted((s for s in sections if s.address), key=lambda section: section.address)
    symtab, strtab, locals_count = _symbol_table(symbols, form, bits, ordered)
    note = struct.pack("<III4s", 4, len(build_id), _NT_GNU_BUILD_ID, b"GNU\0") + build_id if build_id else b""
    names = _StringTable()
    word = bits // 8

    # (name, type, flags, address, contents, size, link, info, alignment, entry size)
    rows: list[tuple[int, int, int, int, bytes, int, int, int, int, int]] = [(0, 0, 0, 0, b"", 0, 0, 0, 0, 0)]
    for section in ordered:
        flags = _SHF_ALLOC | (_SHF_WRITE if section.writable else 0) | (_SHF_EXECINSTR if section.executable else 0)
        rows.append((names.add(section.name), _SHT_NOBITS, flags, section.address, b"", section.size, 0, 0, 1, 0))
    if frames:
        rows.append((names.add(".debug_frame"), _SHT_PROGBITS, 0, 0, frames, len(frames), 0, 0, 8, 0))
    if note:
        rows.append((names.add(".note.gnu.build-id"), _SHT_NOTE, 0, 0, note, len(note), 0, 0, 4, 0))
    strtab_index = len(rows) + 1
    entry = form.symbol.size
    rows.append((names.add(".symtab"), _SHT_SYMTAB, 0, 0, symtab, len(symtab), strtab_index, locals_count, word, entry))
    rows.append((names.add(".strtab"), _SHT_STRTAB, 0, 0, strtab, len(strtab), 0, 0, 1, 0))
    own_name = names.add(".shstrtab")
    rows.append((own_name, _SHT_STRTAB, 0, 0, bytes(names.data), len(names.data), 0, 0, 1, 0))

    out = bytearray(form.header.size)
    headers = bytearray()
    for name, kind, flags, address, contents, size, link, info, alignment, entry_size in rows:
        out += bytes(-len(out) % 8)
        headers += form.section.pack(name, kind, flags, address, len(out), size, link, info, alignment, entry_size)
        out += contents
    out += bytes(-len(out) % 8)
    table = len(out)
    out += headers
    start = next((section.address for section in ordered if section.executable), 0)  # gdb misses one in no section
    ident = b"\x7fELF" + bytes([bits // 32, 1, 1])
    form.header.pack_into(
        *(out, 0, ident, _ET_EXEC, form.machine, 1, start & (1 << bits) - 1, 0, table, 0, form.header.size, 0, 0),
        *(form.section.size, len(rows), len(rows) - 1),
    )
    return bytes(out)


class _StringTable:
    """Names in a string table; `add` gives a name's offset."""

    def __init__(self) -> None:
        self.data = bytearray(1)

    def add(self, name: str) -> int:
        offset = len(self.data)
        self.data += name.encode("utf-8", "replace") + b"\0"
        return offset


def _symbol_table(
    symbols: Iterable[Symbol], form: _Format, bits: int, sections: Sequence[Section]
) -> tuple[bytes, bytes, int]:
    """.symtab and .strtab, and how many entries come before the first global one (the ABI has locals first)."""
    strings = _StringTable()
    starts = [section.address for section in sections]
    pack = form.symbol.pack
    mask = (1 << bits) - 1
    tables = {True: [pack(*(0,) * 6)], False: []}
    for name, address, size, kind, _ in symbols:
        position = bisect_right(starts, address) - 1
        inside = position >= 0 and address <= sections[position].address + sections[position].size
        index = position + 1 if inside and kind not in "Aa" else _SHN_ABS
        binding, kind_number = _binding(kind), _type(kind)
        info = binding << 4 | kind_number
        row = (address & mask, size & mask)
        offset = strings.add(name)
        local = binding == _STB_LOCAL
        tables[local].append(pack(offset, *row, info, 0, index) if bits == 32 else pack(offset, info, 0, index, *row))
    return b"".join(tables[True] + tables[False]), bytes(strings.data), len(tables[True])


def _binding(kind: str) -> int:
    if kind in "WwVv":
        return _STB_WEAK
    return _STB_GLOBAL if kind.isupper() else _STB_LOCAL


def _type(kind: str) -> int:
    if kind in "TtWw":
        return _STT_FUNC
    return _STT_OBJECT if kind in "DdBbRrVvGgSs" else _STT_NOTYPE
