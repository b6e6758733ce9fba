"""The trace: what probes have recorded, in a ring of fixed size, and how a record is written down.

Rules: appended to in the engine's thread, read between runs; knows no machine. Text is ftrace's own format, so that
tools for it work; time is the guest's virtual time, and each record also keeps the count of retired instructions,
which finds the same moment again in a repeated run.
"""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import construct

from probes import rawtext
from probes.fetch import Scalar, Value

DEFAULT_SIZE: Final = 8 << 20
MIN_SIZE: Final = 64 << 10  # the longest record, which a page of Linux's would not hold either, fits
MAX_SIZE: Final = 256 << 20
MAX_GONE: Final = 256  # events that are gone, before those without a record are forgotten
COMM_SIZE: Final = 16

HEADER: Final = construct.Struct(
    "size" / construct.Int32ul,  # of header and payload; 0 where the ring goes on at its beginning
    "kind" / construct.Int32ul,
    "timestamp_ns" / construct.Int64ul,
    "instructions" / construct.Int64ul,
    "entered_ns" / construct.Int64sl,
    "cpu" / construct.Int16ul,
    "comm" / construct.Bytes(COMM_SIZE),
)
"""Of each record in the ring; behind it comes what the guest's own ftrace would have written, see `layout`."""
_HEADER: Final = struct.Struct("<IIQQqH16s")  # the same, for the path every hit takes
_SIZE: Final = struct.Struct("<I")

IRQS_OFF, NEED_RESCHED, HARDIRQ, SOFTIRQ, PREEMPT_RESCHED, NMI, BH_OFF = 0x01, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80
"""enum trace_flag_type, include/linux/trace_events.h, 6.12."""

_COLUMNS: Final = (
    "#                                _-----=> irqs-off/BH-disabled",
    "#                               / _----=> need-resched",
    "#                              | / _---=> hardirq/softirq",
    "#                              || / _--=> preempt-depth",
    "#                              ||| / _-=> migrate-disable",
    "#                              |||| /     delay",
    "#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION",
    "#              | |         |   |||||     |         |",
)


@dataclass(frozen=True, slots=True)
class Record:
    """One hit, or what a trigger wrote down at one.

    `where` is the probed place as %pS shows it; `arguments` are (name, type name, value) in order. `flags` are those of
    enum trace_flag_type; of `preempt_count` the low four bits are its depth, the high ones that of migrate_disable.
    `entered_ns` is when a call began whose return this is, -1 for anything else; `function` is its name then.
    "stack trace" and "dump" are no events: they have `frames`, a stack's innermost first, and no place or arguments.
    """

    timestamp_ns: int
    instructions: int
    event: str
    group: str
    comm: str
    pid: int
    cpu: int
    flags: int
    preempt_count: int
    ip: int
    where: str
    arguments: tuple[tuple[str, str, Value], ...]
    entered_ns: int = -1
    function: str = ""
    frames: tuple[str, ...] | None = None

    def text(self) -> str:
        """What `cat trace` prints: task-pid, cpu, flags, seconds, event, place, arguments; a stack takes more lines.

        Strings are as the guest has them, `rawtext.encode` gives their bytes.
        """
        seconds, rest = divmod(self.timestamp_ns // 1000, 1_000_000)
        task = f"{rawtext.padded(self.comm, -COMM_SIZE)}-{self.pid:<7d}"
        context = context_flags(self.flags, self.preempt_count)
        start = f"{task} [{self.cpu:03d}] {context} {seconds:5d}.{rest:06d}: "
        if self.frames is not None:
            return "\n".join([f"{start}<{self.event}>", *(f" => {frame}" for frame in self.frames)])
        shown = "".join(f" {name}={format_value(value, kind)}" for name, kind, value in self.arguments)
        return f"{start}{self.event}: ({self.where}){shown}"

    def as_dict(self) -> dict[str, object]:
        """What JSON lines and tables have of it: numbers stay numbers, a failed string is None, a string is Unicode:
        a byte that is no UTF-8 is `\\xNN`.
        """
        found: dict[str, object] = {
            "timestamp_ns": self.timestamp_ns,
            "instructions": self.instructions,
            "event": rawtext.readable(f"{self.group}/{self.event}"),
            "comm": rawtext.readable(self.comm),
            "pid": self.pid,
            "cpu": self.cpu,
            "flags": context_flags(self.flags, self.preempt_count),
        }
        if self.frames is not None:
            return found | {"lines": list(self.frames)}
        found |= {"ip": self.ip, "where": self.where}
        if self.entered_ns >= 0:
            found |= {"function": self.function, "duration_ns": self.timestamp_ns - self.entered_ns}
        return found | {"args": {rawtext.readable(name): _readable(value) for name, _, value in self.arguments}}

    def json(self) -> str:
        """One JSON object on one line."""
        return json.dumps(self.as_dict())


def context_flags(flags: int, preempt_count: int) -> str:
    """The five characters before the time: trace_print_lat_fmt(), kernel/trace/trace_output.c, 6.12."""
    off = ("d" if flags & IRQS_OFF else ".") if not flags & BH_OFF else ("D" if flags & IRQS_OFF else "b")
    resched = {0: ".", NEED_RESCHED: "n", PREEMPT_RESCHED: "p"}.get(flags & (NEED_RESCHED | PREEMPT_RESCHED), "N")
    if flags & NMI:
        where = "Z" if flags & HARDIRQ else "z"
    elif flags & HARDIRQ:
        where = "H" if flags & SOFTIRQ else "h"
    else:
        where = "s" if flags & SOFTIRQ else "."
    depth, migrate = preempt_count & 0xF, preempt_count >> 4
    return f"{off}{resched}{where}{f'{depth:x}' if depth else '.'}{f'{migrate:x}' if migrate else '.'}"


def format_value(value: Value, kind: str) -> str:
    """A value as its print function in kernel/trace/trace_probe.c writes it."""
    if isinstance(value, tuple):
        return "{" + ",".join(_format_scalar(element, kind) for element in value) + "}"
    return _format_scalar(value, kind)


def _readable(value: Value) -> Value:
    if isinstance(value, tuple):
        return tuple(rawtext.readable(one) if isinstance(one, str) else one for one in value)
    return rawtext.readable(value) if isinstance(value, str) else value


def _format_scalar(value: Scalar, kind: str) -> str:
    if value is None:
        return "(fault)"
    if isinstance(value, str):
        return value if kind == "symbol" else f'"{value}"'
    if kind == "char":
        return f"'{rawtext.decode(bytes((value,)))}'"
    return f"0x{value:x}" if kind.startswith("x") else str(value)


class Stored(NamedTuple):
    """A record as the ring has it, taken apart by HEADER."""

    timestamp_ns: int
    instructions: int
    entered_ns: int
    cpu: int
    comm: str
    payload: bytes


class Kind(Protocol):
    """What knows how to read the payloads of one event's records, now and after the event is gone."""

    def record(self, stored: Stored, /) -> Record: ...


class TraceRing:
    """The newest records in `size` bytes; older ones are overwritten and counted."""

    def __init__(self, size: int = DEFAULT_SIZE) -> None:
        self._data = bytearray(size)
        self._kinds: dict[int, Kind] = {}
        self._gone: set[int] = set()
        self._next_kind = 1
        self._listeners: list[Callable[[Record], None]] = []
        self.enabled = True
        self.snapshot: TraceRing | None = None
        self.clear()

    def clear(self) -> None:
        self._first = self._end = self._count = 0  # offset of the oldest record, behind the newest; how many there are
        self.overwritten = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Record]:
        return (self._decode(at) for at in list(self._offsets()))

    @property
    def size(self) -> int:
        return len(self._data)

    @property
    def written(self) -> int:
        """Records since the ring was emptied, overwritten ones included."""
        return self._count + self.overwritten

    def define(self, kind: Kind) -> int:
        """The number by which records of an event are appended, its `common_type`."""
        if len(self._gone) >= MAX_GONE:
            used = {_HEADER.unpack_from(self._data, at)[1] for at in self._offsets()}
            for gone in self._gone - used:
                del self._kinds[gone]
            self._gone &= used
        number, self._next_kind = self._next_kind, self._next_kind + 1
        self._kinds[number] = kind
        return number

    def forget(self, number: int) -> None:
        """Nothing more is appended by that number; what is there can still be read."""
        self._gone.add(number)

    def append(
        self, number: int, at_ns: int, instructions: int, entered_ns: int, cpu: int, comm: str, payload: bytes
    ) -> None:
        """Keep a record of kind `number` and tell the listeners. Nothing while the trace is off: ask first."""
        size = _HEADER.size + len(payload)
        if size > len(self._data) // 2:
            self.overwritten += 1  # no ring could hold it, as with Linux
            return
        at = self._room(size)
        comm_bytes = rawtext.encode(comm)
        _HEADER.pack_into(self._data, at, size, number, at_ns, instructions, entered_ns, cpu, comm_bytes)
        self._data[at + _HEADER.size : at + size] = payload
        self._end = at + size
        self._count += 1
        if self._listeners:
            record = self._decode(at)
            for listener in list(self._listeners):
                listener(record)

    def _room(self, size: int) -> int:
        """Where `size` bytes may be written behind the newest record; the oldest make room."""
        capacity = len(self._data)
        at = self._end
        if at + size > capacity:
            while self._count and self._first >= at:
                self._drop()  # what lies between here and the ring's end
            if capacity - at >= _SIZE.size:
                _SIZE.pack_into(self._data, at, 0)
            at = 0
        while self._count and at <= self._first < at + size:
            self._drop()
        if not self._count:
            self._first = at
        return at

    def _drop(self) -> None:
        self._first = self._after(self._first)
        self._count -= 1
        self.overwritten += 1

    def _after(self, at: int) -> int:
        """Where the record behind that at `at` begins."""
        at += _SIZE.unpack_from(self._data, at)[0]
        if at == self._end:
            return at
        turned = len(self._data) - at < _SIZE.size or not _SIZE.unpack_from(self._data, at)[0]
        return 0 if turned else at

    def _offsets(self) -> Iterator[int]:
        at = self._first
        for _ in range(self._count):
            yield at
            at = self._after(at)

    def _decode(self, at: int) -> Record:
        size, number, at_ns, instructions, entered_ns, cpu, comm = _HEADER.unpack_from(self._data, at)
        payload = bytes(self._data[at + _HEADER.size : at + size])
        name = rawtext.decode(comm.split(b"\0", 1)[0])
        return self._kinds[number].record(Stored(at_ns, instructions, entered_ns, cpu, name, payload))

    def last(self, count: int | None = None) -> Sequence[Record]:
        """The newest `count` records, oldest first; all of them for None."""
        return [self._decode(at) for at in deque(self._offsets(), maxlen=count)]

    def resize(self, size: int) -> None:
        """Keep at most `size` bytes from now on; the newest records that fit stay."""
        old, offsets, lost = self._data, list(self._offsets()), self.overwritten
        self._data = bytearray(size)
        self.clear()
        for at in offsets:
            length = _SIZE.unpack_from(old, at)[0]
            if length <= size // 2:
                to = self._room(length)
                self._data[to : to + length] = old[at : at + length]
                self._end, self._count = to + length, self._count + 1
            else:
                self.overwritten += 1
        self.overwritten += lost

    def take_snapshot(self) -> None:
        """What is recorded so far goes to `snapshot`, in place of an older one; the ring begins anew."""
        taken = TraceRing(0)
        taken._data, taken._kinds = self._data, dict(self._kinds)
        taken._first, taken._end, taken._count = self._first, self._end, self._count
        taken.overwritten = self.overwritten
        self._data = bytearray(len(taken._data))
        self.clear()
        self.snapshot = taken

    def subscribe(self, listener: Callable[[Record], None]) -> Callable[[], None]:
        """Have `listener` called with each new record, in the engine's thread; the answer takes it away again."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def lines(self) -> list[str]:
        """All of the `trace` file, its header included."""
        counts = f"# entries-in-buffer/entries-written: {self._count}/{self.written}   #P:1"
        return ["# tracer: nop", "#", counts, "#", *_COLUMNS, *(record.text() for record in self)]
