"""gdb's tracepoints on the probe engine: what is defined, the run of a trace, and what a hit collects.

Rules: the machine's thread; knows probes, the machine and agent expressions, and the syntax of actions, no session. One
`Tracing` belongs to a machine, not to a debugger, as a trace may go on without one. Source: GDB manual, "Tracepoint
Packets"; gdbserver's tracepoint.cc where that is silent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from emu.arch import Arch
from emu.iface import Machine, MemoryFault
from gdbstub.agent import MAX_MEMORY, Agent, BadExpression, Expression, Failure, StateVariables, readable
from gdbstub.packets import PacketError, expression, unhex
from gdbstub.tracebuffer import MAX_SIZE, Frame, TraceBuffer
from probes.errors import ProbeError
from probes.kprobe import Kprobe
from probes.manager import Manager
from probes.regs import Regs

MAX_TRACEPOINTS: Final = 1024
MAX_ACTIONS: Final = 1024  # of one tracepoint
MAX_SOURCES: Final = 1024  # QTDPsrc packets of one tracepoint
TIMESTAMP: Final = 1
"""Number of the built-in variable `$trace_timestamp`: the guest's microseconds since power-on."""


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to collect: `text` is its packet form, `perform` does it."""

    text: bytes
    perform: Callable[[Frame], Failure | None]


@dataclass(eq=False, slots=True)
class Tracepoint:
    """A location of a gdb tracepoint. `steps` instructions are followed after a hit; `passes` hits end the trace, 0
    never."""

    number: int
    address: int
    enabled: bool
    steps: int
    passes: int
    condition: Expression | None = None
    actions: list[Action] = field(default_factory=list)
    step_actions: list[Action] = field(default_factory=list)
    sources: list[bytes] = field(default_factory=list)
    """`type:start:length:hex` as gdb sent them: the user's own words, for a debugger that comes later."""
    in_steps: bool = False  # further actions are for steps
    hits: int = 0
    usage: int = 0  # bytes of the buffer
    probe: Kprobe | None = None


@dataclass(frozen=True, slots=True)
class Variable:
    """A trace state variable's definition."""

    initial: int
    builtin: bool
    name: bytes


class Tracing:
    """Everything about tracepoints of one machine."""

    def __init__(self, machine: Machine, arch: Arch, probes: Manager) -> None:
        self.buffer = TraceBuffer()
        self.variables = StateVariables()
        self.definitions: dict[int, Variable] = {}
        self.points: dict[tuple[int, int], Tracepoint] = {}
        self.readonly: list[tuple[int, int]] = []
        self.running = False
        self.outlives_debugger = False
        self.standing: set[tuple[int, bool]] = set()
        """Breakpoints, (address, hardware), whose commands go on without the debugger that put them there."""
        self.reason = "tnotrun:0"
        """Why the last run ended, in the words of qTStatus."""
        self.user = self.notes = b""
        self.started_us = self.stopped_us = 0
        self._machine = machine
        self._probes = probes
        self._agent = Agent(machine, arch, self.variables, lambda text: None)
        self.describe(arch)
        self.variables.compute(TIMESTAMP, self._now_us)
        self.reset()

    def describe(self, arch: Arch) -> None:
        """What a debugger is told that the processor is: its numbers of registers are meant from now on."""
        self.arch = self._agent.arch = arch
        self._general = arch.names[: arch.numbers["st0"]]

    def _now_us(self) -> int:
        return self._machine.clock.now_ns // 1000

    # ------------------------------------------------------------------------------------------------- definitions

    def reset(self) -> None:
        """QTinit: no tracepoints, no frames, no variables but the built-in one."""
        self._disarm_all()
        self.running = False
        self.points.clear()
        self.readonly.clear()
        self.buffer.clear()
        self.variables.clear()
        self.definitions = {TIMESTAMP: Variable(0, True, b"trace_timestamp")}

    def define_variable(self, number: int, variable: Variable) -> None:
        try:
            self.variables.define(number, variable.initial)
        except ValueError as error:
            raise PacketError(str(error)) from error
        self.definitions[number] = variable

    def add(self, point: Tracepoint, condition: bytes | None) -> None:
        """PacketError for one that exists, one too many, or a condition that cannot be run."""
        key = (point.number, point.address)
        if key in self.points:
            raise PacketError(f"tracepoint {point.number} at {point.address:#x} exists already")
        if len(self.points) >= MAX_TRACEPOINTS:
            raise PacketError(f"no more than {MAX_TRACEPOINTS} tracepoints")
        if condition is not None:
            point.condition = self._compile(condition)
        self.points[key] = point

    def find(self, number: int, address: int) -> Tracepoint:
        point = self.points.get((number, address))
        if point is None:
            raise PacketError(f"no tracepoint {number} at {address:#x}")
        return point

    def add_actions(self, point: Tracepoint, text: bytes) -> None:
        """The actions of one QTDP packet: R, M and X, after an S those of while-stepping."""
        if text.startswith(b"S"):
            point.in_steps = True
            text = text[1:]
        into = point.step_actions if point.in_steps else point.actions
        while text:
            if len(point.actions) + len(point.step_actions) >= MAX_ACTIONS:
                raise PacketError(f"no more than {MAX_ACTIONS} actions of one tracepoint")
            perform, rest = self._action(text)
            into.append(Action(text[: len(text) - len(rest)], perform))
            text = rest

    def _action(self, text: bytes) -> tuple[Callable[[Frame], Failure | None], bytes]:
        if match := _REGISTERS.match(text):
            return self._register_action(match[1]), text[match.end() :]
        if match := _MEMORY.match(text):
            base = None if match[1] == b"-1" or int(match[1], 16) == 0xFFFFFFFF else int(match[1], 16)
            return self._memory_action(base, int(match[2], 16), int(match[3], 16)), text[match.end() :]
        if text.startswith(b"X"):
            code, rest = expression(text)
            run = self._compile(code)
            return lambda frame: outcome if isinstance(outcome := run.evaluate(frame), Failure) else None, rest
        raise PacketError("an action is R, M or X")

    def _register_action(self, mask: bytes) -> Callable[[Frame], None]:
        """The general and segment registers, which cost nothing, and what the mask names of the others."""
        wanted = int(mask, 16)
        names = [name for number, name in enumerate(self.arch.names) if wanted >> number & 1 or name in self._general]
        read = self._machine.registers.read_many

        def perform(frame: Frame) -> None:
            frame.record_registers(dict(zip(names, read(names), strict=True)))

        return perform

    def _memory_action(self, base: int | None, offset: int, size: int) -> Callable[[Frame], None]:
        if size > MAX_MEMORY:
            raise PacketError(f"no more than {MAX_MEMORY} bytes at once")
        if base is not None and base >= len(self.arch.registers):
            raise PacketError(f"no register {base}")
        machine, name = self._machine, None if base is None else self.arch.registers[base].name
        mask = (1 << 8 * self.arch.word_size) - 1

        def perform(frame: Frame) -> None:
            vaddr = (offset + (machine.registers.read(name) if name is not None else 0)) & mask
            if data := readable(machine, vaddr, size):
                frame.record_memory(vaddr, data)

        return perform

    def _compile(self, code: bytes) -> Expression:
        try:
            return self._agent.compile(code)
        except BadExpression as error:
            raise PacketError(str(error)) from error

    # --------------------------------------------------------------------------------------------------- the run

    def start(self) -> None:
        """Arm what is enabled; PacketError, and nothing armed, where one cannot be."""
        self._disarm_all()
        self.buffer.clear()
        for point in self.points.values():
            point.hits = point.usage = 0
        for number, variable in self.definitions.items():
            self.variables.set(number, variable.initial)
        try:
            for point in self.points.values():
                self.arm(point)
        except PacketError:
            self._disarm_all()
            raise
        self.running, self.reason = True, "tnotrun:0"
        self.started_us, self.stopped_us = self._now_us(), 0

    def stop(self, reason: str) -> None:
        """End the run for `reason`, in the words of qTStatus. No effect without a run."""
        if not self.running:
            return
        self.running, self.reason = False, reason
        self.stopped_us = self._now_us()
        self._disarm_all()

    def arm(self, point: Tracepoint) -> None:
        """Put the probe of an enabled tracepoint there; PacketError says why it cannot be."""
        if not point.enabled or point.probe is not None:
            return

        def hit(_probe: Kprobe, _regs: Regs) -> None:
            self._hit(point)

        # Following starts at the probed instruction itself, so that must not run in a slot.
        probe = Kprobe(addr=point.address, pre_handler=hit, arm="hook" if point.steps else "auto")
        try:
            self._probes.register(probe, ours=True)
        except ProbeError as error:
            raise PacketError(f"tracepoint {point.number} at {point.address:#x}: {error.reason}") from error
        point.probe = probe

    def disarm(self, point: Tracepoint) -> None:
        if point.probe is not None:
            self._probes.unregister(point.probe)
            point.probe = None

    def _disarm_all(self) -> None:
        for point in self.points.values():
            self.disarm(point)

    def _hit(self, point: Tracepoint) -> None:
        """The guest is about to execute a tracepoint's instruction."""
        if not self.running:
            return
        if point.condition is not None:
            outcome = point.condition.evaluate()
            if isinstance(outcome, Failure):
                self._fail(point, outcome)
                return
            if not outcome:
                return
        point.hits += 1
        self._collect(point, point.actions, point.address)
        if self.running and point.steps:
            self._machine.follow(self._follower(point))
        elif not point.steps:
            self._count_pass(point)

    def _follower(self, point: Tracepoint) -> Callable[[], bool]:
        """Collects after each of the instructions that follow a hit."""
        left = point.steps
        pc = self.arch.pc

        def step() -> bool:
            nonlocal left
            if not self.running:
                return False
            left -= 1
            self._collect(point, point.step_actions, self._machine.registers.read(pc))
            if not left:
                self._count_pass(point)
            return self.running and left > 0

        return step

    def _count_pass(self, point: Tracepoint) -> None:
        if point.passes and point.hits >= point.passes:
            self.stop(f"tpasscount:{point.number:x}")

    def _collect(self, point: Tracepoint, actions: list[Action], pc: int) -> None:
        frame = Frame(self.arch, point.number, pc)
        failure = None
        for action in actions:
            failure = action.perform(frame)
            if failure is not None:
                break
        if not self.buffer.append(frame):
            self.stop("tfull:0")
            return
        point.usage += len(frame.raw)
        if failure is not None:
            self._fail(point, failure)

    def _fail(self, point: Tracepoint, failure: Failure) -> None:
        self.stop(f"terror:{failure.text.encode().hex()}:{point.number:x}")

    # ------------------------------------------------------------------------------------------------ what is asked

    def status(self) -> str:
        """The reply to qTStatus. Times are the guest's microseconds since power-on."""
        buffer = self.buffer
        return (
            f"T{int(self.running)};{self.reason};tframes:{len(buffer.frames):x};tcreated:{buffer.created:x};"
            f"tfree:{buffer.size - buffer.used:x};tsize:{buffer.size:x};circular:{int(buffer.circular)};"
            f"disconn:{int(self.outlives_debugger)};starttime:{self.started_us:x};stoptime:{self.stopped_us:x};"
            f"username:{self.user.hex()};notes:{self.notes.hex()}:"
        )

    def resize(self, size: int) -> None:
        """A buffer of that many bytes, emptied."""
        if self.running:
            raise PacketError("the trace buffer cannot change while a trace is running")
        if not 0 < size <= MAX_SIZE:
            raise PacketError(f"a trace buffer has 1 to {MAX_SIZE} bytes")
        self.buffer.clear()
        self.buffer.size = size

    def read(self, frame: Frame, vaddr: int, size: int) -> bytes:
        """Memory as a frame has it, up to the first byte it lacks. What the debugger has called read-only is looked up
        in the guest as it is now. MemoryFault where there is nothing."""
        data = frame.read(vaddr, size)
        if not data and any(first <= vaddr and vaddr + size <= end for first, end in self.readonly):
            data = readable(self._machine, vaddr, size)
        if not data:
            raise MemoryFault(vaddr, "find collected")
        return data

    def variable(self, frame: Frame | None, number: int) -> int | None:
        """Its value, in a frame the one collected; None where it has none."""
        if frame is not None:
            return dict(frame.variables).get(number)
        return self.variables.get(number) if number in self.variables else None

    def upload(self) -> list[bytes]:
        """Every tracepoint as the packets that define it have it: the replies to qTfP and qTsP."""
        pieces = []
        for point in self.points.values():
            where = b"%x:%x" % (point.number, point.address)
            state = b"E" if point.enabled else b"D"
            pieces.append(b"T%b:%b:%x:%x" % (where, state, point.steps, point.passes))
            if point.condition is not None:
                code = point.condition.code
                pieces[-1] += b":X%x,%b" % (len(code), code.hex().encode())
            pieces += [b"A%b:%b" % (where, action.text) for action in point.actions]
            pieces += [b"S%b:%b" % (where, action.text) for action in point.step_actions]
            pieces += [b"Z%b:%b" % (where, source) for source in point.sources]
        return pieces

    def upload_variables(self) -> list[bytes]:
        """Every variable: the replies to qTfV and qTsV."""
        return [
            b"%x:%x:%x:%b" % (number, variable.initial, variable.builtin, variable.name.hex().encode())
            for number, variable in self.definitions.items()
        ]

    def annotate(self, fields: Mapping[bytes, bytes]) -> None:
        """QTNotes: user and notes of the run, and the text that `tstop` was given, which comes after the stop."""
        self.user = unhex(fields.get(b"user", self.user.hex().encode()))
        self.notes = unhex(fields.get(b"notes", self.notes.hex().encode()))
        if self.reason.startswith("tstop:") and b"tstop" in fields:
            self.reason = f"tstop:{unhex(fields[b'tstop']).hex()}:0"


_REGISTERS = re.compile(rb"R([0-9a-fA-F]{1,128})")
_MEMORY = re.compile(rb"M(-1|[0-9a-fA-F]{1,8}),([0-9a-fA-F]{1,16}),([0-9a-fA-F]{1,16})")
