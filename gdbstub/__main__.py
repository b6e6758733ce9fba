"""`python -m gdbstub`, and what the installed command calls."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """The command line; Ctrl-C or SIGTERM while the program is still being loaded ends it as later."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        from gdbstub.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
