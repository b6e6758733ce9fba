"""`trace save`: only into the folder that was allowed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emu.iface import MachineError
from gdbstub import cli
from gdbstub.tracefiles import TraceFolder
from tests.probes.test_export import RECORDS


def test_a_trace_is_saved_by_its_suffix(tmp_path: Path) -> None:
    """Over one that is there."""
    folder = TraceFolder(tmp_path)
    (tmp_path / "t.txt").write_text("older and much longer than what comes now\n" * 50)
    assert folder.save("t.txt", RECORDS[:1], ()) == str(tmp_path / "t.txt")
    assert (tmp_path / "t.txt").read_text() == RECORDS[0].text() + "\n"


@pytest.mark.parametrize(
    "name", ["../t.txt", "/tmp/t.txt", "sub/t.txt", "t.doc", "t", "", "link.txt", "fifo.txt", "a\0.txt"]
)
def test_nothing_else_is_written(tmp_path: Path, name: str) -> None:
    """No path, no link, no pipe, no other suffix."""
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    inside = tmp_path / "in"
    (inside / "sub").mkdir(parents=True)
    (inside / "link.txt").symlink_to(outside)
    os.mkfifo(inside / "fifo.txt")
    with pytest.raises(MachineError):
        TraceFolder(inside).save(name, RECORDS, ())
    assert outside.read_text() == "mine"


def test_the_folder_must_be_one(tmp_path: Path) -> None:
    """Said when the program starts."""
    with pytest.raises(MachineError, match="no such folder"):
        TraceFolder(tmp_path / "nosuch")


def test_a_report_is_printed_and_its_flame_graph_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`gdbstub report FILE --flame FILE.svg`; without stacks there is the report alone, and status 2; what
    is no trace is that, too, and a line."""
    trace, flame = tmp_path / "t.jsonl", tmp_path / "t.svg"
    trace.write_text("".join(record.json() + "\n" for record in RECORDS))
    assert cli.main(["report", str(trace), "--flame", str(flame)]) == 0
    assert capsys.readouterr().out.startswith("2 hits\n")
    assert flame.read_text().startswith("<svg")
    trace.write_text(RECORDS[0].json())
    assert cli.main(["report", str(trace), "--flame", str(tmp_path / "none.svg")]) == 2
    said = capsys.readouterr()
    assert said.out.startswith("1 hits\n")
    assert "no stack traces" in said.err
    trace.write_text("no trace\n")
    assert cli.main(["report", str(trace)]) == 2
    assert "line 1" in capsys.readouterr().err
