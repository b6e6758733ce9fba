"""Which task runs: by the guest's own pointer, by its per-cpu area, or by the stack."""

from __future__ import annotations

import pytest

from emu.iface import MemoryFault
from probes.fetch import Task
from probes.tasks import CurrentPerCpu, CurrentSymbol, Tasks, find_tasks
from tests.support.embedded import Guest, power_on
from tests.support.fake_cpu import FakeCpu, ProbedMachine
from tests.support.fake_machine import FakeSymbol

PER_CPU, CURRENT_TASK, TASK = 0xFFFF_8880_0FC0_0000, 0x1FB80, 0xFFFF_8880_0123_4000
LINUX = (FakeSymbol("release_task", 0x1000, 8), FakeSymbol("__switch_to", 0x2000, 8))


class KernelCpu(FakeCpu):
    """A processor whose GS points where it is told."""

    gs = PER_CPU

    def segment_base(self, name: str) -> int:
        return self.gs if name == "gs" else 0


def linux(*variables: FakeSymbol) -> ProbedMachine:
    machine = ProbedMachine(*LINUX, FakeSymbol("entry_SYSCALL_64", 0x3000, 8), *variables)
    machine.memory.map(PER_CPU + (CURRENT_TASK & ~0xFFF), bytes(CURRENT_TASK & 0xFFF) + TASK.to_bytes(8, "little"))
    return machine


@pytest.mark.parametrize("name", ["current_task", "pcpu_hot"])
def test_amd64_linux_keeps_current_in_its_per_cpu_area(name: str) -> None:
    """By whichever symbol the version has; the stack does not matter."""
    tasks = find_tasks(linux(FakeSymbol(name, CURRENT_TASK, 0)))
    assert isinstance(tasks, CurrentPerCpu)
    assert tasks.identify(KernelCpu(), 0x5000) == TASK
    assert (tasks.is_linux, tasks.preemptible) == (True, True)


@pytest.mark.parametrize(("cpl", "gs"), [(3, PER_CPU), (0, 0x7F00_0000_0000)], ids=["ring 3", "before swapgs"])
def test_without_the_kernels_gs_the_stack_tells(cpl: int, gs: int) -> None:
    """16 KiB of it are one task's."""
    tasks = find_tasks(linux(FakeSymbol("current_task", CURRENT_TASK, 0)))
    cpu = KernelCpu(cpl=cpl)
    cpu.gs = gs
    assert tasks.identify(cpu, 0x7_4008) == tasks.identify(cpu, 0x7_7FF8) != tasks.identify(cpu, 0x7_8000)


def test_per_cpu_area_that_is_not_there_is_a_fault() -> None:
    """Early in the boot; never a number made up."""
    tasks = find_tasks(linux(FakeSymbol("current_task", CURRENT_TASK, 0)))
    cpu = KernelCpu()
    cpu.gs = PER_CPU + (1 << 30)
    with pytest.raises(MemoryFault):
        tasks.identify(cpu, 0)


def test_i386_linux_tells_tasks_by_their_8_kib_stacks() -> None:
    """Its symbols have no per-cpu variables."""
    tasks = find_tasks(ProbedMachine(*LINUX, bits=32))
    assert type(tasks) is Tasks
    assert tasks.identify(FakeCpu(), 0xC123_5FFC) == 0xC123_4000
    assert (tasks.is_linux, tasks.same_stack(0xC123_4000, 0xC123_6000)) == (True, False)


def test_unknown_image_has_stacks_only() -> None:
    """No names, no exits to watch, not preemptible as far as anybody knows."""
    machine = ProbedMachine(FakeSymbol("start", 0x1000, 8))
    tasks = find_tasks(machine)
    assert (type(tasks), tasks.exits, tasks.preemptible) == (Tasks, (), False)
    assert tasks.current(FakeCpu()) == Task("<...>", 0)


@pytest.mark.parametrize("bits", [64, 32])
def test_embedded_guests_tasks_have_names(bits: int) -> None:
    """`current` is struct task's address; a pid and a name begin it."""
    machine = power_on(bits, "sleep=1 exit=0")
    guest, tasks = Guest(machine, bits), find_tasks(machine)
    assert isinstance(tasks, CurrentSymbol)
    seen = set()
    for _ in range(2):
        machine.insert_breakpoint(guest.address("sleeping_target"))
        machine.run(1_000_000)
        seen.add((tasks.identify(machine.cpu, 0), tasks.current(machine.cpu)))
    assert seen == {
        (guest.address("init_task"), Task("init", 1)),
        (guest.address("helper_task"), Task("helper", 2)),
    }


def test_name_that_is_not_there_is_unknown() -> None:
    """Before paging the pointer leads nowhere; a record is made all the same."""
    machine = power_on(64)
    assert find_tasks(machine).current(machine.cpu) == Task("<...>", 0)
