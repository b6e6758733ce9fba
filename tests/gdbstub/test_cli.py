"""The command line from end to end on the embedded guest, in this process: what each option does, and how it ends."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest
import trio

from emu.machine import Machine
from gdbstub import cli, composition
from gdbstub.cli import main

OPEN = "p:open do_open file=+0($arg1):string flags=$arg2:u32"
BITS = pytest.mark.parametrize("image", ["embedded", "embedded32"])


class Ended(NamedTuple):
    """What a command left: exit status, standard output, standard error."""

    status: int
    out: str
    err: str


Run: TypeAlias = Callable[..., Ended]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """`gdbstub load IMAGE --no-listen ARGUMENTS`, at most 50 million instructions."""

    def call(image: str, *arguments: str) -> Ended:
        limit = () if "--budget" in arguments else ("--budget", "50M")
        status = main(["load", image, "--no-listen", *limit, *arguments])
        captured = capfd.readouterr()
        return Ended(status, captured.out.replace("\r\n", "\n"), captured.err)

    return call


def flat(tmp_path: Path, code: str) -> tuple[str, ...]:
    """A flat binary and the options that start it in 32-bit mode."""
    path = tmp_path / "flat.bin"
    path.write_bytes(bytes.fromhex(code))
    return (str(path), "--bits", "32", "--base", "0x100000")


# ------------------------------------------------------------------------------------------------------- how it ends


@BITS
def test_until_ends_with_0_and_the_console_on_standard_output(run: Run, image: str):
    """The guest's text alone is on standard output, ours on standard error."""
    ended = run(image, "--until", "embedded: done")
    assert ended.status == 0
    assert ended.out.splitlines()[-1] == "embedded: done"
    assert ended.err == "gdbstub: matched: embedded: done\n"


@pytest.mark.parametrize(
    ("append", "status", "said"),
    [
        ("loop", 1, "budget is used up"),
        ("halt", 1, "halted for good"),
        ("triple", 3, "triple fault"),
        ("reset", 0, "reset the machine"),
        ("poweroff", 0, "powered off"),
        ("exit=9", 9, "status 9"),
        ("panic", 3, "halted for good"),
    ],
)
@BITS
def test_exit_status_says_how_the_guest_ended(run: Run, image: str, append: str, status: int, said: str):
    """And one line says it in words."""
    ended = run(image, "--append", append, "--budget", "3M")
    assert (ended.status, said in ended.err) == (status, True)
    assert len(ended.err.splitlines()) == 1


def test_a_defect_inside_the_guest_s_run_is_status_4(run: Run, monkeypatch: pytest.MonkeyPatch):
    """With the report to send."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("broken on purpose")

    monkeypatch.setattr(Machine, "on_out", broken)
    ended = run("embedded")
    assert ended.status == 4
    assert "please report this" in ended.err
    assert "ZeroDivisionError: broken on purpose" in ended.err


def test_a_second_signal_at_the_very_end_is_no_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may find trio closing: the run has ended all the same, with its own status."""
    run = trio.run

    def interrupted(main: Callable[[], Awaitable[object]]) -> None:
        run(main)
        raise trio.TrioInternalError from KeyboardInterrupt()

    monkeypatch.setattr(trio, "run", interrupted)
    assert cli.main(["load", "embedded", "--no-listen", "--console", "none", "--budget", "1000"]) == 1


def test_a_defect_outside_of_it_is_status_4_too(run: Run, monkeypatch: pytest.MonkeyPatch):
    """No exception of ours leaves the program bare."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("broken on purpose")

    monkeypatch.setattr(composition, "run_program", broken)
    ended = run("embedded")
    assert (ended.status, ended.err.splitlines()[0]) == (4, "gdbstub: a defect of gdbstub; please report this:")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["load", "nosuch.elf"], "nosuch.elf: no such file or directory"),
        (["load", "/"], "/: is a directory"),
        (["load", "/etc/passwd"], "needs --bits 16, 32 or 64"),
        (["boot", "/etc/passwd"], "not a Linux kernel"),
        (["boot", "--restore", "nosuch"], "nosuch: no such file or directory"),
        (["boot", "--restore", "/etc/passwd"], "is not a snapshot of a machine"),
        (["load", "embedded", "--memory", "3K"], "multiple of 2 MiB"),
        (["load", "embedded", "--append", "é"], "ASCII"),
        (["load", "embedded", "--listen", "unix:/nonexistent/s"], "cannot listen on unix:/nonexistent/s"),
        (["load", "embedded", "--memory", "0"], "memory size 0 is not possible"),
        (["load", sys.executable], "a program for an operating system"),
        (["load", "embedded", "--trace", "/nonexistent/t.txt"], "/nonexistent/t.txt: no such file or directory"),
        (["load", "embedded", "--console", "/nonexistent/c"], "/nonexistent/c: no such file or directory"),
        (["load", "embedded", "--log", "int", "--log-file", "/"], "/: is a directory"),
        (["load", "embedded", "--probe-file", "/nonexistent"], "/nonexistent: no such file or directory"),
        (["load", "embedded", "--probe-file", "/bin/sh"], "/bin/sh: not a text file"),
        (["monitor", "unix:/nonexistent/s", "help"], "unix:/nonexistent/s: No such file or directory"),
        (["monitor", "-"], "one client"),
    ],
)
def test_what_cannot_be_had_is_status_2_and_one_line(capfd: pytest.CaptureFixture[str], words: list[str], reason: str):
    """The file or the address, and what is wrong with it."""
    if words[0] == "load" and "--listen" not in words:
        words = [*words, "--no-listen"]
    assert main(words) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert reason.lower() in said.lower()


@pytest.mark.parametrize("option", ["--listen", "--console"])
def test_a_port_in_use_is_named(capfd: pytest.CaptureFixture[str], option: str):
    """Not a traceback, not a silent other port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        more = [] if option == "--listen" else ["--no-listen"]
        assert main(["load", "embedded", option, place, *more]) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert place in said
    assert "in use" in said


@pytest.mark.parametrize("option", ["--summary", "--snapshot"])
def test_a_result_that_cannot_be_written_is_status_2(run: Run, option: str):
    """Found only at the end, but said all the same."""
    ended = run("embedded", "--until", "embedded: ready", option, "/proc/x")
    assert (ended.status, ended.err.splitlines()[-1]) == (2, "gdbstub: /proc/x: no such file or directory")


# ------------------------------------------------------------------------------------------------------------- script


def test_sends_are_typed_in_order(run: Run):
    """Each when its pattern comes, the next only after it."""
    ended = run(
        "embedded", "--send", "embedded: done=>one\\n", "--send", "echo: one=>t\\x77o\\n", "--until", "echo: two"
    )
    assert ended.status == 0
    assert ended.out.endswith("embedded: doneone\necho: one\ntwo\necho: two")  # the guest echoes what is typed


def test_console_to_a_file_leaves_standard_output_empty(run: Run, tmp_path: Path):
    """And the file has what would have been there."""
    shown = run("embedded", "--until", "embedded: done").out
    ended = run("embedded", "--until", "embedded: done", "--console", str(tmp_path / "console"))
    assert (ended.status, ended.out) == (0, "")
    assert (tmp_path / "console").read_bytes().replace(b"\r\n", b"\n").decode() == shown


def test_a_full_console_file_does_not_stop_the_guest(run: Run):
    """It is said once; the run goes on to its end, whose status is that of a file that cannot be had."""
    ended = run("embedded", "--until", "embedded: done", "--console", "/dev/full")
    assert ended.status == 2
    assert ended.err.count("No space left on device; nothing more is written to it") == 1


def summary_of(run: Run, path: Path, *arguments: str) -> dict[str, Any]:
    run("embedded", "--console", "none", "--summary", str(path), *arguments)
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary


def test_summary_has_exactly_the_fields_of_the_interface(run: Run, tmp_path: Path):
    """And they tell what happened."""
    summary = summary_of(run, tmp_path / "s.json", "--until", "embedded: done", "--probe", OPEN)
    assert list(summary) == ["stop", "exit", "instructions", "virtual_ns", "ram_sha256", "cpu", "probes"]
    assert (summary["stop"], summary["exit"], len(summary["ram_sha256"])) == ("ConsoleMatch", 0, 64)
    assert 0 < summary["instructions"] <= summary["virtual_ns"]
    assert {"rip", "rax", "r15", "eflags"} <= set(summary["cpu"])
    assert summary["probes"] == [
        {"name": "kprobes/open", "kind": "kprobe", "symbol": "do_open", "hits": 100, "missed": 0}
    ]


def test_summary_on_standard_output_is_all_there_is(run: Run):
    """Ready for a pipe into jq."""
    ended = run("embedded", "--until", "embedded: done", "--summary", "-")
    assert json.loads(ended.out)["exit"] == 0


def test_probes_and_logs_leave_the_run_as_it_is(run: Run, tmp_path: Path):
    """Same instructions, same memory, same registers with them as without."""
    bare = summary_of(run, tmp_path / "bare.json", "--until", "embedded: done")
    options = (
        "--probe",
        OPEN,
        "--trace",
        str(tmp_path / "t.txt"),
        "--log",
        "int,syscall,io",
        "--log-file",
        "/dev/null",
    )
    watched = summary_of(run, tmp_path / "watched.json", "--until", "embedded: done", *options)
    assert {**watched, "probes": []} == bare


def test_a_restored_run_equals_the_one_that_never_stopped(run: Run, tmp_path: Path):
    """Saved by --snapshot at one line, ended at another: instructions, memory and registers."""
    straight = summary_of(run, tmp_path / "straight.json", "--until", "embedded: done")
    snapshot = str(tmp_path / "ready.snap")
    assert run("embedded", "--until", "embedded: ready", "--snapshot", snapshot).status == 0
    words = ["--no-listen", "--console", "none", "--until", "embedded: done"]
    assert main(["load", "--restore", snapshot, *words, "--summary", str(tmp_path / "restored.json")]) == 0
    assert json.loads((tmp_path / "restored.json").read_text()) == straight


def test_a_send_meets_the_prompt_of_a_restored_machine(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """What stands on the last line is not printed again, so it counts as it is."""
    snapshot = str(tmp_path / "s")
    run("embedded", "--until", "embedded: don", "--snapshot", snapshot)
    words = ["load", "--restore", snapshot, "--no-listen", "--budget", "50M"]
    assert main([*words, "--send", "embedded: d=>hi\\n", "--until", "echo: hi"]) == 0
    assert "echo: hi" in capfd.readouterr().out


# ------------------------------------------------------------------------------------------------------------- probes


@BITS
def test_trace_as_text_on_standard_output(run: Run, image: str):
    """One ftrace line a hit, and no console in between."""
    ended = run(image, "--probe", OPEN, "--trace", "-", "--until", "embedded: done")
    lines = ended.out.splitlines()
    assert len(lines) == 100
    assert ": open: (do_open+0x0/" in lines[7]
    assert lines[7].endswith(') file="/file/007" flags=7')


def test_arm_says_how_probes_are_armed(run: Run):
    """By hook the hits are the same; by int3 alone, one whose page the guest has not mapped yet is refused."""
    words = ("embedded", "--probe", OPEN, "--trace", "-", "--until", "embedded: done")
    assert run(*words, "--arm", "hook").out == run(*words).out != ""
    refused = run(*words, "--arm", "int3")
    assert refused.status == 2
    assert "EFAULT" in refused.err


def test_trace_format_follows_the_suffix(run: Run, tmp_path: Path):
    """.txt has the lines of standard output; .jsonl an object each, numbers as numbers."""
    shown = run("embedded", "--probe", OPEN, "--trace", "-", "--until", "embedded: done").out
    for suffix in ("txt", "jsonl"):
        run("embedded", "--probe", OPEN, "--trace", str(tmp_path / f"t.{suffix}"), "--until", "embedded: done")
    assert (tmp_path / "t.txt").read_text() == shown
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [row["args"] for row in rows] == [{"file": f"/file/{n:03d}", "flags": n} for n in range(100)]


def test_probe_file_has_a_definition_a_line(run: Run, tmp_path: Path):
    """Beside comments, blank lines and --probe."""
    definitions = tmp_path / "defs"
    definitions.write_text(f"# opens\n{OPEN}\n\n  # and calls\np:calls do_calls\n")
    summary = summary_of(
        run,
        tmp_path / "s.json",
        *("--probe-file", str(definitions), "--probe", "p:faults do_faults", "--until", "embedded: done"),
    )
    assert [(row["name"], row["hits"]) for row in summary["probes"]] == [
        ("kprobes/faults", 1),
        ("kprobes/open", 100),
        ("kprobes/calls", 1),
    ]


def test_a_refused_definition_shows_reason_line_caret_and_suggestion(run: Run):
    """The column is that of the symbol."""
    ended = run("embedded", "--probe", "p:open  do_opne")
    assert ended.status == 2
    assert ended.err.splitlines() == [
        "gdbstub: --probe: Invalid probed address or symbol (EINVAL)",
        "  p:open do_opne",
        "         ^",
        "did you mean do_open, do_opens?",
    ]


def test_a_refused_line_of_a_probe_file_is_named(run: Run, tmp_path: Path):
    """By file and line number."""
    (tmp_path / "defs").write_text(f"{OPEN}\n\nx:y do_open\n")
    ended = run("embedded", "--probe-file", str(tmp_path / "defs"))
    assert ended.status == 2
    assert ended.err.startswith(f"gdbstub: {tmp_path}/defs:3: ")


# ---------------------------------------------------------------------------------------------------------------- log


@pytest.mark.parametrize(
    ("topic", "pattern"),
    [("int", "irq vector 0x20 at 0x"), ("syscall", "syscall "), ("io", "out 0x3f8 0x65")],
)
def test_log_has_its_topic_and_no_other(run: Run, topic: str, pattern: str):
    """A line each, with the instruction count, on standard error."""
    ended = run("embedded", "--until", "embedded: done", "--log", topic, "--console", "none")
    lines = ended.err.splitlines()[:-1]
    assert any(pattern in line for line in lines)
    assert {line.split()[1] for line in lines} == {f"{topic}:"}
    counts = [int(line.split()[0]) for line in lines]
    assert counts == sorted(counts)


def test_log_file_takes_the_log_off_standard_error(run: Run, tmp_path: Path):
    """Several topics in one file."""
    path = tmp_path / "log"
    ended = run("embedded", "--until", "embedded: done", "--log", "int,io", "--log-file", str(path))
    assert len(ended.err.splitlines()) == 1
    assert {line.split()[1] for line in path.read_text().splitlines()} == {"int:", "io:"}


# ------------------------------------------------------------------------------------------------------------- images


def test_a_flat_binary_runs_where_it_was_put(run: Run, tmp_path: Path):
    """--base and --bits; its exit port gives the status."""
    # call $+5; pop eax; cmp eax, 0x100005; sete al; add al, 4; mov dx, 0x501; out dx, al; hlt
    ended = run(*flat(tmp_path, "e800000000 58 3d05001000 0f94c0 0404 66ba0105 ee f4"), "--budget", "100")
    assert ended.status == 5, ended


def test_entry_overrides_the_start(run: Run, tmp_path: Path):
    """The second instruction first: the halt is skipped, the loop is not."""
    code = flat(tmp_path, "f4 ebfe")
    assert run(*code, "--budget", "1K").err.startswith("gdbstub: halted for good")
    assert run(*code, "--entry", "0x100001", "--budget", "1K").err.startswith("gdbstub: the budget")


@pytest.mark.parametrize("option", ["--snapshot", "--summary"])
def test_output_that_cannot_be_written_is_refused_before_the_run(
    option: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A long boot is not lost for a folder that is not there."""
    target = tmp_path / "missing" / "file"
    assert main(["load", "embedded", "--no-listen", "--console", "none", "--until", "done", option, str(target)]) == 2
    assert capfd.readouterr().err.strip() == f"gdbstub: {target}: there is no directory {target.parent}"
