"""`monitor script`, `monitor object load` and guest handlers by name: what a debugger may bring, and from where."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emu.boot import GuestMachine, boot_embedded
from emu.iface import MachineError
from gdbstub.monitor import Monitor
from gdbstub.monitorservices import Services
from gdbstub.options import parse
from gdbstub.scripts import HostScripts, ScriptFolder
from probes.manager import Manager
from tests.support.compile import compile_sample

BOOTED, ROUNDS = 30_000, 300_000


class Bench:
    """An embedded guest amid its exercises, with a monitor whose scripts come from `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machine: GuestMachine = boot_embedded(64, append="calls=1000 idle")
        self.machine.run(BOOTED)
        self.probes = Manager(self.machine)
        scripts = HostScripts(ScriptFolder(folder), self.machine, self.probes)
        self.monitor = Monitor(Services(machine=self.machine, probes=self.probes, scripts=scripts))

    def script(self, text: str) -> tuple[tuple[str, ...], bool]:
        """(lines, whether it was refused) of `monitor script`."""
        (self.folder / "a script.py").write_text(text)
        answer = self.monitor.execute("script a script.py")
        return answer.lines, answer.refused


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    folder = tmp_path / "allowed"
    folder.mkdir()
    return Bench(folder)


def test_a_script_has_the_machine_and_the_probes(bench: Bench) -> None:
    """It registers a probe that outlives it, and what it prints is the answer."""
    lines, refused = bench.script(
        "from probes import Kprobe\n"
        "probes.register(Kprobe(symbol='target', pre_handler=lambda p, r: r.call('recursed_target', 3) and None))\n"
        "probes.add('kprobe', 'p:mine target')\n"
        "print('armed at', machine.instructions)\n"
    )
    assert (lines, refused) == ((f"armed at {bench.machine.instructions}",), False)
    bench.machine.run(ROUNDS)
    assert bench.probes.status()[0].hits > 100


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("print('one')\n1 / 0\n", ("one", "a script.py:2: ZeroDivisionError: division by zero")),
        ("def f(:\n", ("a script.py:1: invalid syntax",)),
        ("a = '\0'\n", ("a script.py: source code string cannot contain null bytes",)),
        (
            "probes.add('kprobe', 'p:x nothing_like_it')",
            ("a script.py:1: ProbeError: Invalid probed address or symbol", "  p:x nothing_like_it", "      ^"),
        ),
        ("raise SystemExit('enough')", ("a script.py: enough",)),
    ],
)
def test_a_scripts_error_becomes_text(bench: Bench, text: str, told: tuple[str, ...]) -> None:
    """With the line it came from, after what was printed before; the server goes on."""
    assert bench.script(text) == (told, True)


def test_a_script_may_end_itself(bench: Bench) -> None:
    """`raise SystemExit` and sys.exit() end it without an error, and nothing else."""
    assert bench.script("print(1)\nraise SystemExit\n") == (("1",), False)


def test_endless_output_is_cut(bench: Bench) -> None:
    """A reply has an end; so does the memory it takes."""
    lines, refused = bench.script("for i in range(100_000): print('x' * 100)")
    assert not refused
    assert lines[-1] == "... cut"
    assert sum(map(len, lines)) < 70_000


@pytest.mark.parametrize(
    "name", ["../outside.py", "inside/../../outside.py", "/etc/passwd", ".", "..", "link.py", "up/outside.py"]
)
def test_nothing_outside_the_folder_is_read(bench: Bench, tmp_path: Path, name: str) -> None:
    """Neither by dots nor by an absolute path nor through a link, of a file or of a folder."""
    (tmp_path / "outside.py").write_text("print('out')")
    (bench.folder / "inside").mkdir()
    (bench.folder / "link.py").symlink_to(tmp_path / "outside.py")
    (bench.folder / "up").symlink_to(tmp_path)
    for verb in ("script", "object load"):
        answer = bench.monitor.execute(f"{verb} {name}")
        assert answer.refused
        assert answer.lines == (f"{name} is outside the folder of --allow-scripts",)


def test_a_link_inside_the_folder_is_followed(bench: Bench) -> None:
    """Its target is allowed too."""
    (bench.folder / "real.py").write_text("print('in')")
    (bench.folder / "link.py").symlink_to("real.py")
    assert bench.monitor.execute("script link.py").lines == ("in",)


def test_a_link_put_in_the_way_is_refused(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the path and its opening somebody swaps the file for a link out."""
    (tmp_path / "outside.py").write_text("print('out')")
    (bench.folder / "script.py").symlink_to(tmp_path / "outside.py")
    monkeypatch.setattr(os.path, "realpath", lambda path: str(path))
    answer = bench.monitor.execute("script script.py")
    assert answer.refused
    assert answer.lines == ("script.py: is a link",)


@pytest.mark.parametrize("kind", ["missing", "pipe", "folder", "huge"])
def test_what_is_no_readable_file_is_refused(bench: Bench, kind: str) -> None:
    """In one line, at once: a pipe without a writer does not hold the machine."""
    path = bench.folder / "thing"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        path.touch()
        os.truncate(path, 2 << 20)
    answer = bench.monitor.execute("script thing")
    assert answer.refused
    assert len(answer.lines) == 1
    assert answer.lines[0].startswith("thing: ")


def test_without_a_folder_there_are_no_scripts(bench: Bench) -> None:
    """And a folder that is not there is an error at the start."""
    monitor = Monitor(Services(machine=bench.machine, probes=bench.probes))
    for line in ("script x.py", "object load x.o"):
        assert monitor.execute(line).lines == ("the server was started without --allow-scripts DIR",)
    with pytest.raises(MachineError, match="no such folder"):
        ScriptFolder(bench.folder / "none")


def test_an_object_is_loaded_and_its_handlers_used_by_name(bench: Bench) -> None:
    """`object load`, then `kprobe add --pre --post` and `jprobe add --entry`."""
    for sample in ("kprobe_example", "jprobe_example"):
        (bench.folder / f"{sample}.o").write_bytes(compile_sample(sample, 64))
    execute = bench.monitor.execute
    (loaded,) = execute("object load kprobe_example.o").lines
    assert loaded.startswith("kprobe_example.o: after, before, handler_")
    assert not execute("object load jprobe_example.o").refused
    assert not execute("kprobe add --pre handler_pre --post handler_post p:one target").refused
    assert not execute("jprobe add --entry jsum8 p:two sum8").refused
    bench.machine.run(ROUNDS)
    one, two = bench.probes.status()
    assert one.hits > 100
    assert two.hits > 100
    assert two.kind == "jprobe"
    assert not any("disabled" in line for line in execute("jprobe info two").lines[3:])


def test_a_broken_object_is_refused_in_one_line(bench: Bench) -> None:
    """With its name and the offset."""
    (bench.folder / "bad.o").write_bytes(b"\x7fELF and nothing")
    answer = bench.monitor.execute("object load bad.o")
    assert answer.refused
    assert answer.lines == ("bad.o: not a 64-bit little-endian object, at offset 0x4 (ENOEXEC)",)


def test_an_object_needs_its_folder_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """--object without --allow-scripts is a usage error that says what to add."""
    with pytest.raises(SystemExit) as end:
        parse(["load", "embedded", "--object", "x.o"])
    assert end.value.code == 2
    assert "--allow-scripts DIR" in capsys.readouterr().err
