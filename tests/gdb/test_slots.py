"""No address of an instruction slot gets out: not at a budget's end, not to an interrupt handler, not to a debugger.

A probed loop is cut short at every instruction count, and interrupted by the timer at many of them.
"""

from __future__ import annotations

import pytest

from emu.boot import GuestMachine, boot_embedded
from emu.stops import Breakpoint, Budget, Interrupted, PowerOff
from probes import Kprobe, Manager

OUT = b"\x66\xef"  # out dx, ax
PROBED = ["target", "nested_target", "fib", "do_timer", "do_irq", "schedule"]


@pytest.fixture(params=[64, 32])
def bits(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


def at_work(bits: int, append: str = "calls=40 poweroff") -> GuestMachine:
    """The guest at the first call of its functions."""
    machine = boot_embedded(bits, append)
    (exercise,) = machine.symbols.lookup("exercise")
    machine.insert_breakpoint(exercise.address)
    assert isinstance(machine.run(10_000_000), Breakpoint)
    machine.remove_breakpoint(exercise.address)
    return machine


def armed(machine: GuestMachine, observed: bool) -> list[Kprobe]:
    """PROBED, by int3; `observed` has each instruction stepped alone for a post-handler, else the slot runs boosted."""
    manager = Manager(machine)
    post = (lambda _probe, _regs: None) if observed else None
    probes = [Kprobe(symbol=name, arm="int3", post_handler=post) for name in PROBED]
    manager.register_many(probes)
    return probes


def leaks(machine: GuestMachine) -> list[str]:
    """Where a slot's address shows: registers and what the stack holds near its top."""
    names = machine.registers.arch.names
    found = [name for name in names[: names.index("eflags")] if machine.window.contains(machine.registers.read(name))]
    word = machine.bits // 8
    top = machine.registers.read("rsp" if word == 8 else "esp")
    stack = machine.memory.read(top - 16 * word, 48 * word)
    for offset in range(0, len(stack), word):
        if machine.window.contains(int.from_bytes(stack[offset : offset + word], "little")):
            found.append(f"stack{offset - 16 * word:+}")
    return found


@pytest.mark.parametrize("observed", [False, True])
def test_a_run_cut_at_every_instruction_shows_no_slot(bits: int, observed: bool):
    """By its budget; the clock, the stops and the end are those of a run without probes."""
    bare, probed = at_work(bits), at_work(bits)
    probes = armed(probed, observed)
    for _ in range(1500):
        assert isinstance(probed.run(1), Budget)
        assert isinstance(bare.run(1), Budget)
        assert leaks(probed) == []
        assert (probed.registers.read_many(probed.registers.arch.names), probed.instructions) == (
            bare.registers.read_many(bare.registers.arch.names),
            bare.instructions,
        )
    assert sum(probe.hits for probe in probes) > 20
    assert isinstance(probed.run(100_000_000), PowerOff)
    assert isinstance(bare.run(100_000_000), PowerOff)
    assert (probed.instructions, probed.ram_sha256()) == (bare.instructions, bare.ram_sha256())


@pytest.mark.parametrize("observed", [False, True])
def test_ctrl_c_at_every_instruction_shows_no_slot(bits: int, observed: bool):
    """Requested again before each instruction."""
    machine = at_work(bits)
    armed(machine, observed)
    for _ in range(400):
        machine.request_stop()
        assert isinstance(machine.run(), Interrupted)
        assert leaks(machine) == []
        machine.step()
        assert leaks(machine) == []


@pytest.mark.parametrize("observed", [False, True])
def test_a_timer_interrupt_at_every_instruction_saves_no_slot(bits: int, observed: bool):
    """An interrupt that becomes due at each count in turn: its handler finds the guest's own pc in its frame."""
    machine = at_work(bits)
    start = machine.snapshot()
    armed(machine, observed)
    (handler,) = machine.symbols.lookup("timer_interrupt")
    machine.insert_breakpoint(handler.address)
    for count in range(120):
        machine.restore(start)
        assert isinstance(machine.run(count), Budget)
        machine.devices.pic.set_irq(0, False)
        machine.devices.pic.set_irq(0, True)
        assert isinstance(machine.run(100_000), Breakpoint)
        assert leaks(machine) == []


@pytest.mark.parametrize("observed", [False, True])
def test_an_end_that_a_probed_instruction_brings_about_shows_no_slot(bits: int, observed: bool):
    """The OUT that switches the machine off executes in the slot; what is seen then is the guest's own pc."""
    machine = at_work(bits, "calls=1 poweroff")
    (function,) = machine.symbols.lookup("do_poweroff")
    out = function.address + machine.memory.read(function.address, function.size).index(OUT)
    post = (lambda _probe, _regs: None) if observed else None
    Manager(machine).register(Kprobe(addr=out, arm="int3", post_handler=post))
    assert isinstance(machine.run(100_000_000), PowerOff)
    assert leaks(machine) == []
    assert machine.cpu.linear_pc == out + len(OUT)
