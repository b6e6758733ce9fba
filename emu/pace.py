"""Pacing an idle guest to the wall clock, so that waiting for a person costs no host processor.

Rules: `idle` is called in the machine's thread, `wake` from any. Only idleness is paced: a computing guest runs as fast
as it can, so its time may lag behind the world's, never run ahead of it while it waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

LONGEST_NS = 3_600 * 1_000_000_000  # one wait; the machine asks again


class Pacer(Protocol):
    """Lets an idle machine wait for the world instead of skipping time."""

    def idle(self, until_ns: int | None) -> int | None:
        """Nothing to do before virtual time `until_ns` (None: no timer). -> the time to go on at, None to stop waiting
        for ever (nothing can come any more). Returns early when input arrives or a stop is requested."""
        ...

    def wake(self) -> None:
        """From any thread: end an `idle` in progress."""
        ...


class WallPacer:
    """Implements Pacer over `now_ns`, the guest's virtual time."""

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns
        self._woken = threading.Event()

    def idle(self, until_ns: int | None) -> int | None:
        """Sleep until virtual time `until_ns` (None: until woken). -> the virtual time it is then."""
        start = self._now_ns()
        goal = start + LONGEST_NS if until_ns is None else min(until_ns, start + LONGEST_NS)
        began = time.monotonic_ns()
        woken = self._woken.wait(max(goal - start, 0) / 1e9)
        self._woken.clear()
        return min(start + time.monotonic_ns() - began, goal) if woken else goal

    def wake(self) -> None:
        """End an `idle` in progress, or the next one."""
        self._woken.set()
