"""Monitor RAM in the guest's address space: slots of out-of-line stepping, gates of calls, objects a user loaded.

Rules: the machine's thread only. Monitor RAM has a code half, mapped read-execute, and a data half, mapped writable and
(where the guest's tables can say so) never executed; each by one directory entry (2 or 4 MiB) that the guest does not
use, the second only when it is asked for. Where tables are per process (i386 without PAE) an entry is written again at
the page fault that misses it; the guest never sees that fault. What was written is known, so that hashes and snapshots
leave it out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from emu.cpustate import CpuState
from emu.engine import Engine
from emu.iface import MachineError, MemoryFault
from emu.memory import reachable
from emu.paging import EFER_NXE, NX, Page, entries_are_wide, entry_addresses, walk
from emu.ram import WINDOW_SIZE, Ram
from emu.shortcuts import Shortcuts
from emu.walks import Walks

_LARGE_READ_EXECUTE: Final = 0xA1  # present, accessed, large; not writable, so that no W+X check complains
_LARGE_WRITABLE: Final = 0xE3  # present, writable, accessed, dirty, large

# Offsets into monitor RAM.
_SLOTS: Final = 0x100000
GATES: Final = _SLOTS  # code of the machine's own: where calls into the guest start and return to
_TEXT: Final = GATES + 0x1000
_DATA: Final = 0x200000


class SlotWindow:
    """Implements iface.Window."""

    size = _SLOTS
    text = range(_TEXT, _DATA)
    data = range(_DATA, WINDOW_SIZE)

    def __init__(self, ram: Ram, cpu: CpuState, engine: Engine, walks: Walks, shortcuts: Shortcuts) -> None:
        self._ram = ram
        self._cpu = cpu
        self._engine = engine
        self._walks = walks
        self._shortcuts = shortcuts
        self.base: int | None = None
        self._data: int | None = None  # where the data half is mapped
        self._entries: dict[int, tuple[int, int]] = {}  # ours in directories: physical address -> bytes, value

    def address(self, offset: int) -> int:
        """Virtual address of byte `offset`, mapped now; MachineError where there is no room for it."""
        if self.base is None:
            self.base = self._find_base()
        elif self._walks.page(self.base) is None:
            self._map_code()
        if offset < _DATA:
            return self.base + offset
        return self._data_address() + offset - _DATA

    def contains(self, vaddr: int) -> bool:
        base, data = self.base, self._data
        return (base is not None and 0 <= vaddr - base < _DATA) or (data is not None and 0 <= vaddr - data < _DATA)

    def write(self, offset: int, data: bytes) -> None:
        start = self._ram.window_base + offset
        self._ram.map[start : start + len(data)] = data
        if self.base is not None and offset < _DATA:
            self._shortcuts.drop_range(self.base + offset, len(data))
            self._engine.drop_code(self.base + offset, len(data), reachable(self._cpu, self._walk(self.base)))

    def shorten(self, offset: int, call: Callable[[], int | None], uncount: int) -> None:
        """See iface.Window.shorten."""
        vaddr = self.address(offset)
        self._shortcuts.make(vaddr, self._ram.window_base + offset, b"\xcc", vaddr, call, uncount)

    def read(self, offset: int, size: int) -> bytes:
        """Monitor RAM itself; MemoryFault beyond its end."""
        if not 0 <= offset <= WINDOW_SIZE - size:
            raise MemoryFault(offset, "read monitor")
        start = self._ram.window_base + offset
        return self._ram.map[start : start + size]

    def repair(self, vaddr: int) -> bool:
        """A page fault at `vaddr`: True if it was the window missing from this address space, which it now is not."""
        if not self.contains(vaddr) or self._walk(vaddr) is not None:
            return False
        if self._data is not None and self._data <= vaddr < self._data + _DATA:
            self._map_data()
        else:
            self._map_code()
        return True

    def foreign_bytes(self) -> dict[int, int]:
        """Physical address -> the guest's byte (0), of every directory entry that is ours and still stands.

        Where tables are per process the guest copies our entries into new ones, at the same place of a page, and a
        directory that it has given up may be anything by now.
        """
        found: set[tuple[int, int]] = set()
        for first, width, entry in {self._first_place(at, *kept) for at, kept in self._entries.items()}:
            view = self._ram.words if width == 8 else self._ram.dwords
            last = first + 1 if self._cpu.long_mode else self._ram.size
            found |= {(at, width) for at in range(first, last, 4096) if view[at // width] == entry}
        return {at + i: 0 for at, width in found for i in range(width)}

    def _first_place(self, at: int, width: int, entry: int) -> tuple[int, int, int]:
        """Where to begin to look for `entry`, written at `at`: there, or in the first page it may be copied to."""
        return at if self._cpu.long_mode else at % 4096, width, entry

    def forget(self) -> None:
        """RAM was replaced by RAM without our entries."""
        self._entries.clear()
        self.base = self._data = None

    # ------------------------------------------------------------------------------------------------ finding a place

    def _walk(self, vaddr: int) -> Page | None:
        return walk(self._ram, self._cpu.tables(), vaddr)

    @property
    def _wide(self) -> bool:
        """Directory entries have 8 bytes and map 2 MiB; else 4 and 4."""
        return entries_are_wide(self._cpu.tables())

    @property
    def _shift(self) -> int:
        return 21 if self._wide else 22

    def _find_base(self) -> int:
        physical = self._ram.window_base
        identity = self._walk(physical)
        if identity is not None and identity.paddr == physical and identity.executable:
            return physical
        pc = self._cpu.linear_pc
        frame = self._free_long(pc) if self._cpu.long_mode else self._free_protected(pc)
        if frame is None:
            raise MachineError(f"no two free directory entries near {pc:#x} to map the slot window: arm by hook")
        self.base = frame + physical % (1 << self._shift)
        self._map_code()
        return self.base

    def _data_address(self) -> int:
        """Where the data half begins, mapped now. It lies in the frame after the code's."""
        assert self.base is not None  # `address` has found it
        if self._data is not None and self._walk(self._data) is not None:
            return self._data
        physical = self._ram.window_base + _DATA
        page = self._walk(physical) if self.base == self._ram.window_base else None
        if page is not None:
            if page.paddr != physical or not page.writable:
                raise MachineError(f"the guest maps {physical:#x}, where our data would be, as something else")
            self._data = physical
            return physical
        size = 1 << self._shift
        self._data = self.base // size * size + size + physical % size
        self._map_data()
        return self._data

    def _free_long(self, pc: int) -> int | None:
        """The highest two empty entries of the page directory that maps `pc`: for Linux below 0xffffffffc0000000."""
        entry = self._directory_entry(pc)
        if entry is None:
            return None
        table = (entry & ~0xFFF) >> 3
        for index in range(510, -1, -1):
            if not self._ram.words[table + index] and not self._ram.words[table + index + 1]:
                return (pc & ~((1 << 30) - 1)) | index << 21
        return None

    def _free_protected(self, pc: int) -> int | None:
        """The first two empty entries above `pc`'s run of mappings: for Linux the hole before the vmalloc area."""
        shift, empty = self._shift, 0
        for vaddr in range(pc >> shift << shift, 1 << 32, 1 << shift):
            at = self._directory_entry(vaddr)
            if at is None:
                return None
            empty = 0 if self._entry(at) else empty + 1
            if empty == 2:
                return vaddr - (1 << shift)
        return None

    def _entry(self, at: int) -> int:
        return self._ram.words[at >> 3] if self._wide else self._ram.dwords[at >> 2]

    def _directory_entry(self, vaddr: int) -> int | None:
        """Physical address of the 2 or 4 MiB entry for `vaddr` in the current tables; None where none leads there."""
        found = entry_addresses(self._ram, self._cpu.tables(), vaddr)
        level = 2 if self._cpu.long_mode else int(self._wide)
        return found[level] if len(found) > level else None

    def _map_code(self) -> None:
        assert self.base is not None  # `_find_base` has set it
        self._map(self.base, self._ram.window_base, _LARGE_READ_EXECUTE)

    def _map_data(self) -> None:
        assert self._data is not None  # `_data_address` has set it
        executes_nothing = NX if self._wide and self._cpu.tables().efer & EFER_NXE else 0
        self._map(self._data, self._ram.window_base + _DATA, _LARGE_WRITABLE | executes_nothing)

    def _map(self, vaddr: int, paddr: int, flags: int) -> None:
        at = self._directory_entry(vaddr)
        if at is None:
            raise MachineError(f"the slot window at {vaddr:#x} cannot be mapped in this address space")
        entry = paddr >> self._shift << self._shift | flags
        if self._wide:
            self._ram.words[at >> 3] = entry
            self._entries[at] = 8, entry
        else:
            self._ram.dwords[at >> 2] = entry
            self._entries[at] = 4, entry
