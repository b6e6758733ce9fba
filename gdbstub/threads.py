"""What a debugger's threads are: the processor, or the tasks of the guest's operating system.

Rules: types and one switch, for the machine's thread. Who knows an operating system implements `Tasks`
(`probes.linux.threads`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from emu.iface import MachineError
from emu.stops import Stop

CPU: Final = 1
"""The thread that is processor 0."""
CPU_NAME: Final = "CPU 0"


class Task(Protocol):
    """`core` is true of the one that runs; `state` is for people."""

    @property
    def id(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def state(self) -> str: ...

    @property
    def core(self) -> bool: ...


class Tasks(Protocol):
    """The tasks of a guest, by numbers from 1 on."""

    @property
    def current(self) -> int:
        """Whom the processor works for."""
        ...

    def check(self) -> None:
        """MachineError or ProbeError where this guest's tasks are not known."""
        ...

    def all(self) -> Sequence[Task]: ...

    def find(self, thread: int, /) -> Task | None: ...

    def exists(self, thread: int, /) -> bool: ...

    def registers(self, thread: int, /) -> Mapping[str, int]:
        """Those that are kept of a task that does not run, by gdb's names."""
        ...

    def read(self, thread: int, vaddr: int, size: int, /) -> bytes:
        """A task's memory; MemoryFault names the first byte that is not there."""
        ...

    def write(self, thread: int, vaddr: int, data: bytes, /) -> None:
        """All or nothing."""
        ...

    def run_until_current(self, thread: int, /) -> Stop | None:
        """Run the guest until the processor goes on with that task. -> what has stopped it before, or None."""
        ...


class ThreadChoice:
    """What all debuggers of a machine get to see at their next stop. `tasks` None: there is nothing to choose."""

    def __init__(self, tasks: Tasks | None = None) -> None:
        self._tasks = tasks
        self.shown: Tasks | None = None
        """The tasks; None: processors."""

    def choose(self, word: str) -> Sequence[str]:
        """`cpus` or `tasks`; lines to show. MachineError or ProbeError where the guest's tasks are not known."""
        if word == "cpus":
            self.shown = None
            return ["threads are processors, from a debugger's next stop on"]
        if self._tasks is None:
            raise MachineError("this machine's tasks are not known")
        self._tasks.check()
        self.shown = self._tasks
        return ["threads are tasks, from a debugger's next stop on; lldb and gdb in non-stop mode keep the processor"]
