"""Multiboot kernels, versions 1 and 2: found by their header, started with the information block the header asks for.

Rules: pure; standard library, `emu.iface` and this package. Source: Multiboot Specification 0.6.96 and Multiboot2
Specification 2.0; section numbers below are theirs.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from emu.iface import ImageError
from emu.images.elf import MAGIC as ELF_MAGIC
from emu.images.elf import ElfFile
from emu.images.plan import (
    CR0_PROTECTED,
    EFLAGS_RESET,
    LOW_END,
    LOW_START,
    PAGE,
    Bytes,
    Image,
    Segment,
    Start,
    align_up,
    boot_gdt,
    free_range,
    memory_map,
)
from emu.symbols import Symbol

_LOADER_NAME = b"gdbstub\0"
_CONVENTIONAL_KIB = 639
_INFO_SIZE = 4 * PAGE
"""Room for the information block, command lines included; a command line that does not fit is refused."""
_MAGIC_1, _INFO_MAGIC_1 = 0x1BADB002, 0x2BADB002
_MAGIC_2, _INFO_MAGIC_2 = 0xE85250D6, 0x36D76289
_SEARCH_1, _SEARCH_2 = 8192, 32768
"""Bytes from the file's start the header must lie in (1: 3.1; 2: 3.1)."""

_FLAG_ADDRESSES = 1 << 16
_UNKNOWN_REQUIRED = 0xFFF8
"""Flags 0 to 15 must be understood or refused (1: 3.1.2). Of 0 to 2, page alignment and memory information are given;
a request for a video mode (2) is answered with no video information, which is what a machine without a display has."""

_TAG_END, _TAG_REQUEST, _TAG_ADDRESS, _TAG_ENTRY = 0, 1, 2, 3
_TAGS_IGNORED = {4, 5, 6, 7, 8, 9, 10}
"""Console, framebuffer, module alignment (always done), EFI, relocation: none is given, as allowed (2: 3.1.7-13)."""
_REQUESTS_MET = {1, 2, 3, 4, 6}
_OPTIONAL = 1


@dataclass(frozen=True, slots=True)
class _Header:
    """Either version's header. `addresses`: header, load, load end, bss end as physical addresses, when it has them."""

    version: int
    offset: int
    addresses: tuple[int, int, int, int] | None = None
    entry: int | None = None


def find_header(path: str, data: Bytes) -> _Header | None:
    """The multiboot header of `data`, version 2 before 1, or None. ImageError for one that is broken."""
    view = memoryview(data)
    for offset in range(0, min(len(view), _SEARCH_2) - 15, 8):
        magic, arch, size, checksum = struct.unpack_from("<4I", view, offset)
        if magic == _MAGIC_2 and (magic + arch + size + checksum) & 0xFFFF_FFFF == 0:
            return _header_2(path, view, offset, arch, size)
    for offset in range(0, min(len(view), _SEARCH_1) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<3I", view, offset)
        if magic == _MAGIC_1 and (magic + flags + checksum) & 0xFFFF_FFFF == 0:
            return _header_1(path, view, offset, flags)
    return None


def _header_1(path: str, view: memoryview, offset: int, flags: int) -> _Header:
    if flags & _UNKNOWN_REQUIRED:
        raise ImageError(path, f"multiboot flags {flags:#x} ask for something unknown", offset + 4)
    if not flags & _FLAG_ADDRESSES:
        return _Header(1, offset)
    if offset + 32 > len(view):
        raise ImageError(path, "multiboot header is cut short", offset)
    header, load, load_end, bss_end, entry = struct.unpack_from("<5I", view, offset + 12)
    return _Header(1, offset, (header, load, load_end, bss_end), entry)


def _header_2(path: str, view: memoryview, offset: int, arch: int, size: int) -> _Header:
    if arch != 0:
        raise ImageError(path, f"multiboot2 header for architecture {arch}, not i386", offset + 4)
    if size < 16 or offset + size > len(view):
        raise ImageError(path, f"multiboot2 header of {size:#x} bytes does not fit in the file", offset + 8)
    addresses: tuple[int, int, int, int] | None = None
    entry: int | None = None
    position, end = offset + 16, offset + size
    while position + 8 <= end:
        kind, flags, length = struct.unpack_from("<HHI", view, position)
        if kind == _TAG_END:
            break
        if length < 8 or position + length > end:
            raise ImageError(path, f"multiboot2 tag {kind} of {length:#x} bytes does not fit in its header", position)
        if kind == _TAG_ADDRESS and length >= 24:
            addresses = struct.unpack_from("<4I", view, position + 8)
        elif kind == _TAG_ENTRY and length >= 12:
            (entry,) = struct.unpack_from("<I", view, position + 8)
        elif kind == _TAG_REQUEST:
            wanted = struct.unpack_from(f"<{(length - 8) // 4}I", view, position + 8)
            missing = sorted(set(wanted) - _REQUESTS_MET)
            if missing and not flags & _OPTIONAL:
                raise ImageError(
                    path, f"multiboot2 asks for information this machine has not: tag {missing[0]}", position
                )
        elif kind not in _TAGS_IGNORED and not flags & _OPTIONAL:
            raise ImageError(path, f"multiboot2 header tag {kind} is unknown and not optional", position)
        position += align_up(length, 8)
    return _Header(2, offset, addresses, entry)


def load_multiboot(
    path: str,
    data: Bytes,
    header: _Header,
    *,
    initrd: Bytes = b"",
    append: str = "",
    memory: int,
    entry: int | None = None,
) -> Image:
    """A multiboot kernel with its command line `append` and one module, `initrd`, if given; `memory` bytes of RAM.

    Entered in flat 32-bit protected mode, paging and interrupts off, eax the version's magic, ebx the information
    block (1: 3.2; 2: 3.3). No stack is promised; esp points at a page for kernels that forget. ImageError.
    """
    segments, start_at, symbols = _program(path, data, header, entry)
    base = free_range(path, segments, _INFO_SIZE + 2 * PAGE, LOW_START, LOW_END)
    gdt_segment, gdt = boot_gdt(base + _INFO_SIZE, 32)
    module = _place_module(path, initrd, segments, memory)
    modules = (module,) if module.size else ()
    build = _info_1 if header.version == 1 else _info_2
    # By custom the first word is the file's name; its folder is the host's business and would make runs differ.
    command = f"{os.path.basename(path)} {append}".strip().encode("utf-8", "replace") + b"\0"
    info = build(base, command, modules, memory)
    if len(info) > _INFO_SIZE:
        raise ImageError(path, f"command line of {len(command)} bytes is too long")
    registers = {
        "eax": _INFO_MAGIC_1 if header.version == 1 else _INFO_MAGIC_2,
        "ebx": base,
        "esp": base + _INFO_SIZE + 2 * PAGE,
        "cr0": CR0_PROTECTED,
        "eflags": EFLAGS_RESET,
    }
    start = Start("protected", start_at, registers, gdt)
    kind = "multiboot" if header.version == 1 else "multiboot2"
    return Image(path, kind, (*segments, gdt_segment, Segment(base, info), *modules), start, symbols)


def _program(path: str, data: Bytes, header: _Header, entry: int | None) -> tuple[list[Segment], int, Sequence[Symbol]]:
    """Segments, entry point and symbols: by the header's addresses where it has them, else as ELF."""
    if header.addresses is not None:
        segment = _addressed(path, memoryview(data), header.offset, header.addresses)
        start_at = header.entry if entry is None else entry
        if start_at is None or not segment.paddr <= start_at < segment.end:
            shown = "none" if start_at is None else f"{start_at:#x}"
            raise ImageError(path, f"multiboot entry point {shown} is outside the image", header.offset)
        return [segment], start_at, ()
    if bytes(memoryview(data)[:4]) != ELF_MAGIC:
        raise ImageError(path, "multiboot header without addresses in a file that is not ELF", header.offset)
    elf = ElfFile(path, data)
    start_at = elf.physical_entry(entry if entry is not None else header.entry)
    if start_at >= 1 << 32:
        raise ImageError(path, f"entry point {start_at:#x} is above 4 GiB", 24)
    return elf.segments(), start_at, elf.symbols()


def _addressed(path: str, view: memoryview, at: int, addresses: tuple[int, int, int, int]) -> Segment:
    """The one segment of an image that says itself where it goes (1: 3.1.3, 2: 3.1.5; the "a.out kludge").

    `at` is where the header lies in the file.
    """
    header_addr, load, load_end, bss_end = addresses
    first = at - (header_addr - load)
    if load == 0xFFFF_FFFF:
        first, load = 0, header_addr - at
    if load < 0 or not 0 <= first <= at:
        raise ImageError(path, f"multiboot load address {load:#x} does not fit its header address {header_addr:#x}", at)
    size = load_end - load if load_end else len(view) - first
    if size <= 0 or first + size > len(view):
        raise ImageError(path, f"multiboot load end {load_end:#x} lies outside the file", at)
    if bss_end and bss_end < load + size:
        raise ImageError(path, f"multiboot bss end {bss_end:#x} lies before the end of the data", at)
    return Segment(load, view[first : first + size], bss_end - load if bss_end else size)


def _place_module(path: str, initrd: Bytes, segments: Sequence[Segment], memory: int) -> Segment:
    """On the first page boundary after the kernel and 1 MiB, where a kernel that asked for modules expects them."""
    paddr = align_up(max(1 << 20, *(segment.end for segment in segments)), PAGE)
    if len(initrd) and paddr + len(initrd) > min(memory, 1 << 32):
        needed = -(-(paddr + len(initrd)) >> 20)
        raise ImageError(path, f"with its module of {len(initrd)} bytes it needs {needed} MiB of memory")
    return Segment(paddr, initrd)


def _upper_kib(memory: int) -> int:
    return max(memory - (1 << 20), 0) >> 10


def _info_1(base: int, command: bytes, modules: Sequence[Segment], memory: int) -> bytes:
    """The version 1 information block at `base` (1: 3.3): fixed part, then what it points to."""
    table = b"".join(struct.pack("<IQQI", 20, *row) for row in memory_map(memory))
    fixed = 120
    strings = base + fixed
    name = strings + len(command)
    mods = align_up(name + len(_LOADER_NAME), 4)
    mod_table = b"".join(struct.pack("<4I", module.paddr, module.end, strings, 0) for module in modules)
    maps = mods + len(mod_table)
    flags = 0x1 | 0x4 | 0x40 | 0x200 | (0x8 if modules else 0)  # memory, command line, memory map, name; modules
    info = bytearray(maps + len(table) - base)
    struct.pack_into("<7I", info, 0, flags, _CONVENTIONAL_KIB, _upper_kib(memory), 0, strings, len(modules), mods)
    struct.pack_into("<2I", info, 44, len(table), maps)
    struct.pack_into("<I", info, 64, name)
    for address, part in ((strings, command), (name, _LOADER_NAME), (mods, mod_table), (maps, table)):
        info[address - base : address - base + len(part)] = part
    return bytes(info)


def _info_2(_base: int, command: bytes, modules: Sequence[Segment], memory: int) -> bytes:
    """The version 2 information block (2: 3.6): a size, then tags on 8-byte boundaries; it can lie anywhere."""

    def tag(kind: int, body: bytes) -> bytes:
        whole = struct.pack("<II", kind, 8 + len(body)) + body
        return whole + bytes(-len(whole) % 8)

    table = b"".join(struct.pack("<QQII", *row, 0) for row in memory_map(memory))
    tags = tag(1, command) + tag(2, _LOADER_NAME)
    tags += b"".join(tag(3, struct.pack("<II", module.paddr, module.end) + command) for module in modules)
    tags += tag(4, struct.pack("<II", _CONVENTIONAL_KIB, _upper_kib(memory)))
    tags += tag(6, struct.pack("<II", 24, 0) + table) + tag(0, b"")
    return struct.pack("<II", 8 + len(tags), 0) + tags
