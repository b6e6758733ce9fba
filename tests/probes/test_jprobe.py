"""Jprobes: arguments by each convention, what an entry may change, its place among other probes, guest entries."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from emu.iface import MemoryFault
from probes import Jprobe, Kprobe, Kretprobe, Manager, ProbeError, Regs
from probes.abi import ABIS, Scalar, layout, s8, s32, struct, u8, u32, ulong
from tests.support.embedded import Guest, power_on

BOOTED, ROUNDS = 30_000, 400_000


class Lab:
    """The embedded guest amid its exercises, with a manager."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.machine = power_on(bits, "calls=1000 idle")
        self.machine.run(BOOTED)
        self.guest = Guest(self.machine, bits)
        self.probes = Manager(self.machine)

    def run(self) -> None:
        self.machine.run(ROUNDS)


@pytest.fixture(params=[64, 32])
def lab(request: pytest.FixtureRequest) -> Lab:
    return Lab(request.param)


def target_of(lab: Lab, entry: Callable[..., object] | str | int, symbol: str = "target", **more: object) -> Jprobe:
    """A registered jprobe."""
    probe = Jprobe(kp=Kprobe(symbol=symbol), entry=entry, **more)
    lab.probes.register(probe)
    return probe


# ----------------------------------------------------------------------------------------------------------- arguments


def test_the_entry_gets_the_arguments_of_every_call(lab: Lab) -> None:
    """sum8 is called with i .. i + 7 in each round: in registers and on the stack, as it finds them itself."""
    seen: list[tuple[int, ...]] = []

    def entry(a: u32, b: u32, c: u32, d: u32, e: u32, f: u32, g: u32, h: u32) -> None:
        seen.append((a, b, c, d, e, f, g, h))

    results: list[int] = []
    returns = Kretprobe(kp=Kprobe(symbol="sum8"), handler=lambda ri, regs: results.append(regs.retval), maxactive=10)
    probe = target_of(lab, entry, "sum8")
    lab.probes.register(returns)
    lab.run()
    assert probe.kp.hits == len(seen) > 100
    assert [sum(arguments) for arguments in seen[: len(results)]] == results


@pytest.mark.parametrize(("kind", "expected"), [(u8, 0xFE), (s8, -2), (s32, -0x7FFF_FF02), (u32, 0x8000_00FE)])
def test_annotations_cut_and_sign_arguments(lab: Lab, kind: object, expected: int) -> None:
    """The same register as several types; a kprobe, which runs before the jprobe, sets it."""
    seen: list[int] = []

    def entry(value: int) -> None:
        seen.append(value)

    def set_argument(kp: Kprobe, regs: Regs) -> None:
        regs.cpu.gpr[7 if lab.bits == 64 else 0] = 0x1_8000_00FE & regs.convention.mask

    entry.__annotations__["value"] = kind
    target_of(lab, entry, "recursed_target")
    lab.probes.register(Kprobe(symbol="recursed_target", pre_handler=set_argument))
    lab.run()
    assert set(seen) == {expected}


@pytest.mark.parametrize(
    ("abi", "types", "expected"),
    [
        ("regparm3", [32, 32, 32, 32], ["0", "2", "1", "+0"]),
        ("regparm3", [64, 32, 32], ["02", "1", "+0"]),
        ("regparm3", [32, 64, 32], ["0", "21", "+0"]),
        ("regparm3", [32, 32, 64, 32], ["0", "2", "+0+1", "+2"]),
        ("regparm3", [64, 64, 8], ["02", "+0+1", "+2"]),
        ("cdecl", [32, 64, 8], ["+0", "+1+2", "+3"]),
        ("sysv", [64, 8, 16, 32, 64, 64, 64, 8], ["7", "6", "2", "1", "8", "9", "+0", "+1"]),
    ],
)
def test_layout_is_gccs(abi: str, types: list[int], expected: list[str]) -> None:
    """What gcc 12.2 -m32 -mregparm=3 and -m64 make of such prototypes; see test_objects for the compiler's own word."""

    def show(slot_registers: tuple[int, ...], stack: int, words: int) -> str:
        return "".join(map(str, slot_registers)) or "".join(f"+{stack + i}" for i in range(words))

    slots = layout(ABIS[abi], [Scalar(bits) for bits in types])
    assert [show(slot.registers, slot.stack, slot.words) for slot in slots] == expected


def test_a_variadic_function_takes_nothing_in_registers_on_i386() -> None:
    """`*args` in the entry says so; the words it gets are those above the return address."""
    lab = Lab(32)
    seen: list[tuple[int, ...]] = []
    above: list[tuple[int, ...]] = []

    def entry(first: u32, *rest: u32, regs: Regs) -> None:
        seen.append((first, *rest))
        above.append(tuple(regs.stack(index) for index in range(1, 8)))

    target_of(lab, entry, "sum8")
    lab.run()
    assert seen == above != []


def test_a_returned_structure_is_a_hidden_first_argument(lab: Lab) -> None:
    """With `-> struct` the entry's first argument is the second word."""
    seen: list[tuple[int, int]] = []

    def entry(value: ulong, *, regs: Regs) -> struct:
        seen.append((value, regs.arg(2)))

    target_of(lab, entry, "sum8")
    lab.run()
    assert seen
    assert all(value == second for value, second in seen)


def test_another_word_sizes_convention_is_refused(lab: Lab) -> None:
    """regparm(3) on amd64, sysv on i386."""
    with pytest.raises(ProbeError) as refusal:
        target_of(lab, lambda: None, abi="regparm3" if lab.bits == 64 else "sysv")
    assert refusal.value.errno == errno.EINVAL


def test_an_entry_c_could_not_have_is_refused(lab: Lab) -> None:
    """A keyword argument, or an annotation that is no integer type."""

    def named(*, nothing: int) -> None: ...

    def text(name: str) -> None: ...

    for entry in (named, text):
        with pytest.raises(ProbeError) as refusal:
            target_of(lab, entry)
        assert refusal.value.errno == errno.EINVAL


# --------------------------------------------------------------------------------------------------- what is undone


def test_argument_edits_are_undone_and_other_effects_stay(lab: Lab) -> None:
    """Registers, flags and 64 bytes of stack are put back; a word elsewhere keeps what the entry wrote."""
    scratch = lab.guest.address("count_do_exit")  # nothing ends here

    def entry(value: ulong, *, regs: Regs) -> None:
        regs.di = regs.ax = regs.dx = regs.cx = 12345
        regs.bx = regs.bp = 1
        regs.flags ^= 1
        regs.write(regs.sp, b"\xff" * 64)
        regs.write(scratch, (77).to_bytes(4, "little"))
        regs.sp -= 8

    bare = Lab(lab.bits)
    probe = target_of(lab, entry, "sum8")
    lab.run()
    bare.run()
    assert probe.kp.hits > 100
    assert lab.guest.value("checksum") == bare.guest.value("checksum")
    assert int.from_bytes(lab.machine.memory.read(scratch, 4), "little") == 77


def test_a_jprobe_takes_no_time(lab: Lab) -> None:
    """The guest's clock and course are the bare machine's."""
    bare = Lab(lab.bits)
    target_of(lab, lambda value: None)
    lab.run()
    bare.run()
    assert lab.machine.instructions == bare.machine.instructions
    assert lab.guest.value("jiffies") == bare.guest.value("jiffies")


# ------------------------------------------------------------------------------------------------------- among others


def test_a_second_jprobe_at_an_address_is_refused(lab: Lab) -> None:
    """EEXIST, as the kernel's aggregates have it; after the first is gone it may come."""
    first = target_of(lab, lambda v: None)
    second = Jprobe(kp=Kprobe(symbol="target"), entry=lambda v: None)
    with pytest.raises(ProbeError) as refusal:
        lab.probes.register(second)
    assert refusal.value.errno == errno.EEXIST
    assert not second.registered
    lab.probes.unregister(first)
    lab.probes.register(second)


def test_a_jprobe_off_the_entry_is_refused(lab: Lab) -> None:
    """register_jprobe() of later kernels: EINVAL, and nothing is armed."""
    probe = Jprobe(kp=Kprobe(symbol="target", offset=1), entry=lambda v: None)
    with pytest.raises(ProbeError) as refusal:
        lab.probes.register(probe)
    assert refusal.value.errno == errno.EINVAL
    assert not probe.registered


def test_behind_an_endbr_is_the_entry(lab: Lab) -> None:
    """Linux moves a probe on an ENDBR behind it and still calls that the entry."""
    seen: list[int] = []
    lab.probes.register(Jprobe(kp=Kprobe(symbol="endbr_target", offset=4), entry=lambda v: seen.append(v)))
    lab.run()
    assert len(seen) > 10


def test_the_jprobe_comes_after_the_kprobes_and_with_a_kretprobe(lab: Lab) -> None:
    """Whatever the order of registration: kprobes newest first, then the jprobe; the return probe sees the return."""
    order: list[str] = []

    def pre(name: str) -> Callable[[Kprobe, Regs], None]:
        return lambda kp, regs: order.append(name)

    early = Kprobe(symbol="target", pre_handler=pre("early"), post_handler=pre("post"))
    late = Kprobe(symbol="target", pre_handler=pre("late"))
    returns = Kretprobe(kp=Kprobe(symbol="target"), handler=lambda ri, regs: order.append("return"), maxactive=10)
    lab.probes.register(early)
    target_of(lab, lambda v: order.append("entry"))
    lab.probes.register(late)
    lab.probes.register(returns)
    while "return" not in order:
        lab.machine.run(1000)
    begin = order.index("late")
    assert order[begin : begin + 5] == ["late", "early", "entry", "post", "return"]


def test_a_kprobe_that_takes_over_stops_the_jprobe(lab: Lab) -> None:
    """A true pre-handler ends the aggregate: the jprobe is missed, as the kernel has it."""

    def leave(kp: Kprobe, regs: Regs) -> bool:
        regs.ip = regs.stack(0)
        regs.sp += regs.convention.word
        return True

    probe = target_of(lab, lambda v: pytest.fail("the entry ran"), "inner_target")
    taking = Kprobe(symbol="inner_target", pre_handler=leave)
    lab.probes.register(taking)
    lab.run()
    assert (probe.kp.hits, probe.kp.nmissed) == (0, taking.hits)
    assert taking.hits > 100


def test_a_probe_met_in_the_entry_is_a_reentrant_hit(lab: Lab) -> None:
    """regs.call from the entry into a probed function: executed, counted, no handler."""
    inner = Kprobe(symbol="inner_target")
    lab.probes.register(inner)
    before = lab.guest.counters["inner_target"]
    probe = target_of(lab, lambda v, *, regs: regs.call("nested_target", v))
    lab.run()
    assert inner.nmissed == probe.kp.hits > 100
    assert inner.hits + inner.nmissed == lab.guest.counters["inner_target"] - before


def test_a_jprobe_can_unregister_itself_in_its_entry(lab: Lab) -> None:
    """The hit is finished; no other comes."""
    calls: list[int] = []

    def entry(value: ulong) -> None:
        calls.append(value)
        lab.probes.unregister(probe)

    probe = target_of(lab, entry)
    lab.run()
    assert len(calls) == 1
    assert not probe.registered


# ------------------------------------------------------------------------------------------------------ guest entries


def test_a_guest_entry_that_returns_counts_as_one_that_ends(lab: Lab) -> None:
    """`target2` entered with the arguments of every `inner_target`: its own counter tells."""
    bare = Lab(lab.bits)
    probe = target_of(lab, "target2", "inner_target")
    lab.run()
    bare.run()
    extra = lab.guest.counters["target2"] - bare.guest.counters["target2"]
    assert extra == probe.kp.hits > 100
    assert lab.guest.value("checksum") == bare.guest.value("checksum")


def test_a_guest_entry_finds_stack_arguments(lab: Lab) -> None:
    """sum8 as the entry of a jprobe on sum8: a kprobe inside it, met reentrantly, counts its executions."""
    probe = target_of(lab, lab.guest.address("testprobe"), "sum8")
    before = lab.guest.counters["testprobe"]
    bare = Lab(lab.bits)
    lab.run()
    bare.run()
    assert lab.guest.counters["testprobe"] - bare.guest.counters["testprobe"] == probe.kp.hits
    assert lab.guest.counters["testprobe"] > before


def test_a_guest_entry_that_sleeps_is_taken_out_of_service(lab: Lab) -> None:
    """The probe is disabled and says why; the guest goes on."""
    bare = Lab(lab.bits)
    probe = target_of(lab, "sleep_ticks")
    lab.run()
    bare.run()
    assert probe.kp.hits == 1
    assert probe.kp.disabled
    assert "would sleep" in probe.notes[-1]
    assert lab.guest.value("checksum") == bare.guest.value("checksum")


def test_an_entry_that_is_not_there_is_refused(lab: Lab) -> None:
    """An unknown symbol, and an address nothing is mapped at."""
    with pytest.raises(ProbeError) as refusal:
        target_of(lab, "no_such_entry")
    assert refusal.value.errno == errno.ENOENT
    with pytest.raises(ProbeError) as refusal:
        target_of(lab, 0x10)
    assert refusal.value.errno == errno.EFAULT
    with pytest.raises(MemoryFault):
        lab.machine.memory.read(0x10, 1)


def test_an_entry_is_not_called_for_hits_nobody_wants(lab: Lab) -> None:
    """By a filter; --comm of an event is one, and its hits are none then."""
    seen: list[int] = []

    def entry(value: ulong) -> None:
        seen.append(value)

    target_of(lab, entry, filter=lambda kp, regs: regs.arg(1) % 2 == 0)
    lab.probes.add("jprobe", "p:other fib", {"entry": "target2", "comm": "nobody*"})
    lab.run()
    assert {value % 2 for value in seen} == {0}
    assert lab.probes.status()[0].hits == 0


@pytest.mark.parametrize("entry", [None, 1.5])
def test_what_no_probe_is_is_refused(lab: Lab, entry: Any) -> None:
    """In words, not by an attribute that is missing somewhere."""
    with pytest.raises(TypeError, match="a jprobe's entry is a function, a symbol or an address"):
        Jprobe(kp=Kprobe(symbol="target"), entry=entry)
    for act in (lab.probes.register, lab.probes.unregister):
        with pytest.raises(TypeError, match="a probe is a Kprobe, Kretprobe, Jprobe or Uprobe"):
            act(entry)
