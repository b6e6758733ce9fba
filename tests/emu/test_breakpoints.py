"""A breakpoint is reported each time its instruction is about to run, once, however often the run is cut short."""

from __future__ import annotations

import pytest

from emu.stops import Breakpoint, Budget, Halted, Interrupted
from tests.support.tiny import CODE, UNMAPPED, Tiny

COUNT_TO_5 = "xor ecx, ecx; again: inc ecx; cmp ecx, 5; jne again; hlt"
AGAIN = CODE + 2


@pytest.fixture(params=[32, 64])
def bits(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


@pytest.fixture
def guest(bits: int) -> Tiny:
    return Tiny(bits, COUNT_TO_5)


@pytest.mark.parametrize("hardware", [False, True])
@pytest.mark.parametrize("budget", range(1, 8))
def test_a_budget_that_ends_at_a_breakpoint_does_not_lose_it(guest: Tiny, budget: int, hardware: bool):
    """All five are reported, whichever instructions the runs end before."""
    guest.machine.insert_breakpoint(AGAIN, hardware)
    hits = []
    while not isinstance(stop := guest.machine.run(budget), Halted):
        assert isinstance(stop, Breakpoint | Budget)
        hits += [guest.machine.instructions] * isinstance(stop, Breakpoint)
    assert hits == [1, 4, 7, 10, 13]


@pytest.mark.parametrize("hardware", [False, True])
def test_a_request_to_stop_at_a_breakpoint_neither_loses_nor_repeats_it(guest: Tiny, hardware: bool):
    """Before it is reported, and right after."""
    machine = guest.machine
    machine.insert_breakpoint(AGAIN, hardware)
    machine.run(1)
    hits = []
    while True:
        machine.request_stop()
        assert isinstance(machine.run(), Interrupted)
        if isinstance(stop := machine.run(), Halted):
            break
        assert isinstance(stop, Breakpoint)
        hits.append(machine.instructions)
    assert hits == [1, 4, 7, 10, 13]


@pytest.mark.parametrize("hardware", [False, True])
def test_a_pc_moved_to_a_breakpoint_is_a_hit(guest: Tiny, hardware: bool):
    """With nothing executed: gdb's `jump`."""
    machine = guest.machine
    machine.insert_breakpoint(AGAIN, hardware)
    machine.insert_breakpoint(CODE, hardware)
    assert machine.run() == Breakpoint(CODE, hardware)
    machine.cpu.pc = AGAIN
    assert (machine.run(), machine.instructions) == (Breakpoint(AGAIN, hardware), 0)
    machine.cpu.pc = CODE
    assert (machine.run(), machine.instructions) == (Breakpoint(CODE, hardware), 0)
    assert (machine.run(), machine.instructions) == (Breakpoint(AGAIN, hardware), 1)


@pytest.mark.parametrize("hardware", [False, True])
def test_a_step_off_a_place_does_not_hide_a_breakpoint_set_there_later(guest: Tiny, hardware: bool):
    """The loop comes back with the same stack."""
    machine = guest.machine
    machine.run(1)
    machine.step()
    machine.insert_breakpoint(AGAIN, hardware)
    assert (machine.run(), machine.instructions) == (Breakpoint(AGAIN, hardware), 4)


@pytest.mark.parametrize("hardware", [False, True])
def test_going_on_from_a_breakpoint_taken_out_does_not_hide_one_set_there_later(guest: Tiny, hardware: bool):
    """gdb's `tbreak`, `continue`, and the same again: the guest comes back with the same stack."""
    machine = guest.machine
    machine.insert_breakpoint(AGAIN, hardware)
    assert (machine.run(), machine.instructions) == (Breakpoint(AGAIN, hardware), 1)
    machine.remove_breakpoint(AGAIN, hardware)
    assert machine.run(1) == Budget(2)
    machine.insert_breakpoint(AGAIN, hardware)
    assert (machine.run(), machine.instructions) == (Breakpoint(AGAIN, hardware), 4)


@pytest.mark.parametrize("hardware", [False, True])
def test_a_breakpoint_where_nothing_can_be_fetched_comes_before_the_page_fault(bits: int, hardware: bool):
    """gdb has functions return to a breakpoint on the stack, which may not be executable; going on is the fault."""
    guest = Tiny(bits, f"mov eax, {UNMAPPED}; jmp xax")
    guest.machine.insert_breakpoint(UNMAPPED, hardware)
    assert (guest.run(), guest.machine.instructions) == (Breakpoint(UNMAPPED, hardware), 2)
    assert (guest.trap().vector, guest.machine.registers.read("cr2")) == (14, UNMAPPED)
    assert guest.frame().pc == UNMAPPED


def test_a_processor_in_hlt_runs_where_a_debugger_sends_it(bits: int):
    """gdb calls a function of a guest that idles: the call does not wait for an interrupt that may never come."""
    guest = Tiny(bits, "hlt; nop; inc ecx; hlt")
    assert isinstance(guest.run(), Halted)
    guest.machine.registers.write("rip" if bits == 64 else "eip", CODE + 2)
    assert isinstance(guest.run(), Halted)
    assert guest.machine.cpu.gpr[1] == 1
