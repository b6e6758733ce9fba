"""Exception and interrupt delivery, and system-call entry: what the processor does and Unicorn leaves to us.

Rules: works on the `CpuState` and on RAM, in the machine's thread; changes the state only when the whole delivery
succeeded, so that a fault in the middle can be delivered instead. Source: SDM vol. 3 chapters 6 and 7 (interrupts,
task switch), vol. 2 SYSCALL and SYSENTER.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import NamedTuple

from emu import cpustate as c
from emu.cpustate import CS, DS, ES, FS, GS, SS, CpuState
from emu.layouts import Gate32, Gate64, Tss32, Tss64, offsets
from emu.paging import CR0_WP, canonical, fault_code, touch, walk
from emu.ram import Ram
from emu.walks import Trail, Walks

DE, DB, NMI, BP, OF, BR, UD, NM, DF = range(9)
TS, NP, SS_FAULT, GP, PF = range(10, 15)
MF, AC, XM = 16, 17, 19
WITH_ERROR_CODE = frozenset((DF, TS, NP, SS_FAULT, GP, PF, AC))
CONTRIBUTORY = frozenset((DE, TS, NP, SS_FAULT, GP))
# fault-class exceptions push RF set, so that a code breakpoint on the instruction does not fire again (SDM 17.3.1.1)
FAULTS = frozenset((DE, BR, UD, NM, TS, NP, SS_FAULT, GP, PF, MF, AC, XM))

_TASK_GATE, _INT16, _TRAP16, _INT32, _TRAP32 = 5, 6, 7, 14, 15
_TSS_AVAILABLE, _TSS_BUSY = 9, 11
_TSS32, _TSS64 = offsets(Tss32), offsets(Tss64)
_GATE32, _GATE64 = struct.Struct("<HHBBH"), struct.Struct("<HHBBHII")
_NO_RAM = b"\xff"  # what a bus answers with where nothing is
_FRAME64 = struct.Struct("<5Q")  # RIP, CS, RFLAGS, RSP, SS
assert _GATE32.size == Gate32.sizeof()
assert _GATE64.size == Gate64.sizeof()


class GuestFault(Exception):
    """A fault the processor would raise while it delivers another event."""

    def __init__(self, vector: int, code: int = 0, address: int | None = None) -> None:
        super().__init__(vector, code)
        self.vector = vector
        self.code = code
        self.address = address


class Delivery(NamedTuple):
    """An interrupt or exception on its way to the guest.

    `code`: the error code, pushed for the vectors that have one. `software`: `int n`, int3, into: the gate's DPL is
    checked, and a fault on the way returns to the instruction, `length` bytes back. `external`: a hardware interrupt.
    `seen`: not to be caught any more.
    """

    vector: int
    code: int | None = None
    software: bool = False
    external: bool = False
    length: int = 0
    seen: bool = False


class CaughtException(Exception):
    """An exception of `Traps.caught`, before anything of its delivery; pc is at the instruction (a trap: behind it).

    `delivery` is what `deliver` is to be given when pc has been moved on by its `length` again.
    """

    def __init__(self, delivery: Delivery) -> None:
        super().__init__(delivery)
        self.delivery = delivery


class TripleFaulted(Exception):
    """A fault while delivering a double fault: the processor shuts down. `vector` began it."""

    def __init__(self, vector: int) -> None:
        super().__init__(vector)
        self.vector = vector


def _double(first: int, second: int) -> bool:
    """The two together are a double fault: SDM vol. 3, table 6-5."""
    if first == PF:
        return second == PF or second in CONTRIBUTORY
    return first in CONTRIBUTORY and second in CONTRIBUTORY


class _Descriptor(NamedTuple):
    selector: int
    base: int
    limit: int
    flags: int
    dpl: int
    conforming: bool


@functools.lru_cache(maxsize=1024)
def _decode(selector: int, entry: int) -> _Descriptor:
    """The 8 bytes of a segment descriptor, SDM vol. 3, 3.4.5. Traps meet the same few again and again."""
    high = entry >> 32
    base = (entry >> 16 & 0xFFFFFF) | (high & 0xFF000000)
    limit = (entry & 0xFFFF) | (high & 0xF0000)
    if high & c.DESC_G:
        limit = (limit << 12) | 0xFFF
    return _Descriptor(selector, base, limit, high, high >> 13 & 3, bool(high & 0x400))


_KNOWN_WALKS = 256  # IDT, GDT, TSS and the kernel stacks of the tasks at work


class Traps:
    """Delivers events to the guest that `cpu` and `ram` describe."""

    def __init__(self, cpu: CpuState, ram: Ram, walks: Walks) -> None:
        self.cpu = cpu
        self.ram = ram
        self._ram_size = len(ram.map)
        self._walks = walks
        self.switched_tables = False  # a task switch loaded CR3: the machine has the engine forget its page walks
        self.on_access: Callable[[int, int, bool], None] | None = None  # (vaddr, size, write) of each data access
        self.caught: frozenset[int] = frozenset()
        self.before_entry: Callable[[], int | None] | None = None  # see iface.Machine.before_entry
        self._known: dict[tuple[int, bool, bool], tuple[Trail, int]] = {}  # walks that were allowed, and their pages

    def deliver(self, delivery: Delivery) -> None:
        """Enter the guest's handler; on return `cpu` is at its first instruction.

        TripleFaulted where nothing can be delivered; CaughtException for one of `caught` that is not `seen`.
        """
        vector, code, software, external, length, seen = delivery
        if not external and vector != DB and (stored := self.store_fault()) is not None:
            self.cpu.pc -= length
            vector, code, software, length = PF, stored, False, 0
        first, benign = vector, software or external
        self.cpu.forget_exception()
        resume = self.cpu.pc
        while True:
            if vector in self.caught and not external and not seen:
                self.cpu.pc = resume - length
                raise CaughtException(Delivery(vector, code, software, length=length if software else 0, seen=True))
            try:
                self._enter(vector, code, software, ext=0 if software else 1)
                return
            except GuestFault as fault:
                self.cpu.pc = resume - length
                if vector == DF:
                    raise TripleFaulted(first) from None
                if fault.address is not None:
                    self.cpu.set_cr(2, fault.address)
                if not benign and _double(vector, fault.vector):
                    vector, code = DF, 0
                else:
                    vector, code = fault.vector, fault.code
                software = benign = external = seen = False

    def store_fault(self) -> int | None:
        """The error code of a page fault that is to come before the program leaves ring 3; CR2 is set for it."""
        if self.before_entry is None or self.cpu.cpl != 3:
            return None
        vaddr = self.before_entry()
        if vaddr is None:
            return None
        code = fault_code(walk(self.ram, self.cpu.tables(), vaddr), write=True, user=True, wp=True)
        if code is not None:
            self.cpu.set_cr(2, vaddr)
        return code

    # ------------------------------------------------------------------------------------------------- guest memory

    def _physical(self, vaddr: int, write: bool, user: bool) -> int:
        """Where an access of the processor's goes; GuestFault(#PF). A trap makes four to the same pages as the last."""
        known = self._known.get((vaddr >> 12, write, user))
        if known is not None and self._walks.holds(known[0]):
            return known[1] | vaddr & 0xFFF
        return self._walk(vaddr, write, user)

    def _walk(self, vaddr: int, write: bool, user: bool) -> int:
        tables = self.cpu.tables()
        page = walk(self.ram, tables, vaddr)
        code = fault_code(page, write=write, user=user, wp=bool(tables.cr0 & CR0_WP))
        if page is None or code is not None:
            raise GuestFault(PF, code or 0, vaddr)
        touch(self.ram, page, write)
        trail = self._walks.trail(vaddr)
        if trail is not None:
            if len(self._known) >= _KNOWN_WALKS:
                self._known.clear()
            self._known[vaddr >> 12, write, user] = trail, page.paddr & ~0xFFF
        return page.paddr

    def read(self, vaddr: int, size: int, user: bool = False) -> bytes:
        """Bytes as the processor would fetch or load them; GuestFault(#PF) where it could not."""
        paddr = self._physical(vaddr, False, user)
        room = 0x1000 - (vaddr & 0xFFF)
        if size <= room:
            return self.ram.map[paddr : paddr + size].ljust(size, _NO_RAM)
        rest = self._physical(vaddr + room, False, user)
        return self.read(vaddr, room, user) + self.ram.map[rest : rest + size - room].ljust(size - room, _NO_RAM)

    def _load(self, vaddr: int, size: int) -> bytes:
        """`read`, as a data access that watchpoints see."""
        paddr = self._physical(vaddr, False, False)
        if (vaddr & 0xFFF) + size <= 0x1000 and paddr + size <= self._ram_size:
            data = self.ram.map[paddr : paddr + size]
        else:
            data = self.read(vaddr, size)
        if self.on_access is not None:
            self.on_access(vaddr, size, False)
        return data

    def _store(self, vaddr: int, data: bytes, user: bool = False) -> None:
        """`write`, as a data access that watchpoints see."""
        self.write(vaddr, data, user)
        if self.on_access is not None:
            self.on_access(vaddr, len(data), True)

    def write(self, vaddr: int, data: bytes, user: bool = False) -> None:
        """Store as the processor would: nothing is written where a part would fault."""
        paddr = self._physical(vaddr, True, user)
        room = 0x1000 - (vaddr & 0xFFF)
        if len(data) <= room:
            try:
                self.ram.map[paddr : paddr + len(data)] = data
            except IndexError:
                return  # no RAM there: it is lost
            return
        self._physical(vaddr + room, True, user)
        self.write(vaddr, data[:room], user)
        self.write(vaddr + room, data[room:], user)

    def descriptor(self, selector: int, vector: int = GP, ext: int = 0) -> _Descriptor:
        """A segment descriptor from GDT or LDT; GuestFault(`vector`, selector) beyond the table."""
        base, limit = self.cpu.table("ldt" if selector & 4 else "gdt")
        if (selector | 7) > limit:
            raise GuestFault(vector, (selector & ~3) | ext)
        entry = self._load((base + (selector & ~7)) & _mask(self.cpu), 8)
        return _decode(selector, int.from_bytes(entry, "little"))

    # ------------------------------------------------------------------------------------------------- into the gate

    def _enter(self, vector: int, code: int | None, software: bool, ext: int) -> None:
        cpu = self.cpu
        if not cpu.cr(0) & 1:
            self._enter_real(vector)
        elif cpu.long_mode:
            self._enter_long(vector, code, software, ext)
        else:
            self._enter_protected(vector, code, software, ext)

    def _pushed_flags(self, vector: int, software: bool) -> int:
        flags = self.cpu.eflags
        return flags | c.RF if vector in FAULTS and not software else flags & ~c.RF

    def _enter_real(self, vector: int) -> None:
        cpu = self.cpu
        table = cpu.system_segment("idt")
        if vector * 4 + 3 > table.limit:
            raise GuestFault(GP)
        pc, selector = struct.unpack("<HH", self._load(table.base + vector * 4, 4))
        sp = (cpu.gpr[4] - 6) & 0xFFFF
        frame = struct.pack("<HHH", cpu.pc & 0xFFFF, cpu.selector(CS), cpu.eflags & 0xFFFF)
        self._store(cpu.segment(SS).base + sp, frame)
        cpu.gpr[4] = (cpu.gpr[4] & ~0xFFFF) | sp
        cpu.pc = pc
        cpu.set_segment(CS, selector, selector << 4, 0xFFFF, cpu.segment(CS).flags)
        cpu.eflags &= ~(c.IF | c.TF | c.RF | c.AC)
        cpu.recompute_hflags()

    def _code_segment(self, selector: int, ext: int) -> _Descriptor:
        if not selector & ~3:
            raise GuestFault(GP, ext)
        code = self.descriptor(selector, GP, ext)
        if code.flags & 0x1800 != 0x1800 or code.dpl > self.cpu.cpl:
            raise GuestFault(GP, (selector & ~3) | ext)
        if not code.flags & c.DESC_P:
            raise GuestFault(NP, (selector & ~3) | ext)
        return code

    def _enter_long(self, vector: int, code: int | None, software: bool, ext: int) -> None:
        cpu = self.cpu
        cpl = cpu.cpl
        base, limit = cpu.table("idt")
        index_code = vector * 8 + 2 + ext
        if vector * 16 + 15 > limit:
            raise GuestFault(GP, index_code)
        low, selector, ist, kind, middle, high, _ = _GATE64.unpack(self._load(base + vector * 16, 16))
        if kind & 0x1F not in (_INT32, _TRAP32) or (software and (kind >> 5) & 3 < cpl):
            raise GuestFault(GP, index_code)
        if not kind & 0x80:
            raise GuestFault(NP, index_code)
        target = self._code_segment(selector, ext)
        if target.flags & (c.DESC_L | c.DESC_B) != c.DESC_L:
            raise GuestFault(GP, (selector & ~3) | ext)
        pc = low | middle << 16 | high << 32
        if not canonical(pc):
            raise GuestFault(GP, ext)
        level = cpl if target.conforming else target.dpl
        old_sp = sp = cpu.gpr[4]
        changes = level < cpl
        if ist & 7 or changes:
            slot = _TSS64["ist"] + 8 * ((ist & 7) - 1) if ist & 7 else _TSS64["rsp"] + 8 * level
            sp = int.from_bytes(self._load(cpu.table("tr")[0] + slot, 8), "little")
        frame = _FRAME64.pack(cpu.pc, cpu.selector(CS), self._pushed_flags(vector, software), old_sp, cpu.selector(SS))
        if code is not None and vector in WITH_ERROR_CODE:
            frame = code.to_bytes(8, "little") + frame
        top = sp & ~0xF
        sp = (top - len(frame)) & _MASK64
        if not canonical(sp) or not canonical((top - 1) & _MASK64):
            raise GuestFault(SS_FAULT, ext)
        self._store(sp, frame, user=level == 3)
        cpu.gpr[4] = sp
        cpu.pc = pc
        cpu.set_segment(CS, (selector & ~3) | level, target.base, target.limit, target.flags)
        if changes:
            cpu.set_segment(SS, level, 0, 0, level << 13)
        cpu.hflags = (cpu.hflags & ~(c.HF_CPL | c.HF_ADDSEG)) | level | c.HF_CS64 | c.HF_CS32 | c.HF_SS32
        self._enter_flags(kind)

    def _enter_flags(self, kind: int) -> None:
        clear = c.TF | c.NT | c.RF | c.VM
        if not kind & 1:  # interrupt gates have even types
            clear |= c.IF
        self.cpu.system_flags &= ~clear

    def _enter_protected(self, vector: int, code: int | None, software: bool, ext: int) -> None:
        cpu = self.cpu
        table = cpu.system_segment("idt")
        index_code = vector * 8 + 2 + ext
        if vector * 8 + 7 > table.limit:
            raise GuestFault(GP, index_code)
        low, selector, _, kind, high = _GATE32.unpack(self._load(table.base + vector * 8, 8))
        gate = kind & 0x1F
        if gate not in (_TASK_GATE, _INT16, _TRAP16, _INT32, _TRAP32) or (software and (kind >> 5) & 3 < cpu.cpl):
            raise GuestFault(GP, index_code)
        if not kind & 0x80:
            raise GuestFault(NP, index_code)
        if gate == _TASK_GATE:
            self._switch_task(selector, code if vector in WITH_ERROR_CODE else None, ext)
            return
        wide = gate in (_INT32, _TRAP32)
        target = self._code_segment(selector, ext)
        virtual = bool(cpu.eflags & c.VM)
        if virtual and (target.conforming or target.dpl):
            raise GuestFault(GP, (selector & ~3) | ext)
        level = cpu.cpl if target.conforming else target.dpl
        frame = [cpu.pc, cpu.selector(CS), self._pushed_flags(vector, software)]
        if code is not None and vector in WITH_ERROR_CODE:
            frame.insert(0, code)
        sp, stack = cpu.gpr[4], cpu.segment(SS)
        inner = level < cpu.cpl
        if inner:
            frame += [cpu.gpr[4], cpu.selector(SS)]
            if virtual:
                frame += [cpu.selector(i) for i in (ES, DS, FS, GS)]
            sp, stack = self._inner_stack(level, ext)
        mask = 0xFFFFFFFF if stack.flags & c.DESC_B else 0xFFFF
        sp = (sp - (4 if wide else 2) * len(frame)) & mask
        cut = 0xFFFFFFFF if wide else 0xFFFF
        data = struct.pack(f"<{len(frame)}{'I' if wide else 'H'}", *(word & cut for word in frame))
        self._store((stack.base + sp) & 0xFFFFFFFF, data, user=level == 3)
        cpu.gpr[4] = (cpu.gpr[4] & ~mask & 0xFFFFFFFF) | sp
        cpu.pc = (low | high << 16) & cut
        cpu.set_segment(CS, (selector & ~3) | level, target.base, target.limit, target.flags)
        if inner:
            cpu.set_segment(SS, stack.selector, stack.base, stack.limit, stack.flags)
            if virtual:
                for index in (ES, DS, FS, GS):
                    cpu.set_segment(index, 0, 0, 0, 0)
        self._enter_flags(kind)
        cpu.recompute_hflags()

    def _inner_stack(self, level: int, ext: int) -> tuple[int, c.Segment]:
        task = self.cpu.system_segment("tr")
        sp, selector = struct.unpack("<II", self._load(task.base + _TSS32["stacks"] + 8 * level, 8))
        selector &= 0xFFFF
        if not selector & ~3:
            raise GuestFault(TS, ext)
        found = self.descriptor(selector, TS, ext)
        if selector & 3 != level or found.dpl != level or found.flags & 0x1A00 != 0x1200:  # a writable data segment
            raise GuestFault(TS, (selector & ~3) | ext)
        if not found.flags & c.DESC_P:
            raise GuestFault(SS_FAULT, (selector & ~3) | ext)
        return sp, c.Segment(selector, found.base, found.limit, found.flags)

    def _switch_task(self, selector: int, code: int | None, ext: int) -> None:
        """A task gate: i386 Linux has one for double faults. SDM vol. 3, 7.3, 32-bit TSS only."""
        cpu = self.cpu
        found = self.descriptor(selector, GP, ext)
        if found.flags & 0x1F00 != _TSS_AVAILABLE << 8 or found.limit < 103 or selector & 4:
            raise GuestFault(GP, (selector & ~3) | ext)
        old = cpu.system_segment("tr")
        new = bytearray(self._load(found.base, 104))
        state = struct.pack("<2I8I6I", cpu.pc, cpu.eflags, *cpu.gpr[:8], *(cpu.selector(i) for i in range(6)))
        self._store(old.base + _TSS32["eip"], state)
        self._store(found.base, struct.pack("<I", old.selector))
        table = cpu.system_segment("gdt").base
        self._store(table + (selector & ~7) + 4, struct.pack("<I", found.flags | (_TSS_BUSY << 8)))
        fields = struct.unpack_from("<3I8I6II", new, _TSS32["cr3"])
        cr3, pc, flags, gpr, segments, ldt = fields[0], fields[1], fields[2], fields[3:11], fields[11:17], fields[17]
        cpu.set_cr(3, cr3)
        self.switched_tables = True
        cpu.set_cr(0, cpu.cr(0) | 8)
        cpu.set_system_segment("tr", selector, found.base, found.limit, found.flags | (_TSS_BUSY << 8))
        if ldt & ~3:
            local = self.descriptor(ldt & 0xFFFF, TS, ext)
            cpu.set_system_segment("ldt", ldt & 0xFFFF, local.base, local.limit, local.flags)
        for index, wanted in enumerate(segments):
            wanted &= 0xFFFF
            if wanted & ~3:
                part = self.descriptor(wanted, TS, ext)
                cpu.set_segment(index, wanted, part.base, part.limit, part.flags)
            else:
                cpu.set_segment(index, wanted, 0, 0, 0)
        for index, value in enumerate(gpr):
            cpu.gpr[index] = value
        cpu.pc = pc
        cpu.eflags = flags | c.NT
        cpu.recompute_hflags()
        if code is not None:
            cpu.gpr[4] = (cpu.gpr[4] - 4) & 0xFFFFFFFF
            self._store(cpu.segment(SS).base + cpu.gpr[4], struct.pack("<I", code))

    # --------------------------------------------------------------------------------------------- system-call entry

    def syscall(self, next_pc: int) -> None:
        """SYSCALL in 64-bit or compatibility mode; GuestFault(#UD) where it is not enabled. Sets `pc` to the target."""
        cpu = self.cpu
        self._store_first()
        if not cpu.efer & 1 or not cpu.long_mode:
            raise GuestFault(UD)
        star = cpu.msr(c.MSR_STAR)
        flags = cpu.eflags
        cpu.gpr[1], cpu.gpr[11] = next_pc, flags & ~c.RF
        cpu.pc = cpu.msr(c.MSR_LSTAR if cpu.bits == 64 else c.MSR_CSTAR)
        self._flat_kernel((star >> 32) & 0xFFFC, c.FLAT_CODE64)
        cpu.eflags = flags & ~cpu.msr(c.MSR_FMASK) & ~c.RF

    def _store_first(self) -> None:
        code = self.store_fault()
        if code is not None:
            raise GuestFault(PF, code)

    def sysenter(self) -> None:
        """SYSENTER; GuestFault(#GP) where SYSENTER_CS is null. Sets `pc` to the target."""
        cpu = self.cpu
        self._store_first()
        selector = cpu.msr(c.MSR_SYSENTER_CS) & 0xFFFC
        if not selector:
            raise GuestFault(GP)
        cpu.eflags &= ~(c.VM | c.IF | c.RF)
        cpu.gpr[4] = cpu.msr(c.MSR_SYSENTER_ESP)
        cpu.pc = cpu.msr(c.MSR_SYSENTER_EIP)
        self._flat_kernel(selector, c.FLAT_CODE64 if cpu.long_mode else c.FLAT_CODE32)

    def _flat_kernel(self, selector: int, code_flags: int) -> None:
        cpu = self.cpu
        cpu.set_segment(CS, selector, 0, 0xFFFFFFFF, code_flags)
        cpu.set_segment(SS, selector + 8, 0, 0xFFFFFFFF, c.FLAT_DATA)
        cpu.recompute_hflags()


_MASK64 = (1 << 64) - 1


def _mask(cpu: CpuState) -> int:
    return _MASK64 if cpu.long_mode else 0xFFFFFFFF
