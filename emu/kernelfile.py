"""A Linux kernel on disk, read and not run: its symbols, its memory as it is linked, its types.

Rules: any thread; `emu.images`, `emu.symbols` and `emu.iface` only. For whoever asks about a kernel without booting it.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from pathlib import Path

from emu.hostfile import read_file
from emu.iface import MemoryFault
from emu.images.cache import Progress, quiet
from emu.images.detect import load_kernel
from emu.images.elf import ElfFile, ProgramHeader
from emu.images.fetch import DEFAULT_PACKAGES, Fetched, fetch
from emu.images.plan import Kernel
from emu.symbols import SymbolTable, kallsyms

_MEMORY = 1 << 40  # nothing is loaded, so that every kernel fits
_I386_NAMES = ("686", "i386")


class LinkedMemory:
    """The load segments of an ELF file at their virtual addresses."""

    def __init__(self, elf: ElfFile) -> None:
        self._data = elf.data
        self._loads: list[ProgramHeader] = sorted(elf.loads, key=lambda load: load.vaddr)
        self._starts = [load.vaddr for load in self._loads]

    def read(self, vaddr: int, size: int, /) -> bytes:
        """MemoryFault outside every segment; what the file does not fill is zero."""
        at = bisect.bisect_right(self._starts, vaddr) - 1
        load = self._loads[at] if at >= 0 else None
        if load is None or vaddr + size > load.vaddr + load.memory_size:
            raise MemoryFault(vaddr)
        start = vaddr - load.vaddr
        filled = self._data[load.offset + start : load.offset + min(start + size, load.file_size)]
        return bytes(filled).ljust(size, b"\0")


@dataclass(frozen=True, slots=True)
class KernelFile:
    """`fetched` says what came with it, None for a kernel that is just a file."""

    path: Path
    bits: int
    banner: str
    symbols: SymbolTable
    memory: LinkedMemory
    fetched: Fetched | None
    elf: ElfFile

    def btf(self) -> bytes:
        """The .BTF section; empty where there is none."""
        for section in self.elf.sections():
            if section.name == ".BTF":
                return bytes(self.elf.data[section.offset : section.offset + section.size])
        return b""


def open_kernel(name: str = "amd64", progress: Progress = quiet) -> KernelFile:
    """A kernel by file, by architecture (amd64, i386) or by its Debian package's name or pattern (linux-image-...).

    The latter two are fetched into the cache if they are not there. ImageError, FetchError.
    """
    fetched: Fetched | None = None
    if name in DEFAULT_PACKAGES:
        fetched = fetch(name, progress=progress)
    elif name.startswith("linux-image-") and not Path(name).exists():
        architecture = "i386" if any(part in name for part in _I386_NAMES) else "amd64"
        fetched = fetch(architecture, name, progress=progress)
    return _read(Path(name) if fetched is None else fetched.kernel, fetched, progress)


def _read(path: Path, fetched: Fetched | None, progress: Progress) -> KernelFile:
    image = load_kernel(str(path), read_file(path), memory=_MEMORY)
    kernel = image.kernel
    assert isinstance(kernel, Kernel)  # load_kernel makes no other image
    elf = ElfFile(str(path), kernel.vmlinux)
    symbols = (
        SymbolTable(image.symbols)
        if image.symbols
        else kallsyms(bytes(kernel.vmlinux), path=str(path), progress=progress)
    )
    return KernelFile(path, kernel.bits, kernel.banner, symbols, LinkedMemory(elf), fetched, elf)
