"""Virtual time: a pure function of retired instructions, and the timers that devices set on it.

Rules: standard library and `emu.iface` only; the engine's thread only. One retired instruction is one nanosecond (the
TSC runs at a nominal 1 GHz), HLT skips ahead. Integer arithmetic alone, no host clock: two runs with the same inputs
see the same time at the same instruction.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping
from operator import attrgetter

from emu.iface import MachineError

NS_PER_SECOND = 1_000_000_000

_SKIPPED_BOUND_NS = 1 << 63  # three centuries: a damaged snapshot, not an idle guest

_DEADLINE = attrgetter("_at_ns")


class Timer:
    """A handle for `Clock.cancel`; it holds one callback and its deadline."""

    __slots__ = ("_at_ns", "_callback")

    def __init__(self, at_ns: int, callback: Callable[[], None]) -> None:
        self._at_ns = at_ns
        self._callback = callback


def _nothing() -> None:
    """The hook of a clock nobody listens to."""


class Clock:
    """Time and its timer queue.

    `retired` gives the instructions retired since power-on, exact at every call. It may step back by the few
    instructions that a probe takes off the count (`Machine.uncount`), so users must not take time for monotonic.
    `on_change` is called when the earliest deadline got earlier: the engine moves its instruction limit there.
    """

    def __init__(self, retired: Callable[[], int]) -> None:
        self.on_change: Callable[[], None] = _nothing
        self._retired = retired
        self._skipped_ns = 0
        # A handful of timers live at a time: a sorted list, so that a cancelled one leaves nothing behind.
        self._queue: list[Timer] = []

    @property
    def instructions(self) -> int:
        """Guest instructions retired since power-on."""
        return self._retired()

    @property
    def now_ns(self) -> int:
        """Virtual nanoseconds since power-on: retired instructions plus the time skipped in HLT."""
        return self._retired() + self._skipped_ns

    def schedule(self, at_ns: int, callback: Callable[[], None]) -> Timer:
        """Have `run_due` call `callback` once, at the first call with `now_ns >= at_ns`."""
        timer = Timer(at_ns, callback)
        insort(self._queue, timer, key=_DEADLINE)
        if self._queue[0] is timer:
            self.on_change()
        return timer

    def cancel(self, timer: Timer) -> None:
        """Forget `timer`; no error where it has fired or was cancelled before."""
        if timer in self._queue:
            self._queue.remove(timer)

    def next_deadline_ns(self) -> int | None:
        """When the earliest timer is due, or None: without another event nothing will ever happen by itself."""
        return self._queue[0]._at_ns if self._queue else None

    def next_count(self) -> int | None:
        """The instruction count at which the earliest timer is due if no time is skipped, or None without timers."""
        return self._queue[0]._at_ns - self._skipped_ns if self._queue else None

    def run_due(self) -> int:
        """Fire everything due, by deadline, ties in the order scheduled; how many were fired.

        A callback may schedule; what it puts at or before `now_ns` fires in this call too.
        """
        fired = 0
        while self._queue and self._queue[0]._at_ns <= self.now_ns:
            self._queue.pop(0)._callback()
            fired += 1
        return fired

    def skip_to(self, at_ns: int) -> None:
        """Let time pass without instructions until `at_ns` (HLT). Time never goes back: an earlier `at_ns` is now."""
        self._skipped_ns += max(0, at_ns - self.now_ns)

    def state(self) -> dict[str, object]:
        """The skipped time. The instruction count is the engine's, and each device puts its own timers back."""
        return {"skipped_ns": self._skipped_ns}

    def load(self, state: Mapping[str, object]) -> None:
        """Take over what `state` returned; timers in the queue stay. MachineError where it is no such thing."""
        skipped_ns = state.get("skipped_ns")
        if not isinstance(skipped_ns, int) or isinstance(skipped_ns, bool) or not 0 <= skipped_ns < _SKIPPED_BOUND_NS:
            raise MachineError(f"saved state of the clock: skipped_ns is {skipped_ns!r}")
        self._skipped_ns = skipped_ns
