"""Guests of a few instructions: tables built here, code assembled by the test, nothing that the test does not see.

Rules: tests only. Every vector's handler is HLT unless the test gives one, so a trap ends the run where it arrives.
The layout, in physical memory mapped to itself, page by page, for both rings:

    0x1000 IDT   0x2000 GDT   0x3000 TSS   0x4000 the double fault's TSS (32 bits)   0x10000 code (CODE)
    0x5000 .. 0x5800 stack of ring 0 (STACK)     .. 0x6800 of TSS entries (RING0_STACK)   .. 0x7800 IST 1 (IST1_STACK)
    .. 0x8800 of ring 3 (USER_STACK)   0x9000 data (DATA)   0x20000 handlers, 16 bytes each   0x30000 page tables
    above 2 MiB: nothing (UNMAPPED)
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from emu.boot import Guest, GuestMachine
from emu.cpustate import CS, SS
from emu.images.embedded.assembler import encode, translate
from emu.images.plan import Gdt, Image, Segment, Start
from emu.stops import Halted, Stop

IDT, GDT, TSS, DOUBLE_FAULT_TSS = 0x1000, 0x2000, 0x3000, 0x4000
STACK, RING0_STACK, IST1_STACK, USER_STACK, DATA = 0x5800, 0x6800, 0x7800, 0x8800, 0x9000
CODE, HANDLERS, TABLES, UNMAPPED = 0x10000, 0x20000, 0x30000, 0x200000
MEMORY = 4 << 20
ENOUGH = 100_000

KERNEL_CS, KERNEL_SS = 0x08, 0x10
USER_CS32, USER_SS, USER_CS64, USER_SS64 = 0x1B, 0x23, 0x2B, 0x33
TSS_SELECTOR, DOUBLE_FAULT_SELECTOR = 0x38, 0x48
CONFORMING_CS, ABSENT_CS, DATA_ONLY = 0x50, 0x58, 0x10

# SDM vol. 3, 3.4.5: base 0, limit 4 GiB
_CODE64, _CODE32, _DATA = 0x00AF_9A00_0000_FFFF, 0x00CF_9A00_0000_FFFF, 0x00CF_9200_0000_FFFF
_DPL3, _CONFORMING, _PRESENT = 3 << 45, 1 << 42, 1 << 47
INTERRUPT_GATE, TRAP_GATE, TASK_GATE = 0x8E, 0x8F, 0x85

PRESENT, WRITABLE, USER, LARGE, NX = 1, 2, 4, 0x80, 1 << 63

FLAGS_IF, FLAGS_TF, FLAGS_NT, FLAGS_RF = 0x200, 0x100, 0x4000, 0x10000


def assemble(source: str, bits: int, address: int) -> bytes:
    """Machine code of `source`, in the dialect of `emu.images.embedded.assembler`: xax is rax or eax."""
    return encode(translate(source, bits, {}), bits, address)


@dataclass(frozen=True)
class Frame:
    """What delivery pushed; `sp` and `ss` are None where a 32-bit frame has none."""

    vector: int
    code: int | None
    pc: int
    cs: int
    flags: int
    sp: int | None = None
    ss: int | None = None


class Tiny:
    """A guest of `bits` at `source` in ring 0 or 3. `handlers`: vector -> assembly instead of HLT."""

    def __init__(self, bits: int, source: str, *, ring: int = 0, handlers: Mapping[int, str] | None = None) -> None:
        self.bits = bits
        self.word = bits // 8
        self.code = assemble(source, bits, CODE)
        segments = [Segment(CODE, self.code), Segment(GDT, self._gdt()), *self._tables()]
        start = Start("long" if bits == 64 else "protected", CODE, self._registers(), Gdt(GDT, 0x67, 0x08, 0x10))
        self.machine = machine = GuestMachine(MEMORY, long_mode=bits == 64)
        machine.guest = Guest("tiny", "a test's guest", bits)
        machine.power_on(Image("tiny", "flat", tuple(segments), start))
        machine.cpu.set_system_segment("idt", 0, IDT, 256 * 2 * self.word - 1)
        machine.cpu.set_system_segment("tr", TSS_SELECTOR, TSS, 103, 0x8B00)
        self._build_tss()
        for vector in range(256):
            self.gate(vector)
            self.handler(vector, (handlers or {}).get(vector, "hlt"))
        if ring == 3:
            self.enter_ring3()

    def enter_ring3(self) -> None:
        """Continue at the same pc in ring 3, on the user stack."""
        cpu = self.machine.cpu
        wide = self.bits == 64
        flags = ((_CODE64 if wide else _CODE32) | _DPL3) >> 32
        cpu.set_segment(CS, USER_CS64 if wide else USER_CS32, 0, 0xFFFFFFFF, flags & 0xFFFF00)
        cpu.set_segment(SS, USER_SS64 if wide else USER_SS, 0, 0xFFFFFFFF, (_DATA | _DPL3) >> 32 & 0xFFFF00)
        cpu.gpr[4] = USER_STACK
        cpu.recompute_hflags()

    # ------------------------------------------------------------------------------------------------------- tables

    def _registers(self) -> dict[str, int]:
        wide = self.bits == 64
        control = {"cr0": 0x80010033, "cr3": TABLES, "cr4": 0x620 if wide else 0}
        return control | {"rsp" if wide else "esp": STACK, "eflags": 2}

    def _gdt(self) -> bytes:
        code = _CODE64 if self.bits == 64 else _CODE32
        user = (_CODE32 | _DPL3, _DATA | _DPL3, code | _DPL3, _DATA | _DPL3)
        task = self._task_descriptor(TSS)
        wide = self.bits == 64
        second = 0 if wide else self._task_descriptor(DOUBLE_FAULT_TSS)
        rows = (0, code, _DATA, *user, task, 0, second, code | _CONFORMING, code & ~_PRESENT, 0)
        return struct.pack("<13Q", *rows)

    @staticmethod
    def _task_descriptor(base: int) -> int:
        return 103 | (base & 0xFFFFFF) << 16 | 0x89 << 40

    def _tables(self) -> list[Segment]:
        """The first 2 MiB mapped to themselves in 4 KiB pages, open to ring 3."""
        every = PRESENT | WRITABLE | USER
        if self.bits == 64:
            upper = [struct.pack("<Q", TABLES + 0x1000 * (level + 1) | every) for level in range(3)]
            leaf = struct.pack("<512Q", *(page << 12 | every for page in range(512)))
        else:
            upper = [struct.pack("<I", TABLES + 0x1000 | every)]
            leaf = struct.pack("<512I", *(page << 12 | every for page in range(512)))
        return [Segment(TABLES + 0x1000 * level, table) for level, table in enumerate((*upper, leaf))]

    def _leaf_at(self, vaddr: int) -> int:
        return TABLES + 0x1000 * (3 if self.bits == 64 else 1) + (vaddr >> 12) * self.word

    def map(self, vaddr: int, entry: int) -> None:
        """Replace the page-table entry of `vaddr`, which lies below 2 MiB."""
        self.machine.ram.write(self._leaf_at(vaddr), entry.to_bytes(self.word, "little"))
        self.machine.engine.flush()

    def gate(
        self, vector: int, kind: int = INTERRUPT_GATE, *, dpl: int = 0, selector: int = KERNEL_CS, ist: int = 0
    ) -> None:
        """`kind` without its present bit (0x80) is a gate that is not there."""
        target, kind = HANDLERS + 16 * vector, kind | dpl << 5
        low, high = target & 0xFFFF, target >> 16
        if self.bits == 64:
            row = struct.pack("<HHBBHII", low, selector, ist, kind, high, 0, 0)
        else:
            row = struct.pack("<HHBBH", low, selector, 0, kind, high)
        self.machine.ram.write(IDT + vector * len(row), row)

    def handler(self, vector: int, source: str) -> None:
        self.machine.ram.write(HANDLERS + 16 * vector, assemble(source, self.bits, HANDLERS + 16 * vector))

    def _build_tss(self) -> None:
        ram = self.machine.ram
        if self.bits == 64:
            ram.write(TSS + 4, struct.pack("<Q", RING0_STACK))
            ram.write(TSS + 36, struct.pack("<Q", IST1_STACK))
            return
        ram.write(TSS + 4, struct.pack("<II", RING0_STACK, KERNEL_SS))
        gprs, segments = [0, 0, 0, 0, IST1_STACK, 0, 0, 0], [0x10, 0x08, 0x10, 0x10, 0x10, 0x10]
        start = struct.pack("<3I8I6I", TABLES, HANDLERS + 16 * 8, 2, *gprs, *segments)
        ram.write(DOUBLE_FAULT_TSS + 28, start)

    # ------------------------------------------------------------------------------------------------------ running

    def run(self, budget: int = ENOUGH) -> Stop:
        return self.machine.run(budget)

    @property
    def stack(self) -> int:
        return int(self.machine.cpu.gpr[4])

    def words(self, address: int, count: int) -> list[int]:
        """Machine words at a virtual address."""
        data = self.machine.memory.read(address, count * self.word)
        return list(struct.unpack(f"<{count}{'Q' if self.bits == 64 else 'I'}", data))

    def trap(self) -> Frame:
        """Run into a handler's HLT. -> what it was entered with."""
        stop = self.run()
        assert isinstance(stop, Halted), stop
        return self.frame()

    def frame(self) -> Frame:
        """The frame at the stack of a handler that has just executed its HLT."""
        vector = (self.machine.cpu.pc - 1 - HANDLERS) // 16
        at = self.stack
        code = None
        if vector in (8, 10, 11, 12, 13, 14, 17):
            (code,) = self.words(at, 1)
            at += self.word
        pc, cs, flags = self.words(at, 3)
        if self.bits == 32 and cs & 3 == self.machine.cpu.cpl:
            return Frame(vector, code, pc, cs, flags)
        sp, ss = self.words(at + 3 * self.word, 2)
        return Frame(vector, code, pc, cs, flags, sp, ss)
