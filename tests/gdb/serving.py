"""A machine served to debuggers from a thread of its own, so that a blocking test can drive a real gdb against it.

Rules: tests only. While it is served the machine belongs to its thread: a test looks at it through `Served.call`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio

from emu.boot import GuestMachine
from emu.images.symbolelf import symbol_elf
from emu.runner import Runner, open_runner
from gdbstub.address import Tcp, parse_address
from gdbstub.client import run_monitor_command
from gdbstub.files import FileTree
from gdbstub.monitor import Monitor, Services
from gdbstub.observe import ObserverSession
from gdbstub.server import Server
from gdbstub.services import MachineInspector, NamedSnapshots, TraceText
from gdbstub.session import Session
from probes.manager import Manager

Result = TypeVar("Result")

LIMIT = 120.0
"""Seconds after which a wait counts as broken; nothing that works takes a tenth of it."""


@dataclass
class Served:
    """A machine that `gdb_session(served.address)` reaches, and at `observed` one that only looks."""

    machine: GuestMachine
    probes: Manager
    address: str
    observed: str
    _runner: Runner
    _token: trio.lowlevel.TrioToken
    defects: list[str]

    def call(self, function: Callable[[], Result]) -> Result:
        """`function()` in the machine's thread; the guest runs on afterwards if it was running."""
        return trio.from_thread.run(self._runner.call, function, trio_token=self._token)

    def monitor(self, command: str) -> str:
        """What `gdbstub monitor` prints."""
        said: list[str] = []
        run_monitor_command(parse_address(self.address), command, said.append, timeout=LIMIT)
        return "".join(said)

    def type(self, line: str) -> None:
        """At the guest's console."""
        self.call(partial(self.machine.devices.uart.receive, line.encode() + b"\n"))

    @contextmanager
    def printing(self, pattern: str) -> Iterator[None]:
        """Leave the block when the guest has printed a line that matches, begun inside it."""
        seen = threading.Event()
        withdraw = self.call(lambda: self.machine.console.expect(pattern, lambda _: seen.set()))
        yield
        assert seen.wait(LIMIT), f"{pattern!r} was not printed; the console ends {self.machine.console.text[-500:]!r}"
        self.call(withdraw)

    def wait_running(self) -> None:
        """Until the guest has executed something from now on."""
        ran = threading.Event()
        start = self.call(lambda: self.machine.instructions)

        def look() -> bool:
            if self.machine.instructions > start:
                ran.set()
            return ran.is_set()

        deadline = trio.from_thread.run_sync(trio.current_time, trio_token=self._token) + LIMIT
        while not self.call(look):
            now = trio.from_thread.run_sync(trio.current_time, trio_token=self._token)
            assert now < deadline, "the guest stands still"


@contextmanager
def serve(
    machine: GuestMachine, *, waiting: bool = False, again: Callable[[], GuestMachine] | None = None
) -> Iterator[Served]:
    """Serve `machine` on a free port; with `waiting` the guest stands still until a debugger comes. `again` makes such
    a machine anew, for debuggers who restart it.

    Its memory may be looked at after the block. A defect that the server reports fails the test.
    """
    started: queue.SimpleQueue[Served | BaseException] = queue.SimpleQueue()
    probes = Manager(machine, settled=machine.guest.settled)
    machine.guest.on_settled(lambda: setattr(probes, "settled", True))
    finish = threading.Event()

    async def main() -> None:
        defects: list[str] = []
        async with open_runner(machine, paused=waiting) as runner, trio.open_nursery() as nursery:
            server = Server(
                runner,
                _sessions(machine, probes, nursery.cancel_scope.cancel, again),
                on_kill=nursery.cancel_scope.cancel,
                report=defects.append,
                waiting=waiting,
                new_observer=lambda wake: ObserverSession(machine, machine.registers.arch, wake=wake),
            )
            (bound,) = await nursery.start(server.serve, Tcp("127.0.0.1", 0))
            (second,) = await nursery.start(partial(server.serve, Tcp("127.0.0.1", 0), observe=True))
            token = trio.lowlevel.current_trio_token()
            started.put(Served(machine, probes, str(bound), str(second), runner, token, defects))
            await trio.to_thread.run_sync(finish.wait, abandon_on_cancel=True)
            nursery.cancel_scope.cancel()

    def run() -> None:
        try:
            trio.run(main)
        except BaseException as error:
            started.put(error)
            raise

    thread = threading.Thread(target=run, name="server", daemon=True)
    thread.start()
    served = started.get(timeout=LIMIT)
    if isinstance(served, BaseException):
        raise served
    try:
        yield served
    finally:
        finish.set()
        thread.join(LIMIT)
    assert not thread.is_alive(), "the server does not end"
    assert served.defects == []


def _sessions(
    machine: GuestMachine,
    probes: Manager,
    end: Callable[[], object],
    again: Callable[[], GuestMachine] | None,
) -> Callable[[Callable[[], None]], Session]:
    guest = machine.guest
    token = trio.lowlevel.current_trio_token()
    services = Services(
        machine=machine,
        probes=probes,
        trace=TraceText(probes.trace),
        inspector=MachineInspector(machine, probes),
        snapshots=NamedSnapshots(machine),
        quit=lambda: token.run_sync_soon(end),
    )
    monitor = Monitor(services)
    elf = symbol_elf(
        machine.symbols, bits=guest.bits, sections=guest.sections, build_id=guest.build_id, frames=guest.frames()
    )
    files = FileTree({"/vmlinux": elf}, exec_file="/vmlinux")
    restart = None if again is None else lambda: machine.restore(again().snapshot())
    return lambda wake: Session(
        machine, machine.registers.arch, files=files, monitor=monitor, restart=restart, wake=wake
    )
