"""The trace for other tools: ftrace's text, JSON lines, Perfetto, Parquet; one writer each, fed record by record.

Rules: called in the machine's thread, `write` may be called in it too; opens no file. Perfetto and Parquet are packages
that need not be installed: `open_export` says so. Times are the guest's.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

from probes import rawtext
from probes.errors import ProbeError
from probes.trace import Record

Write: TypeAlias = Callable[[bytes], object]
FORMATS: Final = ("txt", "jsonl", "pftrace", "parquet")
_SIGN: Final = 1 << 63  # annotations are signed
_BATCH: Final = 10_000  # rows of a Parquet group


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A call that a return probe follows and that has not returned. `task` is as `probes.tasks` numbers them."""

    event: str
    function: str
    task: int
    entered_ns: int


class Export(Protocol):
    """One trace being written."""

    def add(self, record: Record, /) -> None: ...

    def close(self, unfinished: Iterable[Unfinished], /) -> None:
        """Write what is left; nothing may be added afterwards. Formats without spans ignore the unfinished."""
        ...


def open_export(name: str, write: Write) -> Export:
    """A writer of one of FORMATS. ProbeError where the package it needs is not installed."""
    makers: Mapping[str, Callable[[Write], Export]] = {
        "txt": lambda out: _Lines(out, Record.text),
        "jsonl": lambda out: _Lines(out, Record.json),
        "pftrace": _Perfetto,
        "parquet": _Parquet,
    }
    try:
        return makers[name](write)
    except ImportError as error:
        extra = "perfetto" if name == "pftrace" else "data"
        raise ProbeError(0, f".{name} needs a package that is not installed: pip install 'gdbstub[{extra}]'") from error


class _Lines:
    def __init__(self, write: Write, show: Callable[[Record], str]) -> None:
        self._write = write
        self._show = show

    def add(self, record: Record, /) -> None:
        self._write(rawtext.encode(self._show(record)) + b"\n")

    def close(self, unfinished: Iterable[Unfinished], /) -> None:
        pass


class _Perfetto:
    """A track for each task with its hits as instants; each call that a return probe followed is a span beside it."""

    def __init__(self, write: Write) -> None:
        from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as protos
        from perfetto.trace_builder.proto_builder import TraceProtoBuilder

        self._write = write
        self._protos = protos
        self._builder = TraceProtoBuilder
        self._tasks: dict[tuple[int, str], int] = {}
        self._next = 1

    def add(self, record: Record, /) -> None:
        track = self._task(record.pid, record.comm)
        event = rawtext.readable(record.event)
        values: dict[str, object] = {rawtext.readable(name): value for name, _, value in record.arguments}
        if record.frames is not None:
            values = {"frames": "\n".join(record.frames)}
        kind = self._protos.TrackEvent
        if record.entered_ns < 0:
            self._event(kind.TYPE_INSTANT, record.timestamp_ns, track, event, {"where": record.where} | values)
            return
        span = self._track(f"{record.function} ({event})", track)
        self._event(kind.TYPE_SLICE_BEGIN, record.entered_ns, span, record.function, {"where": record.where} | values)
        self._event(kind.TYPE_SLICE_END, record.timestamp_ns, span, "", {})

    def close(self, unfinished: Iterable[Unfinished], /) -> None:
        for call in unfinished:
            span = self._track(
                f"{call.function} ({rawtext.readable(call.event)})", self._task(0, f"task {call.task:#x}")
            )
            begin = self._protos.TrackEvent.TYPE_SLICE_BEGIN
            self._event(begin, call.entered_ns, span, f"{call.function} (unfinished)", {"unfinished": True})

    def _task(self, pid: int, comm: str) -> int:
        found = self._tasks.get((pid, comm))
        if found is None:
            found = self._tasks[pid, comm] = self._track(f"{rawtext.readable(comm)} {pid}", 0)
        return found

    def _track(self, name: str, parent: int) -> int:
        number, self._next = self._next, self._next + 1

        def describe(packet: Any) -> None:
            packet.track_descriptor.uuid = number
            packet.track_descriptor.name = name
            if parent:
                packet.track_descriptor.parent_uuid = parent

        self._packet(describe)
        return number

    def _event(self, kind: int, at_ns: int, track: int, name: str, values: Mapping[str, object]) -> None:
        def describe(packet: Any) -> None:
            packet.timestamp = at_ns
            packet.trusted_packet_sequence_id = 1
            event = packet.track_event
            event.type, event.track_uuid = kind, track
            if name:
                event.name = name
            for key, value in values.items():
                note = event.debug_annotations.add()
                note.name = key
                if isinstance(value, bool):
                    note.bool_value = value
                elif isinstance(value, int):
                    note.int_value = (value + _SIGN) % (2 * _SIGN) - _SIGN
                else:
                    note.string_value = rawtext.readable(value) if isinstance(value, str) else json.dumps(value)

        self._packet(describe)

    def _packet(self, describe: Callable[[Any], None]) -> None:
        """A trace is its packets one after the other, so each can be written when it is known."""
        builder = self._builder()
        describe(builder.add_packet())
        self._write(builder.serialize())


class _Parquet:
    """A table with a row for each record; arguments are JSON, their names and types being each event's own."""

    def __init__(self, write: Write) -> None:
        import pyarrow
        import pyarrow.parquet

        self._arrow = pyarrow
        text, number = pyarrow.string(), pyarrow.int64()
        self._schema = pyarrow.schema(
            [
                *(("timestamp_ns", number), ("instructions", number), ("event", text), ("comm", text), ("pid", number)),
                *(("cpu", number), ("flags", text), ("ip", pyarrow.uint64()), ("where", text), ("function", text)),
                *(("duration_ns", number), ("args", text), ("lines", pyarrow.list_(text))),
            ]
        )
        self._writer = pyarrow.parquet.ParquetWriter(_Sink(write), self._schema)
        self._rows: list[dict[str, object]] = []

    def add(self, record: Record, /) -> None:
        row = record.as_dict()
        row["args"] = json.dumps(row.get("args", {}))
        self._rows.append(row)
        if len(self._rows) >= _BATCH:
            self._flush()

    def close(self, unfinished: Iterable[Unfinished], /) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(self._arrow.Table.from_pylist(self._rows, self._schema))
        self._rows = []


class _Sink(io.RawIOBase):
    """A file to write to, for a library that wants one."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self._out = write
        self._at = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        piece = bytes(data)
        self._out(piece)
        self._at += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self._at
