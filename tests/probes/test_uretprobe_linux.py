"""Real programs under return probes: each way of leaving a function is an end of its own, and every entry has one."""

from __future__ import annotations

import re

import pytest

from emu.boot import GuestMachine
from emu.insn import spans
from probes import Manager, Uprobe
from probes.programsymbols import functions
from tests.support.kernels import run_shell
from tests.support.programs import GUESTS, LIBC, LIBC32, equipped

pytestmark = pytest.mark.parametrize(("kernel", "bits"), GUESTS, indirect=["kernel"])


class Calls:
    """Return probes on functions, and what came back: (function, end, value)."""

    def __init__(self, manager: Manager, *functions: tuple[str, str]) -> None:
        self.returns: list[tuple[str, str, int]] = []
        self.probes = {place: Uprobe(*place, ret_handler=lambda ri, regs: None) for place in functions}
        for (_, name), probe in self.probes.items():
            probe.ret_handler = lambda ri, regs, name=name: self.returns.append(
                (name, ri.end.value if ri.end else "", regs.retval)
            )
            manager.register(probe)

    def ends(self) -> dict[str, str]:
        return {name: str(probe.ends) for (_, name), probe in self.probes.items()}


def as_bare(machine: GuestMachine, kernel: str, bits: int, command: str) -> str:
    """What `command` prints in `machine`; as much, as many instructions and the same RAM as in one without probes."""
    bare = equipped(kernel, bits)
    printed = run_shell(bare, command)
    assert run_shell(machine, command) == printed
    assert (machine.clock.instructions, machine.ram_sha256()) == (bare.clock.instructions, bare.ram_sha256())
    return printed


def nothing_left(manager: Manager, calls: Calls) -> bool:
    return not any(manager.uprobes.addresses(probe) or probe.ends.live for probe in calls.probes.values())


def test_dynamic_program_with_its_library_forks_and_threads(kernel: str, bits: int) -> None:
    """Set before exec, in the library's file and the program's; the child of a fork returns too."""
    machine = equipped(kernel, bits)
    manager = Manager(machine)
    libc = LIBC if bits == 64 else LIBC32
    places = [(libc, name) for name in ("malloc", "puts", "fork", "__libc_start_main")]
    calls = Calls(manager, *places, ("/bin/dynamic", "work"), ("/bin/dynamic", "main"))
    assert as_bare(machine, kernel, bits, "dynamic; echo $?").splitlines() == [
        "hello from a dynamic program",
        "child",
        "status 0",
        "0",
    ]
    assert calls.ends() == {
        "malloc": "2 entries = 2 returned + 0 live + 0 missed",
        "puts": "2 entries = 2 returned + 0 live + 0 missed",
        "fork": "1 entries + 1 forked = 2 returned + 0 live + 0 missed",
        "__libc_start_main": "1 entries + 1 forked = 0 returned + 0 live + 0 missed + 2 died",
        "work": "42 entries = 42 returned + 0 live + 0 missed",
        "main": "1 entries + 1 forked = 1 returned + 0 live + 0 missed + 1 died",
    }
    assert sorted(value for name, _, value in calls.returns if name == "work") == sorted(
        [7 * 3 + ord("k"), 300 + ord("c"), *(4 * [n * 3 + ord("t") for n in range(10)])]
    )
    assert nothing_left(manager, calls)


def test_every_way_of_leaving_a_function(kernel: str, bits: int) -> None:
    """longjmp, a tail call, a coroutine's switches, a moved stack, a thread's end, exit, exec."""
    machine = equipped(kernel, bits)
    manager = Manager(machine)
    names = ("leaf", "jumps", "tail", "yields", "moves", "dies", "execs")
    calls = Calls(manager, *(("/bin/leaving", name) for name in names))
    assert as_bare(machine, kernel, bits, "/bin/leaving") == "tail 12\nmoved 42"
    assert calls.ends() == {
        "leaf": "13 entries = 13 returned + 0 live + 0 missed",
        "jumps": "15 entries = 0 returned + 0 live + 0 missed + 15 longjmp",
        "tail": "1 entries = 0 returned + 0 live + 0 missed + 1 tail-called",
        "yields": "3 entries = 3 returned + 0 live + 0 missed",
        "moves": "1 entries = 0 returned + 0 live + 0 missed + 1 moved",
        "dies": "2 entries = 0 returned + 0 live + 0 missed + 2 died",
        "execs": "1 entries = 0 returned + 0 live + 0 missed + 1 exec",
    }
    assert [value for name, _, value in calls.returns if name in ("tail", "moves", "yields")] == [12, 7, 7, 7, 42]
    assert nothing_left(manager, calls)


def test_exceptions_leave_functions_and_are_caught_as_ever(kernel: str, bits: int) -> None:
    """The unwinder finds true return addresses; what it passes has ended by an exception."""
    machine = equipped(kernel, bits)
    manager = Manager(machine)
    calls = Calls(manager, *(("/bin/throws", name) for name in ("thrower", "catcher", "passer", "main")))
    assert as_bare(machine, kernel, bits, "throws") == "sum 96"
    assert calls.ends() == {
        "thrower": "12 entries = 0 returned + 0 live + 0 missed + 12 exception",
        "catcher": "4 entries = 4 returned + 0 live + 0 missed",
        "passer": "1 entries = 0 returned + 0 live + 0 missed + 1 exception",
        "main": "1 entries = 1 returned + 0 live + 0 missed",
    }


def test_signals_in_the_middle_of_instructions_and_two_processes_that_take_turns(kernel: str, bits: int) -> None:
    """A probe on each instruction of a loop whose stores fault and are done again after a signal: one hit each."""
    machine = equipped(kernel, bits)
    manager = Manager(machine)
    file = manager.uprobes.open("/bin/signals")
    assert file is not None
    names = functions(file.read)
    code = file.read(names["stores"], names["stores_end"] - names["stores"])
    probes = [Uprobe("/bin/signals", names["stores"] + at) for at, _ in spans(code, bits)][-5:]
    for probe in probes:
        manager.register(probe)
    calls = Calls(manager, *(("/bin/signals", name) for name in ("stores", "refused", "rang")))
    printed = as_bare(machine, kernel, bits, "signals & signals & wait; wait")
    assert re.findall(r"sum \d+", printed) == ["sum 299"] * 2
    stores, refused, rang = (calls.probes["/bin/signals", name].ends for name in ("stores", "refused", "rang"))
    rounds = stores.returned
    assert [probe.hits for probe in probes] == [rounds * 300 + 2, *[rounds * 300] * 3, rounds]
    assert str(stores) == f"{rounds + 2} entries = {rounds} returned + 0 live + 0 missed + 2 longjmp"
    assert str(refused) == "602 entries = 600 returned + 0 live + 0 missed + 2 longjmp"
    assert rang.returned == rang.entries >= 6
    assert nothing_left(manager, calls)


def test_killed_inside(kernel: str, bits: int) -> None:
    """A process that a signal ends while it sleeps in a probed function has died there."""
    machine = equipped(kernel, bits)
    manager = Manager(machine)
    calls = Calls(manager, ("/bin/sleeper", "sleeps"), ("/bin/sleeper", "main"))
    run_shell(machine, "sleeper & sleep 1; kill -9 $!; wait $!")
    assert calls.ends() == dict.fromkeys(("sleeps", "main"), "1 entries = 0 returned + 0 live + 0 missed + 1 died")
    assert nothing_left(manager, calls)
