"""`python -m gdbstub`, and what the installed command calls."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """The command line; Ctrl-C, SIGTERM or SIGHUP while the program is still being loaded ends it as later."""
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)
        from gdbstub.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
