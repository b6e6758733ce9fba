"""Relocatable objects: handlers that a user compiled, placed in monitor RAM and linked against the guest's symbols.

Rules: `parse` is pure and trusts nothing; ObjectLoader belongs to the machine's thread. Code goes into the window's
read-execute half, everything else that is allocated into its writable half. An object is linked where the window is:
when that moves (another address space's tables, a restored snapshot) it is linked anew and its data begins afresh.
Sources: ELF gABI chapter 4; x86-64 psABI table 4.9; i386 psABI table 2.12. Common symbols and GOT loads are honoured;
thread-local data, constructors and COMDAT elimination are not.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from emu.iface import Machine
from probes.errors import ProbeError
from probes.lookup import did_you_mean, resolve
from probes.room import Room

MAX_SIZE: Final = 16 << 20  # bytes of a file; the window takes less
_MAX_SECTIONS, _MAX_SYMBOLS, _MAX_RELOCATIONS = 4096, 100_000, 200_000
_MAX_ALIGN: Final = 4096

_ET_REL, _LITTLE, _CURRENT = 1, 1, 1
_MACHINES: Final = {8: 62, 4: 3}  # EM_X86_64, EM_386
_SYMTAB, _RELA, _NOTE, _NOBITS, _REL = 2, 4, 7, 8, 9
_ALLOC, _EXECUTABLE, _TLS = 2, 4, 0x400
_UNDEFINED, _RESERVED, _ABSOLUTE, _COMMON = 0, 0xFF00, 0xFFF1, 0xFFF2
_WEAK, _GLOBALS = 2, (1, 2)

# type -> (what it needs, bytes, signed): R_X86_64_* and R_386_*
_RELOCATIONS: Final[Mapping[int, Mapping[int, tuple[str, int, bool]]]] = {
    8: {
        1: ("absolute", 8, False),  # 64
        2: ("relative", 4, True),  # PC32
        4: ("relative", 4, True),  # PLT32: no PLT here, the function itself
        9: ("got", 4, True),  # GOTPCREL
        10: ("absolute", 4, False),  # 32
        11: ("absolute", 4, True),  # 32S
        24: ("relative", 8, True),  # PC64
        41: ("got", 4, True),  # GOTPCRELX
        42: ("got", 4, True),  # REX_GOTPCRELX
    },
    4: {1: ("absolute", 4, False), 2: ("relative", 4, True), 4: ("relative", 4, True)},  # 32, PC32, PLT32
}
_GOT: Final = "_GLOBAL_OFFSET_TABLE_"  # named by code that loads through it, whose relocations say where
_ALIASES: Final = {"printk": "_printk", "_printk": "printk"}  # the one is a macro around the other since 5.15


@dataclass(frozen=True, slots=True)
class Section:
    """A section that is placed: `at` is its offset into the object's code (`executable`) or data."""

    name: str
    executable: bool
    at: int
    size: int
    content: bytes


@dataclass(frozen=True, slots=True)
class ObjectSymbol:
    """`section` is its index, -1 for an absolute value, None for one that somebody else must define."""

    name: str
    section: int | None
    value: int
    weak: bool
    exported: bool


@dataclass(frozen=True, slots=True)
class Relocation:
    """To patch `section` at `at`, for a symbol. `offset` is where in the file it stands."""

    section: int
    at: int
    kind: str
    size: int
    signed: bool
    symbol: int
    addend: int
    offset: int


@dataclass(slots=True)
class ObjectFile:
    """What `parse` found. Sections by index; `text` and `data` are bytes of room needed, GOT included."""

    name: str
    word: int
    sections: dict[int, Section] = field(default_factory=dict)
    symbols: list[ObjectSymbol] = field(default_factory=list)
    relocations: list[Relocation] = field(default_factory=list)
    got: dict[int, int] = field(default_factory=dict)  # symbol -> offset into the data
    text: int = 0
    data: int = 0

    def undefined(self) -> list[str]:
        """Names that others must define."""
        return [s.name for s in self.symbols if s.section is None and not s.weak and s.name != _GOT]


def parse(data: bytes, name: str, word: int) -> ObjectFile:
    """A relocatable ELF file for a guest with words of `word` bytes; ProbeError ENOEXEC names the offset at fault."""
    return _Parser(data, name, word).parse()


@dataclass(frozen=True, slots=True)
class _Header:
    """A section header as it stands in the file, at `offset`."""

    index: int
    offset: int
    name: int
    kind: int
    flags: int
    at: int
    size: int
    link: int
    info: int
    align: int
    entry: int


class _Parser:
    """One file. Every number from it is checked before it is used."""

    def __init__(self, data: bytes, name: str, word: int) -> None:
        self._data = data
        self._name = name
        self._word = word
        self._headers: list[_Header] = []
        self._found = ObjectFile(name, word)

    def parse(self) -> ObjectFile:
        if len(self._data) > MAX_SIZE:
            raise self._refused(0, f"more than {MAX_SIZE >> 20} MiB")
        self._read_headers()
        self._place_sections()
        tables = [header for header in self._headers if header.kind == _SYMTAB]
        if len(tables) != 1:
            raise self._refused(0, f"{len(tables)} symbol tables")
        self._read_symbols(tables[0])
        for header in self._headers:
            if header.kind in (_REL, _RELA) and header.info in self._found.sections:
                self._read_relocations(header, tables[0])
        return self._found

    def _refused(self, offset: int, reason: str) -> ProbeError:
        return ProbeError(errno.ENOEXEC, f"{self._name}: {reason}, at offset {offset:#x}")

    def _unpack(self, layout: str, offset: int, what: str) -> tuple[int, ...]:
        size = struct.calcsize(layout)
        if not 0 <= offset <= len(self._data) - size:
            raise self._refused(offset, f"{what} lies outside the file")
        return struct.unpack_from(layout, self._data, offset)

    def _bytes(self, header: _Header, what: str) -> bytes:
        if header.at > len(self._data) or header.size > len(self._data) - header.at:
            raise self._refused(header.offset, f"{what} lies outside the file")
        return self._data[header.at : header.at + header.size]

    def _string(self, table: bytes, at: int, offset: int) -> str:
        end = table.find(b"\0", at)
        if at >= len(table) or end < 0:
            raise self._refused(offset, "a name lies outside its string table")
        return table[at:end].decode("utf-8", "backslashreplace")

    # ------------------------------------------------------------------------------------------------------ sections

    def _read_headers(self) -> None:
        wide = self._word == 8
        if self._data[:4] != b"\x7fELF":
            raise self._refused(0, "no ELF file")
        ident = self._unpack("<4x3B", 0, "the header")
        if ident != (2 if wide else 1, _LITTLE, _CURRENT):
            raise self._refused(4, f"not a {self._word * 8}-bit little-endian object")
        kind, machine = self._unpack("<HH", 16, "the header")
        if kind != _ET_REL:
            raise self._refused(16, "not a relocatable object: compile with -c")
        if machine != _MACHINES[self._word]:
            raise self._refused(18, f"for machine {machine}, the guest's is {_MACHINES[self._word]}")
        (table,) = self._unpack("<Q" if wide else "<I", 40 if wide else 32, "the header")
        size, count, names = self._unpack("<3H", 58 if wide else 46, "the header")
        layout = "<2I4Q2I2Q" if wide else "<10I"
        if size != struct.calcsize(layout) or not 0 < count <= _MAX_SECTIONS or names >= count:
            raise self._refused(58 if wide else 46, f"{count} section headers of {size} bytes, names in {names}")
        for index in range(count):
            offset = table + index * size
            name, kind, flags, _, at, length, link, info, align, entry = self._unpack(
                layout, offset, "a section header"
            )
            self._headers.append(_Header(index, offset, name, kind, flags, at, length, link, info, align, entry))
        self._names = self._bytes(self._headers[names], "the section names")

    def _place_sections(self) -> None:
        found = self._found
        for header in self._headers:
            if not header.flags & _ALLOC or header.kind == _NOTE or not header.size:
                continue
            align = header.align or 1
            if header.flags & _TLS:
                raise self._refused(header.offset, "thread-local data is not available")
            if align & (align - 1) or align > _MAX_ALIGN:
                raise self._refused(header.offset, f"an alignment of {align}")
            if header.size > MAX_SIZE:
                raise self._refused(header.offset, f"a section of {header.size:,} bytes")
            content = b"" if header.kind == _NOBITS else self._bytes(header, "a section")
            executable = bool(header.flags & _EXECUTABLE)
            at = -(-(found.text if executable else found.data) // align) * align
            if executable:
                found.text = at + header.size
            else:
                found.data = at + header.size
            name = self._string(self._names, header.name, header.offset)
            found.sections[header.index] = Section(name, executable, at, header.size, content)

    # ------------------------------------------------------------------------------------------- symbols, relocations

    def _rows(self, header: _Header, layout: str, limit: int, what: str) -> Iterator[tuple[int, tuple[int, ...]]]:
        size = struct.calcsize(layout)
        if header.entry != size or header.size % size or header.size // size > limit:
            raise self._refused(header.offset, f"{what} of {header.size:,} bytes with entries of {header.entry}")
        self._bytes(header, what)
        for offset in range(header.at, header.at + header.size, size):
            yield offset, struct.unpack_from(layout, self._data, offset)

    def _read_symbols(self, header: _Header) -> None:
        if header.link >= len(self._headers):
            raise self._refused(header.offset, f"names in section {header.link}, which is not there")
        names = self._bytes(self._headers[header.link], "the symbol names")
        wide = self._word == 8
        for offset, row in self._rows(header, "<IBBHQQ" if wide else "<IIIBBH", _MAX_SYMBOLS, "a symbol table"):
            if wide:
                name, info, _, index, value, size = row
            else:
                name, value, size, info, _, index = row
            text = self._string(names, name, offset) if name else ""
            self._found.symbols.append(self._symbol(text, info >> 4, index, value, size, offset))

    def _symbol(self, name: str, binding: int, index: int, value: int, size: int, offset: int) -> ObjectSymbol:
        found = self._found
        exported = binding in _GLOBALS and index != _UNDEFINED
        if index == _UNDEFINED:
            return ObjectSymbol(name, None, 0, binding == _WEAK or not name, False)
        if index == _ABSOLUTE:
            return ObjectSymbol(name, -1, value, False, exported)
        if index == _COMMON:
            if value & (value - 1) or value > _MAX_ALIGN or size > MAX_SIZE:
                raise self._refused(offset, f"a common symbol of {size:,} bytes aligned to {value}")
            at = -(-found.data // (value or 1)) * (value or 1)
            found.data = at + size
            place = len(self._headers) + len(found.symbols)  # a section of its own, numbered behind the file's
            found.sections[place] = Section(name, False, at, size, b"")
            return ObjectSymbol(name, place, 0, False, exported)
        if index >= _RESERVED or index >= len(self._headers):
            raise self._refused(offset, f"a symbol in section {index}, which is not there")
        section = found.sections.get(index)
        if section is not None and value > section.size:
            raise self._refused(offset, f"a symbol {value:#x} bytes into a section of {section.size:#x}")
        return ObjectSymbol(name, index, value, False, exported and section is not None)

    def _read_relocations(self, header: _Header, symbols: _Header) -> None:
        found, wide, explicit = self._found, self._word == 8, header.kind == _RELA
        if header.link != symbols.index:
            raise self._refused(header.offset, f"relocations for the symbols in section {header.link}")
        section = found.sections[header.info]
        layout = "<" + ("QQ" if wide else "II") + (("q" if wide else "i") if explicit else "")
        if len(found.relocations) + header.size // struct.calcsize(layout) > _MAX_RELOCATIONS:
            raise self._refused(header.offset, "too many relocations")
        for offset, row in self._rows(header, layout, _MAX_RELOCATIONS, "a relocation table"):
            number, kind = (row[1] >> 32, row[1] & 0xFFFFFFFF) if wide else (row[1] >> 8, row[1] & 0xFF)
            if not kind:
                continue
            if kind not in _RELOCATIONS[self._word]:
                hint = "" if wide else ": compile with -fno-pic"
                raise self._refused(offset, f"relocation type {kind} is not known{hint}")
            need, size, signed = _RELOCATIONS[self._word][kind]
            if row[0] > len(section.content) - size:
                raise self._refused(offset, f"a relocation outside its section {section.name}")
            if number >= len(found.symbols):
                raise self._refused(offset, f"symbol {number} of {len(found.symbols)}")
            symbol = found.symbols[number]
            if symbol.section not in (None, -1) and symbol.section not in found.sections:
                raise self._refused(offset, "a relocation to a section that is not loaded")
            if need == "got" and number not in found.got:
                found.data = -(-found.data // self._word) * self._word
                found.got[number] = found.data
                found.data += self._word
            addend = row[2] if explicit else int.from_bytes(section.content[row[0] :][:size], "little", signed=True)
            found.relocations.append(Relocation(header.info, row[0], need, size, signed, number, addend, offset))


@dataclass(slots=True)
class _Loaded:
    """An object with its room: offsets into the window, and the addresses it was linked at (-1: not yet)."""

    file: ObjectFile
    text: int
    data: int
    linked: tuple[int, int] = (-1, -1)
    addresses: list[int] = field(default_factory=list)  # by symbol


class ObjectLoader:
    """The objects of one machine."""

    def __init__(self, machine: Machine, word: int, room: Room) -> None:
        self._machine = machine
        self._word = word
        self._room = room
        self._loaded: list[_Loaded] = []

    def load(self, data: bytes, name: str) -> list[str]:
        """Take an object in. -> the functions and data it offers. ProbeError ENOEXEC, ENOENT, ENOMEM, ERANGE.

        It is linked at its first use where the guest has not mapped the functions it calls yet, as before its boot.
        """
        file = parse(data, name, self._word)
        outside = [self._resolve_outside(wanted, name) for wanted in file.undefined()]
        text, start = self._room.take(file.text, file.data, _MAX_ALIGN)
        loaded = _Loaded(file, text, start)
        if all(self._machine.memory.translate(a) is not None or self._machine.window.contains(a) for a in outside):
            self._link(loaded)
        self._loaded.append(loaded)
        return sorted(symbol.name for symbol in file.symbols if symbol.exported)

    def check(self, name: str) -> None:
        """lookup.Functions: an object's, or the image's."""
        if not self.has(name):
            resolve(self._machine, name)

    def address(self, name: str) -> int:
        """lookup.Functions: where a symbol of the newest object that has it is now; else the image's."""
        own = self._own(name)
        return resolve(self._machine, name) if own is None else own

    def _own(self, name: str) -> int | None:
        for loaded in reversed(self._loaded):
            for index, symbol in enumerate(loaded.file.symbols):
                if symbol.exported and symbol.name == name:
                    self._link(loaded)
                    return loaded.addresses[index]
        return None

    def has(self, name: str) -> bool:
        """Some object offers `name`."""
        return any(s.exported and s.name == name for loaded in self._loaded for s in loaded.file.symbols)

    # ------------------------------------------------------------------------------------------------------- linking

    def _resolve_outside(self, name: str, wanted_by: str) -> int:
        if name == "jprobe_return":
            return self._machine.call_exit
        found = self._own(name)
        if found is not None:
            return found
        for known in (name, _ALIASES.get(name, name)):
            addresses = {symbol.address for symbol in self._machine.symbols.lookup(known)}
            if len(addresses) > 1:
                raise ProbeError(errno.EADDRNOTAVAIL, f"{wanted_by}: {len(addresses)} symbols are called {known}")
            if addresses:
                return addresses.pop()
        hint = did_you_mean(self._machine, name)
        raise ProbeError(errno.ENOENT, f"{wanted_by}: no symbol {name} in the guest", hint=hint)

    def _link(self, loaded: _Loaded) -> None:
        """Relocate for where the window is now, unless that has been done, and put it there."""
        window, file = self._machine.window, loaded.file
        base = window.address(loaded.text), window.address(loaded.data)
        if loaded.linked == base:
            return
        addresses = [self._address_of(file, symbol, base) for symbol in file.symbols]
        halves = bytearray(file.data), bytearray(file.text)  # by `executable`
        for section in file.sections.values():
            halves[section.executable][section.at : section.at + len(section.content)] = section.content
        for symbol, at in file.got.items():
            halves[False][at : at + self._word] = (addresses[symbol] & self._mask).to_bytes(self._word, "little")
        for relocation in file.relocations:
            self._apply(file, relocation, addresses, base, halves)
        window.write(loaded.text, bytes(halves[True]))
        window.write(loaded.data, bytes(halves[False]))
        loaded.linked, loaded.addresses = base, addresses

    @property
    def _mask(self) -> int:
        return (1 << 8 * self._word) - 1

    def _address_of(self, file: ObjectFile, symbol: ObjectSymbol, base: tuple[int, int]) -> int:
        if symbol.name == _GOT:
            return base[1]
        if symbol.section is None:
            return (
                0 if symbol.weak and not self._is_known(symbol.name) else self._resolve_outside(symbol.name, file.name)
            )
        section = file.sections.get(symbol.section)
        if section is None:  # absolute, or of a section that is not loaded and that nothing loaded refers to
            return symbol.value
        return base[0 if section.executable else 1] + section.at + symbol.value

    def _is_known(self, name: str) -> bool:
        return bool(name) and (self.has(name) or bool(self._machine.symbols.lookup(name)))

    def _apply(
        self,
        file: ObjectFile,
        relocation: Relocation,
        addresses: Sequence[int],
        base: tuple[int, int],
        halves: tuple[bytearray, bytearray],
    ) -> None:
        section = file.sections[relocation.section]
        at = section.at + relocation.at
        place = base[0 if section.executable else 1] + at
        target = addresses[relocation.symbol]
        if relocation.kind == "got":
            target = base[1] + file.got[relocation.symbol]
        value = target + relocation.addend - (0 if relocation.kind == "absolute" else place)
        bits = 8 * relocation.size
        value = _signed(value & self._mask, 8 * self._word) if relocation.signed else value & self._mask
        low, high = (-(1 << bits - 1), 1 << bits - 1) if relocation.signed else (0, 1 << bits)
        if not low <= value < high and relocation.size < self._word:
            name = file.symbols[relocation.symbol].name or section.name
            reason = f"{name} is out of reach of {bits} bits, at offset {relocation.offset:#x}: try -mcmodel=kernel"
            raise ProbeError(errno.ERANGE, f"{file.name}: {reason}")
        half = halves[section.executable]
        half[at : at + relocation.size] = (value & ((1 << bits) - 1)).to_bytes(relocation.size, "little")


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value
