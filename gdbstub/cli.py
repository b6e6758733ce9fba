"""The composition root: a command line in, an exit status out; the one place that picks real parts.

Rules: the last boundary. A refusal of any room becomes one line and status 2 here, and an exception that nobody
expected a report and status 4.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import assert_never

from emu.boot import IMAGE_MEMORY, KERNEL_MEMORY, GuestMachine, boot, boot_embedded, load, restore
from emu.iface import MachineError
from emu.images.cache import quiet
from emu.images.fetch import FetchError, debug_image, fetch
from gdbstub import options
from gdbstub.address import AddressError
from gdbstub.check import check, symbols
from gdbstub.client import ClientError, run_monitor_command
from gdbstub.commands import Boot, Check, Command, Demo, DrgnShell, Fetch, Load, MonitorCommand, Replay, Report, Symbols
from gdbstub.outcome import DEFECT, NOT_REACHED, SUCCESS, USAGE, UsageError
from gdbstub.program import run_program, run_replay
from gdbstub.recording import RecordError, read_record
from gdbstub.reporting import report
from gdbstub.symbolfile import kernel_elf
from gdbstub.terminal import say
from probes import rawtext
from probes.errors import ProbeError
from probes.linux import linux_of

EMBEDDED = {"embedded": 64, "embedded32": 32}
EMBEDDED_WORK = "calls=10 opens=100 faults=2"
"""What the embedded guest does where --append does not say."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is as `options.EXIT_STATUS` says. SystemExit for a wrong one or --help."""
    try:
        status = _carry_out(options.parse(arguments))
        sys.stdout.flush()
        return status
    except (MachineError, FetchError, AddressError, ClientError, UsageError) as error:
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
    match command:
        case Boot() | Load():
            outcome = run_program(partial(_machine, command), command.run)
            if outcome.text:
                say(f"gdbstub: {outcome.text}")
            return outcome.status
        case Fetch():
            return _fetch(command)
        case DrgnShell(snapshot):
            return _shell(restore(snapshot, say))
        case MonitorCommand(address, text):
            return SUCCESS if run_monitor_command(address, text, _print) else NOT_REACHED
        case Check():
            return check(command, _print, quiet)
        case Symbols():
            return symbols(command, _print, say)
        case Report():
            return report(command, _print)
        case Replay(file):
            return _replay(file)
        case Demo():
            from gdbstub.demo import demo  # pygdbmi is of no use to the other commands

            return demo(lambda line: _print(line + "\n"))
        case _:
            assert_never(command)


def _machine(command: Boot | Load) -> GuestMachine:
    if command.run.restore is not None:
        return restore(command.run.restore, say)
    if isinstance(command, Boot):
        return boot(
            command.kernel,
            initrd=command.initrd,
            append=command.append,
            memory=KERNEL_MEMORY if command.memory is None else command.memory,
            add=command.add,
            command=command.run.execute,
            progress=say,
        )
    memory = IMAGE_MEMORY if command.memory is None else command.memory
    if command.image in EMBEDDED:
        return boot_embedded(EMBEDDED[command.image], command.append or EMBEDDED_WORK, memory=memory)
    return load(
        command.image,
        base=command.base,
        entry=command.entry,
        bits=command.bits,
        memory=memory,
        initrd=command.initrd,
        append=command.append,
    )


def _replay(file: Path) -> int:
    try:
        with file.open(encoding="utf-8") as lines:
            start, events = read_record(str(file), lines)
    except (OSError, UnicodeDecodeError) as error:
        reason = (getattr(error, "strerror", None) or "not a text file").lower()
        raise RecordError(f"{file}: {reason}") from error
    command = options.parse(start.command)
    if not isinstance(command, Boot | Load):
        raise RecordError(f"{file}: its command line makes no machine")
    difference = run_replay(partial(_machine, command), command.run, start, events)
    if difference is not None:
        say(f"gdbstub: {difference}")
        return NOT_REACHED
    whole = any(event.what == "end" for event in events)
    missing = "" if whole else "; the record breaks off before its end, so the last RAM was not compared"
    say(f"gdbstub: {len(events)} events, each as recorded{missing}")
    return SUCCESS


def _fetch(command: Fetch) -> int:
    fetched = fetch(command.architecture, command.package, progress=say)
    if command.debug:
        from probes.linux.generate import make_profile

        with debug_image(command.architecture, fetched, progress=say) as (image, release):
            say(f"the kernel's types: {make_profile(image, release)}")
    if command.show:
        _print(f"{fetched.kernel}\n{fetched.initramfs}\n")
    else:
        say(f"{fetched.package} {fetched.version}: {fetched.kernel}")
    return SUCCESS


def _shell(machine: GuestMachine) -> int:
    from probes.linux.shell import interact  # it changes readline's settings, which only a shell may

    sections = machine.guest.sections
    try:
        linux = linux_of(machine)
        start = min(section.address for section in sections)
        end = max(section.address + section.size for section in sections)
        interact(linux, machine.registers, partial(kernel_elf, machine), range(start, end))
    except ProbeError as error:
        raise UsageError(error.reason) from error
    return SUCCESS


def _print(text: str) -> None:
    """As bytes: a trace has the guest's, of whatever encoding. UsageError where nothing can be written there."""
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(rawtext.encode(text))
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
