"""Uprobes on programs of stock Linux guests, with every process that maps them."""

from __future__ import annotations

import functools

import pytest

from emu.boot import GuestMachine
from probes import Manager, Regs, Uprobe
from probes.programs import ProgramFile
from tests.support.kernels import another, run_shell

BUSYBOX = "/bin/busybox"
WORK = "md5sum /bin/busybox; ls / | wc -l; (cat /proc/self/maps; cat /proc/self/smaps) >/dev/null; dmesg | tail -3"


@pytest.fixture(params=["amd64", "6.12"])
def kernel(request: pytest.FixtureRequest) -> str:
    """Those whose types are known."""
    return str(request.param)


def entry_of(file: ProgramFile) -> int:
    """The file offset of an ELF64 program's first instruction."""
    head = file.read(0, 64)
    entry, table, count = (int.from_bytes(head[at : at + size], "little") for at, size in ((24, 8), (32, 8), (56, 2)))
    for index in range(count):
        header = file.read(table + 56 * index, 56)
        kind, offset, vaddr, size = (
            int.from_bytes(header[at : at + n], "little") for at, n in ((0, 4), (8, 8), (16, 8), (32, 8))
        )
        if kind == 1 and vaddr <= entry < vaddr + size:
            return offset + entry - vaddr
    raise AssertionError("no segment has the entry")


def probed(machine: GuestMachine, *more: int) -> tuple[Manager, list[Uprobe], list[str]]:
    """Probes on busybox's entry and at `more` bytes behind it, and the names of those who hit the first."""
    manager = Manager(machine)
    file = manager.uprobes.open(BUSYBOX)
    assert file is not None
    names: list[str] = []

    def who(up: Uprobe, regs: Regs) -> None:
        names.append(manager.linux.current().comm.string_().decode())

    probes = [Uprobe(BUSYBOX, entry_of(file) + offset, who if not offset else None) for offset in (0, *more)]
    for probe in probes:
        manager.register(probe)
    return manager, probes, names


@functools.cache
def bare(name: str) -> tuple[str, int, str]:
    """What WORK prints, the instructions at its end and the hash of RAM, without probes."""
    machine = another(name)
    return run_shell(machine, WORK), machine.clock.instructions, machine.ram_sha256()


def test_guest_sees_nothing(kernel: str) -> None:
    """Checksum of the probed file, its mappings, the log, the time and every byte of RAM: as in the bare run."""
    machine = another(kernel)
    _, probes, _ = probed(machine, 2, 5)
    assert (run_shell(machine, WORK), machine.clock.instructions, machine.ram_sha256()) == bare(kernel)
    assert all(probe.hits >= 3 for probe in probes)


def test_every_process_present_and_future(kernel: str) -> None:
    """One hit for each exec of the file, none for others; nothing is left of processes that have gone."""
    machine = another(kernel)
    manager, (probe,), names = probed(machine)
    here = manager.uprobes.addresses(probe)
    assert len(here) == 2  # init's shell and its parent, or login
    run_shell(machine, "busybox true; busybox true; (exec busybox true); /bin/busybox sh -c 'exec busybox true'; echo")
    assert (probe.hits, len(names)) == (5, 5)
    assert manager.uprobes.addresses(probe) == here
    run_shell(machine, "cp /bin/busybox /tmp/other; /tmp/other true; ln -s /tmp/other /tmp/link; /tmp/link true")
    assert probe.hits == 5  # cp runs inside the shell
    manager.unregister(probe)
    assert machine.breaks.client is None
    assert run_shell(machine, "busybox echo still here") == "still here"
    assert probe.hits == 5


def test_file_that_does_not_exist_yet(kernel: str) -> None:
    """Registered by path first; then a program of that name comes, goes, and another takes its place."""
    machine = another(kernel)
    manager = Manager(machine)
    file = manager.uprobes.open(BUSYBOX)
    assert file is not None
    probe = Uprobe("/tmp/later/program", entry_of(file))
    manager.register(probe)
    assert probe.notes
    run_shell(machine, "busybox true; mkdir /tmp/later; cp /bin/busybox /tmp/later/program; /tmp/later/program true")
    assert (probe.hits, probe.notes) == (1, ())
    run_shell(machine, "rm /tmp/later/program; cp /bin/busybox /tmp/later/program; /tmp/later/program true")
    run_shell(machine, "ln -s later /tmp/aside; /tmp/aside/program true; busybox true")
    assert probe.hits == 3
