"""The composition root: a command line in, an exit status out; the one place that picks real parts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from emu.boot import GuestMachine, boot, boot_embedded, load, restore
from emu.iface import MachineError
from emu.images.fetch import FetchError, fetch
from gdbstub import options as command_line
from gdbstub.address import AddressError
from gdbstub.client import ClientError, run_monitor_command
from gdbstub.program import ProbeError, UsageError, run_program
from gdbstub.terminal import say

USAGE = 2
EMBEDDED = {"embedded": 64, "embedded32": 32}
EMBEDDED_WORK = "calls=10 opens=100 faults=2"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is as `options.EXIT_STATUS` says."""
    parser = command_line.parser()
    options = parser.parse_args(arguments)
    command_line.check(parser, options)
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "boot": _run,
        "load": _run,
        "fetch": _fetch,
        "monitor": _monitor,
        "demo": _demo,
    }
    try:
        return commands[options.command](options)
    except ProbeError as error:
        say("gdbstub: " + "\n".join(error.lines()))
        return USAGE
    except (MachineError, FetchError, AddressError, ClientError, UsageError) as error:
        say(f"gdbstub: {error}")
        return USAGE
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        return 0


def _run(options: argparse.Namespace) -> int:
    outcome = run_program(_machine(options), options)
    if outcome.text:
        say(f"gdbstub: {outcome.text}")
    return outcome.status


def _machine(options: argparse.Namespace) -> GuestMachine:
    if options.restore is not None:
        return restore(options.restore, say)
    if options.command == "load":
        if options.image in EMBEDDED:
            return boot_embedded(EMBEDDED[options.image], EMBEDDED_WORK)
        return load(options.image, base=options.base, entry=options.entry, bits=options.bits, memory=options.memory)
    return boot(
        options.kernel,
        initrd=options.initrd,
        append=options.append,
        memory=options.memory,
        add=options.add,
        command=options.execute,
        progress=say,
    )


def _fetch(options: argparse.Namespace) -> int:
    fetched = fetch(options.arch, options.package, progress=say)
    if options.show:
        print(fetched.kernel)
        print(fetched.initramfs)
    else:
        say(f"{fetched.package} {fetched.version}: {fetched.kernel}")
    return 0


def _monitor(options: argparse.Namespace) -> int:
    command = " ".join(options.words) or "help"

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    return 0 if run_monitor_command(options.address, command, write) else 1


def _demo(_options: argparse.Namespace) -> int:
    from gdbstub.demo import demo

    return demo(lambda line: print(line, flush=True))


if __name__ == "__main__":
    sys.exit(main())
