"""`gdbstub boot` with stock kernels: the guest's shell, added files, early probes, snapshots from disk, pacing."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from emu.boot import restore
from gdbstub.cli import main
from tests.support.images import fetch_real_kernel
from tests.support.kernels import KERNELS, another
from tests.support.process import gdbstub
from tests.support.programs import LIBC, LIBC32, build, libraries

pytestmark = pytest.mark.boots

HITS_OF_DYNAMIC = {"text": 2, "work": 42, "took": 2, "main": 1, "sh": 0}
OPEN = "p:open do_sys_openat2 file=+0($arg2):string"


@pytest.fixture(scope="session")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with NAME.snap of each kernel at its prompt."""
    folder = tmp_path_factory.mktemp("snapshots")
    for name in ("amd64", "i386"):
        another(name).save(folder / f"{name}.snap")
    return folder


def run(*words: str) -> int:
    """`gdbstub boot WORDS`, unattended, at most 3 G instructions."""
    return main(["boot", "--no-listen", "--budget", "3G", *words])


BOTH = pytest.mark.parametrize("name", ["amd64", "i386"])


@BOTH
def test_exec_gives_its_status_and_its_output(snapshots: Path, name: str, capfd: pytest.CaptureFixture[str]):
    """In the shell of a restored machine."""
    snapshot = str(snapshots / f"{name}.snap")
    assert run("--restore", snapshot, "--exec", "echo in the guest: $((6 * 7)); exit 5") == 5
    captured = capfd.readouterr()
    assert "in the guest: 42" in captured.out
    assert captured.err.splitlines()[-1] == "gdbstub: the guest ended with status 5"
    assert run("--restore", snapshot, "--exec", "true") == 0


@BOTH
def test_hits_are_what_the_guest_did(snapshots: Path, name: str, tmp_path: Path):
    """A file opened thirty times is thirty lines of the trace, and thirty hits in the summary among the shell's."""
    work = "i=0; while [ $i -lt 30 ]; do cat /proc/version >/dev/null; i=$((i+1)); done"
    probing = ("--probe", OPEN, "--trace", str(tmp_path / "t.jsonl"), "--summary", str(tmp_path / "s.json"))
    assert run("--restore", str(snapshots / f"{name}.snap"), "--console", "none", *probing, "--exec", work) == 0
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert sum(row["args"]["file"] == "/proc/version" for row in rows) == 30
    (probe,) = json.loads((tmp_path / "s.json").read_text())["probes"]
    assert (probe["hits"], probe["missed"]) == (len(rows), 0)


def test_a_crash_of_the_guest_is_status_3(snapshots: Path, capfd: pytest.CaptureFixture[str]):
    """Stopped at its panic, with the message."""
    assert run("--restore", str(snapshots / "amd64.snap"), "--exec", "echo c >/proc/sysrq-trigger") == 3
    assert "the guest panicked at 0x" in capfd.readouterr().err


def test_power_off_by_the_guest_is_status_0(snapshots: Path, capfd: pytest.CaptureFixture[str]):
    """Also where a goal was awaited that did not come."""
    script = ("--send", "# =>poweroff -f\\n", "--until", "never")
    assert run("--restore", str(snapshots / "i386.snap"), *script) == 0
    assert capfd.readouterr().err.splitlines()[-1] == "gdbstub: the guest powered off"


@BOTH
def test_added_programs_run_under_probes_set_before_they_start(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """--add and --exec on a kernel that starts: a folder with a program and its libraries, a file, the status."""
    bits = 64 if name == "amd64" else 32
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a file").write_text("from the host\n")
    program = build("dynamic.c", "-pthread", f"-m{bits}")
    for path, data in {"/bin/dynamic": program, **libraries(program)}.items():
        place = tmp_path / "folder" / path[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        place.chmod(0o755)
    (tmp_path / "script").write_text("#!/bin/sh\necho script: $1\nexit 9\n")
    (tmp_path / "script").chmod(0o755)
    libc, text = (LIBC, "+0(%di)") if bits == 64 else (LIBC32, "+0(+4(%sp))")
    probes = (f"p:text {libc}:puts text={text}:string", "r:work /bin/dynamic:work $retval", f"p:took {libc}:malloc")
    probes = (*probes, f"p:main {libc}:__libc_start_main", "p:sh /bin/busybox:0x40")
    given = [word for probe in probes for word in ("--probe", probe)]
    given += ["--summary", str(tmp_path / "s.json"), "--trace", str(tmp_path / "t.jsonl")]
    given += [word for top in (tmp_path / "folder").iterdir() for word in ("--add", f"{top}:/{top.name}")]
    given += ["--add", f"{tmp_path}/script"]
    status = run(name, *given, "--exec", "cat '/a file'; /script ran; dynamic; exit 9")
    captured = capfd.readouterr()
    assert "from the host" in captured.out
    assert "script: ran" in captured.out
    assert status == 9
    counts = {probe["name"]: probe["hits"] for probe in json.loads((tmp_path / "s.json").read_text())["probes"]}
    assert {name.partition("/")[2]: hits for name, hits in counts.items()} == HITS_OF_DYNAMIC
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    said = [row["args"]["text"] for row in rows if "text" in row["args"]]
    assert said == ["hello from a dynamic program", "child"]


@pytest.mark.parametrize(("name", "early", "hit"), [("amd64", "--early", 1), ("i386", "--early", 1), ("amd64", "", 0)])
def test_early_probes_see_the_first_instructions_of_a_kernel(name: str, early: str, hit: int, tmp_path: Path):
    """Its first message is printed through the probed function; without --early nothing is armed yet."""
    files = fetch_real_kernel(KERNELS[name]).fetched
    probing = ("--probe", "p:early vprintk", *early.split(), "--summary", str(tmp_path / "s.json"))
    kernel = (str(files.kernel), "--initrd", str(files.initramfs), "--console", "none")
    assert run(*kernel, *probing, "--until", "Linux version") == 0
    (probe,) = json.loads((tmp_path / "s.json").read_text())["probes"]
    assert min(probe["hits"], 1) == hit


@BOTH
def test_a_booted_guest_comes_from_disk_as_it_was(snapshots: Path, name: str):
    """Registers and memory of the machine that was saved."""
    saved, restored = another(name), restore(snapshots / f"{name}.snap")
    assert restored.ram_sha256() == saved.ram_sha256()
    names = saved.registers.arch.names
    assert restored.registers.read_many(names) == saved.registers.read_many(names)


def test_time_that_a_command_sleeps_is_skipped_or_slept(snapshots: Path):
    """A minute of the guest's takes less without --pace real; two seconds take two with it."""
    words = ("--restore", str(snapshots / "amd64.snap"), "--console", "none", "--exec")
    began = time.monotonic()
    assert run(*words, "sleep 60") == 0
    assert time.monotonic() - began < 60
    began = time.monotonic()
    assert run(*words, "sleep 2", "--pace", "real") == 0
    assert time.monotonic() - began >= 2


def test_a_shell_waits_without_processor_time_and_ends_at_a_signal(snapshots: Path):
    """A restored machine with a shell on a pipe: answers, idles, ends."""
    with gdbstub("boot", "--restore", str(snapshots / "i386.snap"), "--no-listen") as child:
        child.wait_for("instructions in", on="err")
        child.type(b"echo $((1000 + 1))\n")
        child.wait_for("1001\n/ # ")
        before = child.cpu_seconds()
        child.rest(1.0)
        assert child.cpu_seconds() - before < 0.2
        assert child.ended(signal.SIGTERM) == 0


def test_a_restored_guest_has_the_command_before_it_goes_on(snapshots: Path, tmp_path: Path):
    """At the snapshot's instruction, whatever the host is doing then: so the run is the same every time."""
    record = tmp_path / "run.jsonl"
    goal = ("--exec", "sleep 1", "--log-rsp", str(record))
    assert run("--restore", str(snapshots / "amd64.snap"), "--console", "none", *goal) == 0
    start, *events = [json.loads(line) for line in record.read_text().splitlines()]
    (typed,) = [event for event in events if event["what"] == "input"]
    assert typed["at"] == start["instructions"]
