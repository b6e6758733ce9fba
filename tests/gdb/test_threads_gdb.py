"""The guest's tasks as gdb's threads, on both word sizes; the kernel's /proc says what is right."""

from __future__ import annotations

import re

import pytest

from emu.boot import GuestMachine
from gdbstub.automation import GdbError, GdbSession, gdb_session
from gdbstub.serving import serve
from tests.support.kernels import run_shell

_STACK_LINE = re.compile(r"\[<0>\] (\w+)")
_THREAD = re.compile(r"Thread 1\.(\d+) (?:\(id \d+\) )?\"?([^\"(]*)")
SLEEPING = (1, 2)
"""init, which waits for its child, and kthreadd."""
SCHEDULER = ("__schedule", "schedule")


def test_every_task_is_a_thread_with_the_kernels_own_stack(gdb: str, linux_machine: GuestMachine) -> None:
    """Names and numbers are those of /proc, backtraces of sleeping tasks those of /proc/PID/stack."""
    tasks = run_shell(linux_machine, "cd /proc; for p in [0-9]*; do echo $p $(cat $p/comm); done; cd /")
    stacks = [_STACK_LINE.findall(run_shell(linux_machine, f"cat /proc/{pid}/stack")) for pid in SLEEPING]
    assert all(stacks)
    with serve(linux_machine) as served:
        served.monitor("threads tasks")
        with gdb_session(served.address, gdb=gdb) as session:
            listed = {int(pid): name for pid, name in _THREAD.findall(session.execute("info threads"))}
            for line in tasks.splitlines():
                pid, name = line.split(" ", 1)
                assert name.startswith(listed.get(int(pid), ""))  # gdb has 15 letters; the shell's own helpers are gone
            assert set(SLEEPING) <= listed.keys()
            for pid, stack in zip(SLEEPING, stacks, strict=True):
                session.execute(f"thread {sorted(listed).index(pid) + 1}")
                called = [frame.function for frame in session.backtrace(len(stack) + 2)]
                assert called[:2] == list(SCHEDULER)
                # The entry code has other names in gdb's table, and frames of the processor's making have none.
                same = [name for name in stack if "entry" not in name and not name.startswith("ret_from")]
                assert called[2 : 2 + len(same)] == same
            assert session.evaluate("$_inferior") == "1"
            with pytest.raises(GdbError, match=r"E01|does not run"):
                session.execute("set var $sp=0")


def test_step_of_a_sleeping_task_ends_in_it(new_gdb: str, linux_machine: GuestMachine) -> None:
    """The guest runs until the task is current, others' work is not told of; then it is stepped as any thread."""
    with serve(linux_machine) as served:
        served.monitor("threads tasks")
        with gdb_session(served.address, gdb=new_gdb) as session:
            threads = session.execute("info threads").splitlines()
            (line,) = [line for line in threads if '"rcu_preempt"' in line]
            session.execute(f"thread {line.split()[0]}")
            asleep = session.backtrace(20)
            served.monitor("snapshot list")  # others may ask meanwhile
            served.type("ls / >/dev/null")
            for _ in range(2):
                session.resume("stepi")
                session.wait_stop()
            assert session.evaluate("$_thread") == line.split()[0]
            awake = session.backtrace(20)
            callers = [frame.function for frame in asleep][1:]
            assert [frame.function for frame in awake][-len(callers) :] == callers
            session.execute("monitor threads cpus")
            session.resume("stepi")
            session.wait_stop()
            assert '"CPU 0"' in session.execute("info threads")


def test_non_stop_is_refused_with_the_way_to_have_it(new_gdb: str, linux_machine: GuestMachine) -> None:
    with serve(linux_machine) as served:
        served.monitor("threads tasks")
        session = GdbSession(new_gdb)
        try:
            session.execute("set non-stop on")
            with pytest.raises(GdbError, match="monitor threads cpus"):
                session.execute(f"target remote {served.address}")
        finally:
            session.close()
