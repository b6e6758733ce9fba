"""A machine small enough to read at a glance, for testing what stands above `emu.iface`.

It knows memory as pages of bytes (identity-mapped), registers as a dictionary, and a handful of instructions that are
real x86 ones, so that gdb disassembles what runs:

    90        nop                     eb rel8   jmp
    ff c0     inc eax                 f4        hlt: Halted
    0f 0b     ud2: Panic              fa        cli: TripleFault
    e6 imm8   out: 0 PowerOff, 1 Reset, 2 Reset unasked, 3 Defect, 16 + n GuestExit(n)

Anything else is a TripleFault. `text`, `window` and `cpu`, which no debugger needs, are left out.
"""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from emu.arch import Arch
from emu.iface import MachineError, MemoryFault
from emu.stops import (
    Breakpoint,
    Budget,
    Defect,
    GuestExit,
    Halted,
    Interrupted,
    Panic,
    PowerOff,
    Reset,
    Step,
    Stop,
    TripleFault,
    WatchKind,
)

PAGE = 0x1000
CODE = 0x10000
DATA = 0x20000
STACK = 0x30000

PROGRAM = bytes.fromhex("90 ffc0 90 ffc0 ebf8")
"""CODE+0 nop; +1 inc eax; +3 nop; +4 inc eax; +6 jmp CODE: runs for ever."""


@dataclass(frozen=True)
class FakeSymbol:
    name: str
    address: int
    size: int
    kind: str = "T"
    module: str = ""


class FakeMemory:
    size = 0x40000

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}

    def map(self, address: int, data: bytes = b"") -> None:
        """A page at `address` that begins with `data`."""
        self.pages[address // PAGE] = bytearray(data.ljust(PAGE, b"\0"))

    def region(self, vaddr: int) -> tuple[int, int, str]:
        page = vaddr // PAGE * PAGE
        return page, PAGE, "rwx" if page // PAGE in self.pages else ""

    def read(self, vaddr: int, size: int) -> bytes:
        return bytes(self._byte(vaddr + index, "read") for index in range(size))

    def write(self, vaddr: int, data: bytes) -> None:
        for index in range(len(data)):
            self._byte(vaddr + index, "write")
        for index, byte in enumerate(data):
            self.pages[(vaddr + index) // PAGE][(vaddr + index) % PAGE] = byte

    def translate(self, vaddr: int, root: int | None = None) -> int | None:
        return vaddr if vaddr // PAGE in self.pages else None

    def read_physical(self, paddr: int, size: int) -> bytes:
        return self.read(paddr, size)

    def write_physical(self, paddr: int, data: bytes) -> None:
        self.write(paddr, data)

    def _byte(self, address: int, access: str) -> int:
        page = self.pages.get(address // PAGE)
        if page is None:
            raise MemoryFault(address, access)
        return page[address % PAGE]


class FakeRegisters:
    def __init__(self, arch: Arch) -> None:
        self.arch = arch
        self.values = dict.fromkeys(arch.names, 0)

    def read(self, name: str) -> int:
        return self.values[name]

    def write(self, name: str, value: int) -> None:
        if name not in self.values:
            raise KeyError(name)
        self.values[name] = value

    def read_many(self, names: Sequence[str]) -> list[int]:
        return [self.values[name] for name in names]

    def write_many(self, values: Mapping[str, int]) -> None:
        for name in values:
            self.read(name)
        self.values.update(values)


class FakeSymbols:
    def __init__(self, *symbols: FakeSymbol) -> None:
        self.symbols = symbols

    def lookup(self, name: str) -> list[FakeSymbol]:
        return [symbol for symbol in self.symbols if symbol.name == name]

    def find(self, vaddr: int) -> tuple[FakeSymbol, int] | None:
        found = [symbol for symbol in self.symbols if symbol.address <= vaddr < symbol.address + symbol.size]
        return (found[0], vaddr - found[0].address) if found else None

    def glob(self, pattern: str) -> list[FakeSymbol]:
        return [symbol for symbol in self.symbols if fnmatch.fnmatchcase(symbol.name, pattern)]

    def suggest(self, name: str) -> list[str]:
        return [symbol.name for symbol in self.symbols if symbol.name[:3] == name[:3]]


class FakeMachine:
    """Runs `program` from CODE. `instructions` counts what was executed; `breakpoints` is what is inserted now."""

    def __init__(self, arch: Arch, program: bytes = PROGRAM) -> None:
        self.arch = arch
        self.memory = FakeMemory()
        self.memory.map(CODE, program)
        self.memory.map(DATA, b"data of the guest\0")
        self.memory.map(STACK)
        self.registers = FakeRegisters(arch)
        self.registers.values.update({arch.pc: CODE, arch.expedited[1]: STACK + 0x800, "eflags": 2})
        self.symbols = FakeSymbols(FakeSymbol("start", CODE, 6), FakeSymbol("start_kernel", CODE + 6, 2))
        self.instructions = 0
        self.breakpoints: set[tuple[int, bool]] = set()
        self.watchpoints: set[tuple[WatchKind, int, int]] = set()
        self.caught_exceptions: frozenset[int] = frozenset()
        self.conditions: dict[tuple[int, bool], Callable[[], bool] | None] = {}
        self.trap_client = None
        self.threads: set[int] = set()
        self.stepped_into_interrupts = False
        self._stop = threading.Event()

    @property
    def clock(self) -> FakeMachine:
        return self

    @property
    def now_ns(self) -> int:
        return self.instructions

    @property
    def bits(self) -> int:
        return self.arch.word_size * 8

    @property
    def pc(self) -> int:
        return self.registers.values[self.arch.pc]

    def run(self, budget: int | None = None) -> Stop:
        self.threads.add(threading.get_ident())
        start = self.instructions
        while not self._stopped():
            for hardware in (False, True):
                condition = self.conditions.get((self.pc, hardware))
                if (self.pc, hardware) in self.breakpoints and (condition is None or condition()):
                    return Breakpoint(self.pc, hardware)
            if budget is not None and self.instructions - start >= budget:
                return Budget(budget)
            if (stop := self._execute()) is not None:
                return stop
            if self.instructions % 1024 == 0:
                self._stop.wait(0.001)  # as an engine that leaves the interpreter lock to others
        return Interrupted(self.pc)

    def step(self, *, into_interrupts: bool = False) -> Stop:
        self.stepped_into_interrupts = into_interrupts
        self.threads.add(threading.get_ident())
        if self._stopped():
            return Interrupted(self.pc)
        return self._execute() or Step(self.pc)

    def step_at_once(self) -> Stop | None:
        return None

    def request_stop(self) -> None:
        self._stop.set()

    def insert_breakpoint(
        self, vaddr: int, hardware: bool = False, condition: Callable[[], bool] | None = None
    ) -> None:
        self.breakpoints.add((vaddr, hardware))
        self.conditions[vaddr, hardware] = condition

    def remove_breakpoint(self, vaddr: int, hardware: bool = False) -> None:
        self.breakpoints.discard((vaddr, hardware))

    def insert_watchpoint(self, kind: WatchKind, vaddr: int, size: int) -> None:
        if not size:
            raise MachineError("a watchpoint has at least one byte")
        self.watchpoints.add((kind, vaddr, size))

    def remove_watchpoint(self, kind: WatchKind, vaddr: int, size: int) -> None:
        self.watchpoints.discard((kind, vaddr, size))

    def catch_exceptions(self, vectors: frozenset[int]) -> None:
        self.caught_exceptions = vectors

    def uncount(self, instructions: int) -> None:
        self.instructions -= instructions

    def _stopped(self) -> bool:
        if self._stop.is_set():
            self._stop.clear()
            return True
        return False

    def _execute(self) -> Stop | None:
        pc = self.pc
        try:
            code = self.memory.read(pc, 2)
        except MemoryFault:
            return TripleFault(pc, 14)
        self.instructions += 1
        match code[0], code[1]:
            case 0x90, _:
                self._advance(1)
            case 0xFF, 0xC0:
                accumulator = "eax" if self.arch.word_size == 4 else "rax"
                self.registers.values[accumulator] = (self.registers.values[accumulator] + 1) & 0xFFFFFFFF
                self._advance(2)
            case 0xEB, offset:
                self._advance(2 + offset - (offset >> 7 << 8))
            case 0xF4, _:
                return Halted(pc, "interrupts are off")
            case 0x0F, 0x0B:
                return Panic(pc, "Attempted to kill init!")
            case 0xE6, port:
                return self._port(port)
            case _:
                return TripleFault(pc, 6)
        return None

    def _port(self, port: int) -> Stop:
        fixed = {0: PowerOff(), 1: Reset(), 2: Reset(requested=False), 3: Defect(self.pc, "Traceback: boom")}
        return fixed.get(port) or GuestExit(port - 16)

    def _advance(self, size: int) -> None:
        self.registers.values[self.arch.pc] += size
