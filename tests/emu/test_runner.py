"""The runner on the fake machine: who runs the guest, who may look, and what ends it."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from emu.arch import X86_64
from emu.runner import Runner, open_runner
from emu.stops import Breakpoint, GuestExit, Halted, Interrupted, Stop
from tests.support.fake_machine import CODE, PROGRAM, FakeMachine

HALT = bytes.fromhex("90 f4")
EXIT_5 = bytes.fromhex("90 e615")


@pytest.fixture(autouse=True)
async def no_hang() -> AsyncIterator[None]:
    """A wrong runner hangs; ten seconds are far more than any test here takes."""
    with trio.fail_after(10):
        yield


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine(X86_64)


def as_is(stop: Stop) -> Stop:
    return stop


async def running(machine: FakeMachine) -> None:
    """Until the guest has done something."""
    start = machine.instructions
    while machine.instructions == start:
        await trio.lowlevel.checkpoint()


async def test_guest_runs_by_itself(machine: FakeMachine):
    """Nothing is needed to start it."""
    async with open_runner(machine):
        await running(machine)


async def test_paused_guest_stands_still_until_every_hold_is_given_back(machine: FakeMachine):
    """pause and resume nest."""
    async with open_runner(machine, paused=True) as runner:
        await runner.pause()
        runner.resume()
        assert await runner.call(lambda: machine.instructions) == 0
        runner.resume()
        await running(machine)
        await runner.pause()
        count = machine.instructions
        await runner.call(int)
        assert machine.instructions == count


async def test_call_looks_while_the_guest_runs(machine: FakeMachine):
    """In the machine's thread, the one that runs the guest; the guest goes on after it."""
    async with open_runner(machine) as runner:
        await running(machine)
        for _ in range(5):
            assert {await runner.call(threading.get_ident)} == machine.threads
            await running(machine)


async def test_call_raises_what_the_function_raises(machine: FakeMachine):
    """To its caller only."""
    async with open_runner(machine) as runner:
        with pytest.raises(KeyError):
            await runner.call(machine.registers.read, "nosuch")
        await running(machine)


async def test_stop_of_the_free_run_is_reported_once(machine: FakeMachine):
    """And the guest is not run into it again."""
    machine = FakeMachine(X86_64, HALT)
    async with open_runner(machine) as runner:
        assert await runner.wait_stop() == Halted(CODE + 1, "interrupts are off")
        await trio.testing.wait_all_tasks_blocked()
        assert machine.instructions == 2
        with trio.move_on_after(0):
            await runner.wait_stop()
            pytest.fail("reported twice")


async def test_a_hold_given_back_leaves_a_stop(machine: FakeMachine):
    """A debugger that changes pc and goes away gets the guest moving."""
    machine = FakeMachine(X86_64, HALT)
    async with open_runner(machine) as runner:
        await runner.wait_stop()
        await runner.pause()
        runner.resume()
        assert isinstance(await runner.wait_stop(), Halted)


async def test_advance_returns_the_stop(machine: FakeMachine):
    """To the holder, not to wait_stop."""
    async with open_runner(machine, paused=True) as runner:
        machine.insert_breakpoint(CODE + 3)
        assert await runner.advance(machine.run, as_is) == Breakpoint(CODE + 3)
        with trio.move_on_after(0):
            await runner.wait_stop()
            pytest.fail("the debugger's stop was reported")


async def test_an_ending_reaches_both(machine: FakeMachine):
    """The debugger had it first; the program must end all the same."""
    machine = FakeMachine(X86_64, EXIT_5)
    async with open_runner(machine, paused=True) as runner:
        assert await runner.advance(machine.run, as_is) == GuestExit(5)
        assert await runner.wait_stop() == GuestExit(5)


async def test_advance_and_resume_need_a_hold(machine: FakeMachine):
    """They would run the guest twice at once."""
    async with open_runner(machine) as runner:
        with pytest.raises(RuntimeError, match="advance without pause"):
            await runner.advance(machine.run, as_is)
        with pytest.raises(RuntimeError, match="resume without pause"):
            runner.resume()


async def _advance(runner: Runner, stops: list[Stop]) -> None:
    stops.append(await runner.advance(runner.machine.run, as_is))


async def test_interrupt_ends_an_advance(machine: FakeMachine):
    """Ctrl-C in a busy loop."""
    stops: list[Stop] = []
    async with open_runner(machine, paused=True) as runner, trio.open_nursery() as nursery:
        nursery.start_soon(_advance, runner, stops)
        await running(machine)
        runner.interrupt()
    assert [type(stop) for stop in stops] == [Interrupted]


async def test_interrupt_before_the_advance_began_counts(machine: FakeMachine):
    """A client may send `c` and 0x03 in one segment."""
    async with open_runner(machine, paused=True) as runner:
        runner.interrupt()
        assert isinstance(await runner.advance(machine.run, as_is), Interrupted)


async def test_a_call_does_not_end_an_advance(machine: FakeMachine):
    """A monitor client looks; the debugger's `continue` goes on."""
    stops: list[Stop] = []
    async with open_runner(machine, paused=True) as runner, trio.open_nursery() as nursery:
        nursery.start_soon(_advance, runner, stops)
        for _ in range(5):
            await running(machine)
            await runner.call(int)
        assert stops == []
        runner.interrupt()


async def test_a_late_stop_request_does_not_reach_the_next_step(machine: FakeMachine):
    """A request that came just as the guest stopped is nobody's: the next step is a step."""
    async with open_runner(machine, paused=True) as runner:
        machine.request_stop()
        stop = await runner.advance(machine.step, as_is)
    assert not isinstance(stop, Interrupted)


async def test_cancelled_advance_leaves_the_guest_standing(machine: FakeMachine):
    """The scope is left only when the run has ended."""
    async with open_runner(machine, paused=True) as runner:
        with trio.move_on_after(0.05):
            await runner.advance(machine.run, as_is)
        count = machine.instructions
        assert count > 0
        await runner.call(int)
        assert machine.instructions == count


async def test_cancelled_call_that_did_not_begin_never_runs(machine: FakeMachine):
    """It is taken out of the queue."""
    gate = threading.Event()
    ran: list[bool] = []
    async with open_runner(machine, paused=True) as runner:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runner.call, gate.wait)
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0):
                await runner.call(ran.append, True)
            gate.set()
        await runner.call(int)
    assert ran == []


async def test_cancelled_pause_holds_nothing(machine: FakeMachine):
    """The guest goes on."""
    async with open_runner(machine) as runner:
        await running(machine)
        with trio.CancelScope() as scope:
            scope.cancel()
            await runner.pause()
        await running(machine)


async def test_leaving_ends_the_thread(machine: FakeMachine):
    """Also while the guest runs, and when an exception leaves the block."""
    before = threading.active_count()

    async def interrupted() -> None:
        async with open_runner(machine):
            await running(machine)
            raise KeyboardInterrupt

    with pytest.raises(BaseExceptionGroup) as caught:
        await interrupted()
    assert caught.group_contains(KeyboardInterrupt)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("machine")]
    assert threading.active_count() <= before + 1  # trio keeps an idle thread of its own


async def test_defect_of_the_machine_ends_the_block(machine: FakeMachine):
    """An exception out of `run` is never swallowed."""
    machine.run = lambda: 1 // 0  # type: ignore[method-assign, assignment]
    with pytest.raises(BaseExceptionGroup) as caught:
        async with open_runner(machine):
            await trio.sleep_forever()
    assert caught.group_contains(ZeroDivisionError)


async def test_a_guest_that_ended_for_a_debugger_stands_still_when_it_leaves(machine: FakeMachine):
    """Else what a program reports of the end would depend on how fast it goes. Another debugger may let it run."""
    machine.memory.write(CODE, EXIT_5)
    async with open_runner(machine, paused=True) as runner:
        assert await runner.advance(machine.run, as_is) == GuestExit(5)
        count = machine.instructions
        runner.resume()
        await trio.testing.wait_all_tasks_blocked()
        assert await runner.call(lambda: machine.instructions) == count
        await runner.pause()
        machine.memory.write(CODE, PROGRAM)
        await runner.advance(machine.step, as_is)
        runner.resume()
        await running(machine)
