"""The tasks of a Linux guest as a debugger's threads.

Rules: the machine's thread. A task is named by its thread's number (pid in the kernel's words); the idle task, whose
number is 0, by IDLE. Of a task that does not run there are the registers that the kernel has kept (`saved`), and its
memory by its own page tables. While the kernel does not tell its tasks yet, the idle task stands for the processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from drgn import Object
from drgn.helpers.linux.sched import task_state_to_char

from emu.iface import Machine, MemoryFault
from emu.stops import Step, Stop
from probes.linux.program import NotAvailable
from probes.linux.saved import switched_registers
from probes.linux.system import PAGE, Linux

IDLE: Final = (4 << 20) + 1
"""Beyond PID_MAX_LIMIT, include/linux/threads.h."""
_PC: Final = {8: "rip", 4: "eip"}
_STATES: Final = {
    "R": "running", "S": "sleeping", "D": "disk sleep", "T": "stopped", "t": "tracing stop", "X": "dead",
    "Z": "zombie", "P": "parked", "I": "idle",
}  # fmt: skip
"""task_state_array in fs/proc/array.c."""


@dataclass(frozen=True, slots=True)
class TaskThread:
    """`id` is unique while the task lives; `state` is for people; `core` is true of the one that runs."""

    id: int
    name: str
    state: str
    core: bool


class TaskThreads:
    """The threads of one machine. `linux` may be asked only when something is wanted: NotAvailable."""

    def __init__(self, machine: Machine, linux: Callable[[], Linux]) -> None:
        self._machine = machine
        self._get_linux = linux

    def check(self) -> None:
        """NotAvailable where this guest has no tasks that anybody knows."""
        self._get_linux()

    @property
    def current(self) -> int:
        """Whom the processor works for."""
        try:
            linux = self._get_linux()
            task = linux.current()
            with linux.asking("the current task is"):
                return int(task.pid.value_()) or IDLE
        except NotAvailable:
            return IDLE

    def all(self) -> list[TaskThread]:
        current = self.current
        idle = TaskThread(IDLE, "swapper/0", "idle", current == IDLE)
        try:
            linux = self._get_linux()
            tasks = linux.tasks()
            with linux.asking("the tasks are"):
                found = [_describe(task, current) for task in tasks]
        except NotAvailable:
            return [idle]
        # A task that is on its way out, or in, may be in no list while it runs.
        known = current == IDLE or any(thread.core for thread in found)
        return [*found, *([] if known else [TaskThread(current, "?", "running", True)]), idle]

    def find(self, thread: int) -> TaskThread | None:
        """None where there is no such task any more."""
        return next((known for known in self.all() if known.id == thread), None)

    def exists(self, thread: int) -> bool:
        return thread in (IDLE, self.current) or self._task(thread) is not None

    def registers(self, thread: int) -> dict[str, int]:
        """Those that are kept of a task that does not run; none of one whose stack has been taken away."""
        task = self._task(thread)
        if task is None:
            return {}
        linux = self._get_linux()
        try:
            with linux.asking("the registers are"):
                return switched_registers(linux, task)
        except NotAvailable:
            return {}

    def read(self, thread: int, vaddr: int, size: int) -> bytes:
        """A task's memory; MemoryFault names the first byte that is not there."""
        memory = self._machine.memory
        return b"".join(
            memory.read_physical(paddr, count) for paddr, count in self._pieces(thread, vaddr, size, "read")
        )

    def write(self, thread: int, vaddr: int, data: bytes) -> None:
        """All or nothing."""
        at = 0
        for paddr, count in list(self._pieces(thread, vaddr, len(data), "write")):
            self._machine.memory.write_physical(paddr, data[at : at + count])
            at += count

    def _pieces(self, thread: int, vaddr: int, size: int, access: str) -> Iterator[tuple[int, int]]:
        """(physical address, bytes) of each page that the range touches."""
        root = self._root(thread)
        while size > 0:
            paddr = self._machine.memory.translate(vaddr, root)
            if paddr is None:
                raise MemoryFault(vaddr, access)
            count = min(size, PAGE - vaddr % PAGE)
            yield paddr, count
            vaddr, size = vaddr + count, size - count

    def _root(self, thread: int) -> int:
        """Of a task's page tables; a kernel thread has the kernel's."""
        linux = self._get_linux()
        own, task = None, self._task(thread)
        if task is not None:
            with linux.asking("the memory is"):
                mm = task.mm.read_()
                own = self._machine.memory.translate(mm.pgd.value_(), linux.kernel.root) if mm else None
        return linux.kernel.root if own is None else own

    def run_until_current(self, thread: int) -> Stop | None:
        """Run the guest until the processor goes on with `thread`. -> what has stopped it before, or None."""
        pc = self.registers(thread).get(_PC[self._get_linux().kernel.btf.pointer_size])
        if thread == self.current or pc is None:
            return None
        arrived = Step(pc)
        end = self._machine.watch(pc, lambda: arrived if self.current == thread else None)
        try:
            stop = self._machine.run()
        finally:
            end()
        return None if stop is arrived else stop

    def _task(self, thread: int) -> Object | None:
        try:
            linux = self._get_linux()
            if thread != IDLE:
                return linux.task(thread)
            with linux.asking("the idle task is") as program:
                return program["init_task"].address_of_()
        except NotAvailable:
            return None


def _describe(task: Object, current: int) -> TaskThread:
    pid = int(task.pid.value_())
    letter = task_state_to_char(task)
    name = task.comm.string_().decode("utf-8", "backslashreplace")
    return TaskThread(pid, name, f"{_STATES.get(letter, letter)}, process {task.tgid.value_()}", pid == current)
