"""The current task of a stock kernel, read from outside, is what the guest says of itself."""

from __future__ import annotations

import pytest

from emu import GuestMachine
from probes import Kprobe, Regs
from probes.fetch import Task
from probes.linux import NotAvailable
from probes.linux.kernel import kernel_types
from probes.linux.tasks import HARDIRQ, NEED_RESCHED, SOFTIRQ, current_tasks
from probes.manager import Manager
from probes.tasks import find_tasks
from tests.support.kernels import BOOT_BUDGET, PROMPT, run_shell, run_until, switched_on


def test_trace_lines_name_the_process_that_hit(linux: GuestMachine) -> None:
    """The shell prints its own pid; the probe's record of an open by that shell has the same one, and its name."""
    probes = Manager(linux)
    probes.add("kprobe", "p:open do_sys_openat2 file=+0($arg2):ustring comm=$comm")
    pid = run_shell(linux, "echo $$; : < /init").split()[0]
    mine = [record for record in probes.trace.last() if {n: v for n, _, v in record.arguments}["file"] == "/init"]
    assert [(record.comm, str(record.pid)) for record in mine] == [("sh", pid)]


@pytest.mark.parametrize("kernel", ["i386"], indirect=True)
def test_a_kernel_of_an_unknown_build_gets_a_reason(linux: GuestMachine) -> None:
    """Debian's i386 kernel has no BTF: without a profile of its very build it is said, not guessed."""
    linux.guest.build_id = bytes(20)
    with pytest.raises(NotAvailable, match=r"not available because the kernel has no type information .* 6\.1\.0-"):
        _ = Manager(linux).linux


@pytest.mark.boots
def test_a_manager_made_before_the_boot_learns_when_the_kernel_has_settled() -> None:
    """Until then a probe is a PC hook, for the kernel patches its own text; afterwards it is an int3."""
    machine = switched_on("amd64")
    probes = Manager(machine)
    assert not probes.settled
    probes.add("kprobe", "p:open do_sys_openat2")
    assert any("hook" in line for line in probes.info("open"))
    run_until(machine, PROMPT, BOOT_BUDGET)
    assert probes.settled
    assert any("int3" in line for line in probes.info("open"))
    assert probes.status()[0].hits > 0


def test_hits_tell_the_context_they_happen_in(linux: GuestMachine) -> None:
    """In a timer's interrupt, in a softirq, with preemption off, asked to give the processor away, in a system call."""
    kernel = kernel_types(linux)
    assert not isinstance(kernel, str)
    tasks = current_tasks(linux.memory, kernel)
    assert not isinstance(tasks, str)
    seen: dict[str, list[Task]] = {}

    def note(kp: Kprobe, regs: Regs) -> None:
        seen.setdefault(str(kp.symbol), []).append(tasks.current(regs.cpu))

    probes = Manager(linux)
    for symbol in ("update_process_times", "rcu_core_si", "do_sys_openat2", "pick_next_task_fair", "schedule"):
        probes.register(Kprobe(symbol=symbol, pre_handler=note))
    run_shell(linux, "md5sum /bin/busybox; sleep 0.1; cat /proc/version")
    assert all((task.flags, task.preempt_count) == (0, 0) for task in seen["do_sys_openat2"])
    assert all(task.flags & HARDIRQ for task in seen["update_process_times"])
    assert all(task.flags & (HARDIRQ | SOFTIRQ) == SOFTIRQ for task in seen["rcu_core_si"])
    if not kernel.release.startswith("5.10"):  # which counts no more than interrupts do: no CONFIG_PREEMPT_COUNT
        assert all(task.preempt_count & 15 for task in seen["pick_next_task_fair"])
    asked = {bool(task.flags & NEED_RESCHED) for task in seen["schedule"]}
    assert asked == {True, False}  # because a time slice is over, and because there is nothing to do


def test_return_probes_know_tasks_by_the_kernels_own_pointer(linux: GuestMachine) -> None:
    """Not by the stack: what an interrupt does on a stack of its own is still the interrupted task's."""
    probes = Manager(linux)
    reader = current_tasks(linux.memory, probes.linux.kernel)
    assert not isinstance(reader, str)
    tasks = find_tasks(linux, reader)
    numbers: dict[int, set[int]] = {}

    def note(kp: Kprobe, regs: Regs) -> None:
        number = tasks.identify(regs.cpu, regs.sp)
        assert number == probes.linux.current().value_()
        numbers.setdefault(reader.current(regs.cpu).pid, set()).add(number)

    for symbol in ("update_process_times", "do_sys_openat2"):
        probes.register(Kprobe(symbol=symbol, pre_handler=note))
    run_shell(linux, "md5sum /bin/busybox")
    assert len(numbers) > 1
    assert all(len(found) == 1 for found in numbers.values())
