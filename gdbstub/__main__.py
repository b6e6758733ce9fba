"""`python -m gdbstub`, and what the installed command calls."""

from __future__ import annotations

import sys


def main() -> int:
    """The command line; Ctrl-C while the program is still being loaded ends it as later, without a traceback."""
    try:
        from gdbstub.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
