"""Calls into the guest from handlers: values, what is put back, what is refused, and probes met on the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emu.iface import BackEnd
from emu.machine import Machine
from emu.stops import Breakpoint
from probes import Kprobe, Manager, ProbeError, Regs
from probes.abi import s8, s32, u8, u64
from probes.errors import CallError
from tests.support.embedded import Guest, power_on

BOOTED = 30_000
"""Instructions after which the embedded guest's exercises run."""
ROUNDS = 400_000


class Lab:
    """The embedded guest amid its exercises, with a manager."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.machine: Machine = power_on(bits, "calls=1000 idle")
        self.machine.run(BOOTED)
        self.guest = Guest(self.machine, bits)
        self.probes = Manager(self.machine)

    def once(self, call: Callable[[Regs], object], symbol: str = "target", arm: str = "auto") -> object:
        """What `call` gives at the first hit of a probe on `symbol`; the probe is gone afterwards."""
        results: list[object] = []

        def pre(probe: Kprobe, regs: Regs) -> None:
            if not results:
                results.append(call(regs))

        probe = Kprobe(symbol=symbol, pre_handler=pre, arm=arm)
        self.probes.register(probe)
        self.machine.run(ROUNDS)
        self.probes.unregister(probe)
        assert results, f"{symbol} was not reached"
        return results[0]


@pytest.fixture(params=[64, 32])
def lab(request: pytest.FixtureRequest) -> Lab:
    return Lab(request.param)


def failing(call: Callable[[Regs], object]) -> Callable[[Regs], CallError]:
    """`call`, which must be refused. -> the refusal."""

    def attempt(regs: Regs) -> CallError:
        with pytest.raises(CallError) as refusal:
            call(regs)
        return refusal.value

    return attempt


@pytest.mark.parametrize("arm", ["int3", "hook"])
def test_a_call_returns_what_the_function_does(lab: Lab, arm: str) -> None:
    """target(v) is v / 3, however the probe whose handler calls it is armed."""
    assert lab.once(lambda regs: regs.call("recursed_target", 3000), arm=arm) == 1000


def test_an_address_can_be_called(lab: Lab) -> None:
    """As a symbol can."""
    assert lab.once(lambda regs: regs.call(lab.guest.address("target2"), 30)) == 11


def test_arguments_go_where_the_convention_has_them(lab: Lab) -> None:
    """sum8 takes the last two (64 bits) or five (32 bits) of its eight arguments on the stack."""
    values = [10**index for index in range(8)]
    assert lab.once(lambda regs: regs.call("sum8", *values)) == 11111111


def test_a_result_has_the_width_and_sign_asked_for(lab: Lab) -> None:
    """recursed_target(0xfffe * 3) is 0xfffe: -2 as a signed byte, 254 as an unsigned one."""
    assert lab.once(lambda regs: regs.call("recursed_target", 0xFFFE * 3, returns=s8)) == -2
    assert lab.once(lambda regs: regs.call("recursed_target", 0xFFFE * 3, returns=u8)) == 0xFE


def test_a_64_bit_argument_takes_two_registers_on_i386() -> None:
    """testprobe adds six words: one u64 in eax and edx, a word in ecx, one u64 and a word on the stack."""
    lab = Lab(32)
    values, types = (1 << 32 | 2, 4, 8 << 32 | 16, 32), (u64, int, u64, int)
    assert lab.once(lambda regs: regs.call("testprobe", *values, types=types)) == 63


def test_everything_is_put_back(lab: Lab) -> None:
    """Registers, flags and stack pointer are the same after calls that clobber them, x87 and SSE included."""
    registers = lab.machine.registers.arch.names

    def look(regs: Regs) -> tuple[list[int], list[int]]:
        regs.flags |= 0x400
        before = [lab.machine.registers.read(name) for name in registers if name != "eflags"] + [regs.flags]
        for function in ("sse_target", "x87_target", "flags_target"):
            regs.call(function, 5)
        after = [lab.machine.registers.read(name) for name in registers if name != "eflags"] + [regs.flags]
        regs.flags &= ~0x400
        return before, after

    before, after = lab.once(look)
    assert before == after


@pytest.mark.parametrize("arm", ["int3", "hook"])
def test_a_run_with_calls_takes_the_time_of_a_run_without(lab: Lab, arm: str) -> None:
    """The instruction count, the clock and the timer's ticks are those of the bare machine."""
    probe = Kprobe(symbol="target", pre_handler=lambda p, regs: regs.call("fib", 6) and None, arm=arm)
    lab.probes.register(probe)
    bare = Lab(lab.bits)
    ends = [(m.instructions, m.clock.now_ns) for m in (lab.machine, bare.machine) if m.run(ROUNDS)]
    assert probe.hits > 100
    assert ends[0] == ends[1]
    assert lab.guest.value("jiffies") == bare.guest.value("jiffies")
    assert lab.guest.value("checksum") == bare.guest.value("checksum")


def test_time_runs_inside_a_call(lab: Lab) -> None:
    """A callee that waits for time gets it: the clock moves on while it runs, and is back afterwards."""
    clock = lab.machine.clock
    seen: list[int] = []
    lab.machine.watch(lab.guest.address("inner_target"), lambda: seen.append(clock.instructions))

    def call(regs: Regs) -> tuple[int, int]:
        before = clock.instructions
        regs.call("fib", 6)
        seen.clear()
        regs.call("nested_target", 1)
        return before, clock.instructions

    before, after = lab.once(call)
    assert before == after
    assert seen[0] > before


@pytest.mark.parametrize("function", ["schedule", "sleep_ticks", "sleeping_target"])
def test_a_callee_that_would_sleep_is_an_error(lab: Lab, function: str) -> None:
    """Nothing is scheduled: the call ends where `schedule` is entered, and the guest goes on as if it had not begun."""
    error = lab.once(failing(lambda regs: regs.call(function, 2)))
    assert isinstance(error, CallError)
    assert "would sleep: it entered schedule" in error.reason


def test_a_call_given_up_leaves_the_run_as_it_was(lab: Lab) -> None:
    """The exercises go on to the same checksum."""
    lab.once(failing(lambda regs: regs.call("busy_loop", 0, budget=10_000)))
    bare = Lab(lab.bits)
    bare.machine.run(ROUNDS)
    assert lab.guest.value("checksum") == bare.guest.value("checksum")
    assert lab.machine.instructions == bare.machine.instructions


def test_a_callee_that_does_not_return_is_an_error(lab: Lab) -> None:
    """The budget ends it."""
    error = lab.once(failing(lambda regs: regs.call("busy_loop", 0, budget=10_000)))
    assert isinstance(error, CallError)
    assert "10,000 instructions" in error.reason


def test_an_unknown_function_is_refused_with_a_suggestion(lab: Lab) -> None:
    """As a probe on it would be."""

    def attempt(regs: Regs) -> str:
        with pytest.raises(ProbeError, match="no symbol recursed_targt") as refusal:
            regs.call("recursed_targt")
        return str(refusal.value.hint)

    assert "recursed_target" in str(lab.once(attempt))


def test_a_fault_in_the_callee_is_the_guests_to_handle(lab: Lab) -> None:
    """probe_read of an address that is nowhere gives -EFAULT, by way of the guest's page-fault handler."""
    assert lab.once(lambda regs: regs.call("probe_read", 0x10, returns=s32)) == -14


@pytest.mark.parametrize("where", ["pre_handler", "post_handler"])
def test_a_fault_in_the_callee_is_shown_to_the_probe_s_fault_handler_first(lab: Lab, where: str) -> None:
    """In HIT_ACTIVE and HIT_SSDONE: one that declines leaves the fault to the guest, one that mends registers and says
    true has the load done again; no hit is missed for it."""
    good = lab.guest.address("count_target")
    seen: list[tuple[int, bool]] = []
    results: list[int] = []
    mend = False

    def call(probe: Kprobe, regs: Regs) -> None:
        if len(results) < 2:
            results.append(regs.call("probe_read", 0x10, returns=s32))

    def fault(probe: Kprobe, regs: Regs, vector: int) -> bool:
        nonlocal mend
        seen.append((vector, regs.ip == lab.machine.cpu.pc))
        for name in ("ax", "cx", "dx", "di", "si"):
            if mend and getattr(regs, name) == 0x10:
                setattr(regs, name, good)
        mend, now = True, mend
        return now

    probe = Kprobe(symbol="target", fault_handler=fault, **{where: call})  # type: ignore[arg-type]
    lab.probes.register(probe)
    lab.machine.run(ROUNDS)
    assert seen == [(14, True), (14, True)]
    assert results == [-14, 0]
    assert probe.nmissed == 0


def test_a_breakpoint_of_a_debuggers_is_passed(lab: Lab) -> None:
    """Nobody could be asked in the middle of a handler; between calls it stops the machine as ever."""
    at = lab.guest.address("inner_target")
    lab.machine.insert_breakpoint(at)
    results: list[int] = []
    lab.probes.register(Kprobe(symbol="target", pre_handler=lambda p, r: results.append(r.call("nested_target", 4))))
    stops = [lab.machine.run(ROUNDS) for _ in range(4)]
    assert stops == [Breakpoint(at)] * 4
    assert set(results) == {9}


# ----------------------------------------------------------------------------------------------------------- reentrancy


@pytest.mark.parametrize("arm", ["int3", "hook"])
def test_kprobe_missed(lab: Lab, arm: str) -> None:
    """KUnit's test_kprobe_missed: the handlers of a probe call the probed function; each such hit is only counted."""
    ran: list[tuple[str, int]] = []

    def handler(name: str) -> Callable[[Kprobe, Regs], None]:
        def call(probe: Kprobe, regs: Regs) -> None:
            ran.append((name, regs.call("recursed_target", 300)))

        return call

    probe = Kprobe(symbol="recursed_target", pre_handler=handler("pre"), post_handler=handler("post"), arm=arm)
    lab.probes.register(probe)
    counted = lab.guest.counters["recursed_target"]
    while not probe.hits:
        lab.machine.run(1000)
    lab.probes.disable(probe)
    assert ran == [("pre", 100), ("post", 100)]
    assert (probe.hits, probe.nmissed) == (1, 2)
    assert lab.guest.counters["recursed_target"] == counted + 3


def test_a_probe_met_in_a_call_is_armed_again(lab: Lab) -> None:
    """After calls from both handlers the next hit of each probe on the way runs its handlers."""
    outer = Kprobe(symbol="target", pre_handler=lambda p, r: r.call("nested_target", 1) and None)
    outer.post_handler = lambda p, r: r.call("nested_target", 1)
    inner = Kprobe(symbol="inner_target", pre_handler=lambda p, r: None, post_handler=lambda p, r: None)
    lab.probes.register_many([outer, inner])
    before = lab.guest.counters["inner_target"]
    lab.machine.run(ROUNDS)
    assert inner.nmissed == 2 * outer.hits
    assert inner.hits + inner.nmissed == lab.guest.counters["inner_target"] - before
    assert inner.hits > 100


def test_every_probe_of_a_place_is_missed(lab: Lab) -> None:
    """Of an aggregate met in a handler each kprobe counts."""
    several = [Kprobe(symbol="inner_target") for _ in range(3)]
    caller = Kprobe(symbol="target2", pre_handler=lambda p, r: r.call("nested_target", 1) and None)
    lab.probes.register_many([*several, caller])
    lab.machine.run(ROUNDS)
    assert [probe.nmissed for probe in several] == [caller.hits] * 3


def test_a_call_given_up_among_stepped_probes_leaves_none_half_done(lab: Lab) -> None:
    """`busy_loop` is probed where it loops; later hits of the caller find the engine in order."""
    loop = lab.guest.address("busy_loop")
    looping = Kprobe(addr=loop, post_handler=lambda p, r: None)
    attempts: list[CallError] = []

    def pre(probe: Kprobe, regs: Regs) -> None:
        attempts.append(failing(lambda r: r.call("busy_loop", 0, budget=2_000))(regs))

    calling = Kprobe(symbol="target2", pre_handler=pre, post_handler=lambda p, r: None)
    lab.probes.register_many([looping, calling])
    lab.machine.run(100_000)
    assert len(attempts) == calling.hits > 10
    assert calling.nmissed == 0


def test_a_call_can_be_made_between_runs() -> None:
    """A script at a stopped machine calls as a handler does."""
    lab = Lab(64)
    at = lab.guest.address("target")
    lab.machine.insert_breakpoint(at)
    lab.machine.run(ROUNDS)
    before = (lab.machine.cpu.pc, list(lab.machine.cpu.gpr), lab.machine.instructions)
    assert lab.machine.call(lab.guest.address("recursed_target"), {7: 33}, b"", 1000)[0] == 11
    assert (lab.machine.cpu.pc, list(lab.machine.cpu.gpr), lab.machine.instructions) == before


def test_the_back_end_stays(lab: Lab) -> None:
    """A call from a PC hook does not turn it into something else."""
    probe = Kprobe(symbol="target", pre_handler=lambda p, r: r.call("recursed_target", 3) and None, arm="hook")
    lab.probes.register(probe)
    lab.machine.run(ROUNDS)
    assert probe.hits > 100
    assert lab.machine.text.place_at(lab.guest.address("target")) is None
    assert lab.machine.text.hooked(lab.guest.address("target")).back_end is BackEnd.HOOK
