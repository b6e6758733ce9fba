"""Uprobes on the embedded guest's program: its pages come from a slow disk, later than anyone asks for them."""

from __future__ import annotations

import errno

import pytest

from emu.images.embedded import embedded_program
from emu.machine import Machine
from emu.stops import ConsoleMatch
from probes import Manager, ProbeError, Uprobe
from tests.support.embedded import Guest, power_on
from tests.support.kernels import run_until

pytestmark = pytest.mark.parametrize("bits", [64, 32])

PROGRAM = "/bin/program"
BUDGET = 200_000_000


def started(bits: int, append: str) -> tuple[Machine, Manager]:
    machine = power_on(bits, append)
    return machine, Manager(machine)


def at(bits: int, function: str) -> int:
    """The file offset of a function of the program."""
    return embedded_program(bits).offset(function)


def finish(machine: Machine) -> None:
    assert isinstance(run_until(machine, "embedded: done", BUDGET), ConsoleMatch)


def test_registered_before_the_page_is_there_hits_from_its_first_instruction(bits: int) -> None:
    """No page of the file is in memory; each function is first called when its page has just been read."""
    machine, manager = started(bits, "user=50 faults=1 user=50")
    seen: list[int] = []
    cold = Uprobe(PROGRAM, at(bits, "user_cold"), lambda up, regs: seen.append(regs.di if bits == 64 else regs.ax))
    target, main = (Uprobe(PROGRAM, at(bits, name)) for name in ("user_target", "user_main"))
    for probe in (cold, target, main):
        manager.register(probe)
    finish(machine)
    assert seen == [*range(1, 51), *range(1, 51)]
    assert (cold.hits, target.hits, main.hits) == (100, 100, 1)


def test_armed_again_after_every_eviction(bits: int) -> None:
    """`faults` drops the page cache: twelve times the code comes back from the disk, and no call is missed."""
    machine, manager = started(bits, " ".join(["user=1 faults=1"] * 12))
    cold = Uprobe(PROGRAM, at(bits, "user_cold"))
    manager.register(cold)
    finish(machine)
    assert cold.hits == 12
    assert Guest(machine, bits).counters["end_page_read"] >= 2 * 12


def test_run_is_the_bare_run(bits: int) -> None:
    """Instruction count, what the guest reads of its file, and every byte of RAM."""
    results = []
    for functions in ((), ("user_target", "user_cold", "user_main", "user_syscall")):
        machine, manager = started(bits, "user=20 faults=1 user=20 sum=1")
        for name in functions:
            manager.register(Uprobe(PROGRAM, at(bits, name), ret_handler=lambda ri, regs: None))
        finish(machine)
        guest = Guest(machine, bits)
        results.append((machine.clock.instructions, guest.value("work_result"), machine.ram_sha256()))
        assert machine.ram.sha256() == machine.ram_sha256() or functions  # else kprobes of our own are in it
    assert results[0] == results[1]


def test_returns_carry_the_result(bits: int) -> None:
    """Each call returns once, to the handler with the value."""
    machine, manager = started(bits, "user=30")
    results: list[int] = []
    target = Uprobe(PROGRAM, at(bits, "user_target"), ret_handler=lambda ri, regs: results.append(regs.retval))
    main = Uprobe(PROGRAM, at(bits, "user_main"), ret_handler=lambda ri, regs: None)
    manager.register(target)
    manager.register(main)
    finish(machine)
    assert results == [2 * number for number in range(1, 31)]
    assert str(target.ends) == "30 entries = 30 returned + 0 live + 0 missed"
    assert str(main.ends) == "1 entries = 0 returned + 0 live + 1 missed"  # its stack has no page yet


def test_handler_changes_the_course(bits: int) -> None:
    """It returns from the function in its place, with another value: `regs.ip` is where the guest goes on."""
    machine, manager = started(bits, "user=10")
    results: list[int] = []

    def instead(up: Uprobe, regs: object) -> None:
        regs.ax = 1000  # type: ignore[attr-defined]
        regs.ip = regs.stack(0)  # type: ignore[attr-defined]
        regs.sp += bits // 8  # type: ignore[attr-defined]

    manager.register(Uprobe(PROGRAM, at(bits, "user_cold"), instead))
    manager.register(Uprobe(PROGRAM, at(bits, "user_syscall"), lambda up, regs: results.append(regs.si)))
    finish(machine)
    assert Guest(machine, bits).value("work_result") == 10 * 1000 + sum(2 * number for number in range(1, 11))


def test_several_probes_on_a_place_filter_disable_and_remove_each_for_itself(bits: int) -> None:
    machine, manager = started(bits, "user=10 user=10 user=10")
    place = at(bits, "user_target")
    order: list[str] = []
    first = Uprobe(PROGRAM, place, lambda up, regs: order.append("first"))
    odd = Uprobe(PROGRAM, place, filter=lambda up, regs: (regs.di if bits == 64 else regs.ax) % 2)
    once = Uprobe(PROGRAM, place, lambda up, regs: manager.unregister(up))
    for probe in (first, odd, once):
        manager.register(probe)
    while first.hits < 15:
        machine.run(5)
    manager.disable(first)
    finish(machine)
    assert (first.hits, odd.hits, once.hits, once.registered) == (15, 15, 1, False)
    manager.unregister(first)
    manager.unregister(odd)
    assert manager.uprobes.addresses(first) == []


def test_snapshot_forgets_what_was_under_way(bits: int) -> None:
    """Back at an earlier moment the same hits come again, and no call is waited for that this guest has not made."""
    machine, manager = started(bits, "user=10")
    target = Uprobe(PROGRAM, at(bits, "user_target"), ret_handler=lambda ri, regs: None)
    manager.register(target)
    while not target.ends.live:
        machine.run(1)
    saved = machine.snapshot()
    finish(machine)
    machine.restore(saved)
    finish(machine)
    assert (target.ends.returned, target.hits) == (10 + 9, 10 + 9)


@pytest.mark.parametrize(
    ("path", "offset", "reason"),
    [
        ("bin/program", 0, "no absolute path"),
        (PROGRAM, -1, "not negative"),
        (PROGRAM, 3 * 4096, "has 0x3000 bytes, so none at 0x3000"),
    ],
)
def test_refused_without_a_trace(bits: int, path: str, offset: int, reason: str) -> None:
    machine, manager = started(bits, "user=1")
    probe = Uprobe(path, offset)
    with pytest.raises(ProbeError, match=reason) as refused:
        manager.register(probe)
    assert (refused.value.errno, probe.registered, machine.breaks.client) == (errno.EINVAL, False, None)


def test_file_that_is_not_there_is_waited_for(bits: int) -> None:
    _, manager = started(bits, "user=1")
    probe = Uprobe("/nowhere", "main")
    manager.register(probe)
    assert "waiting" in probe.notes[0]
    with pytest.raises(ProbeError, match="registered already"):
        manager.register(probe)
    manager.unregister(probe)
    with pytest.raises(ProbeError, match="not registered"):
        manager.unregister(probe)
