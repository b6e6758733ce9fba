"""Stock kernels at their shell's prompt: booted once a session, restored for each test that wants one.

Rules: tests only. What a test gets is a machine of its own; what it does there no other test sees.
"""

from __future__ import annotations

import functools

import pytest

from emu.boot import GuestMachine, boot, restore
from emu.snapshot import Snapshot
from emu.stops import ConsoleMatch, Stop
from tests.support.images import OLDEST, REAL_KERNELS, fetch_real_kernel
from tests.support.uncovered import stop_measuring

PROMPT = r"^/ # "
KERNELS = {"amd64": "amd64 6.1", "i386": "i386 6.1", "6.12": "amd64 6.12"}
"""The `kernel` fixture's names -> images.REAL_KERNELS."""
if OLDEST in REAL_KERNELS:
    KERNELS["5.10"] = OLDEST
BOOT_BUDGET = 3_000_000_000
"""Instructions; the longest boot takes a third."""
COMMAND_BUDGET = 400_000_000


def switched_on(name: str, append: str = "") -> GuestMachine:
    """A machine about to execute the kernel's first instruction."""
    stop_measuring()
    files = fetch_real_kernel(KERNELS[name]).fetched
    return boot(files.kernel, initrd=files.initramfs, append=append)


@functools.cache
def at_prompt(name: str) -> Snapshot:
    """The kernel after its boot, the shell waiting for a command; one boot a session."""
    machine = switched_on(name)
    stop = run_until(machine, PROMPT, BOOT_BUDGET)
    assert isinstance(stop, ConsoleMatch), f"{name} does not reach its prompt: {stop}\n{machine.console.text[-2000:]}"
    return machine.snapshot()


def another(name: str) -> GuestMachine:
    """A new machine with that kernel at its prompt."""
    stop_measuring()
    return restore(at_prompt(name))


def run_until(machine: GuestMachine, pattern: str, budget: int) -> Stop:
    """Run until a console line matches `pattern`: a ConsoleMatch, or whatever stopped it before."""
    withdraw = machine.console.expect(pattern, lambda match: ConsoleMatch(match.string))
    try:
        return machine.run(budget)
    finally:
        withdraw()


def type_line(machine: GuestMachine, command: str) -> None:
    """Have `command` and the return key arrive at the console."""
    machine.devices.uart.receive(command.encode() + b"\n")


def run_shell(machine: GuestMachine, command: str, budget: int = COMMAND_BUDGET) -> str:
    """Type `command` at the prompt and run to the next one. -> what was printed between the two, newlines as "\\n"."""
    before = len(machine.console.text)
    type_line(machine, command)
    stop = run_until(machine, PROMPT, budget)
    assert isinstance(stop, ConsoleMatch), f"{command!r} ended with {stop}:\n{machine.console.text[before:]}"
    printed = machine.console.text[before:].replace("\r\n", "\n")
    return printed.partition("\n")[2].rpartition("\n")[0]


@pytest.fixture(params=KERNELS, scope="session")
def kernel(request: pytest.FixtureRequest) -> str:
    """Each stock kernel in turn, by its name in KERNELS."""
    name: str = request.param
    return name


@pytest.fixture
def linux(kernel: str) -> GuestMachine:
    """A machine of the test's own with `kernel` at its prompt."""
    return another(kernel)
