"""The boundary of the program: a command line in, an exit status out.

Rules: the last boundary. A refusal of any room becomes one line and status 2 here, and an exception that nobody
expected a report and status 4. What only talks (help, usage, `monitor`) is done without a second of loading machines.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from gdbstub import options
from gdbstub.address import AddressError
from gdbstub.client import ClientError, run_monitor_command
from gdbstub.commands import Command, MonitorCommand
from gdbstub.status import DEFECT, NOT_REACHED, SUCCESS, USAGE, UsageError
from gdbstub.terminal import say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is as `options.EXIT_STATUS` says. SystemExit for a wrong one or --help."""
    try:
        try:
            return _carry_out(options.parse(arguments))
        finally:
            _write(b"")  # what argparse and Python programs of the user's have printed
    except (AddressError, ClientError, UsageError) as error:
        say(f"gdbstub: {error}")
        return USAGE
    except KeyboardInterrupt:
        return SUCCESS
    except BrokenPipeError:
        _leave_output()
        return SUCCESS
    except Exception:  # noqa: BLE001  # the boundary: a defect of ours ends with a report, never with a bare traceback
        say(f"gdbstub: a defect of gdbstub; please report this:\n{traceback.format_exc()}")
        return DEFECT


def _carry_out(command: Command) -> int:
    if isinstance(command, MonitorCommand):
        done = run_monitor_command(
            command.address, command.text, lambda text: _write(text.encode("utf-8", "surrogateescape"))
        )
        return SUCCESS if done else NOT_REACHED
    from gdbstub.composition import carry_out  # which is the second of loading

    return carry_out(command, _write)


def _write(data: bytes) -> None:
    """To standard output; UsageError where nothing can be written there."""
    try:
        sys.stdout.flush()
        if data:  # the system is asked to write nothing, too, and refuses
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _leave_output()
        raise UsageError(f"standard output: {error.strerror}") from error


def _leave_output() -> None:
    """What is still buffered has no way out; else the interpreter complains when it flushes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    sys.exit(main())
