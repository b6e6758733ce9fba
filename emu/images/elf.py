"""ELF files of both word sizes: headers read with every offset checked, segments at their physical addresses, symbols.

Rules: pure, bytes in and values out; standard library, `emu.iface`, `emu.symbols` and `plan` only. The file is hostile
until shown otherwise: nothing is indexed before it is known to lie inside the file, and every refusal says where.
Source of the layouts: System V ABI, chapter 4 (gABI 4.1), and its i386 and AMD64 supplements.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from emu.iface import ImageError
from emu.images.plan import Bytes, Image, Section, Segment, flat_start
from emu.symbols import Symbol

MAGIC = b"\x7fELF"
_MACHINES = {(1, 3): 32, (2, 62): 64}
"""(EI_CLASS, e_machine) -> bits: ELFCLASS32 with EM_386, ELFCLASS64 with EM_X86_64. Nothing else runs here."""
_MACHINE_NAMES = {8: "MIPS", 20: "PowerPC", 22: "S/390", 40: "ARM", 183: "AArch64", 243: "RISC-V", 258: "LoongArch"}

_PT_LOAD, _PT_INTERP, _PT_NOTE = 1, 3, 4
_SHT_SYMTAB, _SHT_NOBITS, _SHT_DYNSYM = 2, 8, 11
_SHF_WRITE, _SHF_ALLOC, _SHF_EXECINSTR = 1, 2, 4
_SHN_ABS = 0xFFF1
_PROGRAMS_LIMIT = 512
"""Program headers taken seriously; executables have about ten. It bounds the work a hostile file can ask for."""
_NAME_LIMIT = 1024
"""Bytes of a symbol's or section's name; Linux's own limit is 512 (KSYM_NAME_LEN, 6.1)."""
_NOTES_LIMIT = 0x10000
"""Bytes of a note segment looked at."""
_STT_OBJECT, _STT_FUNC, _STT_SECTION, _STT_FILE, _STT_TLS = 1, 2, 3, 4, 6
_NT_GNU_BUILD_ID = 3


@dataclass(frozen=True, slots=True)
class _Layout:
    """One word size's structures, little endian. The order of fields differs between the two; names are ours."""

    header: struct.Struct  # e_type e_machine e_version e_entry e_phoff e_shoff e_flags e_ehsize e_phentsize e_phnum ...
    program: struct.Struct
    section: struct.Struct
    symbol: struct.Struct


_LAYOUTS = {
    32: _Layout(*map(struct.Struct, ("<HHIIIIIHHHHHH", "<8I", "<10I", "<IIIBBH"))),
    64: _Layout(*map(struct.Struct, ("<HHIQQQIHHHHHH", "<IIQQQQQQ", "<IIQQQQIIQQ", "<IBBHQQ"))),
}


@dataclass(frozen=True, slots=True)
class ProgramHeader:
    kind: int
    offset: int
    vaddr: int
    paddr: int
    file_size: int
    memory_size: int


@dataclass(frozen=True, slots=True)
class SectionHeader:
    name: str
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int


class ElfFile:
    """The headers of an i386 or x86-64 ELF file, checked against its size; ImageError if it cannot be loaded.

    `bits` 32 or 64, `entry` as the header has it, `programs` in file order.
    """

    def __init__(self, path: str, data: Bytes) -> None:
        self.path = path
        self.data = memoryview(data)
        self.bits = self._identify()
        layout = _LAYOUTS[self.bits]
        self._layout = layout
        fields = self._unpack(layout.header, 16, "ELF header")
        kind, _, _, self.entry, phoff, self._shoff = fields[:6]
        phentsize, phnum, self._shentsize, self._shnum, self._shstrndx = fields[8:13]
        if kind not in (2, 3):
            names = {0: "no type", 1: "a relocatable object", 4: "a core dump"}
            raise ImageError(path, f"not an executable ELF file but {names.get(kind, f'type {kind}')}", 16)
        if phnum == 0:
            raise ImageError(path, "ELF file without program headers: nothing to load", 44 if self.bits == 32 else 56)
        if phnum > _PROGRAMS_LIMIT or phentsize != layout.program.size:
            raise ImageError(path, f"{phnum} program headers of {phentsize} bytes is not an executable's table", phoff)
        self.programs = tuple(self._program(phoff + index * phentsize) for index in range(phnum))

    def _identify(self) -> int:
        ident = bytes(self.data[:20])
        if ident[:4] != MAGIC:
            raise ImageError(self.path, "not an ELF file")
        if len(ident) < 20:
            raise ImageError(self.path, "ELF header is cut short", len(ident))
        if ident[5] != 1:
            raise ImageError(self.path, "not a little-endian ELF file: not for x86", 5)
        machine = int.from_bytes(ident[18:20], "little")
        bits = _MACHINES.get((ident[4], machine))
        if bits is None:
            name = _MACHINE_NAMES.get(machine, f"machine {machine}, class {ident[4]}")
            raise ImageError(self.path, f"ELF file for {name}: only i386 (ELF32) and x86-64 (ELF64) run here", 18)
        return bits

    def _unpack(self, layout: struct.Struct, offset: int, what: str) -> tuple[int, ...]:
        if offset + layout.size > len(self.data):
            raise ImageError(self.path, f"{what} lies outside the file of {len(self.data):#x} bytes", offset)
        return layout.unpack_from(self.data, offset)

    def _program(self, offset: int) -> ProgramHeader:
        fields = self._unpack(self._layout.program, offset, "program header")
        if self.bits == 32:
            kind, position, vaddr, paddr, file_size, memory_size = fields[:6]
        else:
            kind, _, position, vaddr, paddr, file_size, memory_size = fields[:7]
        if kind in (_PT_LOAD, _PT_NOTE) and position + file_size > len(self.data):
            size = len(self.data)
            raise ImageError(
                self.path, f"segment of {file_size:#x} bytes runs past the end of the file ({size:#x})", offset
            )
        if kind == _PT_LOAD and memory_size < file_size:
            raise ImageError(
                self.path, f"segment has {file_size:#x} bytes in the file but {memory_size:#x} in memory", offset
            )
        if kind == _PT_LOAD and max(vaddr, paddr) + memory_size > 1 << self.bits:
            raise ImageError(self.path, f"segment of {memory_size:#x} bytes wraps around the address space", offset)
        return ProgramHeader(kind, position, vaddr, paddr, file_size, memory_size)

    @property
    def loads(self) -> tuple[ProgramHeader, ...]:
        """The segments that occupy memory."""
        return tuple(program for program in self.programs if program.kind == _PT_LOAD and program.memory_size)

    def segments(self) -> list[Segment]:
        """Every load segment at its physical address. ImageError where the file has none."""
        loads = self.loads
        if not loads:
            raise ImageError(self.path, "ELF file without a load segment: nothing to load")
        return [
            Segment(load.paddr, self.data[load.offset : load.offset + load.file_size], load.memory_size)
            for load in loads
        ]

    def physical_entry(self, entry: int | None = None) -> int:
        """`entry` (default: the header's) as a physical address.

        The ABI's e_entry is virtual; Linux and many small kernels put a physical address there. So: a virtual address
        of a segment is translated, a physical one stands as it is, anything else is an ImageError.
        """
        address = self.entry if entry is None else entry
        for load in self.loads:
            if load.vaddr <= address < load.vaddr + load.memory_size:
                return address - load.vaddr + load.paddr
        if any(load.paddr <= address < load.paddr + load.memory_size for load in self.loads):
            return address
        raise ImageError(self.path, f"entry point {address:#x} is in no load segment", 24)

    # Sections, symbols and notes are for people and debuggers. An image loads without them, and a broken table is
    # treated as absent: a kernel cut off behind its last segment still boots.

    def sections(self) -> tuple[SectionHeader, ...]:
        """Section headers in index order; empty where the table is absent, cut short or of another layout."""
        layout = self._layout.section
        count = self._shnum
        if not self._shoff or self._shentsize != layout.size or self._shoff + count * layout.size > len(self.data):
            return ()
        rows = list(layout.iter_unpack(self.data[self._shoff : self._shoff + count * layout.size]))
        names = b""
        if self._shstrndx < len(rows):
            names = self._contents(rows[self._shstrndx][4], rows[self._shstrndx][5])
        return tuple(
            SectionHeader(_string(names, name), kind, flags, address, offset, size, link)
            for name, kind, flags, address, offset, size, link, *_ in rows
        )

    def allocated_sections(self) -> tuple[Section, ...]:
        """The sections that occupy virtual memory; the per-cpu template, which lies at address 0, is not one."""
        return tuple(
            Section(row.name, row.address, row.size, bool(row.flags & _SHF_WRITE), bool(row.flags & _SHF_EXECINSTR))
            for row in self.sections()
            if row.flags & _SHF_ALLOC and row.size and row.address
        )

    def symbols(self) -> list[Symbol]:
        """Named functions, objects and labels of .symtab, else of .dynsym; empty where there is neither."""
        sections = self.sections()
        for wanted in (_SHT_SYMTAB, _SHT_DYNSYM):
            table = next((row for row in sections if row.kind == wanted and row.link < len(sections)), None)
            if table is not None:
                return list(self._symbols(table, sections))
        return []

    def _symbols(self, table: SectionHeader, sections: tuple[SectionHeader, ...]) -> Iterator[Symbol]:
        strings = sections[table.link]
        names = self._contents(strings.offset, strings.size)
        budget = 8 * len(names)  # names may share their ends, but not without limit
        layout = self._layout.symbol
        contents = self._contents(table.offset, table.size)
        for row in layout.iter_unpack(contents[: len(contents) // layout.size * layout.size]):
            if self.bits == 32:
                name, value, size, info, _, index = row
            else:
                name, info, _, index, value, size = row
            kind = info & 0xF
            text = _string(names, name)
            if not text or not index or kind in (_STT_SECTION, _STT_FILE, _STT_TLS):
                continue
            budget -= len(text)
            if budget < 0:
                return
            section = sections[index] if index < len(sections) else None
            yield Symbol(text, value, size, _letter(kind, info >> 4, index, section))

    def build_id(self) -> bytes | None:
        """The descriptor of the NT_GNU_BUILD_ID note, or None."""
        for program in self.programs:
            if program.kind != _PT_NOTE:
                continue
            for name, kind, descriptor in _notes(self._contents(program.offset, min(program.file_size, _NOTES_LIMIT))):
                if name == b"GNU\0" and kind == _NT_GNU_BUILD_ID and descriptor:
                    return descriptor
        return None

    def _contents(self, offset: int, size: int) -> bytes:
        return bytes(self.data[offset : offset + size]) if offset + size <= len(self.data) else b""


def _string(table: bytes, offset: int) -> str:
    end = table.find(b"\0", offset, offset + _NAME_LIMIT)
    return table[offset:end].decode("utf-8", "replace") if end >= 0 else ""


def _notes(contents: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    position = 0
    while position + 12 <= len(contents):
        name_size, size, kind = struct.unpack_from("<III", contents, position)
        name_end = position + 12 + -(-name_size // 4) * 4
        yield contents[position + 12 : position + 12 + name_size], kind, contents[name_end : name_end + size]
        position = name_end + -(-size // 4) * 4


def _letter(kind: int, binding: int, index: int, section: SectionHeader | None) -> str:
    """What nm prints for a symbol: text, data, bss, read-only or absolute; weak; capital where it is global."""
    if index == _SHN_ABS or section is None or (section.flags & _SHF_ALLOC and not section.address):
        letter = "a"
    elif binding == 2:
        return "V" if kind == _STT_OBJECT else "W"
    elif kind == _STT_FUNC or section.flags & _SHF_EXECINSTR:
        letter = "t"
    elif not section.flags & _SHF_WRITE:
        letter = "r"
    else:
        letter = "b" if section.kind == _SHT_NOBITS else "d"
    return letter if binding == 0 else letter.upper()


def load_elf(path: str, data: Bytes, *, entry: int | None = None, bits: int | None = None) -> Image:
    """An ELF executable at its physical addresses; started in the mode of its class unless `bits` (32, 64) is given.

    `entry` replaces the header's entry point and may be virtual or physical like it. ImageError.
    """
    if bits == 16:
        raise ImageError(path, "an ELF file starts in 32 or 64 bits, not 16")
    elf = ElfFile(path, data)
    if any(program.kind == _PT_INTERP for program in elf.programs):
        raise ImageError(path, "a program for an operating system: it asks for a dynamic linker, and none is here")
    segments = elf.segments()
    start_at = elf.physical_entry(entry)
    own, start = flat_start(path, segments, start_at, bits or elf.bits)
    if start.mode == "long" and start_at >= 1 << 32:
        raise ImageError(path, f"entry point {start_at:#x} is above the 4 GiB that are mapped at the start")
    return Image(path, "elf", (*segments, *own), start, elf.symbols())
