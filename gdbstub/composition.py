"""The composition root: a command in, an exit status out; the one place that picks real parts.

Rules: imports everything, so `cli` imports it when there is something to do. A refusal of any room leaves as
UsageError.
"""

from __future__ import annotations

from collections.abc import Callable
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
from gdbstub.commands import Boot, Check, Demo, DrgnShell, Fetch, Load, Replay, Report, Symbols, Work
from gdbstub.program import run_program, run_replay
from gdbstub.recording import RecordError, read_record
from gdbstub.reporting import report
from gdbstub.status import NOT_REACHED, SUCCESS, UsageError
from gdbstub.symbolfile import kernel_elf
from gdbstub.terminal import say
from probes import rawtext
from probes.errors import ProbeError
from probes.linux import linux_of

EMBEDDED = {"embedded": 64, "embedded32": 32}
EMBEDDED_WORK = "calls=10 opens=100 faults=2"
"""What the embedded guest does where --append does not say."""


def carry_out(command: Work, write: Callable[[bytes], None]) -> int:
    """The exit status. Data goes to `write`, for a trace has the guest's bytes; UsageError where a room refuses."""
    try:
        return _carry_out(command, lambda text: write(rawtext.encode(text)))
    except (MachineError, FetchError, AddressError) as error:
        raise UsageError(str(error)) from error


def _carry_out(command: Work, write: Callable[[str], None]) -> int:
    match command:
        case Boot() | Load():
            outcome = run_program(partial(_machine, command), command.run)
            if outcome.text:
                say(f"gdbstub: {outcome.text}")
            return outcome.status
        case Fetch():
            return _fetch(command, write)
        case DrgnShell(snapshot):
            return _shell(restore(snapshot, say))
        case Check():
            return check(command, write, quiet)
        case Symbols():
            return symbols(command, write, say)
        case Report():
            return report(command, write)
        case Replay(file):
            return _replay(file)
        case Demo():
            from gdbstub.demo import demo  # pygdbmi is of no use to the other commands

            return demo(lambda line: write(line + "\n"))
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


def _fetch(command: Fetch, write: Callable[[str], None]) -> int:
    fetched = fetch(command.architecture, command.package, progress=say)
    if command.debug:
        from probes.linux.generate import make_profile

        with debug_image(command.architecture, fetched, progress=say) as (image, release):
            say(f"the kernel's types: {make_profile(image, release)}")
    if command.show:
        write(f"{fetched.kernel}\n{fetched.initramfs}\n")
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
