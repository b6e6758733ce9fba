"""Who runs in a Linux guest: the current task's name and number, by the types of its own BTF.

Rules: called in the machine's thread at a hit; reads guest memory only. Where a kernel does not say what is needed
(no BTF, no such symbol), `linux_tasks` returns None with the reason, and nobody guesses.
"""

from __future__ import annotations

from dataclasses import dataclass

from emu.iface import Cpu, Machine, MemoryFault
from probes.fetch import Task, UnknownTask
from probes.linux.btf import Btf, BtfError

_MASK = (1 << 64) - 1
COMM_SIZE = 16  # TASK_COMM_LEN, include/linux/sched.h


@dataclass(frozen=True, slots=True)
class LinuxTasks:
    """Implements fetch.TaskInfo.

    `area_at` is where the guest keeps the address of processor 0's per-cpu area (it decides while it boots), `variable`
    the place of the current task's pointer in that area.
    """

    machine: Machine
    area_at: int
    variable: int
    pid_offset: int
    comm_offset: int

    def address(self) -> int:
        """Of the current task's task_struct. MemoryFault before the kernel has set its per-cpu area up."""
        read = self.machine.memory.read
        area = int.from_bytes(read(self.area_at, 8), "little")
        return int.from_bytes(read((area + self.variable) & _MASK, 8), "little")

    def current(self, cpu: Cpu) -> Task:
        """comm and pid as /proc shows them for the running thread."""
        read = self.machine.memory.read
        try:
            task = self.address()
            pid = int.from_bytes(read(task + self.pid_offset, 4), "little", signed=True)
            comm = read(task + self.comm_offset, COMM_SIZE)
        except MemoryFault:
            return UnknownTask().current(cpu)
        return Task(comm.split(b"\0", 1)[0].decode("utf-8", "replace"), pid)


def linux_tasks(machine: Machine, btf: bytes) -> LinuxTasks | str:
    """The task reader of an amd64 Linux guest, or why there is none.

    The current task's address is the per-cpu variable current_task (before 6.2) or the first word of pcpu_hot
    (include/linux: asm/current.h of each).
    """
    if not btf:
        return "the kernel has no BTF"
    symbols = machine.symbols
    offsets = symbols.lookup("__per_cpu_offset")
    variable = symbols.lookup("current_task") or symbols.lookup("pcpu_hot")
    if not offsets or not variable:
        return "the kernel's symbols do not say where the current task is"
    try:
        types = Btf(btf)
        pid, comm = types.offset("task_struct", "pid"), types.offset("task_struct", "comm")
        within = 0 if symbols.lookup("current_task") else types.offset("pcpu_hot", "current_task")
    except BtfError as error:
        return str(error)
    return LinuxTasks(machine, offsets[0].address, variable[0].address + within, pid, comm)
