"""The guest's operating system as text is what the guest prints of itself, line by line."""

from __future__ import annotations

import re

import pytest

from emu.boot import GuestMachine
from probes.linux import Linux, NotAvailable, linux_of, report
from tests.support.kernels import another, run_shell


@pytest.fixture
def system(linux: GuestMachine) -> Linux:
    return linux_of(linux)


def test_ps_is_the_guests_ps(linux: GuestMachine, system: Linux) -> None:
    """Numbers, parents, states and command lines; /proc adds to a worker's name what it works on, and itself to ps."""
    mine = report.processes(system)
    theirs = [
        re.sub(r"(\[kworker/[\du][^-]*)-.*\]", r"\1]", line) for line in _shown(linux, "ps -o pid,ppid,stat,args")
    ]
    # The shell runs while we look, and waits while its child looks; a worker may have begun or ended to work.
    assert [re.sub(" [RSID]([<NW ]*) ", r" \1 ", line) for line in mine] == [
        re.sub(" [RSID]([<NW ]*) ", r" \1 ", line) for line in theirs[: len(mine)]
    ]
    assert len(theirs) == len(mine) + 1


def test_maps_and_files_are_those_of_proc(linux: GuestMachine, system: Linux) -> None:
    """/proc/PID/maps to the column, and where each descriptor leads: files, pipes, a file without a name any more.

    One process waits in open(), which has a descriptor for it already and no file.
    """
    run_shell(linux, "exec 3>/tmp/gone; rm /tmp/gone; sleep 1000 | cat & exec 4</bin/busybox")
    run_shell(linux, "mkfifo /tmp/pipe; cat /tmp/pipe & sleep 0.1")
    pids = [int(line.split()[0]) for line in report.processes(system)[1:] if not line.endswith("]")]
    assert len(pids) >= 4
    for pid in pids:
        assert report.maps(system, pid) == _shown(linux, f"cat /proc/{pid}/maps")
        listed = _shown(linux, f"ls -l /proc/{pid}/fd | sort -n -k 9")
        assert report.files(system, pid) == [" ".join(line.split()[8:]) for line in listed if "->" in line]
    shown = "\n".join(line for pid in pids for line in report.files(system, pid))
    assert "/tmp/gone (deleted)" in shown
    assert re.search(r"pipe:\[\d+\]", shown)


def test_kernel_threads_have_no_mappings(system: Linux) -> None:
    """Which is said, in place of nothing."""
    assert report.maps(system, 2) == ["(none: a thread of the kernel's own, or a process that has ended)"]
    assert report.files(system, 2) == ["(none open)"]


def test_a_process_that_is_not_there_is_said(system: Linux) -> None:
    with pytest.raises(NotAvailable, match="task 31999 is not available because there is none"):
        report.maps(system, 31999)


def test_dmesg_is_the_guests_dmesg(linux: GuestMachine, system: Linux) -> None:
    assert report.log(system) == _shown(linux, "dmesg")


def test_dmesg_after_the_log_has_wrapped() -> None:
    """The record that begins anew at the buffer's start is whole. (dmesg leaves out the oldest that its own needs.)"""
    linux = another("amd64")
    run_shell(linux, "echo on > /proc/sys/kernel/printk_devkmsg; dmesg -n 1")
    fill = "y=$(head -c 700 /bin/busybox | od -An -tx1 | tr -d ' \\n' | head -c 900)"
    run_shell(linux, f'{fill}; for i in $(seq 150); do echo "$i $y" > /dev/kmsg; done', 2_000_000_000)
    theirs, mine = _shown(linux, "dmesg", 2_000_000_000), report.log(linux_of(linux))
    assert len(theirs) > 100
    assert mine[-len(theirs) :] == theirs


def test_page_cache_names_every_page_once(linux: GuestMachine, system: Linux) -> None:
    """Ranges of file offsets, in order, with the physical memory that holds those bytes."""
    head, *rows = report.page_cache(system, "/bin/busybox")
    size = int(_shown(linux, "stat -c %s /bin/busybox")[0])
    pages = -(-size // 4096)
    assert re.fullmatch(rf"/bin/busybox: inode \d+, {size} bytes, {pages} of {pages} pages", head)
    end = 0
    inode = system.inode("/bin/busybox")
    for row in rows:
        first, last, paddr = (int(word, 16) for word in re.fullmatch(r"(\w+)-(\w+)  at (\w+)", row).groups())
        assert first == end
        assert linux.memory.read_physical(paddr, 64) == system.read_file(inode, first, 64)
        end = last
    assert end == pages * 4096
    assert report.page_cache(system, "/bin/../bin/sh")[1:] == rows  # a link to it
    for path, why in (("/no/such/file", "no such name"), ("bin/busybox", "begins with /"), ("/bin", "no file")):
        with pytest.raises(NotAvailable, match=why):
            report.page_cache(system, path)


def _shown(linux: GuestMachine, command: str, budget: int = 400_000_000) -> list[str]:
    return run_shell(linux, command, budget).split("\n")
