"""Linux kernels: a bzImage or a vmlinux made into a plan, by the 32-bit and 64-bit boot protocols.

Rules: pure; standard library, construct, `emu.iface` and this package. The bzImage's own decompressor and real-mode
code never run: the payload is decompressed here and the kernel proper is entered, so there is no KASLR and no boot-time
search for memory. Source: Linux 6.12, Documentation/arch/x86/boot.rst and zero-page.rst,
arch/x86/include/uapi/asm/bootparam.h.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass

from construct import Const, Int8ul, Int16ul, Int32ul, Padding, Struct

from emu.iface import ImageError
from emu.images.elf import MAGIC as ELF_MAGIC
from emu.images.elf import ElfFile
from emu.images.payload import unpack
from emu.images.plan import (
    CR0_PAGED,
    CR0_PROTECTED,
    CR4_LONG,
    EFLAGS_RESET,
    PAGE,
    Bytes,
    Image,
    Kernel,
    Segment,
    Start,
    boot_gdt,
    identity_tables,
    memory_map,
)

DEFAULT_APPEND = (
    "console=ttyS0,115200n8 nokaslr acpi=off noapic nolapic pci=off mitigations=off tsc=reliable tsc_early_khz=1000000 "
    "lpj=1000000 nosmp noxsave no_timer_check random.trust_cpu=off rdinit=/init panic=-1 cryptomgr.notests noisapnp"
)
"""The command line of every boot: serial console, no hardware the machine does not have, nothing taken from the host
(time and randomness), so that two runs are the same. A user's `append` comes after it; of two settings the last one
holds."""

# Low memory, all below the 640 KiB that e820 reports as usable; the kernel takes over its own copies early.
_GDT = 0x500
_STACK_TOP = 0x8000
_ZERO_PAGE = 0x1_0000
_COMMAND_LINE = 0x2_0000
_RANDOM_SEED = 0x2_8000
_PAGE_TABLES = 0x3_0000

_SETUP = 0x1F1
"""Offset of the setup header in a bzImage and in the zero page alike."""
_SETUP_LIMIT = 0x290
"""Where the next field of the zero page begins (edd_mbr_sig_buffer)."""
_SETUP_HEADER = Struct(
    "setup_sects" / Int8ul,
    Padding(2),
    "syssize" / Int32ul,  # of what follows the setup sectors, in 16-byte units
    Padding(6),
    "boot_flag" / Const(0xAA55, Int16ul),
    Padding(1),
    "jump_size" / Int8ul,
    "magic" / Const(b"HdrS"),
    "version" / Int16ul,
    Padding(0x22C - 0x208),
    "initrd_addr_max" / Int32ul,
    Padding(0x238 - 0x230),
    "cmdline_size" / Int32ul,
    Padding(0x248 - 0x23C),
    "payload_offset" / Int32ul,
    "payload_length" / Int32ul,
    Padding(0x260 - 0x250),
    "init_size" / Int32ul,
)
"""What this loader reads of the setup header, from _SETUP on, as of protocol 2.10."""
_TYPE_OF_LOADER, _LOADFLAGS, _RAMDISK, _COMMAND_LINE_POINTER = 0x210, 0x211, 0x218, 0x228
"""Zero-page offsets of what a boot loader fills in; the ramdisk's address and size are neighbours."""
_E820_COUNT, _E820_TABLE = 0x1E8, 0x2D0
_SETUP_DATA = 0x250
_SETUP_RNG_SEED = 9
"""In the zero page's list of setup data (arch/x86/include/uapi/asm/setup_data.h); kernels before 6.0 pass it by."""
_LOADED_HIGH = 1
_LOADER_UNDEFINED = 0xFF
_VERSION_PAYLOAD = 0x208
_VERSION_INIT_SIZE = 0x20A
_VERSION_NEWEST = 0x20F

_UNPACK_LIMIT = 512 << 20
"""Most bytes a kernel may decompress to, whatever its header says."""
_CMDLINE_SIZE = 2047
"""COMMAND_LINE_SIZE - 1 on x86: for a vmlinux, which does not say."""
_INITRD_MAX = 0x7FFF_FFFF
_LOWEST = 0x10_0000
"""No kernel of protocol 2.08 or newer is loaded below 1 MiB."""
_BANNER_LIMIT = 512


@dataclass(frozen=True, slots=True)
class _Setup:
    """What a kernel asks of its loader: a bzImage's setup header, or the protocol's defaults for a bare vmlinux."""

    header: bytes
    """For the zero page, from _SETUP on."""
    initrd_addr_max: int = _INITRD_MAX
    cmdline_size: int = _CMDLINE_SIZE
    init_size: int = 0
    """Bytes of RAM the kernel needs from its load address on, before it can read the memory map; 0: not said."""


def is_bzimage(data: Bytes) -> bool:
    """Whether `data` has the setup header's two signatures, whatever else may be wrong with it."""
    return bytes(data[0x1FE:0x200]) == b"\x55\xaa" and bytes(data[0x202:0x206]) == b"HdrS"


def load_linux(path: str, data: Bytes, *, initrd: Bytes = b"", append: str = "", memory: int) -> Image:
    """A bzImage or vmlinux with its command line (DEFAULT_APPEND, then `append`) and initrd, for `memory` bytes of RAM.

    The 64-bit kernel is entered in long mode with the first 4 GiB mapped to themselves, the 32-bit one in flat
    protected mode; rsi/esi is the zero page. ImageError for anything that is not a kernel, is broken or does not fit.
    """
    view = memoryview(data)
    if is_bzimage(view):
        setup, vmlinux = _open_bzimage(path, view)
        elf = ElfFile(path, vmlinux) if vmlinux[:4] == ELF_MAGIC else None
        if elf is None:
            raise ImageError(path, "the bzImage's payload is not an ELF file")
    else:
        setup, elf = _bare_setup(), ElfFile(path, view)
    segments = elf.segments()
    banner = _banner(elf.data)
    if not banner or min(segment.paddr for segment in segments) < _LOWEST:
        raise ImageError(path, "an ELF file, but not a Linux kernel: no version banner, or made for low memory")
    entry = elf.physical_entry()
    text = next(load for load in elf.loads if load.paddr <= entry < load.paddr + load.memory_size)
    own, start = _boot_state(entry, elf.bits)
    command_line = _command_line(path, append, setup.cmdline_size)
    ramdisk = _place_initrd(
        path, initrd, max(max(s.end for s in segments), text.paddr + setup.init_size), memory, setup
    )
    own += [
        Segment(_COMMAND_LINE, command_line),
        Segment(_ZERO_PAGE, _zero_page(setup.header, memory, ramdisk)),
        Segment(_RANDOM_SEED, _random_seed()),
        ramdisk,
    ]
    kernel = Kernel(
        vmlinux=elf.data,
        bits=elf.bits,
        banner=banner,
        virtual_offset=text.vaddr - text.paddr,
        build_id=elf.build_id(),
        sections=elf.allocated_sections(),
    )
    image = Image(path, "linux", (*segments, *own), start, elf.symbols(), kernel)
    image.check_fits(memory)
    return image


def _open_bzimage(path: str, view: memoryview) -> tuple[_Setup, bytes]:
    needed = _SETUP + _SETUP_HEADER.sizeof()
    if len(view) < needed:
        raise ImageError(path, "bzImage is cut short in its setup header", len(view))
    header = _SETUP_HEADER.parse(bytes(view[_SETUP:needed]))
    if header.version < _VERSION_PAYLOAD:
        version = f"{header.version >> 8}.{header.version & 0xFF:02}"
        raise ImageError(path, f"boot protocol {version} is too old: 2.08 (Linux 2.6.26) or newer is needed", 0x206)
    # A setup_sects of 0 means 4, for loaders of Linux 1.x.
    setup_size = ((header.setup_sects or 4) + 1) * 512
    if setup_size + header.syssize * 16 > len(view):
        reason = f"is cut short: its header says {setup_size + header.syssize * 16:,} bytes, it has {len(view):,}"
        raise ImageError(path, reason, len(view))
    offset = setup_size + header.payload_offset
    if offset + header.payload_length > len(view) or not header.payload_length:
        reason = f"payload of {header.payload_length:#x} bytes at {offset:#x} is not in the file ({len(view):#x} bytes)"
        raise ImageError(path, reason, 0x248)
    init_size = header.init_size if header.version >= _VERSION_INIT_SIZE else 0
    limit = min(init_size or _UNPACK_LIMIT, _UNPACK_LIMIT)
    vmlinux = unpack(path, view[offset : offset + header.payload_length], offset, limit)
    raw = bytes(view[_SETUP : min(0x202 + header.jump_size, _SETUP_LIMIT)])
    return _Setup(raw, header.initrd_addr_max, header.cmdline_size or 255, init_size), vmlinux


def _bare_setup() -> _Setup:
    header = bytearray(0x20C - _SETUP)
    struct.pack_into("<H", header, 0x1FE - _SETUP, 0xAA55)
    struct.pack_into("<4sH", header, 0x202 - _SETUP, b"HdrS", _VERSION_NEWEST)
    return _Setup(bytes(header))


def _boot_state(entry: int, bits: int) -> tuple[list[Segment], Start]:
    gdt_segment, gdt = boot_gdt(_GDT, bits)
    if bits == 64:
        registers = {"rsi": _ZERO_PAGE, "rsp": _STACK_TOP, "cr0": CR0_PAGED, "cr3": _PAGE_TABLES, "cr4": CR4_LONG}
        return [gdt_segment, identity_tables(_PAGE_TABLES)], Start(
            "long", entry, registers | {"eflags": EFLAGS_RESET}, gdt
        )
    registers = {"esi": _ZERO_PAGE, "esp": _STACK_TOP, "cr0": CR0_PROTECTED, "eflags": EFLAGS_RESET}
    return [gdt_segment], Start("protected", entry, registers, gdt)


def _command_line(path: str, append: str, limit: int) -> bytes:
    text = f"{DEFAULT_APPEND} {append}".strip().encode("utf-8", "surrogateescape")
    if len(text) > limit:
        raise ImageError(path, f"command line of {len(text)} bytes: this kernel takes at most {limit}")
    if b"\0" in text:
        raise ImageError(path, "the command line has a NUL character in it")
    return text + b"\0"


def _place_initrd(path: str, initrd: Bytes, floor: int, memory: int, setup: _Setup) -> Segment:
    """As high as the kernel allows, below 4 GiB and above `floor`, where the kernel ends."""
    top = min(memory, setup.initrd_addr_max + 1, 1 << 32)
    paddr = (top - len(initrd)) & -PAGE
    if len(initrd) and paddr < floor:
        if top < memory:
            reason = f"its initrd has to lie above {floor:#x}, where it ends itself, and below {top:#x}"
            raise ImageError(path, f"no room for an initrd of {len(initrd)} bytes: {reason}")
        needed, there = -(-(floor + len(initrd) + PAGE) >> 20), memory >> 20
        raise ImageError(path, f"with its initrd of {len(initrd)} bytes it needs {needed} MiB of memory, not {there}")
    return Segment(max(paddr, 0), initrd)


def _zero_page(header: bytes, memory: int, ramdisk: Segment) -> bytes:
    page = bytearray(PAGE)
    page[_SETUP : _SETUP + len(header)] = header
    page[_TYPE_OF_LOADER] = _LOADER_UNDEFINED
    page[_LOADFLAGS] |= _LOADED_HIGH
    struct.pack_into("<I", page, _COMMAND_LINE_POINTER, _COMMAND_LINE)
    struct.pack_into("<Q", page, _SETUP_DATA, _RANDOM_SEED)
    if ramdisk.size:
        struct.pack_into("<II", page, _RAMDISK, ramdisk.paddr, ramdisk.size)
    table = memory_map(memory)
    page[_E820_COUNT] = len(table)
    for index, (base, size, kind) in enumerate(table):
        struct.pack_into("<QQI", page, _E820_TABLE + 20 * index, base, size, kind)
    return bytes(page)


def _random_seed() -> bytes:
    """setup_data with a seed, the same one each time: without it a kernel gathers entropy all through its boot.

    Each number asked for before it has enough costs it a pass of BLAKE2s over its pool, a fifth of an i386 boot here.
    """
    seed = hashlib.sha256(b"gdbstub: the same randomness in every run").digest()
    return struct.pack("<QII", 0, _SETUP_RNG_SEED, len(seed)) + seed


def _banner(vmlinux: memoryview) -> str:
    """The longest there is: of a kernel from a package another one stands before it, without the build's number."""
    found = re.findall(rb"Linux version \d[ -~]{0,%d}" % _BANNER_LIMIT, vmlinux)
    return max(found, key=len).decode("ascii") if found else ""
