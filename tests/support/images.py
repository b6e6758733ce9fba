"""Images built in code for the loaders' tests, and the real kernels that a session fetches once.

No builder imports a loader: what is built is written down from the specifications, not from what reads it.
"""

from __future__ import annotations

import functools
import gzip
import io
import lzma
import os
import struct
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import zstandard

from emu.images.fetch import Fetched, fetch
from emu.images.plan import Image


@dataclass(frozen=True)
class Load:
    """One load segment of a built ELF file. `memory_size` -1: as long as `data`."""

    vaddr: int
    paddr: int
    data: bytes
    memory_size: int = -1
    kind: int = 1


def build_elf(
    bits: int,
    loads: Sequence[Load],
    entry: int,
    *,
    machine: int | None = None,
    symbols: Sequence[tuple[str, int, int]] = (),
) -> bytes:
    """A little-endian ELF executable: headers, segments, then a symbol table of global functions in .text."""
    wide = bits == 64
    header_size, program_size = (64, 56) if wide else (52, 32)
    position = header_size + program_size * len(loads)
    programs, body = b"", b""
    for load in loads:
        size = len(load.data) if load.memory_size < 0 else load.memory_size
        fields = (position + len(body), load.vaddr, load.paddr, len(load.data), size)
        programs += (
            struct.pack("<II5QQ", load.kind, 5, *fields, 16)
            if wide
            else struct.pack("<I5III", load.kind, *fields, 5, 16)
        )
        body += load.data
    tail, sections, offset = (
        _symbol_sections(bits, position, position + len(body), symbols, loads) if symbols else (b"", 0, 0)
    )
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    header = ident + struct.pack("<HHI", 2, machine if machine is not None else (62 if wide else 3), 1)
    header += struct.pack("<QQQ" if wide else "<III", entry, header_size, offset)
    section_size = 64 if wide else 40
    header += struct.pack(
        "<I6H", 0, header_size, program_size, len(loads), section_size, sections, max(sections - 1, 0)
    )
    return header + programs + body + tail


def _symbol_sections(
    bits: int, code: int, position: int, symbols: Sequence[tuple[str, int, int]], loads: Sequence[Load]
) -> tuple[bytes, int, int]:
    """`code` is where the first segment's data lies in the file."""
    wide = bits == 64
    strings, table = b"\0", bytes(24 if wide else 16)
    for name, address, size in symbols:
        row = (len(strings), 0x12, 0, 1, address, size) if wide else (len(strings), address, size, 0x12, 0, 1)
        table += struct.pack("<IBBHQQ" if wide else "<IIIBBH", *row)
        strings += name.encode() + b"\0"
    names = b"\0.text\0.symtab\0.strtab\0.shstrtab\0"
    text = loads[0]
    contents = table + strings + names
    row_format = struct.Struct("<IIQQQQIIQQ" if wide else "<10I")
    at = position
    headers = bytes(row_format.size)
    headers += row_format.pack(1, 1, 6, text.vaddr, code, len(text.data), 0, 0, 16, 0)
    headers += row_format.pack(7, 2, 0, 0, at, len(table), 3, 1, 8, len(table) // (len(symbols) + 1))
    headers += row_format.pack(15, 3, 0, 0, at + len(table), len(strings), 0, 0, 1, 0)
    headers += row_format.pack(23, 3, 0, 0, at + len(table) + len(strings), len(names), 0, 0, 1, 0)
    return contents + headers, 5, position + len(contents)


def build_bzimage(
    payload: bytes,
    *,
    version: int = 0x20F,
    init_size: int = 0x200000,
    cmdline_size: int = 2047,
    initrd_addr_max: int = 0x7FFFFFFF,
) -> bytes:
    """A bzImage of one setup sector after the boot sector, `payload` 16 bytes into its protected-mode part."""
    image = bytearray(1024)
    image[0x1F1] = 1
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    image[0x200:0x206] = b"\xeb\x6aHdrS"
    struct.pack_into("<H", image, 0x206, version)
    image[0x211] = 1
    struct.pack_into("<I", image, 0x22C, initrd_addr_max)
    struct.pack_into("<I", image, 0x238, cmdline_size)
    struct.pack_into("<II", image, 0x248, 16, len(payload))
    struct.pack_into("<I", image, 0x260, init_size)
    return bytes(image) + bytes(16) + payload


BANNER = b"Linux version 6.1.0-test (built in a test)\0"


def build_vmlinux(bits: int) -> bytes:
    """An ELF laid out like a kernel: text at 16 MiB, linked high, entered at a physical address; a build-id."""
    offset = 0xFFFFFFFF80000000 if bits == 64 else 0xC0000000
    text = b"\xf4" * 0x40 + BANNER
    note = struct.pack("<III", 4, 4, 3) + b"GNU\0" + b"\xde\xad\xbe\xef"
    loads = [
        Load(0x1000000 + offset, 0x1000000, text),
        Load(0x1100000 + offset, 0x1100000, b"data", memory_size=0x1000),
        Load(0, 0, note, kind=4),
    ]
    return build_elf(bits, loads, 0x1000020)


def build_kernel(bits: int = 64) -> bytes:
    """A bzImage around `build_vmlinux`, gzip-compressed and followed by its size as Linux's build does it."""
    vmlinux = build_vmlinux(bits)
    return build_bzimage(gzip.compress(vmlinux, mtime=0) + struct.pack("<I", len(vmlinux)))


def multiboot1_header(flags: int = 0x3, *addresses: int) -> bytes:
    magic = 0x1BADB002
    return struct.pack(f"<3I{len(addresses)}I", magic, flags, -(magic + flags) & 0xFFFFFFFF, *addresses)


def multiboot2_header(*tags: tuple[int, int, bytes]) -> bytes:
    """`tags` are (type, flags, body); the end tag is added."""
    body = b""
    for kind, flags, content in (*tags, (0, 0, b"")):
        body += struct.pack("<HHI", kind, flags, 8 + len(content)) + content
        body += bytes(-len(body) % 8)
    magic, size = 0xE85250D6, 16 + len(body)
    return struct.pack("<4I", magic, 0, size, -(magic + size) & 0xFFFFFFFF) + body


def physical(image: Image, paddr: int, size: int) -> bytes:
    """`size` bytes of physical memory as `image` leaves it, all of one segment; AssertionError where there is none."""
    for segment in image.segments:
        if segment.paddr <= paddr and paddr + size <= segment.end:
            start = paddr - segment.paddr
            return bytes(segment.data[start : start + size]).ljust(size, b"\0")
    raise AssertionError(f"no segment has {paddr:#x}-{paddr + size:#x}")


# -------------------------------------------------------------------------------------------------- Debian packages


def build_deb(files: Sequence[tuple[str, bytes]], compression: str = "xz") -> bytes:
    """A .deb with `files` (path in the archive, contents); `compression` of its data: "xz", "gz", "zst" or ""."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, contents in files:
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            archive.addfile(member, io.BytesIO(contents))
    pack = {"xz": lzma.compress, "gz": gzip.compress, "zst": zstandard.compress, "": bytes}[compression]
    data = (f"data.tar.{compression}".rstrip("."), pack(stream.getvalue()))
    members = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), data]
    out = b"!<arch>\n"
    for name, contents in members:
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(contents):<10}`\n".encode() + contents
        out += b"\n" * (len(contents) % 2)
    return out


# ----------------------------------------------------------------------------------------------------- real kernels


@dataclass(frozen=True)
class RealKernel:
    """A stock Debian kernel with its initramfs, from the cache."""

    fetched: Fetched
    bits: int


OLDEST = "amd64 5.10"
"""The oldest kernel whose structures we claim to know: one of the long tests, for what it costs to fetch and boot."""
REAL_KERNELS = {
    "amd64 6.1": ("amd64", None, 64),
    "i386 6.1": ("i386", None, 32),
    "amd64 6.12": ("amd64", "linux-image-6.12*-cloud-amd64-unsigned", 64),
}
if os.environ.get("GDBSTUB_LONG_TESTS"):
    REAL_KERNELS[OLDEST] = ("amd64", "linux-image-5.10*-cloud-amd64-unsigned", 64)


@pytest.fixture(scope="session", params=sorted(REAL_KERNELS))
def real_kernel(request: pytest.FixtureRequest) -> RealKernel:
    """Each stock kernel in turn: fetched from Debian's mirrors the first time, then out of the user's cache."""
    return fetch_real_kernel(request.param)


@functools.cache
def fetch_real_kernel(name: str) -> RealKernel:
    """One of REAL_KERNELS; asks the network at most once for each."""
    architecture, package, bits = REAL_KERNELS[name]
    return RealKernel(fetch(architecture, package, progress=print), bits)
