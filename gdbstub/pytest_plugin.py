"""The pytest plugin: `machine`, `gdb` and `probes` for tests of a kernel, each test from the same snapshot.

Rules: loaded into every pytest run of the environment it is installed in, so importing it imports nothing of ours and
nothing heavy; that happens in the fixtures. A project's own fixtures of these names win.

Which machine a test gets is said by `@pytest.mark.gdbstub(...)`, or for all by `gdbstub_machine` in pytest's ini file:

    "amd64", "i386"          the fetched Debian kernel, booted to its shell once a run
    "embedded", "embedded32" our own small kernel, at its first instruction; append="..." is its command line
    a path                   a snapshot, as `gdbstub boot --snapshot FILE` makes it
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from emu.boot import GuestMachine
    from emu.snapshot import Snapshot
    from gdbstub.automation import GdbSession
    from probes.manager import Manager

DEFAULT_MACHINE: Final = "amd64"
_EMBEDDED: Final = {"embedded": 64, "embedded32": 32}
_PROMPT: Final = r"^/ # "  # of the fetched initramfs
_BOOT_BUDGET: Final = 3_000_000_000  # instructions; the longest boot takes a third
_SHOWN: Final = 8_000  # characters of the console with a failed test
_RECORDS: Final = 100  # ... and of the trace

_machine_key: Final = pytest.StashKey[Any]()
_probes_key: Final = pytest.StashKey[Any]()
_snapshots_key: Final = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "gdbstub_machine", "what `machine` is: amd64, i386, embedded, embedded32 or a snapshot", default=DEFAULT_MACHINE
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "gdbstub(machine, append=''): which machine the fixtures machine, gdb and probes are of"
    )


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> GuestMachine:
    """A machine of the test's own, standing still: an `emu.GuestMachine`."""
    marker = request.node.get_closest_marker("gdbstub")
    name = str(marker.args[0]) if marker is not None and marker.args else request.config.getini("gdbstub_machine")
    append = str(marker.kwargs.get("append", "")) if marker is not None else ""
    made = _make(request.config, name, append)
    request.node.stash[_machine_key] = made
    return made


@pytest.fixture
def probes(machine: GuestMachine, request: pytest.FixtureRequest) -> Manager:
    """The probes of that machine: a `probes.Manager`."""
    from probes.manager import Manager

    manager = Manager(machine)
    request.node.stash[_probes_key] = manager
    return manager


@pytest.fixture
def gdb(machine: GuestMachine, probes: Manager) -> Iterator[GdbSession]:
    """A gdb attached to that machine, which it holds: a `gdbstub.automation.GdbSession`.

    While gdb has the guest stopped, `machine` and `probes` may be used directly too.
    """
    from gdbstub.automation import gdb_session
    from gdbstub.serving import serve

    with serve(machine, probes=probes, waiting=True) as served, gdb_session(served.address) as session:
        yield session


def _make(config: pytest.Config, name: str, append: str) -> GuestMachine:
    from emu.boot import boot_embedded, restore

    if name in _EMBEDDED:
        return boot_embedded(_EMBEDDED[name], append)
    if append:
        raise pytest.UsageError(f"gdbstub: append is for the embedded machines, {name} has booted already")
    known: dict[str, Snapshot] = config.stash.setdefault(_snapshots_key, {})
    if name not in known:
        known[name] = _booted(name) if name in ("amd64", "i386") else _opened(config, name)
    return restore(known[name])


def _booted(name: str) -> Snapshot:
    """The kernel at its shell's prompt."""
    from emu.boot import boot
    from emu.stops import ConsoleMatch

    machine = boot(name)
    machine.console.expect(_PROMPT, lambda match: ConsoleMatch(match.string))
    stop = machine.run(_BOOT_BUDGET)
    if not isinstance(stop, ConsoleMatch):
        raise RuntimeError(f"{name} does not reach its prompt: {stop}")
    return machine.snapshot()


def _opened(config: pytest.Config, name: str) -> Snapshot:
    from emu.snapshot import Snapshot

    path = config.rootpath / Path(name)
    if not path.exists():
        raise pytest.UsageError(f"gdbstub: {name} is no machine: amd64, i386, embedded, embedded32 or a snapshot file")
    return Snapshot.open(path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and (machine := item.stash.get(_machine_key, None)) is not None:
        console = machine.console.text[-_SHOWN:]
        report.sections.append((f"guest console, {machine.instructions:,} instructions in", console))
        manager = item.stash.get(_probes_key, None)
        records = manager.trace.last(_RECORDS) if manager is not None else []
        if records:
            from probes import rawtext

            report.sections.append(("probe trace", rawtext.readable("\n".join(record.text() for record in records))))
    return report
