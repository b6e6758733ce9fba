"""A machine served to debuggers from a thread of its own, for blocking scripts and tests in the same process.

Rules: trio lives here, inside that thread. While a machine is served it belongs to the thread: whoever serves it looks
at it through `Served.call`, or as it is while a debugger holds it stopped.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import trio

from emu.boot import GuestMachine
from emu.runner import Runner, open_runner
from gdbstub.address import Tcp, parse_address
from gdbstub.client import run_monitor_command
from gdbstub.server import Server
from gdbstub.sessions import Sessions
from gdbstub.threads import ThreadChoice
from probes.linux.threads import TaskThreads
from probes.manager import Manager

Result = TypeVar("Result")

LIMIT: Final = 120.0
"""Seconds after which a wait counts as broken; nothing that works takes a tenth of it."""


class ServingError(Exception):
    """A wait that took too long, or a defect of the server's; the text says which."""


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
        if not seen.wait(LIMIT):
            raise ServingError(f"{pattern!r} was not printed; the console ends {self.machine.console.text[-500:]!r}")
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
            if now >= deadline:
                raise ServingError("the guest stands still")


@contextmanager
def serve(
    machine: GuestMachine,
    *,
    probes: Manager | None = None,
    waiting: bool = False,
    again: Callable[[], GuestMachine] | None = None,
) -> Iterator[Served]:
    """Serve `machine` on a free port; with `waiting` the guest stands still until a debugger comes. `again` makes such
    a machine anew, for debuggers who restart it; `probes` is its manager where it has one.

    Its memory may be looked at after the block. ServingError on leaving where the server reported a defect.
    """
    started: queue.SimpleQueue[Served | BaseException] = queue.SimpleQueue()
    manager = probes if probes is not None else Manager(machine)
    finish = threading.Event()

    async def main() -> None:
        defects: list[str] = []
        async with open_runner(machine, paused=waiting) as runner, trio.open_nursery() as nursery:
            token = trio.lowlevel.current_trio_token()
            threads = ThreadChoice(TaskThreads(machine, lambda: manager.linux))
            end = partial(token.run_sync_soon, nursery.cancel_scope.cancel)
            sessions = Sessions(machine, manager, threads, quit=end, again=again)
            server = Server(
                runner,
                sessions.debugger,
                on_kill=nursery.cancel_scope.cancel,
                report=defects.append,
                waiting=waiting,
                new_observer=sessions.observer,
            )
            (bound,) = await nursery.start(server.serve, Tcp("127.0.0.1", 0))
            (second,) = await nursery.start(partial(server.serve, Tcp("127.0.0.1", 0), observe=True))
            started.put(Served(machine, manager, str(bound), str(second), runner, token, defects))
            await trio.to_thread.run_sync(finish.wait, abandon_on_cancel=True)
            nursery.cancel_scope.cancel()

    def run() -> None:
        try:
            trio.run(main)
        except BaseException as error:  # raised again where the server is awaited
            started.put(error)
            raise

    thread = threading.Thread(target=run, name="server", daemon=True)
    thread.start()
    try:
        served = started.get(timeout=LIMIT)
    except queue.Empty:
        raise TimeoutError(f"the server has not begun to listen within {LIMIT:.0f} seconds") from None
    if isinstance(served, BaseException):
        raise served
    try:
        yield served
    finally:
        finish.set()
        thread.join(LIMIT)
    if thread.is_alive():
        raise ServingError("the server does not end")
    if served.defects:
        raise ServingError(served.defects[0])
