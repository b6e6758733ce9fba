"""A probe and a debugger's watchpoint on one instruction: the stop is at the guest's own next one, and each counts."""

from __future__ import annotations

import pytest

from emu.boot import GuestMachine, boot_embedded
from emu.stops import WatchKind, Watchpoint
from probes.manager import Manager

APPEND = "calls=5 exit=0"


def facts(machine: GuestMachine) -> tuple[object, ...]:
    return (machine.instructions, machine.ram_sha256())


@pytest.mark.parametrize("arm", ["int3", "hook"])
@pytest.mark.parametrize("bits", [64, 32])
def test_an_instruction_executed_out_of_line_is_watched(bits: int, arm: str):
    """`push` at a function's entry, which a probe executes in its slot, stores to the stack."""
    machine, bare = boot_embedded(bits, APPEND), boot_embedded(bits, APPEND)
    entry = machine.symbols.lookup("inner_target")[0].address
    machine.insert_breakpoint(entry)
    machine.run(5_000_000)
    machine.remove_breakpoint(entry)
    probes = Manager(machine)
    probes.add("kprobe", "p:entry inner_target", {"arm": arm})
    word = bits // 8
    machine.insert_watchpoint(WatchKind.WRITE, machine.registers.read("rsp" if bits == 64 else "esp") - word, word)
    stop = machine.run(5_000_000)
    assert isinstance(stop, Watchpoint)
    assert stop.pc == entry + 1  # behind the push
    while isinstance(stop, Watchpoint):
        assert not machine.window.contains(stop.pc)
        stop = machine.run(5_000_000)
    assert (bare.run(5_000_000), facts(bare)) == (stop, facts(machine))
    (status,) = probes.status()
    counter = machine.symbols.lookup("count_inner_target")[0].address
    assert status.hits == int.from_bytes(machine.memory.read(counter, word), "little") > 0
