"""Who runs in a Linux guest: the current task's name and number, cheaply, for the moment of a hit.

Rules: called in the machine's thread; reads guest memory only, and physically, so that it answers in user mode too. The
places come from the kernel's own types (kernel.py) once; drgn is not asked. Where a kernel does not say what is needed,
`current_tasks` returns the reason, and nobody guesses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from emu.iface import Cpu, Memory, MemoryFault
from probes import rawtext
from probes.btf import BtfError
from probes.fetch import Task, UnknownTask
from probes.linux.kernel import KernelTypes

COMM_SIZE: Final = 16  # TASK_COMM_LEN, include/linux/sched.h
NEED_RESCHED, HARDIRQ, SOFTIRQ, PREEMPT_RESCHED, NMI, BH_OFF = 0x04, 0x08, 0x10, 0x20, 0x40, 0x80
"""enum trace_flag_type, include/linux/trace_events.h, 6.12."""
_TIF_NEED_RESCHED: Final = 3  # arch/x86/include/asm/thread_info.h: its bit
# include/linux/preempt.h and arch/x86/include/asm/preempt.h: parts of preempt_count; the last is set where nobody asks
_PREEMPT, _SOFTIRQ_OFFSET, _SOFTIRQ_OFF, _HARDIRQ, _NMI = 0xFF, 0x100, 0xFE00, 0xF0000, 0xF00000
_PREEMPT_UNASKED: Final = 1 << 31
_MAX_TASK: Final = 64 << 10  # bytes of a task_struct; it has 6 to 14 thousand
_MOST: Final = 15  # of either depth; more is shown as this
_PAGE: Final = 0x1000
_MAX_PAGES: Final = 4096  # kept translations; a guest has a page or two for each task


@dataclass(frozen=True, slots=True)
class Offsets:
    """Of a task_struct's members; `migration_disabled` is None where the kernel does not count that."""

    flags: int
    pid: int
    comm: int
    migration_disabled: int | None

    @property
    def end(self) -> int:
        """Behind the last of them."""
        return max(self.flags, self.pid, self.comm, self.migration_disabled or 0) + COMM_SIZE


@dataclass(frozen=True, slots=True)
class LinuxTasks:
    """Implements fetch.TaskInfo.

    `area_at` is the physical place of the address of processor 0's per-cpu area (the guest decides while it boots);
    `variable` and `preempt_count` are offsets in that area, of the current task's pointer and of preempt_count.
    `root`: the kernel's page tables.
    """

    memory: Memory
    root: int
    word: int
    area_at: int
    variable: int
    preempt_count: int
    offsets: Offsets
    _pages: dict[int, int] = field(default_factory=dict)
    """Virtual to physical. Per-cpu areas and tasks lie where the kernel maps all memory, one to one and for good."""

    def address(self) -> int:
        """Of the current task's task_struct. MemoryFault before the kernel has set its per-cpu area up."""
        return self._state()[0]

    def current(self, cpu: Cpu) -> Task:
        """comm and pid as /proc shows them for the running thread, and in what context it runs."""
        offsets = self.offsets
        try:
            task, count = self._state()
            # In one piece: each read costs more than the two or three thousand bytes do.
            data = self._read(task, offsets.end)
        except MemoryFault:
            return UnknownTask().current(cpu)
        comm = rawtext.decode(data[offsets.comm : offsets.comm + COMM_SIZE].partition(b"\0")[0])
        pid = int.from_bytes(data[offsets.pid : offsets.pid + 4], "little", signed=True)
        asked = data[offsets.flags] >> _TIF_NEED_RESCHED & 1
        pinned = offsets.migration_disabled
        migration = 0 if pinned is None else min(int.from_bytes(data[pinned : pinned + 2], "little"), _MOST)
        return Task(comm, pid, _flags(count, asked), min(count & _PREEMPT, _MOST) | migration << 4)

    def _state(self) -> tuple[int, int]:
        """The current task's address and preempt_count."""
        area = int.from_bytes(self.memory.read_physical(self.area_at, self.word), "little")
        start = min(self.variable, self.preempt_count)
        data = self._read(area + start, max(self.variable, self.preempt_count) + self.word - start)
        task, count = self.variable - start, self.preempt_count - start
        return int.from_bytes(data[task : task + self.word], "little"), int.from_bytes(
            data[count : count + 4], "little"
        )

    def _read(self, vaddr: int, size: int) -> bytes:
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


def _flags(count: int, asked: int) -> int:
    """tracing_gen_ctx_irq_test() in kernel/trace/trace.c, without what the processor knows: the interrupt flag."""
    found = NEED_RESCHED if asked else 0
    for mask, flag in ((_SOFTIRQ_OFFSET, SOFTIRQ), (_SOFTIRQ_OFF, BH_OFF), (_HARDIRQ, HARDIRQ), (_NMI, NMI)):
        if count & mask:
            found |= flag
    return found if count & _PREEMPT_UNASKED else found | PREEMPT_RESCHED


def current_tasks(memory: Memory, kernel: KernelTypes) -> LinuxTasks | str:
    """The task reader of a kernel, or why there is none.

    The current task's address and preempt_count are per-cpu variables (before 6.2) or members of pcpu_hot (until 6.14;
    asm/current.h and asm/preempt.h of each).
    """
    areas = kernel.address("__per_cpu_offset")
    types = kernel.btf
    try:
        current = _per_cpu(kernel, "current_task", "current_task")
        count = _per_cpu(kernel, "__preempt_count", "preempt_count")
        offsets = Offsets(
            types.offset("task_struct", "thread_info") + types.offset("thread_info", "flags"),
            types.offset("task_struct", "pid"),
            types.offset("task_struct", "comm"),
            _optional(kernel, "migration_disabled"),
        )
    except BtfError as error:
        return str(error)
    if areas is None or current is None or count is None or abs(current - count) > _PAGE or offsets.end > _MAX_TASK:
        return "the kernel's symbols do not say where the current task is"
    area_at = areas - kernel.virtual_offset
    return LinuxTasks(memory, kernel.root, types.pointer_size, area_at, current, count, offsets)


def _per_cpu(kernel: KernelTypes, variable: str, member: str) -> int | None:
    """The offset in the per-cpu area of `variable`, or of the member of pcpu_hot that took its place. BtfError."""
    own = kernel.address(variable)
    if own is not None:
        return own
    hot = kernel.address("pcpu_hot")
    return None if hot is None else hot + kernel.btf.offset("pcpu_hot", member)


def _optional(kernel: KernelTypes, member: str) -> int | None:
    try:
        return kernel.btf.offset("task_struct", member)
    except BtfError:
        return None
