"""A connected socket used past trio, for a conversation whose packets take less than a turn of its loop does.

Rules: standard library only; no packet is understood here. Neither call waits longer than a moment, and both may be
mixed with trio's own on the same socket, as long as nobody waits in these.
"""

from __future__ import annotations

import os
import select
import time
from typing import Final

_MOMENT_MS: Final = 1  # that `receive` waits
_LOOKING_NS: Final = 100_000  # ... of which awake: who asks for one thing after another takes half as long
_REST, _LONGEST_REST = 16, 1024  # calls in which that is not tried again where it was in vain


class Gone(Exception):
    """The other end cannot be reached any more."""


class Wire:
    """The non-blocking socket behind a file descriptor, which stays its owner's; `portion` bytes are read at most."""

    def __init__(self, descriptor: int, portion: int) -> None:
        self._descriptor = descriptor
        self._portion = portion
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._rest, self._resting = _REST, 0

    def receive(self) -> bytes | None:
        """What is there or comes within the moment, empty at the end; None where nothing comes. Gone for an error."""
        try:
            return os.read(self._descriptor, self._portion) if self._look() or self._poll.poll(_MOMENT_MS) else None
        except BlockingIOError:
            return None
        except OSError as error:
            raise Gone from error

    def _look(self) -> bool:
        """Whether something comes while we stay awake: to wake from a sleep takes 15 us of the 100 of a step.

        A processor that others want is left to them, and a client that is slower than this costs a look in a thousand.
        """
        if self._resting:
            self._resting -= 1
            return False
        end = time.perf_counter_ns() + _LOOKING_NS
        while time.perf_counter_ns() < end:
            if self._poll.poll(0):
                self._rest = _REST
                return True
            os.sched_yield()
        self._resting, self._rest = self._rest, min(2 * self._rest, _LONGEST_REST)
        return False

    def send(self, data: bytes) -> bytes:
        """Send what there is room for. -> the rest. Gone where nobody takes it."""
        try:
            return data[os.write(self._descriptor, data) :]
        except BlockingIOError:
            return data
        except OSError as error:
            raise Gone from error
