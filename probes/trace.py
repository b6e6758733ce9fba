"""The trace: what probes have recorded, in a ring, and how a record is written down.

Rules: appended to in the engine's thread, read between runs; knows no machine. Text is ftrace's own format, so that
tools for it work; time is the guest's virtual time, and each record also keeps the count of retired instructions,
which finds the same moment again in a repeated run.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from probes.fetch import Scalar, Value

MAX_RECORDS: Final = 65536
MAX_BYTES: Final = 32 << 20  # of strings: 128 arguments of PATH_MAX each would otherwise be 0.5 MB a record
_FIXED_COST: Final = 64


@dataclass(frozen=True, slots=True)
class Record:
    """One hit.

    `where` is the probed place as %pS shows it; `arguments` are (name, type name, value) in order. `irqs_off` is the
    guest's EFLAGS.IF, inverted.
    """

    timestamp_ns: int
    instructions: int
    event: str
    group: str
    comm: str
    pid: int
    cpu: int
    irqs_off: bool
    ip: int
    where: str
    arguments: tuple[tuple[str, str, Value], ...]

    def text(self) -> str:
        """The line `cat trace` prints: task-pid, cpu, flags, seconds, event, place, arguments."""
        seconds, rest = divmod(self.timestamp_ns // 1000, 1_000_000)
        flags = "d...." if self.irqs_off else "....."
        shown = "".join(f" {name}={format_value(value, kind)}" for name, kind, value in self.arguments)
        return (
            f"{self.comm:>16}-{self.pid:<7d} [{self.cpu:03d}] {flags} {seconds:5d}.{rest:06d}: "
            f"{self.event}: ({self.where}){shown}"
        )

    def json(self) -> str:
        """One JSON object on one line; numbers stay numbers, a failed string is null."""
        return json.dumps(
            {
                "timestamp_ns": self.timestamp_ns,
                "instructions": self.instructions,
                "event": f"{self.group}/{self.event}",
                "comm": self.comm,
                "pid": self.pid,
                "cpu": self.cpu,
                "ip": self.ip,
                "where": self.where,
                "args": {name: value for name, _, value in self.arguments},
            }
        )

    @property
    def cost(self) -> int:
        """Bytes, about, that it keeps in memory beyond its fixed part."""
        return sum(_cost(value) for _, _, value in self.arguments)


def _cost(value: Value) -> int:
    if isinstance(value, tuple):
        return sum(map(_cost, value))
    return _FIXED_COST + len(value) if isinstance(value, str) else _FIXED_COST


def format_value(value: Value, kind: str) -> str:
    """A value as its print function in kernel/trace/trace_probe.c writes it."""
    if isinstance(value, tuple):
        return "{" + ",".join(_format_scalar(element, kind) for element in value) + "}"
    return _format_scalar(value, kind)


def _format_scalar(value: Scalar, kind: str) -> str:
    if value is None:
        return "(fault)"
    if isinstance(value, str):
        return value if kind == "symbol" else f'"{value}"'
    if kind == "char":
        return f"'{chr(value)}'"
    return f"0x{value:x}" if kind.startswith("x") else str(value)


class TraceRing:
    """The newest records, at most `max_records` and about `max_bytes`; older ones are overwritten and counted."""

    def __init__(self, max_records: int = MAX_RECORDS, max_bytes: int = MAX_BYTES) -> None:
        self._records: deque[Record] = deque()
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._bytes = 0
        self._listeners: list[Callable[[Record], None]] = []
        self.overwritten = 0
        self.enabled = True

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def append(self, record: Record) -> None:
        """Keep a record and tell the listeners; dropped while the trace is off."""
        if not self.enabled:
            return
        self._records.append(record)
        self._bytes += record.cost
        while len(self._records) > self._max_records or (self._bytes > self._max_bytes and len(self._records) > 1):
            self._bytes -= self._records.popleft().cost
            self.overwritten += 1
        for listener in self._listeners:
            listener(record)

    def last(self, count: int | None = None) -> Sequence[Record]:
        """The newest `count` records, oldest first; all of them for None."""
        records = list(self._records)
        return records if count is None else records[len(records) - min(count, len(records)) :]

    def clear(self) -> None:
        self._records.clear()
        self._bytes = 0
        self.overwritten = 0

    def subscribe(self, listener: Callable[[Record], None]) -> Callable[[], None]:
        """Have `listener` called with each new record, in the engine's thread; the answer takes it away again."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)
