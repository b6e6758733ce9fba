"""What the tests with a real gdb run on: both gdbs, guests of both word sizes, Linux and embedded."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from emu.boot import GuestMachine, boot_embedded
from gdbstub.serving import Served, serve
from tests.support.kernels import another

PIP_GDB = str(Path(sys.executable).parent / "gdb")
SYSTEM_GDB = shutil.which("gdb", path="/usr/bin:/usr/local/bin")
LINUX = {64: "amd64", 32: "i386"}
"""Word size -> kernel."""


@pytest.fixture(params=["pip", "system"] if SYSTEM_GDB else ["pip"], scope="session")
def gdb(request: pytest.FixtureRequest) -> str:
    """Each gdb there is: the one that the test extra brings, and the system's."""
    chosen = PIP_GDB if request.param == "pip" else str(SYSTEM_GDB)
    assert os.access(chosen, os.X_OK), f"{chosen} is missing: pip install -e '.[test]'"
    return chosen


@pytest.fixture(scope="session")
def new_gdb() -> str:
    """The gdb of the test extra, where one is enough."""
    return PIP_GDB


@pytest.fixture(params=[64, 32], scope="session")
def bits(request: pytest.FixtureRequest) -> int:
    """Each word size."""
    size: int = request.param
    return size


@pytest.fixture
def linux_machine(bits: int) -> GuestMachine:
    """Linux of that word size, its shell waiting for a command."""
    return another(LINUX[bits])


@pytest.fixture
def linux(linux_machine: GuestMachine) -> Iterator[Served]:
    """The same, served and running."""
    with serve(linux_machine) as served:
        yield served


@pytest.fixture
def embedded(bits: int) -> Iterator[Callable[..., Served]]:
    """A call that starts the embedded guest with a command line and serves it."""
    with ExitStack() as stack:
        yield lambda append, *, waiting=False: stack.enter_context(serve(boot_embedded(bits, append), waiting=waiting))
