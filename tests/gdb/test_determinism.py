"""What a debugger does leaves no trace: the guest's console, instruction count and RAM end as those of a bare run."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from emu.boot import GuestMachine, boot_embedded
from emu.stops import ConsoleMatch, PowerOff
from gdbstub.automation import gdb_session
from gdbstub.serving import Served, serve
from tests.gdb.conftest import LINUX
from tests.support.kernels import another, type_line

WORKLOAD = "for i in 1 2 3 4 5 6; do cat /proc/version; done; echo workload $((1 + 1)) done"
ALONE = 5_000
"""Instructions that the guest runs between two debuggers."""
END = r"^workload 2 done"


@dataclass(frozen=True)
class End:
    """How a run ended."""

    console: str
    instructions: int
    ram: str


def end_of(machine: GuestMachine) -> End:
    return End(machine.console.text, machine.instructions, machine.ram_sha256())


def linux_workload(bits: int) -> GuestMachine:
    """At the prompt with a command typed, about to go on; it stops when the command's last line is printed."""
    machine = another(LINUX[bits])
    type_line(machine, WORKLOAD)
    machine.console.expect(END, lambda match: ConsoleMatch(match.string))
    return machine


def run_no_further_than(machine: GuestMachine, instructions: int | None) -> None:
    """Where the guest stands still once no debugger holds it, so that the next one finds it before its end."""
    machine.budget_end = None if instructions is None else machine.instructions + instructions


def disturb(served: Served, function: str, gdb: str) -> None:
    """Break, step, look, interrupt, detach, come back, probe: until the guest has ended."""
    with gdb_session(served.address, gdb=gdb) as session:
        session.execute(f"break {function}")
        for _ in range(3):
            session.resume()
            assert session.wait_stop().reason == "breakpoint-hit"
            session.execute("bt 3")
            session.execute("info registers all")
            for command in ("stepi", "stepi", "nexti", "stepi"):
                session.resume(command)
                assert session.wait_stop().reason == "end-stepping-range"
        session.resume("finish")
        session.wait_stop()
        served.call(lambda: run_no_further_than(served.machine, ALONE))
    with gdb_session(served.address, gdb=gdb) as session:
        served.call(lambda: run_no_further_than(served.machine, None))
        session.monitor(f"kprobe add --arm int3 p:seen {function}")
        session.execute(f"hbreak {function}")
        session.resume()
        assert session.wait_stop().reason == "breakpoint-hit"
        session.execute("delete")
        session.resume("stepi")
        session.wait_stop()
        session.monitor("kprobe del seen")
        session.resume()
        served.monitor("info registers")
        assert session.wait_stop().reason == "exited-normally"


def test_a_debugged_linux_ends_as_a_bare_one(new_gdb: str, bits: int):
    """A shell's workload from the prompt to its last line."""
    bare = linux_workload(bits)
    assert isinstance(bare.run(2_000_000_000), ConsoleMatch)
    with serve(linux_workload(bits), waiting=True) as served:
        disturb(served, "do_sys_openat2", new_gdb)
    assert end_of(served.machine) == end_of(bare)


@pytest.mark.parametrize("function", ["target", "do_timer"])
def test_a_debugged_embedded_guest_ends_as_a_bare_one(new_gdb: str, bits: int, function: str):
    """Its tasks are preempted by the timer, and its interrupt handler itself is stepped."""
    append = "calls=300 opens=30 faults=1 poweroff"
    bare = boot_embedded(bits, append)
    assert isinstance(bare.run(2_000_000_000), PowerOff)
    with serve(boot_embedded(bits, append), waiting=True) as served:
        disturb(served, function, new_gdb)
    assert end_of(served.machine) == end_of(bare)
