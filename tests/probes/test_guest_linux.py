"""Calls, jprobes and guest handlers on stock kernels."""

from __future__ import annotations

from emu.boot import GuestMachine
from probes import Jprobe, Kprobe, Manager, Regs, s32, ulong
from tests.support.compile import compile_sample
from tests.support.kernels import another, run_shell

NAME_LIMIT = 40


def test_calls_and_jprobes_leave_the_guests_course_alone(kernel: str) -> None:
    """A command takes as many instructions and prints the same, while handlers call the kernel at each open."""
    machine, bare = another(kernel), another(kernel)
    probes = Manager(machine)
    seen: list[tuple[int, str]] = []
    answers: list[tuple[int, int]] = []

    def call(kp: Kprobe, regs: Regs) -> None:
        answers.append((regs.call("strlen", regs.arg(2)), regs.call("jiffies_to_msecs", 250)))

    def entry(dfd: s32, name: ulong, *, regs: Regs) -> None:
        seen.append((dfd, regs.string(name, NAME_LIMIT)))

    inside = Kprobe(symbol="jiffies_to_msecs", post_handler=lambda kp, regs: None)
    where = Kprobe(symbol="do_sys_openat2", pre_handler=call, post_handler=lambda kp, regs: None)
    probes.register_many([inside, where, Jprobe(kp=Kprobe(symbol="do_sys_openat2"), entry=entry)])
    command = "cat /proc/version; ls / | md5sum"
    assert run_shell(machine, command) == run_shell(bare, command)
    assert machine.instructions == bare.instructions
    assert seen[:2] == [(-100, "/proc/version"), (-100, "/")]
    assert [(len(name), 1000) for _, name in seen] == answers
    assert inside.nmissed == where.hits


def test_the_kernels_functions_can_be_called(linux: GuestMachine) -> None:
    """Memory is taken and given back, and an offer to be preempted is declined, not an error."""
    probes = Manager(linux)
    results: list[tuple[int, int, int]] = []
    kmalloc = "__kmalloc" if linux.symbols.lookup("__kmalloc") else "__kmalloc_noprof"  # since 6.10
    offer = "__cond_resched" if linux.symbols.lookup("__cond_resched") else "_cond_resched"  # before 5.12

    def call(kp: Kprobe, regs: Regs) -> None:
        taken = regs.call(kmalloc, 100, 0xCC0)  # GFP_KERNEL
        regs.write(taken, bytes(range(100)))
        copied = regs.call("memcmp", taken, taken, 100)
        regs.call("kfree", taken)
        results.append((taken, copied, regs.call(offer, returns=s32)))

    probes.register(Kprobe(symbol="do_sys_openat2", pre_handler=call))
    assert "Linux version" in run_shell(linux, "cat /proc/version")
    half = 1 << (linux.guest.bits - 1)
    assert results
    assert all(taken & half and (copied, yielded) == (0, 0) for taken, copied, yielded in results)


def test_compiled_handlers_print_through_the_kernel(linux: GuestMachine) -> None:
    """kprobe, jprobe and return probe from one object; the lines are in the kernel's log, with the true addresses."""
    probes = Manager(linux)
    probes.load_object(compile_sample("linux_example", linux.guest.bits), "linux_example.o")
    probes.add("kprobe", "p:a vfs_open", {"pre": "handler_pre"})
    probes.add("jprobe", "p:b do_filp_open", {"entry": "jdo_filp_open"})
    probes.add("kretprobe", "r:c do_sys_openat2", {"post": "ret_handler"})
    printed = run_shell(linux, "cat /proc/version; dmesg | tail -8")
    address = linux.symbols.lookup("vfs_open")[0].address
    assert f"<vfs_open> pre_handler: p->addr = {address:x}, ip = {address + 1:x}" in printed
    assert "jprobe: dfd = -100" in printed
    assert "returned 3" in printed
    assert not any("disabled" in line for name in "abc" for line in probes.info(name))
