"""Many probes at once, anywhere in a kernel's code: the guest neither sees them nor is late.

Boundaries are drawn with a fixed seed from the whole of .text and armed by int3; GDBSTUB_BOUNDARIES says how many.
"""

from __future__ import annotations

import os
import random

import pytest

from emu.boot import GuestMachine
from emu.insn import boundaries
from probes import Kprobe, Manager
from probes.regs import Regs
from tests.support.kernels import another, run_shell

pytestmark = pytest.mark.boots

COUNT = int(os.environ.get("GDBSTUB_BOUNDARIES", "300"))
HOT = 50  # hits after which a probe takes itself away
LONGEST = 4096  # bytes of a function to draw from: decoding starts at its first
COMMAND = "ls -l / > /tmp/l; cat /tmp/l /proc/version /proc/filesystems | md5sum; dmesg | md5sum; ps | wc -l"


def draw(machine: GuestMachine, count: int) -> list[int]:
    """`count` addresses of instructions, from functions drawn by their size."""
    start, end = (machine.symbols.lookup(name)[0].address for name in ("_stext", "__noinstr_text_end"))
    functions = sorted(
        {s.address: s.size for s in machine.symbols if start <= s.address < end and 0 < s.size <= LONGEST}.items()
    )
    chosen: set[int] = set()
    chance = random.Random(20051)
    while len(chosen) < count:
        address, size = chance.choices(functions, [size for _, size in functions])[0]
        code = machine.memory.read(address, size)
        starts = boundaries(
            lambda vaddr, length, code=code, address=address: code[vaddr - address :][:length],
            address,
            address + size,
            machine.guest.bits,
        )
        chosen.add(chance.choice(sorted(starts)))
    return sorted(chosen)


@pytest.mark.parametrize("name", ["amd64", "i386"])
def test_probes_at_random_instructions_change_nothing_a_guest_can_tell(name: str) -> None:
    """Shown: with int3 on random instructions, hot ones disarmed by their own handler, the shell's files have the bare
    run's sums and the clock its count of instructions; hits come, and none but the hot are disarmed."""
    bare, probed = another(name), another(name)
    manager = Manager(probed)

    def cool(probe: Kprobe, regs: Regs) -> None:
        if probe.hits >= HOT:
            manager.disable(probe)

    probes = [Kprobe(addr=address, pre_handler=cool) for address in draw(bare, COUNT)]
    manager.register_many(probes)
    assert run_shell(probed, COMMAND) == run_shell(bare, COMMAND)
    assert probed.instructions == bare.instructions
    assert sum(probe.hits for probe in probes) > COUNT // 10
    assert all(probe.disabled == (probe.hits == HOT) for probe in probes)
    assert all(probe.hits <= HOT and probe.nmissed == 0 for probe in probes)
