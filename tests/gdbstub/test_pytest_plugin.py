"""The pytest plugin, as a project that has installed gdbstub uses it: pytest runs of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = """
import pytest

@pytest.mark.gdbstub("embedded", append="calls=3 loop")
def test_gdb_and_probes(gdb, machine, probes):
    probes.add("kprobe", "p:seen target")
    gdb.break_at("fib")
    gdb.resume()
    stop = gdb.wait_stop(timeout=30)
    assert (stop.reason, stop.function) == ("breakpoint-hit", "fib")
    assert machine.registers.read("rip") == stop.pc
    assert [frame.function for frame in gdb.backtrace(2)] == ["fib", "exercise"]
    assert len(probes.trace) == 1
    assert "seen" in gdb.monitor("trace")

@pytest.mark.gdbstub("embedded32")
def test_another_word_size(machine):
    assert machine.bits == 32 and machine.instructions == 0

def test_from_a_snapshot(machine):
    assert machine.instructions == 1000
    machine.run(5)

def test_from_the_same_snapshot_again(machine):
    assert machine.instructions == 1000

@pytest.mark.gdbstub("embedded", append="calls=3 loop")
def test_that_fails(machine, probes):
    probes.add("kprobe", "p:seen target")
    machine.run(1_000_000)
    assert machine.bits == 16

@pytest.mark.gdbstub("nonsense")
def test_of_no_machine(machine):
    pass
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "gdbstub.pytest_plugin", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest says of PROJECT."""
    from emu import boot_embedded

    folder = tmp_path_factory.mktemp("project")
    machine = boot_embedded(64)
    machine.run(1000)
    machine.save(folder / "small.snap")
    (folder / "pytest.ini").write_text("[pytest]\ngdbstub_machine = small.snap\n")
    (folder / "test_kernel.py").write_text(PROJECT)
    return run(folder, "-rA").stdout


def test_fixtures_are_of_the_machine_that_was_asked_for(said: str):
    """By marker and by ini file; each test has one of its own."""
    for name in (
        "test_gdb_and_probes",
        "test_another_word_size",
        "test_from_a_snapshot",
        "test_from_the_same_snapshot_again",
    ):
        assert f"PASSED test_kernel.py::{name}" in said, said


def test_a_failed_test_shows_console_and_trace(said: str):
    """And only a failed one."""
    assert said.count("guest console, ") == 1
    assert "instructions in" in said
    assert "embedded: ready" in said
    assert said.count(": seen: (target+0x0/") == 9, said


def test_an_unknown_machine_is_an_error_in_one_line(said: str):
    """With what there is."""
    assert "nonsense is no machine: amd64, i386, embedded, embedded32 or a snapshot file" in said


def test_unrelated_runs_import_nothing_of_ours(tmp_path: Path):
    """The plugin is loaded wherever it is installed: no engine, no event loop, no gdb; the user's own fixtures win."""
    (tmp_path / "test_other.py").write_text(
        "import sys, pytest\n"
        "@pytest.fixture\n"
        "def machine(): return 5\n"
        "def test_it(machine):\n"
        "    assert machine == 5\n"
        "    loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "    assert not loaded & {'emu', 'probes', 'unicorn', 'capstone', 'trio', 'pygdbmi'}\n"
        "    ours = {name for name in sys.modules if name.startswith('gdbstub')}\n"
        "    assert ours == {'gdbstub', 'gdbstub.pytest_plugin'}\n"
    )
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout
