"""The seven traps of "Insert probes on non-memory resident pages" (2006): avoided by us, met by who does it that way.

For every trap there is a mechanism that differs from ours in just what the patch does; the same guest, the same probes
and the same assertion, which is true of ours and not of that one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from emu.images.embedded import layout
from emu.insn import MAX_INSN_SIZE, decode
from emu.machine import Machine
from emu.stops import ConsoleMatch
from probes import Kprobe, Kretprobe, Manager, Uprobe
from probes.aops import PageReads
from probes.programs import Entry, ProgramFile
from probes.regs import Regs
from tests.probes.cached import DENIED, finish, in_cache, started
from tests.probes.test_aops import raw_a_ops, stop_in
from tests.support.embedded import Guest
from tests.support.kernels import run_until

pytestmark = pytest.mark.parametrize("bits", [64, 32])


class AtSubmission(PageReads):
    """(a) Inserts when readpage has been called, as if the data were there."""

    def _started(self, mapping: int, pages: range) -> None:
        for index in pages:
            page = self._cache.page(mapping, index)
            assert page is not None
            self._arrived(replace(page, uptodate=True))


@pytest.mark.parametrize(("reads", "hits"), [(PageReads, 30), (AtSubmission, 0)])
def test_a_inserted_when_the_data_is_there(bits: int, reads: type[PageReads], hits: int) -> None:
    """(a) readpage is asynchronous: what is put in at submission is overwritten by the data."""
    machine, manager = started(bits, "user=10 drop user=20", reads)
    probe = in_cache(bits, "user_cold")
    manager.register(probe)
    finish(machine)
    assert probe.hits == hits


class OnlyOnce(PageReads):
    """(b) Takes a probe for inserted (`kp.opcode` is set) once its page has had it."""

    def __init__(self, *parts: object) -> None:
        super().__init__(*parts)  # type: ignore[arg-type]
        self.inserted: set[tuple[int, int]] = set()

    def _on_completion(self, kp: Kprobe, regs: Regs) -> None:
        page = self._cache.completed(kp.symbol or "", regs)
        if page is not None and page.uptodate and (page.mapping, page.index) not in self.inserted:
            self.inserted.add((page.mapping, page.index))
            super()._on_completion(kp, regs)


@pytest.mark.parametrize(("reads", "hits"), [(PageReads, 60), (OnlyOnce, 10)])
def test_b_inserted_again_after_each_eviction(bits: int, reads: type[PageReads], hits: int) -> None:
    """(b) A page that was evicted and is read again is probed again."""
    machine, manager = started(bits, " drop ".join(["user=10"] * 6), reads)
    probe = in_cache(bits, "user_cold")
    manager.register(probe)
    finish(machine)
    assert probe.hits == hits


class CallsThroughThePointer(PageReads):
    """(c) Forgets the module before the pointer is put back, and without a module calls what the pointer leads to."""

    rounds = 0

    def unhook(self, file: ProgramFile) -> None:
        self._hooked.pop(self._cache.mapping(file), None)

    def _through(self, entry: Entry, target: int, kp: Kprobe, regs: Regs) -> bool:
        super()._through(entry, target, kp, regs)
        if not self._hooked:
            self.rounds += 1
            regs.ip = kp.address or 0  # mapping->a_ops->readpages: itself
            if self.rounds > 1000:  # for ever, in no time of the guest's: end it
                regs.ip = self._machine.symbols.lookup("do_halt")[0].address
        return True


def call_of_readpages(machine: Machine, bits: int) -> int:
    """The address of the indirect call in page_cache_read that reads two pages."""
    (symbol,) = machine.symbols.lookup("page_cache_read")
    at = symbol.address
    while True:
        insn = decode(machine.memory.read(at, MAX_INSN_SIZE), at, bits)
        if insn.data[:1] == b"\xff":
            return at
        at = insn.end


@pytest.mark.parametrize(("reads", "ends"), [(PageReads, True), (CallsThroughThePointer, False)])
def test_c_last_probe_goes_while_somebody_is_about_to_call(bits: int, reads: type[PageReads], ends: bool) -> None:
    """(c) The guest has loaded our pointer when the last probe goes: it still comes to the original, once."""
    machine, manager = started(bits, "user=10", reads)
    guest = Guest(machine, bits)
    probe = in_cache(bits, "user_cold")
    manager.register(probe)
    went: list[int] = []

    def unregister(kp: Kprobe, regs: Regs) -> None:
        if probe.registered:
            manager.unregister(probe)
            went.append(machine.clock.instructions)

    manager.register(Kprobe(addr=call_of_readpages(machine, bits), pre_handler=unregister))
    stop = run_until(machine, "embedded: done", 3_000_000)
    assert len(went) == 1
    assert isinstance(stop, ConsoleMatch) is ends
    if ends:
        assert guest.counters["disk_readpages"] == 1
        assert (probe.hits, raw_a_ops(guest)) == (0, guest.address("disk_aops"))


class Locked(PageReads):
    """(d) Holds one lock from submission until the data is there; who comes meanwhile sleeps, and tries again."""

    def __init__(self, *parts: object) -> None:
        super().__init__(*parts)  # type: ignore[arg-type]
        self.arguments: dict[int, list[int]] = {}  # of calls that wait, by stack pointer

    def _through(self, entry: Entry, target: int, kp: Kprobe, regs: Regs) -> bool:
        gpr = regs.cpu.gpr
        for number, value in enumerate(self.arguments.pop(regs.sp, [])):
            gpr[number] = value
        if not self._awaited or entry in (Entry.FREE, Entry.MOVE):
            return super()._through(entry, target, kp, regs)
        self.arguments[regs.sp] = [gpr[number] for number in range(8)]
        (sleep_ticks,) = self._machine.symbols.lookup("sleep_ticks")
        regs.sp -= self._word
        self._machine.memory.write(regs.sp, (kp.address or 0).to_bytes(self._word, "little"))  # and back here
        gpr[7 if self._word == 8 else 0], regs.ip = 1, sleep_ticks.address
        return True


def ends_of_reads(bits: int, probed: bool, reads: type[PageReads]) -> list[int]:
    """The instruction counts at which reads of both=6 end."""
    machine, manager = started(bits, "both=6", reads)
    for probe in (in_cache(bits, "user_cold"), Uprobe("/data", 0x3010, arm="aops")) if probed else ():
        manager.register(probe)
    at: list[int] = []
    manager.register(Kprobe(symbol="end_page_read", pre_handler=lambda kp, regs: at.append(machine.clock.instructions)))
    finish(machine)
    return at


@pytest.mark.parametrize(("reads", "in_time"), [(PageReads, True), (Locked, False)])
def test_d_nobody_waits_for_another_s_disk(bits: int, reads: type[PageReads], in_time: bool) -> None:
    """(d) Two probed files are read at the same time, and each read ends when it does without probes; with a lock over
    the disk's work one waits for the other."""
    bare, probed = ends_of_reads(bits, False, reads), ends_of_reads(bits, True, reads)
    late = [mine - theirs >= 1000 for mine, theirs in zip(probed, bare, strict=False)]  # a tick is a million
    assert (len(probed) == len(bare) and not any(late)) is in_time


@pytest.mark.parametrize("naive", [False, True])
def test_e_private_copy_that_was_made_before_is_probed(bits: int, naive: bool) -> None:
    """(e) A probe in the page cache is not in a copy that a program has made of the page before."""
    machine, manager = started(bits, "cow=1 user=10 user=10")
    if naive:
        manager.uprobes.planting.covers = lambda place, vaddr: True  # type: ignore[method-assign]
    stop_in(machine, "do_user")
    probe = in_cache(bits, "user_target")
    manager.register(probe)
    finish(machine)
    assert probe.hits == (0 if naive else 20)


@pytest.mark.parametrize("naive", [False, True])
def test_e_writer_does_not_get_our_bytes_on_the_disk(bits: int, naive: bool) -> None:
    """(e) What is in the page cache could be written back, so that writers are denied; who may write has them."""
    machine, manager = started(bits, "user=3 write=7")
    guest = Guest(machine, bits)
    if naive:
        cache = manager.uprobes.planting.cache
        cache.deny = lambda file: (guest.address("jiffies"), bits // 8, 0)  # type: ignore[method-assign]
    manager.register(in_cache(bits, "user_target"))
    finish(machine)
    denied = guest.value("work_result") == DENIED & (1 << bits) - 1
    assert denied is not naive
    assert machine.memory.read(guest.address("disk_program") + 8191, 1) == (b"\x07" if naive else b"\0")


class Words32(PageReads):
    """(f) Reckons a page's place in the file in a 32-bit `unsigned long`."""

    def _on_completion(self, kp: Kprobe, regs: Regs) -> None:
        page = self._cache.completed(kp.symbol or "", regs)
        if page is not None and page.uptodate and page.mapping in self._hooked:
            self._arrived(replace(page, index=(page.index << 12 & 0xFFFF_FFFF) >> 12))


@pytest.mark.parametrize(("reads", "hits"), [(PageReads, (7, 7)), (Words32, (14, 0))])
def test_f_offsets_beyond_4_gib(bits: int, reads: type[PageReads], hits: tuple[int, int]) -> None:
    """(f) Page 0x100001 of a file is not its page 1."""
    machine, manager = started(bits, "big=7", reads)
    low, high = (Uprobe("/big", page * 4096 + 16, arm="aops") for page in (1, layout.BIG_HIGH))
    alone = reads is Words32
    manager.register(low)
    if not alone:
        manager.register(high)
    finish(machine)
    assert (low.hits, high.hits) == hits


class OnlyWhenAllWasWell(PageReads):
    """(g) Inserts nothing where readpages has returned an error."""

    def __init__(self, *parts: object) -> None:
        super().__init__(*parts)  # type: ignore[arg-type]
        self.submitted: list[tuple[int, range]] = []

    def _started(self, mapping: int, pages: range) -> None:
        self.submitted.append((mapping, pages))

    def returned(self, result: int) -> None:
        for mapping, pages in self.submitted if result == 0 else ():
            self.expect(mapping, pages)
        self.submitted.clear()


@pytest.mark.parametrize(("reads", "hits"), [(PageReads, (10, 10)), (OnlyWhenAllWasWell, (0, 10))])
def test_g_pages_that_came_though_the_call_failed(bits: int, reads: type[PageReads], hits: tuple[int, int]) -> None:
    """(g) readpages returns EIO with one of its two pages on the way: that one is probed when it comes."""
    machine, manager = started(bits, "partial drop user=10", reads)
    stop_in(machine, "do_drop")
    probes = [in_cache(bits, "user_target"), in_cache(bits, "user_cold")]
    for probe in probes:
        manager.register(probe)
    follow(manager)
    finish(machine)
    assert [probe.hits for probe in probes] == list(hits)


def follow(manager: Manager) -> None:
    """Tell the naive mechanism what the guest's functions return."""
    reads = manager.uprobes.planting._reads
    if isinstance(reads, OnlyWhenAllWasWell):
        for name in ("disk_readpage", "disk_readpages_partial"):
            manager.register(Kretprobe(kp=Kprobe(symbol=name), handler=lambda ri, regs: reads.returned(regs.retval)))
