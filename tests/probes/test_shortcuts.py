"""Hits by the short way: taken as long as nothing it rests on has changed, and then the same as by the long way.

`CALLS` runs in ring 0 by 4 KiB pages; the probe stands on `f`. The guest has no handlers for #BP and #DB.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from emu.machine import Machine
from emu.stops import Breakpoint, Budget, GuestExit, Halted
from probes import Kprobe, Manager
from probes.regs import Regs
from tests.support.assemble import assemble
from tests.support.embedded import power_on
from tests.support.trapping import CODE, MEMORY, trapping_image

CALLS = "l: call f; jmp l; f: add rax, rbx; ret"
F = CODE + 7
ROUND = 4  # instructions
SPARE = 0x80000  # a page that nobody uses
TF = 0x100
ENOUGH = 1_000_000
Handler = Callable[[Manager, Kprobe, Regs], object]


def looping() -> Machine:
    machine = Machine(MEMORY)
    machine.power_on(trapping_image(assemble(CALLS, 64, CODE), 0, ring=0))
    while machine.cpu.pc != CODE:
        machine.run(1)
    machine.cpu.gpr[0], machine.cpu.gpr[3] = 0, 1
    return machine


def probed(machine: Machine, handler: Handler = lambda *_: None, **how: object) -> tuple[Manager, Kprobe]:
    manager = Manager(machine)
    probe = Kprobe(addr=F, pre_handler=lambda p, regs: handler(manager, p, regs), arm="int3", **how)  # type: ignore[arg-type]
    manager.register(probe)
    return manager, probe


def count_long_ways(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The places of hits that come to the trap client."""
    client, found = machine.trap_client, []
    assert client is not None
    on_break = client.on_break

    def counted(cpu, pc, back_end):
        found.append(pc)
        return on_break(cpu, pc, back_end)

    monkeypatch.setattr(client, "on_break", counted)
    return found


def entry(machine: Machine, level: int, vaddr: int) -> int:
    """Physical address of the entry for `vaddr` in the image's tables, which lie behind one another; 0 is the root."""
    return machine.cpu.cr3 + 0x1000 * level + 8 * (vaddr >> (39 - 9 * level) & 511)


@pytest.mark.parametrize("observed", [False, True])
def test_hits_take_the_short_way(monkeypatch: pytest.MonkeyPatch, observed: bool):
    """None comes to the trap client, and the guest is where the bare one is."""
    machine, bare = looping(), looping()
    after: list[int] = []
    _, probe = probed(machine, post_handler=(lambda _p, regs: after.append(regs.ip)) if observed else None)
    long_ways = count_long_ways(machine, monkeypatch)
    assert machine.run(10 * ROUND) == bare.run(10 * ROUND)
    assert (probe.hits, long_ways) == (10, [])
    assert after == [F + 3] * 10 * observed
    assert machine.registers.read_many(machine.registers.arch.names) == bare.registers.read_many(
        bare.registers.arch.names
    )
    assert machine.ram_sha256() == bare.ram_sha256()


def test_another_root_with_the_same_tables_is_no_long_way(monkeypatch: pytest.MonkeyPatch):
    """Address spaces share the kernel's tables: only the root differs."""
    machine = looping()
    _, probe = probed(machine)
    machine.ram.write(SPARE, machine.ram.read(machine.cpu.cr3, 0x1000))
    machine.registers.write("cr3", SPARE)
    long_ways = count_long_ways(machine, monkeypatch)
    machine.run(10 * ROUND)
    assert (probe.hits, long_ways) == (10, [])


def test_a_stop_elsewhere_is_no_reason_for_the_long_way(monkeypatch: pytest.MonkeyPatch):
    """A debugger has stopped the guest and gone on."""
    machine = looping()
    _, probe = probed(machine)
    machine.insert_breakpoint(CODE + 5)
    assert isinstance(machine.run(ROUND), Breakpoint)
    machine.remove_breakpoint(CODE + 5)
    long_ways = count_long_ways(machine, monkeypatch)
    machine.run(10 * ROUND)
    assert (probe.hits, long_ways) == (11, [])


def test_an_int3_of_the_guests_own_in_another_page_is_the_guests():
    """The page of the probe is exchanged for one with an int3 at the same place: the guest, without a gate, halts."""
    machine = looping()
    _, probe = probed(machine)
    machine.run(2 * ROUND)
    code = machine.memory.read(CODE, 0x1000)
    machine.ram.write(SPARE, code[: F - CODE] + b"\xcc" + code[F - CODE + 1 :])
    machine.ram.write(entry(machine, 3, CODE), struct.pack("<Q", SPARE | 7))
    machine.engine.flush()
    assert isinstance(machine.run(2 * ROUND), Halted)
    assert probe.hits == 2


@pytest.mark.parametrize("observed", [False, True])
def test_what_stands_behind_the_int3_is_executed_as_it_is_now(observed: bool):
    """Somebody has made `add rax, rcx` of it, without touching the first byte."""
    machine = looping()
    _, probe = probed(machine, post_handler=(lambda *_: None) if observed else None)
    machine.cpu.gpr[1] = 100
    machine.run(2 * ROUND)
    machine.ram.write(F + 2, b"\xc8")
    machine.engine.flush()
    machine.run(2 * ROUND)
    assert (machine.cpu.gpr[0], probe.hits) == (202, 4)


def _set_tf(_manager: Manager, _probe: Kprobe, regs: Regs) -> None:
    regs.flags |= TF


def _skip(_manager: Manager, probe: Kprobe, regs: Regs) -> bool:
    regs.ip = F + 3
    return probe.hits % 2 == 0


def _unregister(manager: Manager, probe: Kprobe, _regs: Regs) -> None:
    if probe.hits == 3:
        manager.unregister(probe)


def _change(_manager: Manager, _probe: Kprobe, regs: Regs) -> None:
    regs.bx += 1
    regs.flags |= 1


def _observe(manager: Manager, probe: Kprobe, _regs: Regs) -> None:
    if probe.hits == 3:
        manager.register(Kprobe(addr=F, post_handler=lambda _p, regs: setattr(regs, "cx", regs.cx + regs.ax)))


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("handler", [_set_tf, _skip, _unregister, _change, _observe])
def test_a_handler_that_changes_what_is_usual_is_heeded(handler: Handler, observed: bool):
    """The short way and the long way come to the same registers, at the same time."""
    ends = []
    for short in (False, True):
        machine = looping()
        _, probe = probed(machine, handler, post_handler=(lambda *_: None) if observed else None)
        stop = None
        for _ in range(8):  # a cleared shortcut comes back with the first hit
            if not short:
                machine.shortcuts.clear()
            stop = machine.run(ROUND)
            if not isinstance(stop, Budget):
                break
        ends.append((stop, machine.registers.read_many(machine.registers.arch.names), probe.hits))
    assert ends[0] == ends[1]


def test_a_handler_that_raises_leaves_no_hit_open(monkeypatch: pytest.MonkeyPatch):
    """The run ends with its traceback; the next hit is a hit, not one inside another."""
    machine = looping()
    failing = [True]

    def handler(*_: object) -> None:
        if failing.pop():
            raise ValueError("the handler's own")
        failing.append(False)

    _, probe = probed(machine, handler)
    assert "the handler's own" in getattr(machine.run(ROUND), "report", "")
    failing.append(False)
    machine.run(4 * ROUND)
    assert (probe.nmissed, probe.hits > 3) == (0, True)


@pytest.mark.parametrize("bits", [64, 32])
def test_stepped_hits_leave_no_trace_in_pushed_flags(bits: int) -> None:
    """Faults of the guest are delivered between them: what their frames hold below the stack is the bare run's."""
    bare, machine = power_on(bits, "calls=9 exit=0"), power_on(bits, "calls=9 exit=0")
    probe = Kprobe(symbol="target", post_handler=lambda *_: None)
    Manager(machine).register(probe)
    assert bare.run(ENOUGH) == machine.run(ENOUGH) == GuestExit(0)
    assert probe.hits == 27
    assert machine.ram_sha256() == bare.ram_sha256()
