"""The trace for other tools, read back by the tools' own packages; and what a report makes of it."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as protos

from probes import rawtext
from probes.errors import ProbeError
from probes.export import Unfinished, open_export
from probes.report import Report, records_of
from probes.trace import Record

OPEN = Record(
    *(1_000, 10, "open", "kprobes", "cat", 7, 0, 0, 0, 0xFFFFFFFF81000000, "do_open+0x0/0x10"),
    (("file", "string", "/etc/motd"), ("fl", "x32", 5), ("big", "x64", 1 << 63)),
)
READ = Record(
    *(9_000, 90, "read", "kprobes", "cat", 7, 0, 0, 0, 0x10, "caller+0x5/0x10 <- vfs_read"),
    (("n", "s64", -5), ("bad", "string", None)),
    entered_ns=4_000,
    function="vfs_read",
)
STACK = Record(9_000, 90, "stack trace", "", "cat", 7, 0, 0, 0, 0, "", (), frames=("vfs_read", "ksys_read", "entry"))
RECORDS = (OPEN, READ, STACK)


def exported(name: str, unfinished: tuple[Unfinished, ...] = ()) -> bytes:
    out = io.BytesIO()
    export = open_export(name, out.write)
    for record in RECORDS:
        export.add(record)
    export.close(unfinished)
    return out.getvalue()


def test_text_and_json_are_a_line_a_record() -> None:
    """A stack takes a line for each frame; numbers stay numbers, a call has its duration."""
    assert exported("txt").decode().splitlines() == [line for one in RECORDS for line in one.text().split("\n")]
    rows = [json.loads(line) for line in exported("jsonl").splitlines()]
    assert (rows[1]["function"], rows[1]["duration_ns"], rows[1]["args"]) == ("vfs_read", 5_000, {"n": -5, "bad": None})
    assert rows[2]["lines"] == ["vfs_read", "ksys_read", "entry"]


def test_bytes_that_are_no_text_are_kept_or_escaped() -> None:
    r"""ftrace's text has them as the guest has; what has to be Unicode has `\xNN`, and can always be written."""
    text = rawtext.decode(b"a\xff\xc3\xa9\n")
    arguments = (("file", "string", text), ("two", "string", (text, None)), ("\udce9", "u8", 1))
    record = replace(OPEN, event="caf\udce9", comm=text, arguments=arguments)

    def written(name: str) -> bytes:
        out = io.BytesIO()
        export = open_export(name, out.write)
        export.add(record)
        export.close(())
        return out.getvalue()

    assert written("txt").startswith(b"           a\xff\xc3\xa9\n-7 ")
    assert b'file="a\xff\xc3\xa9\n" two={"a\xff\xc3\xa9\n",(fault)}' in written("txt")
    readable = "a\\xff\u00e9\n"
    row = json.loads(written("jsonl"))
    assert (row["comm"], row["args"]) == (readable, {"file": readable, "two": [readable, None], "\\xe9": 1})
    assert readable.encode() in written("pftrace")
    assert b"caf\\xe9" in written("pftrace")
    assert pyarrow.parquet.read_table(io.BytesIO(written("parquet"))).to_pylist()[0]["comm"] == readable
    assert any("caf\\xe9" in line for line in Report(records_of(written("txt"))).lines())


def test_perfetto_has_a_track_for_each_task_and_a_span_for_each_call() -> None:
    """Parsed by the package's own protos: an entry is an instant, a call begins and ends, an unfinished one only
    begins and says so."""
    trace = protos.Trace()
    trace.ParseFromString(exported("pftrace", (Unfinished("wait", "do_wait", 0x1000, 2_000),)))
    tracks = {packet.track_descriptor.uuid: packet.track_descriptor for packet in trace.packet}
    named = {track.name: track for track in tracks.values()}
    events = [packet for packet in trace.packet if packet.HasField("track_event")]
    kinds = protos.TrackEvent
    shown = [(one.timestamp, one.track_event.type, one.track_event.name) for one in events]
    assert shown == [
        (1_000, kinds.TYPE_INSTANT, "open"),
        (4_000, kinds.TYPE_SLICE_BEGIN, "vfs_read"),
        (9_000, kinds.TYPE_SLICE_END, ""),
        (9_000, kinds.TYPE_INSTANT, "stack trace"),
        (2_000, kinds.TYPE_SLICE_BEGIN, "do_wait (unfinished)"),
    ]
    assert named["vfs_read (read)"].parent_uuid == named["cat 7"].uuid == events[0].track_event.track_uuid
    notes = {note.name: note for note in events[0].track_event.debug_annotations}
    assert (notes["file"].string_value, notes["fl"].int_value, notes["big"].int_value) == ("/etc/motd", 5, -(1 << 63))


def test_parquet_is_a_table() -> None:
    """One row a record, arguments as JSON."""
    rows = pyarrow.parquet.read_table(io.BytesIO(exported("parquet"))).to_pylist()
    assert [row["event"] for row in rows] == ["kprobes/open", "kprobes/read", "/stack trace"]
    assert (rows[1]["duration_ns"], json.loads(rows[1]["args"])["n"], rows[0]["ip"]) == (5_000, -5, 0xFFFFFFFF81000000)


@pytest.mark.parametrize(
    ("name", "module"), [("pftrace", "perfetto.trace_builder.proto_builder"), ("parquet", "pyarrow")]
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    """Both are extras."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ProbeError, match="pip install"):
        open_export(name, io.BytesIO().write)


@pytest.mark.parametrize("name", ["txt", "jsonl"])
def test_a_report_counts_functions_tasks_and_stacks(name: str) -> None:
    """From either form; durations are in JSON only."""
    report = Report(records_of(exported(name)))
    text = "\n".join(report.lines())
    assert report.total == 2
    assert "         1  " in text
    assert "read vfs_read" in text
    assert "cat-7" in text
    assert "vfs_read <- ksys_read <- entry" in text
    assert ("median 5,000 ns" in text) is (name == "jsonl")


def test_a_flame_graph_has_a_box_for_each_function_as_wide_as_its_share() -> None:
    """The callers stand below; names are escaped."""
    stacks = [("<b>", "main"), ("c", "main"), ("c", "main"), ("main",)]
    report = Report({"event": "stack trace", "lines": list(stack)} for stack in stacks)
    svg = report.flame_graph()
    assert "<title>main: 4 of 4</title>" in svg
    assert "<title>c: 2 of 4</title>" in svg
    assert "&lt;b&gt;: 1 of 4" in svg
    assert 'width="600.0"' in svg


@given(st.binary(max_size=300))
def test_no_file_brings_a_report_down(data: bytes) -> None:
    """Anything is a trace or is refused with its line."""
    try:
        Report(records_of(data)).lines()
    except ValueError as error:
        assert "line" in str(error)  # noqa: PT017  # what is refused and what is not both are right


def test_json_that_is_nested_too_deep_is_refused_with_its_line() -> None:
    with pytest.raises(ValueError, match="line 1 is no JSON"):
        list(records_of(b'{"a":' * 100_000))


def test_a_stack_of_any_depth_has_its_innermost_frames() -> None:
    report = Report([{"event": "stack trace", "lines": [f"f{index}" for index in range(5000)]}])
    assert "<title>f0: 1 of 1</title>" in report.flame_graph()
    assert "f5000" not in report.flame_graph()
