"""Guest RAM: one anonymous map that Python and the engine share.

Rules: reads and writes here are physical, cost no call into the engine, and drop no translated code (`machine` does
that where a write may touch code). Behind the guest's RAM, at `window_base`, lies monitor RAM of ours; the guest is
never told of it (it is not in any memory map) and it belongs to no hash or snapshot.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap

from emu.iface import MachineError, MemoryFault

PAGE = 0x1000
WINDOW_SIZE = 0x400000  # two 2 MiB pages: code (read-execute), then data (read-write, never executed)
MIN_SIZE = 2 << 20
MAX_SIZE = 3 << 30  # below the hole that 32-bit guests keep for devices


class Ram:
    """`size` bytes of guest RAM from physical address 0, then WINDOW_SIZE bytes of monitor RAM."""

    def __init__(self, size: int) -> None:
        if not MIN_SIZE <= size <= MAX_SIZE or size % 0x200000:
            raise MachineError(
                f"memory size {size} is not possible: a multiple of 2 MiB, {MIN_SIZE >> 20} to {MAX_SIZE >> 20} MiB"
            )
        self.size = size
        self.window_base = size
        self.map = mmap.mmap(-1, size + WINDOW_SIZE)
        self.map.madvise(mmap.MADV_HUGEPAGE)  # 65,536 page faults fewer for 256 MiB
        self.bytes = memoryview(self.map)
        self.words = self.bytes.cast("Q")  # 64-bit words, for page walks
        self.dwords = self.bytes.cast("I")
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def read(self, paddr: int, size: int) -> bytes:
        """Bytes at a physical address; MemoryFault beyond guest RAM."""
        if paddr < 0 or paddr + size > self.size:
            raise MemoryFault(max(paddr, self.size), "read")
        return self.map[paddr : paddr + size]

    def write(self, paddr: int, data: bytes) -> None:
        if paddr < 0 or paddr + len(data) > self.size:
            raise MemoryFault(max(paddr, self.size), "write")
        self.map[paddr : paddr + len(data)] = data

    def sha256(self) -> str:
        """Of the guest's RAM, in hex."""
        return hashlib.sha256(self.bytes[: self.size]).hexdigest()
