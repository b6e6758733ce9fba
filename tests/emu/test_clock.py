"""Virtual time and its timers, on a counter that the test moves by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.clock import Clock
from emu.iface import MachineError


class Counter:
    """Stands for the engine's retired instructions."""

    def __init__(self) -> None:
        self.value = 0

    def __call__(self) -> int:
        return self.value


@pytest.fixture
def counter() -> Counter:
    return Counter()


@pytest.fixture
def clock(counter: Counter) -> Clock:
    return Clock(counter)


def test_time_is_instructions_plus_what_was_skipped(clock: Clock, counter: Counter) -> None:
    """HLT adds time and no instructions."""
    counter.value = 100
    clock.skip_to(1_000)
    counter.value = 107
    assert (clock.instructions, clock.now_ns) == (107, 1_007)


def test_skip_never_goes_back(clock: Clock, counter: Counter) -> None:
    """A target in the past leaves the time as it is."""
    counter.value = 500
    clock.skip_to(499)
    assert clock.now_ns == 500


def test_timer_fires_at_its_deadline_and_not_before(clock: Clock, counter: Counter) -> None:
    """One nanosecond early nothing is due."""
    fired: list[int] = []
    clock.schedule(10, lambda: fired.append(clock.now_ns))
    counter.value = 9
    assert clock.run_due() == 0
    counter.value = 10
    assert clock.run_due() == 1
    assert fired == [10]


def test_timer_fires_once(clock: Clock, counter: Counter) -> None:
    """A timer that fired is gone from the queue."""
    clock.schedule(10, lambda: None)
    counter.value = 10
    clock.run_due()
    assert clock.run_due() == 0
    assert clock.next_deadline_ns() is None


def test_cancelled_timer_does_not_fire(clock: Clock, counter: Counter) -> None:
    """Cancelling again, or after it fired, is no error."""
    timer = clock.schedule(10, lambda: pytest.fail("cancelled timer fired"))
    clock.cancel(timer)
    clock.cancel(timer)
    counter.value = 10
    assert clock.run_due() == 0


def test_callback_may_cancel_a_timer_that_is_due_too(clock: Clock, counter: Counter) -> None:
    """The queue is looked at again after each callback."""
    clock.schedule(5, lambda: clock.cancel(later))
    later = clock.schedule(6, lambda: pytest.fail("cancelled timer fired"))
    counter.value = 10
    assert clock.run_due() == 1


def test_callback_may_schedule_and_what_is_due_fires_too(clock: Clock, counter: Counter) -> None:
    """A periodic timer that is behind catches up within one call."""
    fired: list[int] = []

    def again(at_ns: int) -> None:
        fired.append(at_ns)
        clock.schedule(at_ns + 10, lambda: again(at_ns + 10))

    clock.schedule(10, lambda: again(10))
    counter.value = 35
    assert clock.run_due() == 3
    assert fired == [10, 20, 30]
    assert clock.next_deadline_ns() == 40


def test_change_is_told_only_when_the_earliest_deadline_gets_earlier(clock: Clock) -> None:
    """The engine need not move its limit for a timer behind another."""
    told: list[int | None] = []
    clock.on_change = lambda: told.append(clock.next_deadline_ns())
    clock.schedule(100, lambda: None)
    clock.schedule(100, lambda: None)
    clock.schedule(200, lambda: None)
    clock.schedule(50, lambda: None)
    assert told == [100, 50]


def test_state_brings_the_skipped_time_back(clock: Clock, counter: Counter) -> None:
    """With the same instruction count the time is the same."""
    counter.value = 3
    clock.skip_to(1_000)
    other = Clock(counter)
    other.load(clock.state())
    assert other.now_ns == 1_000


@pytest.mark.parametrize(
    "state",
    [{}, {"skipped_ns": -1}, {"skipped_ns": 1 << 63}, {"skipped_ns": "7"}, {"skipped_ns": True}, {"skipped_ns": 1.5}],
)
def test_damaged_state_is_refused(clock: Clock, state: dict[str, object]) -> None:
    """One line that says which part of a snapshot is wrong."""
    with pytest.raises(MachineError, match="skipped_ns"):
        clock.load(state)


@given(st.lists(st.integers(0, 50)), st.lists(st.integers(0, 20)))
def test_timers_fire_by_deadline_and_ties_as_scheduled(deadlines: list[int], steps: list[int]) -> None:
    """However time moves, the order is that of a stable sort, and nothing is early, late or lost."""
    counter = Counter()
    clock = Clock(counter)
    fired: list[tuple[int, int]] = []
    for number, at_ns in enumerate(deadlines):
        clock.schedule(at_ns, lambda entry=(at_ns, number): fired.append(entry))
    for step in steps:
        counter.value += step
        clock.run_due()
        assert len(fired) == sum(at_ns <= counter.value for at_ns in deadlines)
    counter.value = 50
    clock.run_due()
    assert fired == sorted((at_ns, number) for number, at_ns in enumerate(deadlines))


def test_the_next_timer_in_instructions(clock: Clock, counter: Counter) -> None:
    """Time that was skipped is time that needs no instructions."""
    assert clock.next_count() is None
    clock.schedule(1000, lambda: None)
    counter.value = 100
    assert clock.next_count() == 1000
    clock.skip_to(400)
    assert clock.next_count() == 700
