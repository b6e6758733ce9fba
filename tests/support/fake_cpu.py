"""A processor and the parts a trap client touches, without an engine: state is set, effects are recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from emu.iface import BackEnd, MemoryFault, TrapClient, Verdict
from emu.stops import Stop
from tests.support.fake_machine import FakeMemory, FakeSymbols


@dataclass
class FakeCpu:
    """iface.Cpu as plain attributes."""

    pc: int = 0
    eflags: int = 0x2
    gpr: list[int] = field(default_factory=lambda: [0] * 16)
    bits: int = 64
    cpl: int = 0
    cr3: int = 0

    debug: dict[int, int] = field(default_factory=dict)

    @property
    def system_flags(self) -> int:
        return self.eflags

    @system_flags.setter
    def system_flags(self, value: int) -> None:
        self.eflags = value

    def segment_base(self, name: str) -> int:
        return 0

    def debug_register(self, index: int) -> int:
        return self.debug.get(index, 0)

    def set_debug_register(self, index: int, value: int) -> None:
        self.debug[index] = value


@dataclass
class FakeText:
    """Remembers what is armed; INT3 needs a mapped page."""

    memory: FakeMemory
    armed: dict[int, BackEnd] = field(default_factory=dict)

    def arm(self, vaddr: int, owner: object, back_end: BackEnd) -> None:
        if back_end is BackEnd.INT3 and self.memory.translate(vaddr) is None:
            raise MemoryFault(vaddr)
        self.armed[vaddr] = back_end

    def shorten(self, *_: object) -> None:
        """Every hit takes the long way here."""

    def disarm(self, vaddr: int, owner: object) -> None:
        self.armed.pop(vaddr, None)

    def code(self, vaddr: int, size: int) -> bytes | None:
        return self.memory.read(vaddr, size) if self.armed.get(vaddr) is BackEnd.INT3 else None


@dataclass
class FakeWindow:
    """A window whose bytes can be looked at."""

    base: int = 0x7000_0000
    size: int = 0x1000
    bytes: bytearray = field(default_factory=lambda: bytearray(0x1000))

    def shorten(self, *_: object) -> None:
        """As FakeText's."""

    def address(self, offset: int) -> int:
        return self.base + offset

    def write(self, offset: int, data: bytes) -> None:
        self.bytes[offset : offset + len(data)] = data

    def contains(self, vaddr: int) -> bool:
        return self.base <= vaddr < self.base + self.size


class FakeRegisters:
    def read(self, name: str) -> int:
        return {"cs": 0x10, "ss": 0x18}[name]

    def write(self, name: str, value: int) -> None:
        raise KeyError(name)


@dataclass
class FakeClock:
    instructions: int = 1000
    now_ns: int = 5_684_361_000


class ProbedMachine:
    """iface.Machine for a trap client: `hit` plays what the machine does at an armed place."""

    def __init__(self, *symbols: object, bits: int = 64) -> None:
        self.bits = bits
        self.memory = FakeMemory()
        self.text = FakeText(self.memory)
        self.window = FakeWindow()
        self.registers = FakeRegisters()
        self.clock = FakeClock()
        self.symbols = FakeSymbols(*symbols)
        self.cpu = FakeCpu(bits=bits)
        self.trap_client: TrapClient | None = None

    def uncount(self, instructions: int) -> None:
        self.clock.instructions -= instructions

    def run(self, budget: int | None = None) -> Stop:
        raise NotImplementedError

    step = run

    def request_stop(self) -> None:
        raise NotImplementedError

    def insert_breakpoint(self, vaddr: int, hardware: bool = False) -> None:
        raise NotImplementedError

    remove_breakpoint = insert_breakpoint

    def hit(self, pc: int) -> Verdict | Stop:
        """The guest reaches `pc`: the trap client is asked if it is armed, with an int3 counted."""
        back_end = self.text.armed.get(pc)
        self.cpu.pc = pc
        if back_end is None or self.trap_client is None:
            return Verdict.NOT_MINE
        self.clock.instructions += 1
        return self.trap_client.on_break(self.cpu, pc, back_end)

    def finish_step(self, advance: Callable[[int], int]) -> Verdict | Stop:
        """The stepped copy has run: pc becomes `advance(copy's address)` and #DB comes."""
        assert self.trap_client is not None
        self.cpu.pc = advance(self.cpu.pc)
        return self.trap_client.on_debug(self.cpu)
