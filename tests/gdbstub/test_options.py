"""The command line as values: what each option means, what is refused, and that --help teaches."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from gdbstub.address import Stdio, Tcp, Unix
from gdbstub.commands import Boot, Demo, Fetch, Load, MonitorCommand, TraceTarget
from gdbstub.options import parse, parser

COMMANDS = ("boot", "load", "demo", "fetch", "monitor")
COMMON = """--listen --no-listen --wait --observe --pace --probe --probe-file --early --linux-limits --trace --console
    --send --until --budget --snapshot --restore --summary --log --log-file"""


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_status:
        parse([command, "--help"])
    assert exit_status.value.code == 0
    return capsys.readouterr().out


def refusal(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a usage error is, after its status was found to be 2."""
    with pytest.raises(SystemExit) as exit_status:
        parse(shlex.split(line))
    captured = capsys.readouterr()
    assert (exit_status.value.code, captured.out) == (2, "")
    (said,) = captured.err.splitlines()
    return said


@pytest.mark.parametrize(
    ("command", "more"),
    [("boot", "--initrd --append --memory --exec --add"), ("load", "--base --entry --bits --memory")],
)
def test_every_option_of_the_interface_is_offered(command: str, more: str, capsys: pytest.CaptureFixture[str]):
    """Spelled as in the interface, on both commands that run a machine."""
    text = help_of(command, capsys)
    assert [option for option in f"{COMMON} {more}".split() if option not in text] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_that_work(command: str, capsys: pytest.CaptureFixture[str]):
    """Each example is a command line that this parser takes for that command."""
    lines = [line.strip() for line in help_of(command, capsys).splitlines() if line.startswith("  gdbstub ")]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[1] == command
        parse(words[1:])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_the_commands_own_exit_status(command: str, capsys: pytest.CaptureFixture[str]):
    """No guest crashes where none is run."""
    with pytest.raises(SystemExit):
        parse([command, "--help"])
    text = capsys.readouterr().out.partition("exit status:\n")[2]
    assert "  2  usage" in text
    assert ("the guest crashed" in text) == (command in ("boot", "load"))


def test_defaults_are_those_of_the_interface():
    """A bare `gdbstub boot`: the amd64 kernel, on this terminal, debuggers on the loopback's 1234."""
    boot = parse(["boot"])
    assert isinstance(boot, Boot)
    assert (boot.kernel, boot.run.listen, boot.run.console) == ("amd64", Tcp("127.0.0.1", 1234), "stdio")
    assert not boot.run.has_goal


def test_the_other_commands_become_values():
    """With their own defaults."""
    assert parse(["demo"]) == Demo()
    assert parse(["fetch", "i386", "--print"]) == Fetch("i386", None, True)
    assert parse(["monitor", "unix:/tmp/s"]) == MonitorCommand(Unix("/tmp/s"), "help")
    words = ["monitor", ":1", "kprobe", "add", "--arm", "hook", "p:x y a=+0($arg1):string"]
    assert parse(words) == MonitorCommand(Tcp("127.0.0.1", 1), "kprobe add --arm hook p:x y a=+0($arg1):string")


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["--console", "stdio"], "stdio"),
        (["--console", "none"], "none"),
        (["--console", "[::1]:7"], Tcp("::1", 7)),
        (["--console", "log"], Path("log")),
        (["--console", "./a:7"], Path("./a:7")),
        (["--trace", "-"], "none"),
        (["--summary", "-"], "none"),
        (["--listen", "-"], "none"),
        (["--trace", "t.txt"], "stdio"),
    ],
)
def test_where_the_console_goes(words: list[str], place: object):
    """As said; unsaid it leaves standard output to whatever else was sent there."""
    load = parse(["load", "x", *words])
    assert isinstance(load, Load)
    assert load.run.console == place


@pytest.mark.parametrize(
    ("option", "text", "field", "value"),
    [
        ("--send", "log.n: =>root\\n", "sends", (("log.n: ", b"root\n"),)),
        ("--send", "a=>b=>c", "sends", (("a", b"b=>c"),)),
        ("--send", "x=>\\x03\\xff\\\\\\t\\q", "sends", (("x", b"\x03\xff\\\t\\q"),)),
        ("--send", "x=>é", "sends", (("x", "é".encode()),)),
        ("--until", "é", "until", "Ã©"),
        ("--budget", "2G", "budget", 2_000_000_000),
        ("--budget", "1_000k", "budget", 1_000_000),
        ("--trace", "a.jsonl", "trace", TraceTarget(Path("a.jsonl"), "jsonl")),
        ("--trace", "-", "trace", TraceTarget(None, "txt")),
        ("--log", "rsp,int", "log", frozenset({"rsp", "int"})),
        ("--listen", "-", "listen", Stdio()),
        ("--listen", "unix:s", "listen", Unix("s")),
        ("--observe", "[::1]:7", "observe", Tcp("::1", 7)),
    ],
)
def test_values_of_common_options(option: str, text: str, field: str, value: object):
    """The console is Latin-1, so patterns become it; what is typed stays the bytes that were given."""
    load = parse(["load", "x", option, text])
    assert isinstance(load, Load)
    assert getattr(load.run, field) == value


def test_values_of_image_options(tmp_path: Path):
    """Sizes in binary units, addresses as in C, added files under their own name or the one given."""
    load = parse(["load", "x", "--base", "0x7c00", "--entry", "31744", "--bits", "16", "--memory", "2M"])
    assert isinstance(load, Load)
    assert (load.base, load.entry, load.bits, load.memory) == (0x7C00, 0x7C00, 16, 2 << 20)
    boot = parse(["boot", "--memory", "1g", "--add", str(tmp_path), "--add", f"{tmp_path}:/data"])
    assert isinstance(boot, Boot)
    assert (boot.memory, boot.add) == (1 << 30, ((tmp_path, f"/{tmp_path.name}"), (tmp_path, "/data")))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "COMMAND"),
        ("bot", "'bot' is not known here: did you mean boot?"),
        ("load", "which IMAGE?"),
        ("boot --unitl x", "did you mean --until?"),
        ("boot --unti x", "did you mean --until?"),
        ("boot a b", "'b' is not known here"),
        ("boot linux-image-6.1*", "`gdbstub fetch --package 'linux-image-6.1*' --print`"),
        ("symbols linux-image-6.1*", "Add a GLOB, '*' for all"),
        ("symbols ./vmlinuz", "Add a GLOB, '*' for all"),
        ("boot --pace fast", "'fast' is not known here: real, none"),
        ("boot --until (", "no regular expression"),
        ("boot --send ls", "write 'REGEX=>TEXT'"),
        ("boot --send (=>ls", "no regular expression"),
        ("boot --budget 0", "write 500M or 2G"),
        ("boot --budget -5", "argument --budget"),
        ("boot --budget many", "write 500M or 2G"),
        ("boot --memory lots", "write 256M or 1G"),
        ("load x --base -1", "argument --base"),
        ("load x --base 0x1ffffffffffffffff", "write 0x100000"),
        ("load x --bits 8", "argument --bits: 8 is not known here"),
        ("boot --add /nonexistent", "'/nonexistent' does not exist"),
        ("boot --trace hits", "write .txt, .jsonl, .pftrace, .parquet"),
        ("boot --log all", "int, syscall, io, rsp"),
        ("boot --listen nowhere", "HOST:PORT, unix:PATH or -"),
        ("boot --console -", "write stdio, none, HOST:PORT or a file"),
        ("boot --console unix:x", "write stdio, none, HOST:PORT or a file"),
        ("monitor", "HOST:PORT"),
        ("fetch arm64", "'arm64' is not known here: did you mean amd64?"),
        ("boot --console stdio --trace -", "--console stdio and --trace - both write standard output"),
        ("boot --listen - --trace -", "--trace - and --listen - both write standard output"),
        ("boot --listen - --console stdio", "--console stdio and --listen - both"),
        ("boot --summary - --trace -", "--trace - and --summary - both"),
        ("boot --no-listen --wait", "leave one out"),
        ("boot --observe -", "'-' is not HOST:PORT or unix:PATH"),
        ("boot --no-listen --listen :1", "leave one out"),
        ("boot --early", "add --probe or --probe-file"),
        ("boot --log-file x", "add --log"),
        ("boot --snapshot x", "add --until"),
        ("boot i386 --restore x", "leave KERNEL out"),
        ("boot --append quiet --restore x", "leave --append out"),
        ("boot --add /etc/passwd --restore x", "leave --add out"),
        ("load a --restore x", "leave IMAGE out"),
        ("boot --console x --log int --log-file x", "--console and --log-file both write x"),
        ("boot --trace x.txt --summary x.txt", "--trace and --summary both write x.txt"),
    ],
)
def test_what_makes_no_sense_is_refused(line: str, reason: str, capsys: pytest.CaptureFixture[str]):
    """Status 2 and one line, which says what to write instead."""
    assert reason in refusal(line, capsys)


def test_one_device_takes_several_writers():
    """/dev/null is where things go to be forgotten together."""
    load = parse(["load", "x", "--console", "/dev/null", "--log", "int", "--log-file", "/dev/null"])
    assert isinstance(load, Load)
    assert load.run.console == load.run.log_file


def test_top_level_help_names_every_command():
    """With a line for each."""
    assert all(f"\n    {command} " in parser().format_help() for command in COMMANDS)
