"""A program of a few instructions in ring 3 on the real machine, and the operating system it needs: none but exits.

The kernel goes to ring 3 with interrupts on; `int 0x80` and `syscall` return 1 in eax, `int 0x81` and every fault end
the run. Descriptors are laid out as Linux has them (arch/x86/include/asm/segment.h).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from emu.iface import Cpu
from emu.images.plan import IDENTITY_TABLES_SIZE, Image, Segment, flat_start
from emu.machine import Machine
from emu.stops import Halted
from emu.symbols import SymbolTable
from probes.programs import CachedPage, Entry, Event, FileId, Mapped, PageCache, ProgramFile, Region
from probes.regs import Regs

MEMORY = 4 << 20
KERNEL, HANDLERS, SYSCALL, TSS, TABLES = 0x100000, 0x108000, 0x109000, 0x10A000, 0x10B000
IDTR, GDTR, FRAME, GDT, IDT = TABLES, TABLES + 0x10, TABLES + 0x20, TABLES + 0x80, 0x10C000
WRITERS = 0x10F000  # a count
PROGRAM, PROGRAM_SIZE, KERNEL_STACK, STACK = 0x110000, 0x2000, 0x1F0000, 0x1F8000
EXIT = 0x81
"""The vector by which a program ends."""
PATH, CODE_OFFSET = "/program", 0x1000

_CODE64, _CODE32, _DATA = 0x00AF9B000000FFFF, 0x00CF9B000000FFFF, 0x00CF93000000FFFF
_USER = 3 << 45
_USER32, _USER_DATA, _USER64 = 0x23, 0x2B, 0x33
_EFLAGS = 0x202
_TASK_SIZE = 0x68
_START = {
    64: """
        0f011c2500b01000    ; lidt [IDTR]
        0f01142510b01000    ; lgdt [GDTR]
        b840000000 0f00d8   ; ltr
        b9800000c0 0f32 83c801 0f30         ; EFER.SCE
        ffc1 31c0 ba10002300 0f30           ; STAR
        ffc1 b800901000 31d2 0f30           ; LSTAR: SYSCALL
        bc20b01000 48cf     ; mov esp,FRAME; iretq
    """,
    32: """
        0f011d00b01000      ; lidt [IDTR]
        0f011510b01000      ; lgdt [GDTR]
        b840000000 0f00d8   ; ltr
        b82b000000 8ed8 8ec0                ; ds, es
        0f20e0 0d00020000 0f22e0            ; CR4.OSFXSR
        bc20b01000 cf       ; mov esp,FRAME; iret
    """,
}


@dataclass(frozen=True)
class End:
    """What a guest could tell apart at the end, and the vector that ended it."""

    vector: int
    result: int
    instructions: int
    registers: tuple[tuple[str, int], ...]
    memory: str


class OneProgram:
    """Implements Programs for it. Its file has a header, and the code from CODE_OFFSET on."""

    def __init__(self, code: bytes, bits: int) -> None:
        head = b"\x7fELF" + bytes([bits // 32])
        self._file = head.ljust(CODE_OFFSET, b"\0") + code
        self.id = FileId(1, 1)
        self.regular = True
        self.size = len(self._file)

    def read(self, offset: int, size: int) -> bytes:
        return self._file[offset : offset + size]

    def open(self, path: str) -> ProgramFile | None:
        return self if path == PATH else None

    def mapped(self, space: int | None = None) -> Iterable[Mapped]:
        return [Mapped(Region(0, PROGRAM, PROGRAM + PROGRAM_SIZE, CODE_OFFSET, self.id, PATH[1:]), self)]

    def space(self, cpu: Cpu) -> int:
        return 0

    def thread(self, cpu: Cpu) -> int:
        return 0

    def stack(self, space: int, address: int) -> int:
        return 0

    def file_at(self, address: int) -> tuple[ProgramFile | None, int] | None:
        return None

    def user_stack(self) -> int | None:
        return None

    def physical(self, space: int, address: int, *, store: bool = False) -> int | None:
        return address

    def may_store(self, address: int) -> bool:
        return False

    def resumes(self, space: int) -> Iterable[int]:
        return ()

    def cache(self) -> PageCache:
        return Resident()

    def watch(self, tell: Callable[[Event], None]) -> Callable[[], None]:
        return lambda: None


class Resident:
    """Implements PageCache, for `--arm int3`: every page of the program is in memory, for good."""

    table_size = 0
    entries: Mapping[int, Entry] = {}

    def mapping(self, file: ProgramFile) -> int:
        return 0

    def page(self, mapping: int, index: int) -> CachedPage | None:
        return CachedPage(mapping, index, PROGRAM + index * 0x1000 - CODE_OFFSET, uptodate=True)

    def hold(self, file: ProgramFile) -> Sequence[tuple[int, int, int]]:
        return ()

    def deny(self, file: ProgramFile) -> tuple[int, int, int]:
        return WRITERS, 4, -1

    def pointer(self, mapping: int) -> int:
        raise NotImplementedError

    def unread(self, file: ProgramFile) -> str | None:
        return "nothing is ever read"

    def started(self, entry: Entry, regs: Regs) -> tuple[int, range]:
        raise NotImplementedError

    def subject(self, entry: Entry, regs: Regs) -> CachedPage:
        raise NotImplementedError

    def completions(self) -> Sequence[str]:
        return ()

    def completed(self, function: str, regs: Regs) -> CachedPage | None:
        raise NotImplementedError


def build(code: bytes, bits: int) -> Machine:
    """A machine about to enter ring 3 at `code`, whose first byte is at PROGRAM."""
    frame = (PROGRAM, _USER64 if bits == 64 else _USER32, _EFLAGS, STACK, _USER_DATA)
    tables = {
        IDTR: struct.pack("<HQ", 0xFFF, IDT),
        GDTR: struct.pack("<HQ", 0x4F, GDT),
        FRAME: struct.pack("<5Q" if bits == 64 else "<5I", *frame),
        GDT: _descriptors(bits),
    }
    segments = [
        Segment(0, b"\xf4" * 0x1000),  # for a program that is lost
        Segment(KERNEL, _assembled(_START[bits])),
        Segment(HANDLERS, _handlers(bits)),
        Segment(SYSCALL, bytes.fromhex("b801000000 480f07")),  # mov eax,1; sysretq
        Segment(TSS, _task_state(bits)),
        Segment(IDT, b"".join(_gate(vector, bits) for vector in range(256))),
        Segment(PROGRAM, code, PROGRAM_SIZE),
        *(Segment(address, data) for address, data in tables.items()),
    ]
    own, start = flat_start(PATH, segments, KERNEL, bits)
    image = Image(PATH, "flat", (*segments, *own), start)
    machine = Machine(MEMORY, symbols=SymbolTable(()), long_mode=bits == 64)
    machine.power_on(image)
    if bits == 64:
        _open_to_users(machine)
    return machine


def finish(machine: Machine) -> End:
    stop = machine.run(10_000)
    assert isinstance(stop, Halted), stop
    names = [*machine.registers.arch.names, "cr0", "cr2", "cr3"]
    registers = tuple((name, machine.registers.read(name)) for name in names)
    vector = (machine.cpu.pc - HANDLERS) // 16
    return End(vector, machine.cpu.gpr[0], machine.clock.instructions, registers, machine.ram_sha256())


def _assembled(text: str) -> bytes:
    return bytes.fromhex("".join(line.partition(";")[0] for line in text.splitlines()))


def _descriptors(bits: int) -> bytes:
    task = _TASK_SIZE - 1 | (TSS & 0xFFFFFF) << 16 | 0x89 << 40
    kernel = _CODE64 if bits == 64 else _CODE32
    user = [_CODE32 | _USER, _DATA | _USER, _CODE64 | _USER]
    return struct.pack("<10Q", 0, 0, kernel, _DATA, *user, 0, task, 0)


def _task_state(bits: int) -> bytes:
    """The stack of ring 0, and no port for ring 3: the map of them begins behind the end."""
    stack = struct.pack("<IQ", 0, KERNEL_STACK) if bits == 64 else struct.pack("<III", 0, KERNEL_STACK, 0x18)
    return stack.ljust(_TASK_SIZE - 2, b"\0") + struct.pack("<H", _TASK_SIZE)


def _handlers(bits: int) -> bytes:
    """16 bytes for each vector."""
    answer = bytes.fromhex("b801000000" + ("48cf" if bits == 64 else "cf"))  # mov eax,1; iret
    return b"".join((answer if vector == 0x80 else b"").ljust(16, b"\xf4") for vector in range(256))


def _gate(vector: int, bits: int) -> bytes:
    """An interrupt gate that ring 3 may use."""
    handler = HANDLERS + 16 * vector
    short = struct.pack("<HHBBH", handler & 0xFFFF, 0x10, 0, 0xEE, handler >> 16)
    return short + bytes(8) if bits == 64 else short


def _open_to_users(machine: Machine) -> None:
    """Every page may be used in ring 3."""
    start = machine.registers.read("cr3")
    table = bytearray(machine.memory.read_physical(start, IDENTITY_TABLES_SIZE))
    for at in range(0, IDENTITY_TABLES_SIZE, 8):
        table[at] |= 4 if table[at] & 1 else 0
    machine.memory.write_physical(start, bytes(table))
