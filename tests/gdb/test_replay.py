"""`--log-rsp` and `gdbstub replay`: a session of a real gdb happens again, instruction for instruction."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from gdbstub import replay
from gdbstub.automation import GdbSession, gdb_session
from gdbstub.cli import main
from tests.gdb.conftest import LINUX
from tests.support.kernels import another
from tests.support.process import gdbstub

OF_A_RUN = ("--console", "stdio", "--listen", "127.0.0.1:0", "--pace", "real")


def replayed(record: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and what was said."""
    capfd.readouterr()
    status = main(["replay", str(record)])
    return status, capfd.readouterr().err


def recorded_embedded(record: Path, gdb: str, image: str) -> None:
    """Breakpoints, steps, Ctrl-C, a probe, console input, a visitor, a reattach."""
    with gdbstub("load", image, "--append", "calls=50 loop", *OF_A_RUN, "--wait", "--log-rsp", str(record)) as child:
        with gdb_session(child.address, gdb=gdb) as session:
            session.monitor("kprobe add p:seen fib")
            session.execute("break target if $sp != 0")
            session.monitor("trace stream on")
            session.resume()
            assert session.wait_stop().function == "target"
            for command in ("stepi", "next", "finish"):
                session.resume(command)
                session.wait_stop()
            session.execute("set var $dr0 = 5")
            session.execute("delete")
            session.resume()
            child.type(b"typed while it runs\n")
            assert child.monitor("info", "stats")[0] == 0
            session.interrupt()
        with gdb_session(child.address, gdb=gdb) as session:
            assert "cr3" in session.execute("info registers")
        child.monitor("quit")
        assert child.ended() == 0


@pytest.mark.parametrize("image", ["embedded", "embedded32"])
def test_a_session_over_the_embedded_guest_is_replayed(
    new_gdb: str, image: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Everything as recorded, to the hash of RAM; and a change anywhere in the record is found at its place."""
    record = tmp_path / "session.jsonl"
    recorded_embedded(record, new_gdb, image)
    lines = record.read_text().splitlines(keepends=True)
    kinds = {json.loads(line)["what"] for line in lines[1:]}
    assert kinds >= {"connect", "attach", "detach", "->", "<-", "interrupt", "input", "output", "end"}
    assert replayed(record, capfd) == (0, f"gdbstub: {len(lines) - 1} events, each as recorded\n")
    for what in ("<-", "output", "end"):
        place = max(number for number, line in enumerate(lines) if json.loads(line).get("what") == what)
        event = json.loads(lines[place])
        event["data"] = "something else"
        record.write_text("".join((*lines[:place], json.dumps(event) + "\n", *lines[place + 1 :])))
        status, said = replayed(record, capfd)
        assert status == 1
        assert f"event {place} differs" in said
        assert "recorded: at instruction" in said
    monkeypatch.setattr(replay, "TOLD_EVERY", 1)
    record.write_text("".join(lines[:-20]) + lines[-20][:9])
    status, said = replayed(record, capfd)
    assert status == 0, "a record that was cut short is replayed as far as it goes"
    assert f" of {len(lines) - 21}, instruction " in said, "and says how far it has come"
    assert said.endswith("each as recorded; the record breaks off before its end, so the last RAM was not compared\n")


def test_a_session_over_linux_is_replayed(new_gdb: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """A snapshot at a shell prompt: a command is typed, gdb stops in it, walks the stack, steps and lets it go on."""
    snapshot, record = tmp_path / "shell.snap", tmp_path / "session.jsonl"
    another(LINUX[64]).save(snapshot)
    with gdbstub("boot", "--restore", str(snapshot), *OF_A_RUN, "--log-rsp", str(record)) as child:
        with gdb_session(child.address, gdb=new_gdb) as session:
            session.execute("break do_sys_openat2")
            session.resume()
            child.type(b"cat /proc/version\n")
            assert session.wait_stop().function == "do_sys_openat2"
            session.execute("bt")
            session.resume("stepi 20")
            session.wait_stop()
            session.execute("delete")
        child.wait_for("Linux version .*\n")
        child.monitor("quit")
        assert child.ended() == 0
    status, said = replayed(record, capfd)
    assert (status, said.splitlines()[-1].endswith("each as recorded")) == (0, True), said


def test_a_restart_types_the_command_again(new_gdb: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """`run` takes a machine that was given --exec and --send back to where it began, with what is typed there; so does
    its replay, once."""
    snapshot, record = tmp_path / "shell.snap", tmp_path / "session.jsonl"
    another(LINUX[64]).save(snapshot)
    goal = ("--exec", "cat /proc/version; read line; echo got $line", "--send", "Linux version=>typed\\n", "--wait")
    with gdbstub("boot", "--restore", str(snapshot), *OF_A_RUN, *goal, "--log-rsp", str(record)) as child:
        with contextlib.closing(GdbSession(new_gdb)) as session:
            session.execute(f"target extended-remote {child.address}")
            session.wait_stop()
            session.execute("break do_sys_openat2")
            session.resume()
            first = session.wait_stop()
            for _ in range(2):
                session.execute("delete")
                session.execute("break do_sys_openat2")
                session.resume("run")
                assert session.wait_stop().function == first.function == "do_sys_openat2"
            session.execute("delete")
            session.resume()
            end = session.wait_stop()
        assert end.reason == "exited-normally"
        child.wait_for("got typed")
        assert child.ended() == 0
    status, said = replayed(record, capfd)
    assert (status, said.splitlines()[-1].endswith("each as recorded")) == (0, True), said


EMPTY = {"gdbstub record": 1, "command": [], "instructions": 0, "ram_sha256": ""}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "an empty file"),
        ("hello\n", ":1: no line of a record"),
        ("[" * 100_000 + "\n", ":1: no line of a record"),
        ('{"gdbstub record": 99}\n', "another version"),
        ('{"gdbstub record": 1, "command": ["demo"], "instructions": 0, "ram_sha256": ""}\n', "makes no machine"),
        ('{"gdbstub record": 1, "command": 5, "instructions": 0, "ram_sha256": ""}\n', ":1: no line"),
        ('{"gdbstub record": 1, "command": [], "instructions": 0, "ram_sha256": ""}\n[]\n', ":2: no line"),
        ('{"gdbstub record": 1, "command": [], "instructions": 0, "ram_sha256": ""}\n{"x": 1}\n', ":2: no line"),
        *(
            (json.dumps(EMPTY) + "\n" + json.dumps(fields) + "\n", ":2: no line")
            for fields in (
                {"at": "x", "what": "input"},
                {"at": -1, "what": "input"},
                {"at": 1 << 64, "what": "input"},
                {"at": 5, "what": "nothing"},
                {"at": 5, "what": ["input"]},
                {"at": 5, "what": "input", "data": "\u20ac"},
                {"at": 5, "what": "input", "data": 7},
                {"at": 5, "what": "->", "client": None, "data": "g"},
            )
        ),
    ],
)
def test_what_is_no_record_is_refused(text: str, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """With the line, in one line, before a machine is made."""
    record = tmp_path / "record"
    record.write_text(text)
    status, said = replayed(record, capfd)
    assert (status, said.count("\n")) == (2, 1)
    assert reason in said


def test_a_file_that_cannot_be_read_is_named_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    status, said = replayed(tmp_path / "None", capfd)
    assert (status, said) == (2, f"gdbstub: {tmp_path}/None: no such file or directory\n")
    (tmp_path / "Bytes").write_bytes(b"\xff\xfe")
    assert replayed(tmp_path / "Bytes", capfd) == (2, f"gdbstub: {tmp_path}/Bytes: not a text file\n")


def test_another_machine_is_told_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Before the first event: the record was made of another program or image."""
    record = tmp_path / "record"
    start = {"gdbstub record": 1, "command": ["load", "embedded"], "instructions": 0, "ram_sha256": "00"}
    record.write_text(json.dumps(start) + "\n")
    status, said = replayed(record, capfd)
    assert (status, "another one than was recorded" in said) == (1, True)
