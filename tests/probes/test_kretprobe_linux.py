"""Return probes on stock kernels at their prompt: what the guest does is what it does without them."""

from __future__ import annotations

import contextlib
import functools
import re

import pytest

from emu.boot import GuestMachine
from emu.stops import ConsoleMatch
from probes import Kprobe, Kretprobe, Manager, ProbeError
from probes.kretprobe import End
from tests.probes.returns import add_up
from tests.support.kernels import another, run_shell, run_until, type_line

pytestmark = pytest.mark.parametrize("kernel", ["amd64", "i386"], indirect=True)

FUNCTIONS = ("vfs_read", "do_sys_openat2", "schedule", "do_nanosleep", "begin_new_exec", "flush_thread", "do_exit")
WORK = "md5sum /bin/busybox; (sleep 1); cat /proc/version"


@functools.cache
def bare(name: str) -> tuple[str, int, str]:
    """What WORK prints, the instructions at its end and the hash of RAM, without probes."""
    machine = another(name)
    return run_shell(machine, WORK), machine.clock.instructions, machine.ram_sha256()


def probed(machine: GuestMachine, *symbols: str, shadow: bool) -> tuple[Manager, list[Kretprobe]]:
    manager = Manager(machine)
    rps = [Kretprobe(kp=Kprobe(symbol=symbol), maxactive=100, shadow=shadow) for symbol in symbols]
    manager.register_many(rps)
    return manager, rps


@pytest.mark.parametrize("shadow", [True, False], ids=["shadow", "trampoline"])
def test_guest_works_as_ever(kernel: str, shadow: bool) -> None:
    """Same output at the same instruction; every entry, of sleeping, execing and dying callers, is accounted for."""
    machine = another(kernel)
    manager, rps = probed(machine, *FUNCTIONS, shadow=shadow)
    printed = run_shell(machine, WORK)
    assert (printed, machine.clock.instructions) == bare(kernel)[:2]
    by_name = {rp.kp.symbol: rp for rp in rps}
    assert add_up(rps)
    assert all(rp.entries for rp in rps)
    assert by_name["do_exit"].died == by_name["do_exit"].entries
    for name in ("vfs_read", "do_sys_openat2", "do_nanosleep", "begin_new_exec", "flush_thread"):
        assert by_name[name].returned + by_name[name].live == by_name[name].entries
    for rp in rps:
        manager.unregister(rp)
    assert [rp.live for rp in rps] == [0] * len(rps)
    assert run_shell(machine, "echo still here") == "still here"


@pytest.mark.parametrize("shadow", [True, False], ids=["shadow", "trampoline"])
def test_memory_ends_as_in_the_bare_run(kernel: str, shadow: bool) -> None:
    """To the last byte of RAM; without do_nanosleep, which on i386 aligns its stack and copies its return address."""
    machine = another(kernel)
    probed(machine, *(name for name in FUNCTIONS if shadow or name != "do_nanosleep"), shadow=shadow)
    run_shell(machine, WORK)
    assert machine.ram_sha256() == bare(kernel)[2]


LABELS = {
    "amd64": (
        *("error_return", "swapgs_restore_regs_and_return_to_usermode", "syscall_return_via_sysret"),
        *("entry_SYSCALL_64", "native_irq_return_iret", "asm_sysvec_apic_timer_interrupt"),
    ),
    "i386": ("restore_all_switch_stack", "asm_exc_page_fault", "asm_common_interrupt", "entry_SYSENTER_32"),
}


def test_labels_of_entry_code_are_missed_and_unharmed(kernel: str) -> None:
    """Saved registers stand on the stack there, or a program's own return address, or where an `iret` is to go: none is
    replaced, nothing is armed in programs, and whoever asked for a trampoline is told."""
    machine = another(kernel)
    _, rps = probed(machine, *LABELS[kernel], shadow=False)
    assert run_shell(machine, WORK) == bare(kernel)[0]
    assert (machine.clock.instructions, machine.ram_sha256()) == bare(kernel)[1:]
    assert max(rp.nmissed for rp in rps) > 50
    assert all("followed by shadow" in " ".join(rp.notes) for rp in rps)
    assert all("missed where" in rp.notes[-1] for rp in rps if rp.entries)
    assert all(rp.entries == rp.nmissed for rp in rps)


def test_thousands_of_functions_at_once_change_nothing(kernel: str) -> None:
    """Every tenth function, by trampoline and by shadow in turn: same output, same instruction, same RAM."""
    machine = another(kernel)
    manager, taken = Manager(machine), 0
    for number, name in enumerate(sorted({symbol.name for symbol in machine.symbols if symbol.kind in "tT"})[::10]):
        shadow = number % 2 == 0 or name == "do_nanosleep"
        with contextlib.suppress(ProbeError):  # freed at the end of the boot
            manager.register(Kretprobe(kp=Kprobe(symbol=name), maxactive=100, shadow=shadow))
            taken += 1
    assert taken > 2000
    assert run_shell(machine, WORK) == bare(kernel)[0]
    assert (machine.clock.instructions, machine.ram_sha256()) == bare(kernel)[1:]


@pytest.mark.parametrize("shadow", [True, False], ids=["shadow", "trampoline"])
def test_process_killed_inside_frees_its_instances(kernel: str, shadow: bool) -> None:
    """A killed sleeper returns from its sleep with the signal, and dies inside get_signal."""
    machine = another(kernel)
    _, (nap, signal) = probed(machine, "hrtimer_nanosleep", "get_signal", shadow=shadow)
    run_shell(machine, "sleep 100 & sleep 1; kill $!; wait $!; true")
    assert nap.entries == nap.returned >= 2
    assert signal.died == 1
    assert (signal.live, add_up([signal])) == (0, True)


def test_unregistered_while_a_process_sleeps_inside(kernel: str) -> None:
    """Its return is unharmed, and nothing of ours is left on its stack."""
    machine = another(kernel)
    manager, (nap,) = probed(machine, "hrtimer_nanosleep", shadow=False)
    type_line(machine, "sleep 2 && echo slept")
    while not nap.live:
        machine.run(100_000)
    manager.unregister(nap)
    assert nap.ends[End.UNREGISTERED] == 1
    assert isinstance(run_until(machine, "^slept", 100_000_000), ConsoleMatch)


def test_event_of_a_return_names_both_ends(kernel: str) -> None:
    """`EV: (CALLER+0xO/0xS <- FUNC)` with the result, by shadow where nobody says.

    A kernel with BTF knows that it is a long.
    """
    machine = another(kernel)
    manager = Manager(machine)
    assert manager.add("kretprobe", "r:ret do_sys_openat2 $retval") == ["r10:kprobes/ret do_sys_openat2 arg1=$retval"]
    run_shell(machine, "cat /nonexistent")
    texts = [record.text() for record in manager.trace.last()]
    lines = [
        re.search(r"ret: \((\S+)\+0x[0-9a-f]+/0x[0-9a-f]+ <- do_sys_openat2\) arg1=(0x[0-9a-f]+|-?\d+)$", t)
        for t in texts
    ]
    assert all(lines)
    results = {int(line[2], 0) & 0xFFFFFFFF for line in lines if line is not None}
    assert 0xFFFFFFFE in results  # -ENOENT
    assert "    by shadow: " in "\n".join(manager.info("ret"))
