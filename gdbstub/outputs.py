"""Descriptors that the guest's console, the trace and the log are written to.

Rules: no trio; `write` is called inside the guest's run, where an exception would count as a defect of ours and a wait
without end would make the program deaf. So writing never raises, and a reader that does not read can be given up on.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable
from pathlib import Path

_PORTION = select.PIPE_BUF  # bytes that a pipe which polls as writable takes without blocking
_LOOK_MS = 100


class Output:
    """Writes to a descriptor, unbuffered: who follows the file sees each line at once.

    The first failure is given to `on_failure`; what is written later is dropped. Any thread; pieces of up to 4096 bytes
    of several threads do not mix.
    """

    def __init__(self, descriptor: int, on_failure: Callable[[OSError], None]) -> None:
        self._descriptor = descriptor
        self._on_failure = on_failure
        self._useless = False

    def write(self, data: bytes) -> None:
        """All of `data`, waiting for a reader that is slow until `give_up`."""
        while data and not self._useless:
            room = select.poll()  # one of its own: a poll object serves one thread at a time
            room.register(self._descriptor, select.POLLOUT)
            if not room.poll(_LOOK_MS):
                continue
            try:
                data = data[os.write(self._descriptor, data[:_PORTION]) :]
            except BlockingIOError:  # somebody who shares the descriptor made it so, and was faster
                continue
            except OSError as error:
                self._useless = True
                self._on_failure(error)

    def write_line(self, text: str) -> None:
        """A line; what UTF-8 cannot say becomes escapes."""
        self.write(text.encode("utf-8", "backslashreplace") + b"\n")

    def give_up(self) -> None:
        """From any thread: no longer wait for a reader, drop what is left."""
        self._useless = True

    def close(self) -> None:
        """Standard output and standard error stay open."""
        self._useless = True
        if self._descriptor > 2:
            os.close(self._descriptor)


def open_output(path: Path | None, on_failure: Callable[[OSError], None]) -> Output:
    """An Output onto a new or emptied file; None is standard output. OSError as the system says."""
    if path is None:
        return Output(1, on_failure)
    return Output(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666), on_failure)


def reader_is_gone(error: OSError) -> bool:
    """Whether an Output failed because its reader has had enough (`| head`), which is no failure of anybody."""
    return error.errno in (errno.EPIPE, errno.EIO)
