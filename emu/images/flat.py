"""Flat binaries: bytes without a header, started at an address the user names.

Rules: pure; `emu.iface` and `plan` only. Nothing about such a file can be checked but its size and place.
"""

from __future__ import annotations

from emu.iface import ImageError
from emu.images.plan import EFLAGS_RESET, Bytes, Image, Segment, Start, flat_start

BOOT_SECTOR = 0x7C00
"""Where a BIOS loads a boot sector and starts it."""
_HIGH_BASE = 0x10_0000
_REAL_LIMIT = 0x10_0000
_FIRST_DISK = 0x80
"""What a BIOS leaves in DL: the drive it booted from."""


def load_flat(
    path: str, data: Bytes, *, base: int | None = None, entry: int | None = None, bits: int | None = None
) -> Image:
    """`data` at physical `base` (default 0x7c00 for 16 bits, else 1 MiB), started at `entry` (default: `base`).

    `bits` 16 (real mode, as a BIOS starts a boot sector), 32 (the default) or 64 as `flat_start` has them. ImageError.
    """
    bits = bits or 32
    where = (BOOT_SECTOR if bits == 16 else _HIGH_BASE) if base is None else base
    start_at = where if entry is None else entry
    if not len(data):
        raise ImageError(path, "the file is empty")
    if where < 0 or not where <= start_at < where + len(data):
        raise ImageError(path, f"entry {start_at:#x} is outside the image at {where:#x}-{where + len(data):#x}")
    segments = [Segment(where, data)]
    if bits == 16:
        return Image(path, "flat", tuple(segments), _real_start(path, start_at))
    if start_at >= 1 << 32:
        raise ImageError(path, f"entry {start_at:#x} is above the first 4 GiB")
    own, start = flat_start(path, segments, start_at, bits)
    return Image(path, "flat", (*segments, *own), start)


def _real_start(path: str, entry: int) -> Start:
    if entry >= _REAL_LIMIT:
        raise ImageError(path, f"entry {entry:#x} is above 1 MiB, out of reach of 16-bit code")
    segment = 0 if entry < 0x1_0000 else (entry >> 4) & 0xF000
    registers = {"cs": segment, "ds": 0, "es": 0, "ss": 0, "esp": BOOT_SECTOR}
    registers |= {"edx": _FIRST_DISK, "eflags": EFLAGS_RESET}
    return Start("real", entry - (segment << 4), registers)
