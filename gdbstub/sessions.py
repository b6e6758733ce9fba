"""What the sessions of one machine share: monitor commands, files, tracepoints, threads, a way back to the start.

Rules: composition only; no trio, nothing is opened. Where the host may be touched is said by who makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from emu.boot import GuestMachine
from emu.iface import MachineError
from emu.images.fetch import FetchError
from gdbstub.files import FileTree, Folder
from gdbstub.monitor import Monitor
from gdbstub.monitorservices import Scripts
from gdbstub.observe import ObserverSession
from gdbstub.services import services
from gdbstub.session import Session
from gdbstub.symbolfile import SymbolFile
from gdbstub.threads import ThreadChoice
from gdbstub.tracefiles import TraceFolder
from gdbstub.tracepoints import Tracing
from probes.manager import Manager

EXEC_FILE: Final = "/vmlinux"


class Sessions:
    """Makes the sessions of a machine's clients; itself made before the machine runs.

    `quit` ends the program, from the machine's thread. `again` makes such a machine anew, for debuggers who go back to
    where it began, and `restarted` is called then; without it they cannot. `scripts`, `traces` and `folder` are what
    they may use of the host's. `make` is called in place of `Session`.
    """

    def __init__(
        self,
        machine: GuestMachine,
        probes: Manager,
        threads: ThreadChoice,
        *,
        quit: Callable[[], None],
        again: Callable[[], GuestMachine] | None = None,
        restarted: Callable[[], None] = lambda: None,
        scripts: Scripts | None = None,
        traces: TraceFolder | None = None,
        folder: Folder | None = None,
        make: Callable[..., Session] = Session,
    ) -> None:
        self._machine = machine
        self._arch = machine.registers.arch  # until a client reads the description
        self._make = make
        found = services(machine, probes, quit=quit, folder=traces, scripts=scripts, threads=threads)
        files = {EXEC_FILE: SymbolFile(machine)} if len(machine.symbols) else {}
        tree = FileTree(files, exec_file=EXEC_FILE if files else None, folder=folder)
        self._shared: dict[str, Any] = {"files": tree, "monitor": Monitor(found)}
        self._debuggers: dict[str, Any] = {
            "tracing": Tracing(machine, self._arch, probes),
            "restart": None if again is None else lambda: _restart(machine, again, restarted),
            "threads": threads,
        }

    def debugger(self, wake: Callable[[], None]) -> Session:
        """Of a client that may become the debugger; `wake` is the session's."""
        return self._make(self._machine, self._arch, **self._shared, **self._debuggers, wake=wake)

    def observer(self, wake: Callable[[], None]) -> ObserverSession:
        """Of a client that only looks."""
        return ObserverSession(self._machine, self._arch, **self._shared, wake=wake)


def _restart(machine: GuestMachine, again: Callable[[], GuestMachine], restarted: Callable[[], None]) -> None:
    try:
        machine.restore(again().snapshot())
    except FetchError as error:
        raise MachineError(str(error)) from error
    restarted()
