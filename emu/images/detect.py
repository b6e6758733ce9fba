"""Which loader a file is for: by what is in it, never by its name.

Rules: pure; this package and `emu.iface` only. What nothing here can start is named as what it is.
"""

from __future__ import annotations

from emu.iface import ImageError
from emu.images.elf import MAGIC as ELF_MAGIC
from emu.images.elf import load_elf
from emu.images.flat import load_flat
from emu.images.linux import is_bzimage, load_linux
from emu.images.multiboot import find_header, load_multiboot
from emu.images.plan import Bytes, Image

_FOREIGN: tuple[tuple[int, bytes, str], ...] = (
    (0x38, b"ARM\x64", "a Linux kernel for AArch64"),
    (0x30, b"RISCV", "a Linux kernel for RISC-V"),
    (0, b"#!", "a script"),
    (0, b"MZ", "a PE (Windows or EFI) executable"),
    (0, b"\x1f\x8b", "a gzip file: decompress it first"),
    (0, b"\xfd7zXZ", "an xz file: decompress it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file: decompress it first"),
    (0, b"\x02\x21\x4c\x18", "an lz4 file: decompress it first"),
    (0, b"!<arch>\n", "an archive (.a or .deb): unpack it first"),
    (0, b"070701", "a cpio archive: an initramfs, not a kernel"),
    (0x8001, b"CD001", "an ISO 9660 image: boot the kernel inside it"),
)
_SECTOR = 512


def load_image(
    path: str,
    data: Bytes,
    *,
    memory: int,
    base: int | None = None,
    entry: int | None = None,
    bits: int | None = None,
    initrd: Bytes = b"",
    append: str = "",
) -> Image:
    """What `gdbstub load` starts: a multiboot kernel, an ELF executable or a flat binary, in `memory` bytes of RAM.

    A multiboot header wins over ELF unless `bits` is given. A file with neither is flat where `base` or `bits` say so
    or it is a boot sector; anything else is an ImageError naming what it is. `initrd` and `append` are for multiboot.
    """
    _refuse_empty(path, data)
    is_elf = bytes(data[:4]) == ELF_MAGIC
    header = find_header(path, data) if base is None and bits is None else None
    if header is not None:
        image = load_multiboot(path, data, header, initrd=initrd, append=append, memory=memory, entry=entry)
    elif initrd or append:
        raise ImageError(path, "only a multiboot kernel takes a command line or modules")
    elif is_elf and base is None:
        image = load_elf(path, data, entry=entry, bits=bits)
    elif base is not None or bits is not None:
        image = load_flat(path, data, base=base, entry=entry, bits=bits)
    elif is_bzimage(data):
        raise ImageError(path, "a Linux kernel: start it with `gdbstub boot`")
    elif _is_boot_sector(data):
        image = load_flat(path, data, entry=entry, bits=16)
    else:
        what = _foreign(data) or "neither ELF nor multiboot"
        raise ImageError(path, f"{what}; a flat binary needs --bits 16, 32 or 64")
    image.check_fits(memory)
    return image


def load_kernel(path: str, data: Bytes, *, initrd: Bytes = b"", append: str = "", memory: int) -> Image:
    """What `gdbstub boot` starts: a Linux kernel, bzImage or vmlinux, with `append` after the default command line."""
    _refuse_empty(path, data)
    if not is_bzimage(data) and bytes(data[:4]) != ELF_MAGIC:
        raise ImageError(path, f"not a Linux kernel for x86 but {_foreign(data) or 'something unknown'}")
    return load_linux(path, data, initrd=initrd, append=append, memory=memory)


def _refuse_empty(path: str, data: Bytes) -> None:
    if not len(data):
        raise ImageError(path, "the file is empty")


def _foreign(data: Bytes) -> str | None:
    return next((what for offset, magic, what in _FOREIGN if bytes(data[offset : offset + len(magic)]) == magic), None)


def _is_boot_sector(data: Bytes) -> bool:
    return len(data) % _SECTOR == 0 and bytes(data[_SECTOR - 2 : _SECTOR]) == b"\x55\xaa"
