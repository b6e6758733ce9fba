"""Which task runs, as a number, and when one is gone: what return probes are bound to.

Rules: called in the engine's thread at a hit; reads guest memory only, and what it reads must be known, not guessed.
A task's number means nothing but itself: it is its alone while the task lives, and may be used again afterwards.
Names and process ids for people are `fetch.TaskInfo`'s affair.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from emu.iface import Cpu, Machine, MemoryFault, Symbol
from probes import rawtext
from probes.fetch import Task, UnknownTask
from probes.linux.tasks import LinuxTasks

# THREAD_SIZE: arch/x86/include/asm/page_64_types.h and page_32_types.h, 2.6.12 to 6.12 without KASAN.
_STACK_64: Final = 16 << 10
_STACK_32: Final = 8 << 10
_EMBEDDED_STACK: Final = 4 << 10
_KERNEL_HALF: Final = 1 << 63
_SPLIT: Final = 1 << 30  # CONFIG_VMSPLIT of i386, whose kernel begins 16 MB above PAGE_OFFSET
_COMM: Final = 16


@dataclass(frozen=True, slots=True)
class Tasks:
    """The tasks of a guest nobody knows: one for each aligned piece of `stack_size` bytes of stack.

    `exits` are functions a task enters to end, never to return from, and `switches` those that then give the processor
    to another: best first, the first that exists counts. `is_linux` and `preemptible` say what return probes' defaults
    depend on. Addresses below `kernel_start` are programs'. Implements fetch.TaskInfo with nothing to tell.
    """

    machine: Machine
    stack_size: int = _STACK_32
    exits: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    is_linux: bool = False
    preemptible: bool = False
    kernel_start: int = 0

    @property
    def tells(self) -> bool:
        """`current` knows the task's name and process id."""
        return False

    def identify(self, cpu: Cpu, stack_address: int) -> int:
        """The number of the task that runs now; `stack_address` is a linear address in its stack.

        MemoryFault where the guest keeps it in memory that is not there.
        """
        return stack_address & -self.stack_size

    def same_stack(self, one: int, other: int) -> bool:
        """Two addresses lie on one stack; an interrupt may have moved a task to another for a while."""
        return one & -self.stack_size == other & -self.stack_size

    def current(self, cpu: Cpu) -> Task:
        return UnknownTask().current(cpu)


@dataclass(frozen=True, slots=True)
class CurrentPerCpu(Tasks):
    """Linux on amd64: `current` is a per-cpu variable at `offset`, whose area GS points to in the kernel."""

    offset: int = 0

    def identify(self, cpu: Cpu, stack_address: int) -> int:
        base = cpu.segment_base("gs")
        if cpu.cpl == 3 or base < _KERNEL_HALF:
            return stack_address & -self.stack_size  # before SWAPGS; functions return there before it, too
        return int.from_bytes(self.machine.memory.read(base + self.offset & (1 << 64) - 1, 8), "little")


@dataclass(frozen=True, slots=True)
class CurrentLinux(Tasks):
    """A Linux whose types are known: `current` as its own per-cpu variable has it, in any mode and on any stack."""

    reader: LinuxTasks = field(kw_only=True)

    @property
    def tells(self) -> bool:
        """By `reader`, which is what events ask."""
        return True

    def identify(self, cpu: Cpu, stack_address: int) -> int:
        return self.reader.address()


@dataclass(frozen=True, slots=True)
class CurrentSymbol(Tasks):
    """A kernel that keeps a pointer to the task that runs at `variable`, as the embedded guest does.

    `described`: its tasks begin with a pid and a pointer to their name, a machine word each.
    """

    variable: int = 0
    described: bool = False

    @property
    def tells(self) -> bool:
        """Where its tasks are described."""
        return self.described

    def identify(self, cpu: Cpu, stack_address: int) -> int:
        return self._word(self.variable)

    def current(self, cpu: Cpu) -> Task:
        if not self.described:
            return UnknownTask().current(cpu)
        try:
            task = self._word(self.variable)
            name = self.machine.memory.read(self._word(task + self.machine.bits // 8), _COMM)
            return Task(rawtext.decode(name.partition(b"\0")[0]), self._word(task))
        except MemoryFault:
            return UnknownTask().current(cpu)

    def _word(self, address: int) -> int:
        return int.from_bytes(self.machine.memory.read(address, self.machine.bits // 8), "little")


_LINUX_EXITS: Final = ("do_task_dead", "do_exit")  # the first since 4.8; preemption is off from there to the switch
_LINUX_SWITCHES: Final = ("__switch_to",)


def find_tasks(machine: Machine, linux: LinuxTasks | None = None) -> Tasks:
    """What this guest's symbols say about its tasks; `linux` is what its types say."""
    if _symbol(machine, "release_task") is not None and _symbol(machine, "__switch_to") is not None:
        return _linux_tasks(machine, linux)
    current = _symbol(machine, "current")
    if current is None:
        return Tasks(machine)
    embedded = all(_symbol(machine, name) is not None for name in ("idle_task", "user_vmas", "need_resched"))
    return CurrentSymbol(
        machine,
        stack_size=_EMBEDDED_STACK if embedded else _STACK_32,
        exits=("do_exit",),
        switches=("switch_to", "__switch_to"),
        preemptible=_symbol(machine, "need_resched") is not None,
        variable=current.address,
        described=embedded,
    )


def _linux_tasks(machine: Machine, linux: LinuxTasks | None) -> Tasks:
    # Without types: current_task was a per-cpu variable of its own until 6.1, is the first of pcpu_hot's members since
    # 6.2 (and again a variable since 6.15). i386's kallsyms have neither: its stacks tell tasks apart, those of
    # interrupts included.
    variable = _symbol(machine, "current_task") or _symbol(machine, "pcpu_hot")
    is_64 = _symbol(machine, "entry_SYSCALL_64") is not None
    text = _symbol(machine, "_text")
    start = _KERNEL_HALF if is_64 else 0 if text is None else text.address & -_SPLIT
    size = _STACK_64 if is_64 else _STACK_32
    common = machine, size, _LINUX_EXITS, _LINUX_SWITCHES, True, True, start
    if linux is not None:
        return CurrentLinux(*common, reader=linux)
    if variable is None or variable.address >= _KERNEL_HALF:
        return Tasks(*common)
    return CurrentPerCpu(*common, offset=variable.address)


def _symbol(machine: Machine, name: str) -> Symbol | None:
    found = machine.symbols.lookup(name)
    return found[0] if found else None
