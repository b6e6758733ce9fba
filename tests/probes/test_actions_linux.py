"""Actions and stacks on stock kernels, with BTF and without."""

from __future__ import annotations

import pytest

from emu import GuestMachine
from emu.stops import ProbeStop
from gdbstub.examples import MONITOR_EXAMPLES
from gdbstub.monitor import Monitor, Services
from probes import Manager
from probes.tracefs import Tracefs
from tests.support.kernels import COMMAND_BUDGET, run_shell, type_line

OPEN = "events/kprobes/open"


def test_a_stock_kernel_is_steered_by_triggers(linux: GuestMachine) -> None:
    """An open fails with the error that was asked for, a stack leads to the system call's entry, and a stop is one."""
    manager = Manager(linux)
    files = Tracefs(manager)
    manager.add("kprobe", "p:open do_sys_openat2 file=+0($arg2):ustring")
    manager.add("kprobe", "r:done do_sys_openat2 ret=$retval:s32")
    files.write(f"{OPEN}/trigger", 'return:-EACCES if file == "/init"', append=False)
    files.write(f"{OPEN}/trigger", "stacktrace:1", append=False)
    files.write(f"{OPEN}/trigger", "hist:keys=common_pid.execname,file", append=False)
    assert "can't open '/init': Permission denied" in run_shell(linux, "cat /init")
    records = manager.trace.last()
    assert [record.event for record in records[:3]] == ["open", "stack trace", "done"]
    assert records[0].comm == "cat"
    assert records[1].frames is not None
    assert records[1].frames[0] == "do_sys_openat2"
    assert "entry" in records[1].frames[-1]
    assert {name: value for name, _, value in records[2].arguments} == {"ret": -13}
    assert "file: /init" in files.read(f"{OPEN}/hist")
    files.write(f"{OPEN}/trigger", 'stop:1 if file == "/proc/version"', append=False)
    hits = manager.status()[0].hits
    type_line(linux, "cat /proc/version")
    (function,) = linux.symbols.lookup("do_sys_openat2")
    assert linux.run(COMMAND_BUDGET) == ProbeStop(function.address)
    assert manager.status()[0].hits == hits + 1
    linux.run(1_000_000)
    assert manager.status()[0].missed == 0


@pytest.mark.parametrize("kernel", ["6.12"], indirect=True)
def test_the_examples_of_help_echo_can_be_typed(linux: GuestMachine) -> None:
    """Each as it stands there, in order, and what they ask for comes about."""
    monitor = Monitor(Services(linux, tracefs=Tracefs(Manager(linux))))
    lines = [line.strip() for line in MONITOR_EXAMPLES["echo"].splitlines() if line.startswith("    ")]
    commands = [line for line in lines if line.startswith(("echo ", "cat "))]
    assert len(commands) > 10
    for command in commands:
        assert not (answer := monitor.execute(command)).refused, f"{command}: {answer.lines}"
    assert "Permission denied" in run_shell(linux, "cat /tmp/secret")
    assert "file: /tmp/secret" in "".join(monitor.execute("cat events/kprobes/open/hist").lines)
