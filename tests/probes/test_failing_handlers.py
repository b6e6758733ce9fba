"""A handler of a user's that raises: the run ends and says where, the guest goes on as if nothing had been there."""

from __future__ import annotations

import pytest

from emu.machine import Machine
from emu.stops import Defect, GuestExit, HandlerFailed, Stop
from gdbstub.outcome import judge
from gdbstub.stops import explain, signal
from probes import Jprobe, Kprobe, Kretprobe, Manager
from tests.support.embedded import power_on

ENOUGH = 1_000_000


def divide(*_: object) -> int:
    return 1 // 0


DIVISION = divide.__code__.co_firstlineno + 1


def probe_of(kind: str) -> Kprobe | Kretprobe | Jprobe:
    if kind in ("pre_handler", "post_handler"):
        return Kprobe(symbol="target", **{kind: divide})
    if kind == "jprobe":
        return Jprobe(kp=Kprobe(symbol="target"), entry=lambda a: divide(a))
    return Kretprobe(kp=Kprobe(symbol="target"), **{kind: divide})


def failures(machine: Machine) -> tuple[list[HandlerFailed], Stop]:
    """The guest run on past each failure to its end."""
    found = []
    while isinstance(stop := machine.run(ENOUGH), HandlerFailed):
        found.append(stop)
    return found, stop


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("kind", ["pre_handler", "post_handler", "handler", "entry_handler", "jprobe"])
def test_guest_is_as_without_it(kind: str, bits: int) -> None:
    bare, machine = power_on(bits, "calls=9 exit=0"), power_on(bits, "calls=9 exit=0")
    bare.run(ENOUGH)
    manager, probe = Manager(machine), probe_of(kind)
    manager.register(probe)
    found, end = failures(machine)
    assert end == GuestExit(0)
    assert len(found) == 27
    assert {(stop.where, stop.error) for stop in found} == {
        (f"{__file__}:{DIVISION}", "ZeroDivisionError: integer division or modulo by zero")
    }
    assert machine.instructions == bare.instructions
    assert machine.ram_sha256() == bare.ram_sha256()


def test_report_begins_in_the_users_code() -> None:
    machine = power_on(64, "calls=1 exit=0")
    Manager(machine).register(probe_of("handler"))
    stop = machine.run(ENOUGH)
    assert isinstance(stop, HandlerFailed)
    assert "in divide" in stop.report
    assert "kretprobe.py" not in stop.report
    outcome = judge(stop, False)
    assert (outcome.status, signal(stop)) == (2, 6)
    assert outcome.text == f"a probe's handler failed at {stop.pc:#x}: {stop.where}: {stop.error}"
    assert stop.where in explain(stop)


def test_error_of_ours_is_a_defect_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that is ours, and raises by itself."""
    machine = power_on(64, "calls=1 exit=0")
    manager = Manager(machine)
    manager.add("kprobe", "p:e target")
    monkeypatch.setattr(type(manager.trace), "append", None)
    stop = machine.run(ENOUGH)
    assert isinstance(stop, Defect)
    assert "TypeError" in stop.report


def test_first_of_two_failures_is_told() -> None:
    machine = power_on(64, "calls=1 exit=0")
    manager = Manager(machine)
    for _ in range(2):
        manager.register(Kprobe(symbol="target", pre_handler=divide))
    found, end = failures(machine)
    assert end == GuestExit(0)
    assert len(found) == 3
