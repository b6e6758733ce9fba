"""Many probes at once, anywhere in a kernel's code: the guest neither sees them nor is late.

Boundaries are drawn with a fixed seed from the whole of .text; GDBSTUB_BOUNDARIES says how many. A booted kernel gets
them by int3, all at once. A booting one gets them from its first instruction on by PC hook, as many at a time as there
can be, and by int3 from when it has settled; with fewer of them than 2,000 only the boot's beginning is run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

import pytest

from emu.boot import GuestMachine
from emu.insn import boundaries
from emu.stops import Budget, ConsoleMatch
from probes import Kprobe, Manager
from probes.core import MAX_HOOKS
from probes.regs import Regs
from tests.support.kernels import BOOT_BUDGET, PROMPT, another, run_shell, run_until, switched_on

pytestmark = pytest.mark.boots

COUNT = int(os.environ.get("GDBSTUB_BOUNDARIES", "300"))
WHOLE = COUNT >= 2000
EARLY = 40_000_000  # instructions of a boot's beginning
HOT = 50  # hits after which a probe takes itself away
HOT_HOOK = 1  # ... by a PC hook, which slows the rest of the boot: most of .init.text runs once
LONGEST = 4096  # bytes of a function to draw from: decoding starts at its first
COMMAND = "ls -l / > /tmp/l; cat /tmp/l /proc/version /proc/filesystems | md5sum; dmesg | md5sum; ps | wc -l"


TEXT = ("_stext", "__noinstr_text_end")
INIT_TEXT = ("_sinittext", "_einittext")


def draw(machine: GuestMachine, count: int, between: tuple[str, str] = TEXT) -> list[int]:
    """`count` addresses of instructions, from functions between two symbols, drawn by their size."""
    start, end = (machine.symbols.lookup(name)[0].address for name in between)
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


def probe_all(machine: GuestMachine, addresses: Sequence[int], hot: int = HOT) -> list[Kprobe]:
    """A probe on each, which disables itself when it is `hot`."""
    manager = Manager(machine)

    def cool(probe: Kprobe, regs: Regs) -> None:
        if probe.hits >= hot:
            manager.disable(probe)

    probes = [Kprobe(addr=address, pre_handler=cool) for address in addresses]
    manager.register_many(probes)
    return probes


def run_boot(machine: GuestMachine) -> GuestMachine:
    """From the first instruction to the prompt, or as far as EARLY."""
    stop = run_until(machine, PROMPT, BOOT_BUDGET if WHOLE else EARLY)
    assert isinstance(stop, ConsoleMatch if WHOLE else Budget), stop
    return machine


@pytest.mark.parametrize("name", ["amd64", "i386"])
def test_probes_from_the_first_instruction_of_a_boot_change_nothing(name: str) -> None:
    """Shown: the kernel's messages, its count of instructions and its RAM are the bare boot's, whatever is hooked while
    it sets up its memory and patches its text; no probe is hit more often than until it was hot."""
    early = switched_on(name)
    early.run(EARLY)
    addresses = draw(early, COUNT // 2) + draw(early, COUNT - COUNT // 2, INIT_TEXT)
    bare = run_boot(switched_on(name)) if WHOLE else early
    random.Random(COUNT).shuffle(addresses)
    hits = 0
    for batch in range(0, COUNT if WHOLE else MAX_HOOKS, MAX_HOOKS):
        machine = switched_on(name)
        probes = probe_all(machine, addresses[batch : batch + MAX_HOOKS], HOT_HOOK)
        run_boot(machine)
        assert machine.console.text == bare.console.text
        assert (machine.instructions, machine.ram_sha256()) == (bare.instructions, bare.ram_sha256())
        assert all(probe.hits <= HOT_HOOK and probe.nmissed == 0 for probe in probes)
        hits += sum(probe.hits for probe in probes)
    assert hits > 5


@pytest.mark.parametrize("name", ["amd64", "i386"])
def test_probes_at_random_instructions_change_nothing_a_guest_can_tell(name: str) -> None:
    """Shown: with int3 on random instructions, hot ones disarmed by their own handler, the shell's files have the bare
    run's sums and the clock its count of instructions; hits come, and none but the hot are disarmed."""
    bare, probed = another(name), another(name)
    probes = probe_all(probed, draw(bare, COUNT))
    assert run_shell(probed, COMMAND) == run_shell(bare, COMMAND)
    assert probed.instructions == bare.instructions
    assert sum(probe.hits for probe in probes) > COUNT // 10
    assert all(probe.disabled == (probe.hits == HOT) for probe in probes)
    assert all(probe.hits <= HOT and probe.nmissed == 0 for probe in probes)
