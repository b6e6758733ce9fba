"""The current task of a stock kernel, read from outside, is what the guest says of itself."""

from __future__ import annotations

import pytest

from emu import GuestMachine
from probes.linux import NotAvailable
from probes.manager import Manager
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
