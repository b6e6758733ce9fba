"""Functions of a program file by name, as offsets into the file, from what of it can be read.

Rules: pure; the file comes from a guest and is hostile. A page that is not there (MemoryFault) costs the table that
lies in it, not the others: sections name .symtab and .dynsym, and where they cannot be read the dynamic segment, which
a running program has in memory, still leads to the latter. Source: System V ABI (gABI 4.1), chapters 4 and 5; the GNU
hash table as in glibc 2.36, elf/dl-lookup.c.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from typing import Final

from emu.iface import MemoryFault

Reader = Callable[[int, int], bytes]
"""(offset, size) -> bytes of the file; fewer at its end. MemoryFault where a page cannot be read."""

_HEADER: Final = {1: struct.Struct("<HHIIIIIHHHHHH"), 2: struct.Struct("<HHIQQQIHHHHHH")}
_PROGRAM: Final = {1: struct.Struct("<8I"), 2: struct.Struct("<IIQQQQQQ")}
_SECTION: Final = {1: struct.Struct("<10I"), 2: struct.Struct("<IIQQQQIIQQ")}
_SYMBOL: Final = {1: struct.Struct("<IIIBBH"), 2: struct.Struct("<IBBHQQ")}
_PT_LOAD, _PT_DYNAMIC, _PT_NOTE = 1, 2, 4
_SHT_SYMTAB, _SHT_DYNSYM = 2, 11
_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_GNU_HASH = 4, 5, 6, 10, 0x6FFFFEF5
_STT_NOTYPE, _STT_FUNC, _STT_GNU_IFUNC = 0, 2, 10
_MAX_HEADERS: Final = 1024
_MAX_NOTE: Final = 4096  # bytes looked at of each; a build-id has 20
_MAX_TABLE: Final = 64 << 20  # bytes; the largest programs' symbol tables have a tenth


def functions(read: Reader) -> dict[str, int]:
    """Name -> offset of its first byte in the file. Empty where the file is no ELF program of this processor's."""
    try:
        return _Program(read).functions()
    except (MemoryFault, struct.error, UnicodeDecodeError):
        return {}


def identity(read: Reader) -> bytes | None:
    """A digest of what a program and its copies have in common, stripped or not: program headers and notes, where its
    build-id is.

    None where that cannot be read, or it is no ELF program.
    """
    try:
        return _Program(read).identity
    except (MemoryFault, struct.error):
        return None


class _Program:
    def __init__(self, read: Reader) -> None:
        self._read = read
        ident = read(0, 16)
        self._class = ident[4] if ident[:4] == b"\x7fELF" and ident[5:6] == b"\1" and ident[4] in (1, 2) else 0
        self._loads: list[tuple[int, int, int]] = []  # (vaddr, size in the file, offset)
        self._dynamic: tuple[int, int] | None = None
        self._notes: list[tuple[int, int]] = []
        self._table = b""
        self._sections = 0, 0, 0
        if self._class:
            self._headers()

    def _headers(self) -> None:
        layout = _HEADER[self._class]
        fields = layout.unpack(self._exactly(16, layout.size))
        phoff, shoff, phnum, shentsize, shnum = fields[4], fields[5], fields[9], fields[10], fields[11]
        if shentsize == _SECTION[self._class].size and shnum <= _MAX_HEADERS:
            self._sections = shoff, shnum, shentsize
        layout = _PROGRAM[self._class]
        table = self._exactly(phoff, min(phnum, _MAX_HEADERS) * layout.size)
        self._table = table
        for fields in layout.iter_unpack(table):
            kind, offset, vaddr, size = fields[0], fields[1], fields[2], fields[4]
            if self._class == 2:
                offset, vaddr, size = fields[2], fields[3], fields[5]
            if kind == _PT_LOAD:
                self._loads.append((vaddr, size, offset))
            elif kind == _PT_DYNAMIC:
                self._dynamic = offset, size
            elif kind == _PT_NOTE:
                self._notes.append((offset, size))

    @property
    def identity(self) -> bytes | None:
        notes = [self._exactly(offset, min(size, _MAX_NOTE)) for offset, size in self._notes]
        return hashlib.sha256(b"".join((self._table, *notes))).digest() if self._class else None

    def functions(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for symbols, strings in self._tables():
            for name, value in self._symbols(symbols, strings):
                offset = self._offset(value)
                if offset is not None:
                    found.setdefault(name, offset)
        return found

    def _tables(self) -> Iterator[tuple[bytes, bytes]]:
        """(symbol table, its strings), what there is of them."""
        shoff, count, size = self._sections
        try:
            sections = list(_SECTION[self._class].iter_unpack(self._exactly(shoff, count * size))) if count else []
        except MemoryFault:
            sections = []
        whole = bool(sections)
        for section in sections:
            if section[1] in (_SHT_SYMTAB, _SHT_DYNSYM) and section[6] < len(sections):
                strings = sections[section[6]]
                try:
                    yield self._exactly(section[4], section[5]), self._exactly(strings[4], strings[5])
                except MemoryFault:
                    whole = False
        if not whole and self._dynamic is not None:
            yield from self._dynamic_table(*self._dynamic)

    def _dynamic_table(self, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
        word = "I" if self._class == 1 else "Q"
        try:
            data = self._exactly(offset, size)
            tags = dict(struct.iter_unpack(f"<2{word}", data[: len(data) // (8 * self._class) * 8 * self._class]))
            symbols, strings = self._offset(tags.get(_DT_SYMTAB, 0)), self._offset(tags.get(_DT_STRTAB, 0))
            if symbols is None or strings is None:
                return
            count = self._count(tags)
            yield self._exactly(symbols, count * _SYMBOL[self._class].size), self._exactly(strings, tags[_DT_STRSZ])
        except (MemoryFault, KeyError):
            return

    def _count(self, tags: dict[int, int]) -> int:
        """Of the dynamic symbols, which only a hash table says."""
        if (at := self._offset(tags.get(_DT_HASH, 0))) is not None and tags.get(_DT_HASH):
            return int.from_bytes(self._exactly(at + 4, 4), "little")
        at = self._offset(tags[_DT_GNU_HASH])
        if at is None:
            return 0
        buckets, first, bloom, _ = struct.unpack("<4I", self._exactly(at, 16))
        at += 16 + bloom * (4 if self._class == 1 else 8)
        last = max(struct.unpack(f"<{buckets}I", self._exactly(at, 4 * buckets)), default=0)
        if last < first:
            return int(first)
        at += 4 * buckets + 4 * (last - first)
        while not struct.unpack("<I", self._exactly(at, 4))[0] & 1:  # the end of the last chain
            at, last = at + 4, last + 1
        return int(last) + 1

    def _symbols(self, symbols: bytes, strings: bytes) -> Iterator[tuple[str, int]]:
        layout = _SYMBOL[self._class]
        for fields in layout.iter_unpack(symbols[: len(symbols) // layout.size * layout.size]):
            name, value, info, section = fields[0], fields[1], fields[3], fields[5]
            if self._class == 2:
                value, info, section = fields[4], fields[1], fields[3]
            if not section or not value or info & 0xF not in (_STT_NOTYPE, _STT_FUNC, _STT_GNU_IFUNC):
                continue
            end = strings.find(b"\0", name)
            if end > name:
                yield strings[name:end].decode("utf-8", "backslashreplace"), value

    def _offset(self, vaddr: int) -> int | None:
        return next((offset + vaddr - at for at, size, offset in self._loads if at <= vaddr < at + size), None)

    def _exactly(self, offset: int, size: int) -> bytes:
        if size > _MAX_TABLE:
            raise MemoryFault(offset)
        data = self._read(offset, size)
        if len(data) < size:
            raise MemoryFault(offset + len(data))
        return data
