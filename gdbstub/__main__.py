"""`python -m gdbstub`, and what the installed command calls."""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """The command line; Ctrl-C, SIGTERM or SIGHUP while the program is still being loaded ends it as later."""
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)
        _open_closed_streams()
        from gdbstub.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 0


def _open_closed_streams() -> None:
    """Where the caller has closed a standard descriptor (`>&-`): else the next file that is opened would take its
    place. Input is empty then, messages go nowhere, and output cannot be written, for to lose that is an error."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if descriptor == 2 else os.O_RDONLY)  # the lowest number that is free
    sys.stdin = sys.stdin or os.fdopen(0, "r", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


if __name__ == "__main__":
    sys.exit(main())
