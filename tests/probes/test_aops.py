"""Probes in the page cache by replaced address_space_operations: what the 2006 patch wants, on the embedded guest.

Its disk is slow: data comes ticks after readpage has returned. The patch's own traps are in test_aops_traps.
"""

from __future__ import annotations

import errno

import pytest

from emu.images.embedded import embedded_program, layout
from emu.stops import Breakpoint
from probes import Manager, ProbeError, Uprobe
from tests.probes.cached import DENIED, INT3, finish, in_cache, started
from tests.support.embedded import Guest, power_on

pytestmark = pytest.mark.parametrize("bits", [64, 32])


def a_ops(guest: Guest, file: str = "program") -> int:
    return guest.word(guest.address(f"{file}_mapping") + layout.offset(guest.bits, "MAPPING", "a_ops"))


def raw_a_ops(guest: Guest, file: str = "program") -> int:
    """As the guest reads it."""
    at = guest.address(f"{file}_mapping") + layout.offset(guest.bits, "MAPPING", "a_ops")
    paddr = at - layout.KERNEL_OFFSET[guest.bits]
    return int.from_bytes(guest.machine.ram.read(paddr, guest.bits // 8), "little")


def stop_in(machine, function: str, offset: int = 0) -> None:
    (symbol,) = machine.symbols.lookup(function)
    machine.insert_breakpoint(symbol.address + offset)
    assert machine.run(50_000_000) == Breakpoint(symbol.address + offset)
    machine.remove_breakpoint(symbol.address + offset)


@pytest.mark.parametrize(("arm", "told"), [("aops", 2), ("int3", 0)])
def test_same_hits_as_in_translated_code_in_the_bare_run_s_own_time(bits: int, arm: str, told: int) -> None:
    """Registered with no page in memory, through an eviction: each call is a hit, as of a probe of the default kind on
    the next instruction. RAM without our bytes is that of a run without probes, and so is the instruction count but
    for two instructions a page that leaves the cache: the guest's own, that find and make the call of freepage."""
    ends = []
    for probed in (False, True):
        machine, manager = started(bits, "user=50 faults=1 user=50")
        names = ("user_target", "user_cold", "user_main")
        probes = [in_cache(bits, name, arm=arm) for name in names]
        after = [in_cache(bits, name, arm="hook", offset=1) for name in names[:2]]
        for probe in (*probes, *after) if probed else ():
            manager.register(probe)
        finish(machine)
        ends.append((machine.ram_sha256(), machine.clock.instructions - told * 3 * probed))
    assert ends[0] == ends[1]
    assert [probe.hits for probe in probes] == [100, 100, 1]
    assert [probe.hits for probe in after] == [100, 100]
    assert len(machine.planted.guest_bytes()) == (3 if arm == "aops" else 2)  # user_main has run once, long ago
    for probe in probes:
        manager.unregister(probe)
    assert machine.planted.guest_bytes() == {}


def test_pointer_is_a_copy_s_while_probed_and_its_own_again_after_the_last(bits: int) -> None:
    """Two probes, one of them gone: still the copy. A debugger is shown the guest's own table all the time."""
    machine, manager = started(bits, "user=5")
    guest = Guest(machine, bits)
    own = guest.address("disk_aops")
    probes = [in_cache(bits, "user_target"), in_cache(bits, "user_cold")]
    for probe in probes:
        manager.register(probe)
    copy = raw_a_ops(guest)
    assert (a_ops(guest), machine.window.contains(copy), raw_a_ops(guest, "data")) == (own, True, own)
    manager.unregister(probes[0])
    assert raw_a_ops(guest) == copy
    manager.unregister(probes[1])
    assert raw_a_ops(guest) == own
    finish(machine)


def test_files_with_the_same_operations_share_a_copy_and_let_go_of_it_one_by_one(bits: int) -> None:
    machine, manager = started(bits, "user=5 big=5")
    guest = Guest(machine, bits)
    target, big = in_cache(bits, "user_target"), Uprobe("/big", 0x1010, arm="aops")
    manager.register(target)
    manager.register(big)
    assert raw_a_ops(guest, "program") == raw_a_ops(guest, "big")
    manager.unregister(target)
    assert raw_a_ops(guest, "program") == guest.address("disk_aops") != raw_a_ops(guest, "big")
    finish(machine)
    assert (target.hits, big.hits) == (0, 5)


def test_registered_with_the_page_in_memory(bits: int) -> None:
    machine, manager = started(bits, "user=10 user=10")
    stop_in(machine, "do_user")
    stop_in(machine, "do_user", 1)
    stop_in(machine, "do_user")
    probe = in_cache(bits, "user_cold")
    manager.register(probe)
    assert len(machine.planted.guest_bytes()) == 1
    finish(machine)
    assert probe.hits == 10


def test_registered_while_its_page_is_being_read(bits: int) -> None:
    """The read was begun by the file's own operations; its end is seen all the same."""
    machine, manager = started(bits, "user=10")
    stop_in(machine, "disk_readpages")  # pages 0 and 1
    probes = [in_cache(bits, "user_main"), in_cache(bits, "user_target")]
    for probe in probes:
        manager.register(probe)
    assert machine.planted.guest_bytes() == {}
    finish(machine)
    assert [probe.hits for probe in probes] == [1, 10]


def test_unregistered_while_its_page_is_being_read(bits: int) -> None:
    """Nothing is put into the page when it comes, and nothing of ours waits for it."""
    machine, manager = started(bits, "user=10")
    probe = in_cache(bits, "user_target")
    manager.register(probe)
    stop_in(machine, "disk_readpages")
    manager.unregister(probe)
    armed = set(machine.text.armed_bytes())
    finish(machine)
    assert (probe.hits, machine.planted.guest_bytes()) == (0, {})
    (wake_up,) = machine.symbols.lookup("wake_up")
    assert wake_up.address - layout.KERNEL_OFFSET[bits] not in armed


def test_only_reads_under_way_cost_anything(bits: int) -> None:
    """The kernel's function for a read that is over is probed while a page of a probed file is awaited."""
    machine, manager = started(bits, "user=10 faults=3")
    manager.register(in_cache(bits, "user_target"))
    (wake_up,) = machine.symbols.lookup("wake_up")
    at = wake_up.address - layout.KERNEL_OFFSET[bits]
    assert at not in machine.text.armed_bytes()
    stop_in(machine, "disk_readpages")
    assert at in machine.text.armed_bytes()
    stop_in(machine, "do_faults")
    assert at not in machine.text.armed_bytes()


def test_several_probes_on_a_page_switched_each_for_itself(bits: int) -> None:
    machine, manager = started(bits, "user=10 user=10 drop user=10")
    first, again, second = (in_cache(bits, "user_target", offset=offset) for offset in (0, 0, 1))
    for probe in (first, again, second):
        manager.register(probe)
    while second.hits < 10:
        machine.run(50)
    manager.disable(first)
    manager.disable(second)
    assert len(machine.planted.guest_bytes()) == 1
    while again.hits < 20:
        machine.run(50)
    manager.unregister(again)
    assert machine.planted.guest_bytes() == {}
    manager.enable(second)
    finish(machine)
    assert (first.hits, again.hits, second.hits) == (10, 20, 20)


def test_handlers_and_returns(bits: int) -> None:
    machine, manager = started(bits, "user=10")
    seen: list[int] = []
    probe = in_cache(
        bits,
        "user_target",
        handler=lambda up, regs: seen.append(regs.di if bits == 64 else regs.ax),
        ret_handler=lambda call, regs: seen.append(regs.retval),
    )
    manager.register(probe)
    finish(machine)
    assert seen == [value for number in range(1, 11) for value in (number, 2 * number)]


def test_read_that_fails_gets_nothing_and_the_next_one_does(bits: int) -> None:
    """Three reads give no data: no byte of ours lands in the frames they had."""
    machine, manager = started(bits, "ioerrors=3 drop user=10")
    probe = in_cache(bits, "user_cold")
    stop_in(machine, "do_user")
    manager.register(probe)
    finish(machine)
    assert (probe.hits, len(machine.planted.guest_bytes())) == (10, 1)
    (paddr,) = machine.planted.guest_bytes()
    guest = Guest(machine, bits)
    frames, size = guest.address("page_frames") - layout.KERNEL_OFFSET[bits], 32 * 4096
    whole, own = machine.ram.read(frames, size), machine.memory.read_physical(frames, size)
    assert [at for at in range(size) if whole[at] != own[at]] == [paddr - frames]


def test_writers_are_denied_while_probed(bits: int) -> None:
    """ETXTBSY to the guest's writer, whose file stays as it was; allowed again after the last probe has gone."""
    machine, manager = started(bits, "write=7 user=5 write=9")
    guest = Guest(machine, bits)
    probe = in_cache(bits, "user_target")
    manager.register(probe)
    stop_in(machine, "do_user")
    assert guest.value("work_result") == DENIED & (1 << bits) - 1
    assert machine.memory.read(guest.address("disk_program") + 8191, 1) == b"\0"
    while probe.hits < 5:
        machine.run(50)
    manager.unregister(probe)
    finish(machine)
    assert machine.memory.read(guest.address("disk_program") + 8191, 1) == b"\x09"
    assert guest.value("work_result") == 1


@pytest.mark.parametrize("arm", ["aops", "int3"])
def test_refused_while_somebody_writes(bits: int, arm: str) -> None:
    machine, manager = started(bits, "user=5")
    guest = Guest(machine, bits)
    count = guest.address("program_inode") + layout.offset(bits, "INODE", "i_writecount")
    machine.memory.write(count, (1).to_bytes(bits // 8, "little"))
    probe = in_cache(bits, "user_target", arm=arm)
    with pytest.raises(ProbeError, match="open for writing") as refused:
        manager.register(probe)
    assert (refused.value.errno, probe.registered, guest.word(count)) == (errno.ETXTBSY, False, 1)
    assert raw_a_ops(guest) == guest.address("disk_aops")
    finish(machine)


@pytest.mark.parametrize(("arm", "visible"), [("hook", False), ("int3", True), ("aops", True)])
def test_what_the_guest_reads_of_its_file(bits: int, arm: str, visible: bool) -> None:
    """The kernel adds up the file's bytes through the page cache: the int3s are in the sum, the default is not."""
    machine, manager = started(bits, "user=5 sum=1")
    places = ("user_target", "user_cold")
    for name in places:
        manager.register(in_cache(bits, name, arm=arm))
    finish(machine)
    code = embedded_program(bits).code
    more = sum(INT3 - code[embedded_program(bits).offset(name)] for name in places)
    assert Guest(machine, bits).value("work_result") - sum(code) == (more if visible else 0)


def test_private_copy_made_of_a_page_with_a_probe_keeps_it(bits: int) -> None:
    """The guest copies the page, int3 and all, and runs the copy: every call is a hit, and none a trap of its own."""
    machine, manager = started(bits, "user=5 cow=1 user=5 drop user=5")
    probe = in_cache(bits, "user_target")
    manager.register(probe)
    finish(machine)
    assert probe.hits == 15
    manager.unregister(probe)
    assert machine.planted.guest_bytes() == {}


def test_two_ways_at_one_place_are_refused(bits: int) -> None:
    machine, manager = started(bits, "user=5")
    first = in_cache(bits, "user_target")
    manager.register(first)
    with pytest.raises(ProbeError, match="armed by aops"):
        manager.register(in_cache(bits, "user_target", arm="int3"))
    joined = in_cache(bits, "user_target", arm="auto")
    manager.register(joined)
    finish(machine)
    assert (first.hits, joined.hits) == (5, 5)


def test_machine_that_goes_back_has_its_probes_again(bits: int) -> None:
    """A snapshot has neither our pointer, our int3s nor our share of a count; after a restore all are there once."""
    machine, manager = started(bits, "user=10 user=10")
    guest = Guest(machine, bits)
    probe = in_cache(bits, "user_target")
    manager.register(probe)
    while probe.hits < 10:
        machine.run(50)
    saved = machine.snapshot()
    finish(machine)
    machine.restore(saved)
    assert len(machine.planted.guest_bytes()) == 1
    finish(machine)
    assert probe.hits == 10 + 10 + 10
    manager.unregister(probe)
    assert guest.member(guest.address("program_inode"), "INODE", "i_writecount") == 0
    other = power_on(bits)
    other.restore(saved)
    bare = Guest(other, bits)
    assert raw_a_ops(bare) == bare.address("disk_aops")
    assert bare.member(bare.address("program_inode"), "INODE", "i_writecount") == 0


def test_guest_without_page_tables_is_asked_to_go_on(bits: int) -> None:
    machine = power_on(bits, "user=5")
    manager = Manager(machine)
    with pytest.raises(ProbeError) as refused:
        manager.register(in_cache(bits, "user_target"))
    assert refused.value.errno == errno.EAGAIN
