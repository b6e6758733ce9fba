"""What the monitor says of a machine, checked against the machine: the embedded guest in both word sizes."""

from __future__ import annotations

import re

import pytest

from emu.boot import GuestMachine, boot_embedded
from emu.iface import MachineError
from emu.stops import ConsoleMatch
from gdbstub.monitorservices import TOPICS
from gdbstub.services import GuestSystem, MachineInspector, NamedSnapshots, TraceText, disassembler
from probes.linux import NotAvailable
from probes.manager import Manager


@pytest.fixture(params=[64, 32, "pae"])
def machine(request: pytest.FixtureRequest) -> GuestMachine:
    """At its idle loop."""
    pae = request.param == "pae"
    guest = boot_embedded(32 if pae else request.param, "opens=3", pae=pae)
    guest.console.expect("embedded: done", lambda match: ConsoleMatch(match.string))
    guest.run(50_000_000)
    return guest


def lines(machine: GuestMachine, topic: str) -> str:
    return "\n".join(MachineInspector(machine, Manager(machine)).lines(topic))


@pytest.mark.parametrize("topic", TOPICS)
def test_looking_leaves_the_machine_as_it_is(machine: GuestMachine, topic: str):
    """Every topic has something to say and changes nothing."""
    before = (machine.ram_sha256(), machine.registers.read_many(machine.registers.arch.names))
    assert lines(machine, topic)
    assert (machine.ram_sha256(), machine.registers.read_many(machine.registers.arch.names)) == before


def test_registers_are_those_of_the_machine(machine: GuestMachine):
    """General and control registers by name, in the width of the processor."""
    text = lines(machine, "registers")
    width = 16 if machine.bits == 64 else 8
    names = machine.registers.arch.names
    for name in (*names[: names.index("eflags")], "cr3"):
        assert re.search(rf"\b{name} {machine.registers.read(name):0{width}x}\b", text), name


def test_mappings_translate_as_the_machine_does(machine: GuestMachine):
    """Each page of `info tlb`, at its first and last byte; `info mem` has the same extent.

    Pages with no RAM behind them are listed, for the guest has mapped them, but no debugger can read there.
    """
    extent = 0
    for line in lines(machine, "tlb").splitlines():
        vaddr, paddr, size = re.fullmatch(r"([0-9a-f]{16}): ([0-9a-f]{16}) [u-]r[w-][x-] (\d+)K", line).groups()
        for offset in (0, (int(size) << 10) - 1):
            target = int(paddr, 16) + offset
            assert machine.memory.translate(int(vaddr, 16) + offset) == (target if target < machine.ram.size else None)
        extent += int(size) << 10
    assert extent == sum(int(line.split()[1], 16) for line in lines(machine, "mem").splitlines())


def test_probes_add_nothing_to_the_mappings(machine: GuestMachine):
    """The window their slots live in is ours, not the guest's."""
    before = lines(machine, "tlb")
    Manager(machine).add("kprobe", "p:open do_open")
    assert lines(machine, "tlb") == before


def test_timers_and_statistics_count_as_the_clock_does(machine: GuestMachine):
    """Instructions and virtual time."""
    assert f"now {machine.clock.now_ns:,} ns, {machine.instructions:,} instructions" in lines(machine, "timers")
    assert lines(machine, "stats").startswith(f"instructions {machine.instructions:,}\n")


def test_each_timer_is_a_line_of_words(machine: GuestMachine):
    """The guest's tick of 1 kHz, and two counters that nobody has started."""
    shown = lines(machine, "timers").splitlines()[2:]
    assert re.fullmatch(r"pit counter 0: mode 2 \(rate generator\), at \d+ of 1193 \(1000\.2 Hz\), .*", shown[0])
    assert shown[1:] == [
        "pit counter 1: mode 0 (one count), not started, gate high, out low",
        "pit counter 2: mode 0 (one count), not started, gate low, out low",
    ]


def test_a_named_snapshot_goes_back_exactly(machine: GuestMachine):
    """Memory and instruction count of then."""
    snapshots = NamedSnapshots(machine)
    before = (machine.ram_sha256(), machine.instructions)
    assert snapshots.list() == ["no snapshots"]
    snapshots.save("here")
    machine.run(100_000)
    assert machine.instructions > before[1]
    assert snapshots.restore("here")[0] == f"here: restored at instruction {before[1]:,}"
    assert (machine.ram_sha256(), machine.instructions) == before
    assert re.fullmatch(rf"here  instruction {before[1]:,}  \d+ MiB", snapshots.list()[0])


def test_snapshots_are_limited_and_named(machine: GuestMachine):
    """Memory of the host is not for a debugger to fill; an unknown name lists the known ones."""
    snapshots = NamedSnapshots(machine)
    with pytest.raises(MachineError, match=r"no snapshot 'x': none is kept"):
        snapshots.restore("x")
    for number in range(8):
        snapshots.save(f"s{number}")
    with pytest.raises(MachineError, match="8 snapshots are kept already"):
        snapshots.save("s8")
    snapshots.save("s0")
    with pytest.raises(MachineError, match=r"no snapshot 'x': s0, s1, "):
        snapshots.restore("x")


def test_a_debugger_cannot_have_a_host_file_written(machine: GuestMachine):
    """Unless who started the program has allowed a folder for it."""
    with pytest.raises(MachineError, match="--trace-dir DIR"):
        TraceText(Manager(machine)).save("/tmp/x")


def test_disassembly_is_of_the_guest_s_own_bytes(machine: GuestMachine):
    """One instruction a line, each where the last ended; an armed probe does not show."""
    (symbol,) = machine.symbols.lookup("do_open")
    paddr = machine.memory.translate(symbol.address)
    assert paddr is not None
    before = disassembler(machine)(paddr, 4)
    assert (len(before), int(before[0].partition(":")[0], 16)) == (4, paddr)
    Manager(machine).add("kprobe", "p:open do_open")
    assert disassembler(machine)(paddr, 4) == before


def test_disassembly_ends_where_memory_or_sense_ends(machine: GuestMachine):
    """At the last byte of RAM it shows what there is; beyond it there is nothing."""
    end = machine.ram.size
    machine.memory.write_physical(end - 3, b"\x90\x90\x0f")
    assert disassembler(machine)(end - 3, 9)[1:] == [f"{end - 2:016x}: nop", f"{end - 1:016x}: (bad)"]
    with pytest.raises(MachineError, match="cannot read memory"):
        disassembler(machine)(end, 1)


def test_a_guest_that_is_no_linux_says_so() -> None:
    """Every question about the operating system has the reason for an answer, not a traceback and not an empty list."""
    machine = boot_embedded()
    system = GuestSystem(Manager(machine))
    for ask in (system.processes, system.modules, system.log, lambda: system.maps(1), lambda: system.page_cache("/x")):
        with pytest.raises(NotAvailable) as refused:
            ask()
        assert refused.value.lines() == ["the guest's operating system is not available because the guest is no Linux"]
