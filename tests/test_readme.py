"""README says what the program does, and its examples of Python do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import emu
from emu.boot import GuestMachine
from tests.support.kernels import another
from tests.support.readme import README, rewritten

_PYTHON = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
SCRIPTS = [code for code in _PYTHON if "def test_" not in code]
TESTS = [code for code in _PYTHON if "def test_" in code]


def test_generated_blocks_are_what_the_program_prints() -> None:
    """The reference in README cannot drift from --help and `monitor help`."""
    text = README.read_text()
    assert "<!-- made by: gdbstub boot --help -->" in text
    assert rewritten(text) == text, "run `python -m tests.support.readme`"


@pytest.mark.parametrize("code", SCRIPTS, ids=lambda code: code.splitlines()[0])
def test_scripts_run_as_written(code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """But for the boot: the machine is the suite's at its prompt, it types, and its run is cut short."""

    def boot(name: str) -> GuestMachine:
        machine = another(name)
        machine.devices.uart.receive(b"cat /proc/version\n")
        machine.budget_end = machine.instructions + 3_000_000
        run = machine.run
        monkeypatch.setattr(machine, "run", lambda budget: run(), raising=True)
        return machine

    monkeypatch.setattr(emu, "boot", boot)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.count("\n") > 1


@pytest.mark.parametrize("code", TESTS, ids=lambda code: re.findall(r"def (test_\w+)", code)[0])
def test_tests_pass_as_written(code: str, tmp_path: Path) -> None:
    """By a pytest of its own with the plugin."""
    (tmp_path / "test_readme_example.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gdbstub.pytest_plugin"]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout


def test_there_are_examples_of_both() -> None:
    assert SCRIPTS
    assert TESTS
