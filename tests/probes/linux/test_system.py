"""What is read of a stock kernel from outside is what the guest's own /proc says."""

from __future__ import annotations

import pytest

from emu.boot import GuestMachine
from emu.iface import MemoryFault
from probes.linux import Linux, NotAvailable, linux_of
from tests.support.kernels import run_shell, switched_on


@pytest.fixture
def system(linux: GuestMachine) -> Linux:
    return linux_of(linux)


def test_the_shell_is_the_current_task_with_its_files_and_mappings(linux: GuestMachine, system: Linux) -> None:
    """Its pid, its mappings and where its descriptors lead, as it prints them itself."""
    pid = int(run_shell(linux, "echo $$"))
    shell = system.task(pid)
    assert shell.comm.string_() == b"sh"
    printed = run_shell(linux, f"cat /proc/{pid}/maps").splitlines()
    found = [(m.start, m.end, m.offset, system.mapping_name(m)) for m in system.mappings(shell.mm)]
    theirs = [line.split(None, 5) for line in printed]
    assert found == [
        (*(int(part, 16) for part in row[0].split("-")), int(row[2], 16), row[5] if len(row) > 5 else "")
        for row in theirs
        if "vsyscall" not in row[-1]  # no mapping: the processor's gate page, the same for every process
    ]
    for descriptor, file in system.files(shell):
        assert run_shell(linux, f"readlink /proc/{pid}/fd/{descriptor}") == system.path(file)


def test_current_task_is_right_in_user_mode_and_in_the_kernel(linux: GuestMachine, system: Linux) -> None:
    """Wherever a run stops, the task that the guest is switching from or to is the one of its own pointer."""
    seen = set()
    run_shell(linux, "md5sum /bin/busybox & ")
    for _ in range(20):
        linux.run(budget=200_003)
        current = system.current()
        seen.add((linux.cpu.cpl == 3, current.comm.string_()))
        assert system.task(int(current.pid)) == current or int(current.pid) == 0
    assert any(name in (b"sh", b"md5sum", b"swapper/0") for _, name in seen)


def test_page_cache_holds_the_bytes_of_the_program(linux: GuestMachine, system: Linux) -> None:
    """By physical address, by offset, and as the process maps it; a page beyond the end is absent, not zeros."""
    shell = system.task(int(run_shell(linux, "echo $$")))
    inode = system.inode("/bin/busybox")
    assert inode is not None
    first = system.page(inode, 0)
    assert first is not None
    assert linux.memory.read_physical(first, 4) == b"\x7fELF" == system.read_file(inode, 0, 4)
    code = next(m for m in system.mappings(shell.mm) if m.executable and m.inode == inode.value_())
    assert system.read_user(shell.mm, code.start + 0xFF0, 32) == system.read_file(inode, code.offset + 0xFF0, 32)
    size = int(inode.i_size)
    assert system.page(inode, size // 4096 + 1) is None
    with pytest.raises(MemoryFault):
        system.read_file(inode, size + 8192, 1)
    assert {index for index, _ in system.pages(inode)} == set(range(-(-size // 4096)))
    assert system.inode("/no/such/file") is None


def test_names_lead_where_they_lead_now(linux: GuestMachine, system: Linux) -> None:
    """Asked again and again: a file that is moved, removed while it is open, replaced, behind a mount and a link."""
    run_shell(linux, "mkdir /tmp/d /tmp/e; echo > /tmp/d/f; exec 5</tmp/d/f; ln -s ../d /tmp/e/link")

    def at(path: str) -> int | None:
        found = system.follow(path)
        return None if found is None else int(found.i_ino.value_())

    def theirs(path: str) -> int | None:
        printed = run_shell(linux, f"ls -di {path} 2>/dev/null").split()
        return int(printed[0]) if printed else None

    paths = ("/tmp/d/f", "/tmp/d/g", "/tmp/e/../d/g", "/tmp/e/link/f", "/tmp/d", "/")
    seen = set()
    for change in ("true", "mv /tmp/d/f /tmp/d/g", "rm /tmp/d/g", "echo > /tmp/d/f", "mount -t tmpfs none /tmp/d",
                   "echo > /tmp/d/g", "umount /tmp/d"):  # fmt: skip
        run_shell(linux, change)
        found = tuple(at(path) for path in paths)
        assert found == tuple(theirs(path) for path in paths)
        seen.add(found)
    assert len(seen) == 6  # at the end as before the mount


def test_tasks_are_those_of_proc(linux: GuestMachine, system: Linux) -> None:
    """Every number in /proc but those of the command that lists them."""
    listed = {int(word) for word in run_shell(linux, "ls /proc").split() if word.isdecimal()}
    mine = {int(task.pid) for task in system.processes()}
    assert mine <= listed
    assert len(listed - mine) == 1
    assert {int(task.pid) for task in system.tasks()} == mine


@pytest.mark.boots
def test_early_in_the_boot_each_question_has_an_answer_or_a_reason() -> None:
    """From the first instruction on: the first task alone, no log, no files; and in time there are more."""
    machine = switched_on("amd64")
    system = linux_of(machine)
    tasks, reasons = set[bytes](), set[str]()
    for _ in range(18):
        for ask in (system.current, system.tasks, system.log, lambda: system.task(1), lambda: system.inode("/init")):
            try:
                ask()
            except NotAvailable as reason:
                reasons.add(str(reason).partition(" at 0x")[0])
            else:
                if ask == system.current:
                    tasks.add(system.current().comm.string_())
        machine.run(budget=10_000_000)
    assert tasks >= {b"swapper"}
    assert "task 1 is not available because there is none" in reasons
    assert any(text.startswith("/init is not available because") for text in reasons)
    assert len(system.tasks()) > 20
