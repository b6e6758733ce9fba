"""Monitor RAM in the guest's address space: where the slots of out-of-line stepping live.

Rules: the machine's thread only. The window is mapped by writing one directory entry (2 or 4 MiB, read-execute) that
the guest does not use. Where tables are per process (i386 without PAE) the entry is written again at the page fault
that misses it; the guest never sees that fault. What was written is known, so that hashes and snapshots leave it out.
"""

from __future__ import annotations

from emu.cpustate import CpuState
from emu.engine import Engine
from emu.iface import MachineError
from emu.memory import reachable
from emu.paging import ADDRESS, CR4_PAE, entry_addresses, walk
from emu.ram import WINDOW_SIZE, Ram

_LARGE_READ_EXECUTE = 0xA1  # present, accessed, large; not writable, so that no W+X check complains
_CODE_SIZE = 0x200000


class SlotWindow:
    """Implements iface.Window."""

    size = _CODE_SIZE

    def __init__(self, ram: Ram, cpu: CpuState, engine: Engine) -> None:
        self._ram = ram
        self._cpu = cpu
        self._engine = engine
        self.base: int | None = None
        self._entries: set[int] = set()  # physical addresses of directory entries that are ours
        self._wide = True

    def address(self, offset: int) -> int:
        """Virtual address of byte `offset`, mapped in the current address space; MachineError where there is no room."""
        if self.base is None:
            self.base = self._find_base()
        elif walk(self._ram, self._cpu.tables(), self.base) is None:
            self._map(self.base)
        return self.base + offset

    def contains(self, vaddr: int) -> bool:
        return self.base is not None and self.base <= vaddr < self.base + WINDOW_SIZE

    def write(self, offset: int, data: bytes) -> None:
        start = self._ram.window_base + offset
        self._ram.map[start : start + len(data)] = data
        if self.base is not None:
            page = walk(self._ram, self._cpu.tables(), self.base)
            self._engine.drop_code(self.base + offset, len(data), reachable(self._cpu, page))

    def repair(self, vaddr: int) -> bool:
        """A page fault at `vaddr`: True if it was the window missing from this address space, which it now is not."""
        if not self.contains(vaddr) or self.base is None or walk(self._ram, self._cpu.tables(), vaddr) is not None:
            return False
        self._map(self.base)
        return True

    def foreign_bytes(self) -> dict[int, int]:
        """Physical address -> the guest's byte (0), of every directory entry that is ours."""
        width = 8 if self._wide else 4
        return {entry + i: 0 for entry in self._entries for i in range(width)}

    def forget(self) -> None:
        """RAM was replaced by RAM without our entries."""
        self._entries.clear()
        self.base = None

    # ------------------------------------------------------------------------------------------------ finding a place

    def _find_base(self) -> int:
        tables = self._cpu.tables()
        identity = walk(self._ram, tables, self._ram.window_base)
        if identity is not None and identity.paddr == self._ram.window_base and identity.executable:
            return self._ram.window_base
        pc = self._cpu.linear_pc
        base = self._free_long(pc) if self._cpu.long_mode else self._free_protected(pc)
        if base is None:
            raise MachineError(f"no free directory entry near {pc:#x} to map the slot window: arm by hook")
        self._map(base)
        return base

    def _free_long(self, pc: int) -> int | None:
        """The highest empty entry of the page directory that maps `pc`: for Linux 0xffffffffbfe00000, shared by all."""
        found = entry_addresses(self._ram, self._cpu.tables(), pc)
        if len(found) < 3:
            return None
        table = found[2] & ~0xFFF
        for index in range(511, -1, -1):
            if not self._ram.words[(table >> 3) + index]:
                return (pc & ~((1 << 30) - 1)) | index << 21
        return None

    def _free_protected(self, pc: int) -> int | None:
        """The first empty entry above `pc`'s run of mappings: for Linux the hole before the vmalloc area."""
        tables = self._cpu.tables()
        wide = bool(tables.cr4 & CR4_PAE)
        shift, view = (21, self._ram.words) if wide else (22, self._ram.dwords)
        vaddr = pc >> shift << shift
        while vaddr < 1 << 32:
            at = self._directory_entry(vaddr, wide)
            if at is None:
                return None
            if not view[at >> (3 if wide else 2)]:
                return vaddr
            vaddr += 1 << shift
        return None

    def _directory_entry(self, vaddr: int, wide: bool) -> int | None:
        """Physical address of the 2 or 4 MiB entry for `vaddr` in the current tables; None where none leads there."""
        tables = self._cpu.tables()
        if self._cpu.long_mode:
            found = entry_addresses(self._ram, tables, vaddr)
            return found[2] if len(found) > 2 else None
        if not wide:
            at = (tables.cr3 & 0xFFFFF000) + (vaddr >> 22) * 4
            return at if at + 4 <= self._ram.size else None
        at = (tables.cr3 & 0xFFFFFFE0) + (vaddr >> 30) * 8
        if at + 8 > self._ram.size or not self._ram.words[at >> 3] & 1:
            return None
        return (self._ram.words[at >> 3] & ADDRESS) + ((vaddr >> 21) & 511) * 8

    def _map(self, base: int) -> None:
        wide = self._cpu.long_mode or bool(self._cpu.tables().cr4 & CR4_PAE)
        at = self._directory_entry(base, wide)
        if at is None:
            raise MachineError(f"the slot window at {base:#x} cannot be mapped in this address space")
        entry = self._ram.window_base | _LARGE_READ_EXECUTE
        if wide:
            self._ram.words[at >> 3] = entry
        else:
            self._ram.dwords[at >> 2] = entry
        self._wide = wide
        self._entries.add(at)
