"""Who runs in a Linux guest: the current task's name and number, cheaply, for the moment of a hit.

Rules: called in the machine's thread; reads guest memory only, and physically, so that it answers in user mode too. The
places come from the kernel's own types (kernel.py) once; drgn is not asked. Where a kernel does not say what is needed,
`current_tasks` returns the reason, and nobody guesses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from emu.iface import Cpu, Memory, MemoryFault
from probes.btf import BtfError
from probes.fetch import Task, UnknownTask
from probes.linux.kernel import KernelTypes

COMM_SIZE: Final = 16  # TASK_COMM_LEN, include/linux/sched.h
_PAGE: Final = 0x1000
_MAX_PAGES: Final = 4096  # kept translations; a guest has a page or two for each task


@dataclass(frozen=True, slots=True)
class LinuxTasks:
    """Implements fetch.TaskInfo.

    `area_at` is the physical place of the address of processor 0's per-cpu area (the guest decides while it boots),
    `variable` the offset of the current task's pointer in that area. `root`: the kernel's page tables.
    """

    memory: Memory
    root: int
    word: int
    area_at: int
    variable: int
    pid_offset: int
    comm_offset: int
    _pages: dict[int, int] = field(default_factory=dict)
    """Virtual to physical. Per-cpu areas and tasks lie where the kernel maps all memory, for good."""

    def address(self) -> int:
        """Of the current task's task_struct. MemoryFault before the kernel has set its per-cpu area up."""
        area = int.from_bytes(self.memory.read_physical(self.area_at, self.word), "little")
        return int.from_bytes(self._read(area + self.variable, self.word), "little")

    def current(self, cpu: Cpu) -> Task:
        """comm and pid as /proc shows them for the running thread."""
        try:
            task = self.address()
            pid = int.from_bytes(self._read(task + self.pid_offset, 4), "little", signed=True)
            comm = self._read(task + self.comm_offset, COMM_SIZE)
        except MemoryFault:
            return UnknownTask().current(cpu)
        return Task(comm.split(b"\0", 1)[0].decode("utf-8", "replace"), pid)

    def _read(self, vaddr: int, size: int) -> bytes:
        """`size` bytes that are aligned to their size, or lie in a structure that is: they do not cross a page."""
        vaddr &= (1 << 8 * self.word) - 1
        start = vaddr & -_PAGE
        paddr = self._pages.get(start)
        if paddr is None:
            paddr = self.memory.translate(start, self.root)
            if paddr is None:
                raise MemoryFault(vaddr)
            if len(self._pages) >= _MAX_PAGES:
                self._pages.clear()
            self._pages[start] = paddr
        return self.memory.read_physical(paddr + vaddr - start, size)


def current_tasks(memory: Memory, kernel: KernelTypes) -> LinuxTasks | str:
    """The task reader of a kernel, or why there is none.

    The current task's address is the per-cpu variable current_task (before 6.2) or a member of pcpu_hot (until 6.14;
    asm/current.h of each).
    """
    offsets = kernel.address("__per_cpu_offset")
    variable, hot = kernel.address("current_task"), kernel.address("pcpu_hot")
    if offsets is None or (variable is None and hot is None):
        return "the kernel's symbols do not say where the current task is"
    types = kernel.btf
    try:
        pid, comm = types.offset("task_struct", "pid"), types.offset("task_struct", "comm")
        if variable is None and hot is not None:
            variable = hot + types.offset("pcpu_hot", "current_task")
    except BtfError as error:
        return str(error)
    assert variable is not None
    return LinuxTasks(memory, kernel.root, types.pointer_size, offsets - kernel.virtual_offset, variable, pid, comm)
