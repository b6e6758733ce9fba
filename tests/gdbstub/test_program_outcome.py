"""Every way a run can end, as an exit status and a line."""

from __future__ import annotations

import pytest

from emu import stops
from gdbstub.outcome import judge

ENDS = [
    (None, 0, ""),
    (stops.ConsoleMatch("/ # \n"), 0, "matched: / #"),
    (stops.GuestExit(7), 7, "status 7"),
    (stops.PowerOff(), 0, "powered off"),
    (stops.Reset(), 0, "reset the machine"),
    (stops.Reset(requested=False), 3, "reset unasked"),
    (stops.Panic(0x10, "VFS: no init"), 3, "panicked at 0x10: VFS: no init"),
    (stops.TripleFault(0x10, 14), 3, "vector 14"),
    (stops.Budget(1_000), 1, "instruction 1,000"),
    (stops.Halted(0x10, "no timer"), 1, "for good at 0x10: no timer"),
    (stops.Defect(0x10, "Traceback"), 4, "please report this:\nTraceback"),
    (stops.Interrupted(0x10), 0, "stopped at 0x10"),
]


@pytest.mark.parametrize(("stop", "status", "text"), ENDS, ids=lambda value: type(value).__name__)
def test_status_and_line_of_each_stop(stop: stops.Stop | None, status: int, text: str):
    """The table of the interface."""
    outcome = judge(stop, crashed=False)
    assert (outcome.stop, outcome.status) == (stop, status)
    assert text in outcome.text
    assert bool(text) == bool(outcome.text)


@pytest.mark.parametrize("stop", [None, stops.PowerOff(), stops.Reset(), stops.Budget(1), stops.Halted(0, "")])
def test_a_guest_that_panicked_earlier_has_crashed(stop: stops.Stop | None):
    """Also where a debugger took the panic and let the guest go on to its reboot."""
    assert judge(stop, crashed=True).status == 3


def test_a_goal_reached_counts_also_after_a_panic():
    """The user waited for that very line."""
    assert judge(stops.ConsoleMatch("Kernel panic"), crashed=True).status == 0
