"""What debuggers and probes need of a kernel beside its memory, taken from its image once and kept by image hash.

Rules: any thread; reads and writes the cache only. A machine restored from a snapshot has no image any more, only its
key; where the cache has lost the facts, they are empty and whoever needs them says so.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import zstandard

from emu.iface import ImageError
from emu.images.cache import Progress, cache_root, quiet, write_atomic
from emu.images.elf import ElfFile
from emu.images.frames32 import frame_pointer_frames
from emu.images.orc import debug_frame
from emu.images.plan import Kernel
from emu.symbols import Symbol

_LIMIT = 64 << 20
_KEY = re.compile("[0-9a-f]{64}")
FRAMES, BTF = "frames2", "btf"
"""File name endings; the first has the number of what makes it, so that older tables are made anew."""


def keep(kernel: Kernel, path: str, symbols: Sequence[Symbol], progress: Progress = quiet) -> str:
    """Put the kernel's facts into the cache if they are not there. -> the key to `read` them by."""
    vmlinux = bytes(kernel.vmlinux)
    key = hashlib.sha256(vmlinux).hexdigest()
    if not all(_file(key, fact).exists() for fact in (FRAMES, BTF)):
        progress(f"{path}: reading the kernel's unwind tables and types, once for this image")
        try:
            elf = ElfFile(path, vmlinux)
            if kernel.bits == 64:
                frames = debug_frame(elf)
            else:
                frames = frame_pointer_frames(elf.segments(), symbols, kernel.virtual_offset)
            _write(key, FRAMES, frames)
            sections = {section.name: section for section in elf.sections()}
            types = sections.get(".BTF")
            _write(key, BTF, vmlinux[types.offset : types.offset + types.size] if types else b"")
        except (ImageError, OSError) as error:
            progress(f"{path}: backtraces will be short and types unknown: {error}")
    return key


def read(key: str, fact: str) -> bytes:
    """FRAMES (a .debug_frame section) or BTF (a .BTF section); empty where the kernel has none or nothing is kept."""
    if not _KEY.fullmatch(key):
        return b""  # none, or what a damaged snapshot says
    try:
        packed = _file(key, fact).read_bytes()
        return zstandard.ZstdDecompressor().decompress(packed, max_output_size=_LIMIT)
    except (OSError, zstandard.ZstdError):
        return b""


def _file(key: str, fact: str) -> Path:
    return cache_root() / "facts" / f"{key}.{fact}"


def _write(key: str, fact: str, data: bytes) -> None:
    write_atomic(_file(key, fact), zstandard.ZstdCompressor(level=3).compress(data))
