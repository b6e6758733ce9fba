"""Guests that rewrite their own code under probes: they end with the bytes they wanted, and the probes go on working.

The Linux guests toggle a static key, `sched_schedstats`, which patches some seventy places by text_poke.
"""

from __future__ import annotations

import errno
from collections import Counter
from dataclasses import dataclass

import pytest

from emu.boot import GuestMachine, restore
from emu.insn import spans
from probes import Kprobe, Kretprobe, Manager
from probes.errors import ProbeError
from probes.kretprobe import ReturnInstance
from probes.regs import Regs
from tests.support.embedded import Guest, power_on
from tests.support.kernels import another, run_shell
from tests.support.programs import bring, build

pytestmark = pytest.mark.boots

TOGGLE = "echo {} > /proc/sys/kernel/sched_schedstats"
NEWS = "dmesg | md5sum; for i in 1 2 3; do echo a | md5sum; done"
FILTERED = "/bin/filtered; echo $?"
BPF_FUNC = 0x30  # in struct bpf_prog, 6.1 to 6.12: the address of its code
NEIGHBOURS = 2
NOP5 = bytes.fromhex("0f1f440000")
LOAD_1, LOAD_9 = bytes.fromhex("b801000000"), bytes.fromhex("b809000000")  # mov eax, 1 and 9


@dataclass
class Site:
    """The branch of a static key inside `symbol` and the instructions around it, as offsets."""

    symbol: str
    offset: int
    neighbours: list[int]


def toggled_sites(name: str, functions: tuple[str, ...]) -> list[Site]:
    """Where the key is tested in `functions`, found by what a bare machine's toggling changes in them."""
    machine = another(name)
    symbols = [machine.symbols.lookup(function)[0] for function in functions]
    before = [machine.memory.read(symbol.address, symbol.size) for symbol in symbols]
    run_shell(machine, TOGGLE.format(1))
    sites = []
    for symbol, old in zip(symbols, before, strict=True):
        new = machine.memory.read(symbol.address, symbol.size)
        at = next(index for index in range(symbol.size) if old[index] != new[index])
        starts = [start for start, _ in spans(old, machine.guest.bits)]
        here = starts.index(at)
        sites.append(Site(symbol.name, at, [*starts[here - NEIGHBOURS : here], *starts[here + 1 :][:NEIGHBOURS]]))
    return sites


def count_executions(machine: GuestMachine, address: int, into: Counter[int]) -> None:
    """Have the engine itself count what no probe of ours sees; on a machine that has not run."""

    def count() -> None:
        into[address] += 1

    machine.engine.add_pc_hook(address, count)


def text_of(machine: GuestMachine) -> bytes:
    """The kernel's code without what we have put there."""
    start, end = (machine.symbols.lookup(name)[0].address for name in ("_stext", "__noinstr_text_end"))
    return machine.memory.read(start, end - start)


@pytest.mark.parametrize("name", ["amd64", "i386"])
def test_static_keys_are_toggled_under_probes_as_on_a_bare_machine(name: str) -> None:
    """Shown: probes on the patched instruction and its neighbours, plain and with post-handlers; the text, the guest's
    output and its instruction count are the bare run's, and hits are what the bare engine counts by itself."""
    sites = toggled_sites(name, ("update_curr", "enqueue_entity"))
    bare, probed = another(name), another(name)
    manager = Manager(probed)
    before = set(probed.text.armed_bytes())
    probes: list[Kprobe] = []
    executed: Counter[int] = Counter()
    for site in sites:
        for number, offset in enumerate([site.offset, *site.neighbours]):
            post = (lambda p, regs: None) if number % 2 else None
            probe = Kprobe(symbol=site.symbol, offset=offset, post_handler=post)
            manager.register(probe)
            probes.append(probe)
            count_executions(bare, probe.address or 0, executed)
    for command in (TOGGLE.format(1), NEWS, TOGGLE.format(0), NEWS):
        assert run_shell(probed, command) == run_shell(bare, command)
    assert probed.instructions == bare.instructions
    assert text_of(probed) == text_of(bare)
    assert {probe.address: probe.hits + probe.nmissed for probe in probes if probe.hits} == executed
    assert len(executed) > len(sites)
    for probe in probes:
        manager.unregister(probe)
    assert text_of(probed) == text_of(bare)
    assert set(probed.text.armed_bytes()) == before


def test_a_probe_at_a_function_s_entry_goes_on_under_ftrace() -> None:
    """Shown: the function tracer makes the 5-byte nop under a probe a call; its hits go on, and ftrace says nothing."""
    bare, probed = another("amd64"), another("amd64")
    manager = Manager(probed)
    probe = Kprobe(symbol="vfs_read", arm="int3")
    manager.register(probe)
    commands = (
        "mount -t tracefs none /sys/kernel/tracing; cd /sys/kernel/tracing; echo vfs_read > set_ftrace_filter; cd /",
        "echo function > /sys/kernel/tracing/current_tracer; cat /proc/version | md5sum",
        "cat /proc/cmdline | md5sum; echo nop > /sys/kernel/tracing/current_tracer; cat /proc/stat | wc -l",
        NEWS,
    )
    hits = []
    for command in commands:
        assert run_shell(probed, command) == run_shell(bare, command)
        hits.append(probe.hits)
    assert hits == sorted(set(hits)), "each command reads files"
    assert probed.instructions == bare.instructions
    assert text_of(probed) == text_of(bare)


def test_the_bytes_are_out_of_the_way_only_while_the_guest_patches() -> None:
    """Shown: inside the guest's text_poke a reader of raw memory finds no int3 of ours; at its prompt it does."""
    machine = another("amd64")
    manager = Manager(machine)
    site, inside = Kprobe(symbol="vfs_read", arm="int3"), Kprobe(symbol="__text_poke", arm="hook")
    manager.register(site)
    paddr = machine.memory.translate(site.address or 0)
    assert paddr is not None
    seen = []
    inside.pre_handler = lambda p, regs: seen.append(machine.ram.map[paddr])
    manager.register(inside)
    assert machine.ram.map[paddr] == 0xCC
    run_shell(machine, TOGGLE.format(1))
    assert seen
    assert 0xCC not in seen
    assert machine.ram.map[paddr] == 0xCC


@pytest.mark.parametrize("observed", [False, True], ids=["plain", "post-handler"])
@pytest.mark.parametrize("bits", [32, 64])
def test_plain_stores_over_probed_code_are_noticed_before_it_runs(bits: int, observed: bool) -> None:
    """Shown: the guest writes over the armed byte and what follows it, ten times; each new instruction is executed and
    hit, nothing stale comes back, and the run ends as the bare one does."""
    rounds, budget = 5, 300_000
    bare, probed = (power_on(bits, f"patch={rounds}") for _ in range(2))
    guest = Guest(probed, bits)
    start = guest.address("do_patch")
    probed.insert_breakpoint(start)
    probed.run(budget)
    probed.remove_breakpoint(start)
    target = guest.address("patched_target")
    site = target + probed.memory.read(target, 64).index(NOP5)
    manager = Manager(probed)
    post = (lambda p, regs: None) if observed else None
    entry, patched, skipped = probes = [
        Kprobe(addr=address, post_handler=post, arm="int3") for address in (target, site, site + len(NOP5))
    ]
    manager.register_many(probes)
    bare.run(budget)
    probed.run(budget - probed.instructions)
    assert (entry.hits, patched.hits, skipped.hits) == (2 * rounds, 2 * rounds, rounds)
    assert probed.ram_sha256() == bare.ram_sha256()


def test_a_debugger_s_write_over_a_probed_instruction_is_what_runs() -> None:
    """Shown: the copy of the instruction that stood there first is not executed any more."""
    machine = power_on(64, "patch=1")
    guest = Guest(machine, 64)
    machine.insert_breakpoint(guest.address("do_patch"))
    machine.run(300_000)
    machine.remove_breakpoint(guest.address("do_patch"))
    target = guest.address("patched_target")
    load = target + machine.memory.read(target, 64).index(LOAD_1)
    probe = Kprobe(addr=load, arm="int3")
    manager = Manager(machine)
    manager.register(probe)
    machine.memory.write(load, LOAD_9)
    before = guest.value("checksum")
    machine.run(100_000)
    assert probe.hits == 2
    assert guest.value("checksum") - before == 9 + 10


@pytest.mark.parametrize("name", ["amd64", "i386"])
def test_a_probe_on_code_that_the_boot_has_freed_is_gone(name: str) -> None:
    """Shown: once the guest has settled, a probe in .init.text is disarmed, listed so, not enabled again, and taken
    away without a byte of the freed memory changing; one in ordinary code is armed by int3."""
    machine = another(name)
    manager = Manager(machine, settled=False)
    manager.add("kprobe", "p:early start_kernel")
    manager.add("kprobe", "p:late vfs_read")
    before = machine.ram_sha256()
    manager.settled = True
    assert any(line.endswith(", [GONE]") for line in manager.info("early"))
    assert any(line.endswith(", int3") for line in manager.info("late"))
    with pytest.raises(ProbeError) as caught:
        manager.enable("early")
    assert caught.value.errno == errno.EINVAL
    manager.delete("all")
    assert machine.ram_sha256() == before


@pytest.mark.parametrize("name", ["amd64", "6.12"])
def test_a_probe_in_code_made_for_a_socket_filter_is_hit_and_gone_with_it(name: str) -> None:
    """Shown: a filter's machine code is probed as soon as it is there and hit for each datagram; freed, filled with
    int3 and partly used for the next filter, it is given up. The guest, its count of instructions and its RAM are as
    bare."""
    bare = another(name)
    bring(bare, Manager(bare).linux, {"/bin/filtered": build("filtered.c", "-static", "-O1")})
    probed = restore(bare.snapshot())
    manager = Manager(probed)
    made: list[Kprobe] = []

    def compiled(instance: ReturnInstance, regs: Regs) -> None:
        probe = Kprobe(addr=int.from_bytes(regs.read(regs.retval + BPF_FUNC, 8), "little"))
        manager.register(probe)
        made.append(probe)

    manager.register(Kretprobe(kp=Kprobe(symbol="bpf_prog_select_runtime"), handler=compiled, shadow=True))
    for command in ("echo 1 > /proc/sys/net/core/bpf_jit_enable; ip link set lo up", FILTERED, FILTERED, NEWS):
        assert run_shell(probed, command) == run_shell(bare, command)
    assert probed.instructions == bare.instructions
    assert probed.ram_sha256() == bare.ram_sha256()
    assert [probe.hits for probe in made] == [3, 3]
    assert made[0].gone
    for probe in made:
        manager.unregister(probe)
    assert probed.ram_sha256() == bare.ram_sha256()
