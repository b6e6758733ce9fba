"""Return probes on the embedded guest: both word sizes, by trampoline and by shadow. KUnit's cases and 2005's."""

from __future__ import annotations

import errno
from collections import Counter

import pytest

from emu.stops import GuestExit
from probes import Kprobe, Kretprobe, Manager, ProbeError, Regs, ReturnInstance
from probes.arch.x86 import X86Arch
from probes.core import Kprobes
from probes.kprobe import Arm
from probes.kretprobe import Kretprobes
from probes.tasks import find_tasks
from tests.probes.returns import ENOUGH, STEP, WAYS, End, Returns, Way, add_up
from tests.support.embedded import power_on

pytestmark = pytest.mark.parametrize("way", WAYS, ids=str)

EVERYWHERE = (
    *("target", "target2", "fib", "skip_frames", "skipped_target", "ret_imm_target", "tail_target", "sum8"),
    *("nested_target", "inner_target", "exercise", "memcpy", "flags_target", "probe_read", "endbr_target"),
    *("sleeping_target", "sleep_ticks", "dying_target", "do_exit", "wake_up", "schedule", "switch_to", "do_timer"),
)
"""Functions that return plainly, late, elsewhere, in a chain, with `ret imm16`, in another task, or never."""


# ------------------------------------------------------------------------------------------- as the kernel's own tests


def test_entry_then_return_with_the_functions_value(way: Way) -> None:
    """KUnit's test_kretprobe: the entry handler comes first, the return handler sees v / 3."""
    run, seen = Returns(way, "calls=4"), []
    rp = run.probe(
        "recursed_target",
        lambda ri, regs: seen.append(("return", regs.retval)),
        lambda ri, regs: seen.append(("entry", regs.arg(1))),
    )
    run.run()
    assert seen == [event for v in range(1, 5) for event in (("entry", v), ("return", v // 3))]
    assert (rp.entries, rp.returned) == (4, 4)


def test_batch_of_two(way: Way) -> None:
    """KUnit's test_kretprobes: each sees its own function; both go in one register_many and are registered again."""
    run, seen = Returns(way, "calls=1"), Counter[str]()

    def count(ri: ReturnInstance, regs: Regs) -> None:
        seen[f"{ri.rp.kp.symbol} {regs.retval}"] += 1

    rps = [
        Kretprobe(kp=Kprobe(symbol=name), handler=count, shadow=way.shadow) for name in ("target2", "recursed_target")
    ]
    run.manager.register_many(rps)
    for rp in rps:
        run.manager.unregister(rp)
    run.manager.register_many(rps)
    run.run()
    assert seen == {"target2 1": 1, "recursed_target 0": 1}


def test_stack_trace_in_the_handler_begins_at_the_true_return_address(way: Way) -> None:
    """KUnit's test_stacktrace_on_kretprobe: ip and the frames above it name the callers, not us."""
    run, traces = Returns(way, "calls=1"), []
    run.probe(
        "recursed_target", lambda ri, regs: traces.append((regs.ip == ri.ret_addr, run.callers(regs.ip, regs.bp)))
    )
    run.run()
    assert traces == [(True, ["exercise", "do_calls", "run_workloads", "ret_from_fork"])]


def test_stack_trace_of_nested_return_probes_is_true(way: Way) -> None:
    """KUnit's test_stacktrace_on_nested_kretprobe: in the inner handler the outer's frame shows its true return."""
    run, traces = Returns(way, "calls=1"), []

    def trace(ri: ReturnInstance, regs: Regs) -> None:
        names = run.callers(regs.ip, regs.bp)
        if names[0] == "nested_target":
            traces.append(names)

    run.probe("nested_target")
    run.probe("inner_target", trace)
    run.run()
    assert traces == [["nested_target", "exercise", "do_calls", "run_workloads", "ret_from_fork"]]


# ---------------------------------------------------------------------------------------------- what the guest notices


@pytest.mark.parametrize("arm", ["int3", "hook"])
def test_guest_cannot_tell(way: Way, arm: Arm) -> None:
    """With probes on everything the run ends at the bare run's instruction, with its RAM; all entries add up."""
    append = "calls=2 sleep=3 deaths=2"
    bare = power_on(way.bits, f"{append} exit=0")
    bare.run(1_000_000)
    run = Returns(way, append)
    rps = [run.probe(name, arm=arm) for name in EVERYWHERE]
    run.run()
    assert add_up(rps)
    assert run.machine.ram_sha256() == bare.ram_sha256()
    assert run.machine.clock.instructions == bare.clock.instructions


@pytest.mark.parametrize("name", ["common_trap", "common_interrupt"])
def test_entry_code_is_entered_without_a_return_address(way: Way, name: str) -> None:
    """A vector stands on the stack there, and the guest finds it as it was: entries are misses, the probe says why."""
    append = "calls=2 sleep=3"
    bare = power_on(way.bits, f"{append} exit=0")
    bare.run(1_000_000)
    run = Returns(way, append)
    rp = run.probe(name)
    run.run()
    assert rp.entries == rp.nmissed > 0
    assert rp.notes[-1] == "missed where it was entered without a return address on the stack"
    assert run.machine.ram_sha256() == bare.ram_sha256()
    assert run.machine.clock.instructions == bare.clock.instructions


def test_a_function_that_a_handler_leaves_has_returned(way: Way) -> None:
    """By its return address, as `return:` does, behind the entry's own handler: with that handler's value."""
    run, values = Returns(way, "calls=3"), []

    def leave(probe: Kprobe, regs: Regs) -> bool:
        word = way.bits // 8
        regs.ip, regs.retval = int.from_bytes(regs.read(regs.sp, word), "little"), 77
        regs.sp += word
        return True

    run.manager.register(Kprobe(symbol="recursed_target", pre_handler=leave))
    rp = run.probe("recursed_target", lambda ri, regs: values.append(regs.retval))
    run.breakpoint(run.guest.address("exercise"))
    run.machine.run(2_000)
    assert (rp.returned, rp.live, add_up([rp])) == (rp.entries, 0, True)
    assert values == [77] * rp.entries != []


def test_a_return_is_seen_before_any_other_probe_there(way: Way) -> None:
    """One that stands at the return address and sets the registers would keep it from being seen."""
    run, sites = Returns(way, "calls=3"), []
    rp = run.probe("recursed_target", lambda ri, regs: sites.append(ri.ret_addr))
    run.run_until(lambda: rp.returned == 1)
    counted: list[int] = []
    run.manager.register(Kprobe(addr=sites[0], pre_handler=lambda probe, regs: counted.append(rp.returned)))
    run.run()
    assert counted == [2, 3]


def test_code_that_comes_where_other_code_was_freed_returns_as_well(way: Way) -> None:
    """As a module's that is loaded again at the same address: nobody has expected a return there since."""
    machine = Returns(way, "calls=3").machine
    arch = X86Arch(machine, object())
    kprobes = machine.trap_client = Kprobes(machine, arch)
    rps, sites = Kretprobes(machine, arch, kprobes, find_tasks(machine)), []
    rp = Kretprobe(
        kp=Kprobe(symbol="recursed_target"), handler=lambda ri, regs: sites.append(ri.ret_addr), shadow=way.shadow
    )
    rps.register(rp)
    while rp.returned < 1:
        machine.run(STEP)
    kprobes.discard(sites[0], sites[0] + 1)
    assert machine.run(ENOUGH) == GuestExit(0)
    assert (rp.returned, rp.live) == (rp.entries, 0)
    assert rp.entries == 3


def test_unregistering_leaves_nothing_armed(way: Way) -> None:
    """Neither at the functions nor at the addresses they returned to."""
    run = Returns(way, "calls=2 sleep=2 deaths=1")
    rps = [run.probe(name) for name in EVERYWHERE]
    run.run()
    for rp in rps:
        run.manager.unregister(rp)
    assert add_up(rps)
    assert run.machine.text.armed_bytes() == {}


def test_window_that_goes_away_under_a_call_costs_no_time(way: Way) -> None:
    """The guest drops our directory entry, as Linux does early in its boot: it is put back at the return, uncounted."""
    bare = power_on(way.bits, "calls=1 exit=0")
    bare.run(1_000_000)
    run = Returns(way, "calls=1")
    rp = run.probe("recursed_target")
    run.breakpoint(run.guest.address("recursed_target") + 1)
    for paddr, byte in run.machine.window.foreign_bytes().items():
        run.machine.ram.write(paddr, bytes([byte]))
    run.machine.engine.flush()
    run.run()
    assert (rp.returned, run.machine.clock.instructions) == (1, bare.clock.instructions)


def test_watched_return_address_does_not_stay_hooked(way: Way) -> None:
    """While the guest patches itself returns are met by PC hooks, each of which slows every instruction."""
    run, seen = Returns(way, "calls=2"), set[int]()
    manager = Manager(run.machine, settled=False)
    rp = Kretprobe(
        kp=Kprobe(symbol="fib"), handler=lambda ri, regs: seen.add(ri.ret_addr), maxactive=9, shadow=way.shadow
    )
    manager.register(rp)
    run.run()
    assert (rp.returned, len(seen)) == (50, 3)
    assert [run.machine.text.hooked(address) for address in seen] == [None] * 3


def test_debugger_reads_the_true_return_address(way: Way) -> None:
    """Inside a probed function the stack word, as a debugger reads it, is the caller's; the guest's is ours or not."""
    run = Returns(way, "calls=1")
    run.probe("recursed_target")
    run.breakpoint(run.guest.address("recursed_target") + 1)
    word, sp = way.bits // 8, run.machine.cpu.gpr[4] + way.bits // 8
    shown = run.guest.word(sp)
    paddr = run.machine.memory.translate(sp)
    assert paddr is not None
    read_by_guest = int.from_bytes(run.machine.ram.read(paddr, word), "little")
    assert run.function_at(shown) == "exercise"
    assert run.machine.window.contains(read_by_guest) is not way.shadow


def test_debuggers_write_to_the_return_address_is_obeyed(way: Way) -> None:
    """As gdb's `return` does: the function returns to where the debugger says, and the handler runs or is skipped."""
    run = Returns(way, "calls=1")
    rp = run.probe("recursed_target")
    run.breakpoint(run.guest.address("recursed_target") + 1)
    word = way.bits // 8
    elsewhere = run.guest.address("do_panic")
    run.machine.memory.write(run.machine.cpu.gpr[4] + word, elsewhere.to_bytes(word, "little"))
    run.breakpoint(elsewhere)
    assert (rp.returned, rp.live) == ((0, 1) if way.shadow else (1, 0))


def test_handler_may_change_the_return_value(way: Way) -> None:
    """The caller goes on with it: the checksum grows by what was added."""
    sums = []
    for extra in (0, 1000):
        run = Returns(way, "calls=3")

        def add(ri: ReturnInstance, regs: Regs, extra: int = extra) -> None:
            regs.retval += extra

        run.probe("recursed_target", add)
        run.run()
        sums.append(run.guest.value("checksum"))
    assert sums[1] - sums[0] == 3000


# ------------------------------------------------------------------------------------------------------ many instances


def test_recursion_returns_inside_out(way: Way) -> None:
    """fib(6): 25 calls, each return with the value of its own argument."""
    run, wrong = Returns(way, "calls=1"), []
    values = [0, 1, 1, 2, 3, 5, 8]

    def enter(ri: ReturnInstance, regs: Regs) -> None:
        ri.data[0] = regs.arg(1)

    def check(ri: ReturnInstance, regs: Regs) -> None:
        if regs.retval != values[ri.data[0]]:
            wrong.append((ri.data[0], regs.retval))

    rp = run.probe("fib", check, enter, data_size=1)
    run.run()
    assert (rp.returned, wrong) == (25, [])


@pytest.mark.parametrize("maxactive", [1, 3, 5])
def test_entries_beyond_maxactive_are_missed(way: Way, maxactive: int) -> None:
    """Exactly those that a recursion finds the pool empty."""

    def count(n: int, depth: int) -> tuple[int, int]:
        """(followed, missed) of fib(n) when `depth` instances are out."""
        got = depth < maxactive
        inner = [count(n - k, depth + got) for k in (1, 2)] if n >= 2 else []
        return got + sum(i[0] for i in inner), (not got) + sum(i[1] for i in inner)

    run = Returns(way, "calls=1")
    rp = run.probe("fib", maxactive=maxactive)
    run.run()
    assert (rp.returned, rp.nmissed) == count(6, 0)


def test_default_maxactive_is_that_of_a_preemptible_kernel(way: Way) -> None:
    """max(10, 2 * NR_CPUS); the embedded guest's tasks are preempted."""
    assert Returns(way, "").probe("target", maxactive=0).maxactive == 10


def test_several_on_one_function_nest(way: Way) -> None:
    """Newest probe first at the entry, so newest instance first at the return; all have the true return address."""
    run, seen = Returns(way, "calls=1"), []
    for name in "abc":
        run.probe(
            "recursed_target",
            lambda ri, regs, n=name: seen.append((n, run.function_at(ri.ret_addr))),
            lambda ri, regs, n=name: seen.append(n),
        )
    run.run()
    assert seen == ["c", "b", "a", ("a", "exercise"), ("b", "exercise"), ("c", "exercise")]


def test_function_left_by_a_jump_shares_the_return_of_the_next(way: Way) -> None:
    """tail_target jumps to target: one `ret`, two returns, the newer entry first."""
    run, seen = Returns(way, "calls=1"), []
    for name in ("target", "tail_target"):
        run.probe(name, lambda ri, regs: seen.append(ri.rp.kp.symbol))
    run.run()
    at = seen.index("tail_target")
    assert seen[at - 1] == "target"
    assert seen.count("tail_target") == 1


def test_both_ways_at_once(way: Way) -> None:
    """A trampoline's and a shadow's probe on one function each see every return."""
    run = Returns(way, "calls=3")
    one = run.probe("fib")
    other = Kretprobe(kp=Kprobe(symbol="fib"), maxactive=50, shadow=not way.shadow)
    run.manager.register(other)
    run.run()
    assert (one.returned, other.returned) == (75, 75)


def test_entry_handler_declines(way: Way) -> None:
    """Its instance goes back at once: with maxactive=1 no call is missed, every other one is declined."""
    run, returned = Returns(way, "calls=6"), []
    rp = run.probe(
        "recursed_target",
        lambda ri, regs: returned.append(regs.retval),
        lambda ri, regs: regs.arg(1) % 2,
        maxactive=1,
    )
    run.run()
    assert (returned, rp.declined, rp.missed) == ([2 // 3, 4 // 3, 6 // 3], 3, 0)


def test_instances_have_data_of_their_own(way: Way) -> None:
    """`data_size` zeroed bytes from the entry to the return of one call."""
    run, seen = Returns(way, "calls=2"), []

    def enter(ri: ReturnInstance, regs: Regs) -> None:
        seen.append(bytes(ri.data))
        ri.data[:] = regs.arg(1).to_bytes(4, "little")

    run.probe("recursed_target", lambda ri, regs: seen.append(bytes(ri.data)), enter, data_size=4)
    run.run()
    assert seen == [bytes(4), b"\1\0\0\0", bytes(4), b"\2\0\0\0"]


# ------------------------------------------------------------------------------------------------------- tasks and time


def test_tasks_that_sleep_inside_return_as_themselves(way: Way) -> None:
    """Two tasks in sleeping_target at a time: each instance's task and argument are those of its own return."""
    run, seen = Returns(way, "sleep=3"), Counter[int]()

    def enter(ri: ReturnInstance, regs: Regs) -> None:
        ri.data[:] = regs.arg(1).to_bytes(4, "little")

    def leave(ri: ReturnInstance, regs: Regs) -> None:
        assert ri.task == run.guest.value("current")
        assert regs.retval == int.from_bytes(ri.data, "little") + 1
        seen[ri.task] += 1

    run.probe("sleeping_target", leave, enter, data_size=4)
    run.run()
    assert seen == {run.guest.address(name): 3 for name in ("init_task", "helper_task")}


def test_second_task_misses_the_only_instance(way: Way) -> None:
    """maxactive=1, two tasks asleep in the function: nmissed is 1."""
    run = Returns(way, "sleep=1")
    rp = run.probe("sleeping_target", maxactive=1)
    run.run()
    assert (rp.returned, rp.nmissed) == (1, 1)


def test_ten_thousand_returns_across_tasks_add_up(way: Way) -> None:
    """Proof D: functions that sleep, of two tasks and the idle one; entries are the guest's own counts."""
    run = Returns(way, "sleep=110")
    names = ("sleeping_target", "schedule", "switch_to", "do_timer")
    rps = [run.probe(name) for name in names]
    run.run()
    assert sum(rp.returned for rp in rps) >= 10_000
    assert {rp.kp.symbol: rp.entries for rp in rps} == {name: run.guest.counters[name] for name in names}
    assert add_up(rps)
    assert all(rp.entries == rp.returned + rp.live + rp.died for rp in rps)


def test_unregistered_while_tasks_sleep_inside(way: Way) -> None:
    """The function returns as expected, the handler does not run, and the probe can be registered again."""
    run = Returns(way, "sleep=1 calls=1")
    rp = run.probe("sleeping_target", lambda ri, regs: pytest.fail("the handler ran"))
    run.run_until(lambda: rp.live == 2)
    run.manager.unregister(rp)
    assert (rp.live, rp.ends[End.UNREGISTERED], add_up([rp])) == (0, 2, True)
    run.manager.register(rp)
    run.run()
    assert run.guest.counters["sleeping_target"] == 2


def test_handler_may_unregister_its_own_probe(way: Way) -> None:
    """fib's first return ends it for the calls around it, too."""
    run = Returns(way, "calls=1")
    rp = run.probe("fib", lambda ri, regs: run.manager.unregister(rp))
    run.run()
    assert (rp.returned, rp.live, add_up([rp])) == (1, 0, True)


def test_task_that_ends_inside_frees_its_instances(way: Way) -> None:
    """A pool of one serves three tasks that never return, one after the other."""
    run = Returns(way, "deaths=3")
    rp = run.probe("dying_target", maxactive=1)
    run.run()
    assert (rp.entries, rp.died, rp.live, rp.missed) == (3, 3, 0, 0)


def test_frames_that_are_jumped_over_are_skipped(way: Way) -> None:
    """skip_frames leaves three calls as longjmp does: each is counted so, and the next round finds the pool full."""
    run = Returns(way, "calls=3")
    skipped, whole = run.probe("skipped_target", maxactive=3), run.probe("skip_frames")
    run.run()
    assert (skipped.entries, skipped.skipped, skipped.missed) == (9, 9, 0)
    assert (whole.returned, whole.skipped) == (3, 0)


def test_arguments_popped_by_the_callee(way: Way) -> None:
    """`ret imm16`: a return all the same, with the function's value."""
    run, seen = Returns(way, "calls=2"), []
    rp = run.probe("ret_imm_target", lambda ri, regs: seen.append(regs.retval))
    run.run()
    assert (seen, rp.skipped) == ([41, 42], 0)


def test_machine_that_goes_back_forgets_the_calls(way: Way) -> None:
    """Restored to before the entry, live instances are of another time; the guest runs on and is probed as ever."""
    run = Returns(way, "sleep=1")
    before = run.machine.snapshot()
    rp = run.probe("sleeping_target")
    run.run_until(lambda: rp.live == 2)
    run.machine.restore(before)
    assert (rp.live, rp.ends[End.RESTORED]) == (0, 2)
    run.run()
    assert (rp.returned, add_up([rp])) == (2, True)


def test_snapshot_inside_a_probed_call_runs_without_us(way: Way) -> None:
    """It holds true return addresses: a machine that knows of no probes goes on from it."""
    run = Returns(way, "sleep=1")
    rp = run.probe("sleeping_target")
    run.run_until(lambda: rp.live == 2)
    other = Returns(way, "sleep=1")
    other.machine.restore(run.machine.snapshot())
    other.run()
    run.run()
    assert other.machine.ram_sha256() == run.machine.ram_sha256()


# ------------------------------------------------------------------------------------------------------ registration


@pytest.mark.parametrize(
    ("rp", "number"),
    [
        (Kretprobe(kp=Kprobe(symbol="nothing")), errno.ENOENT),
        (Kretprobe(kp=Kprobe(symbol="target", offset=1)), errno.EINVAL),
        (Kretprobe(kp=Kprobe(symbol="target", offset=4)), errno.EINVAL),
        (Kretprobe(kp=Kprobe(symbol="target"), data_size=4097), errno.E2BIG),
    ],
    ids=["unknown", "inside", "no-endbr", "data"],
)
def test_refused_with_the_kernels_errno(way: Way, rp: Kretprobe, number: int) -> None:
    """register_kretprobe()'s refusals; nothing is armed then."""
    run = Returns(way, "")
    with pytest.raises(ProbeError) as refusal:
        run.manager.register(rp)
    assert refusal.value.errno == number
    assert run.machine.text.armed_bytes() == {}


def test_same_probe_twice_is_refused(way: Way) -> None:
    """EINVAL, and the first registration stands."""
    run = Returns(way, "calls=1")
    rp = run.probe("recursed_target")
    with pytest.raises(ProbeError) as refusal:
        run.manager.register(rp)
    run.run()
    assert (refusal.value.errno, rp.returned) == (errno.EINVAL, 1)


def test_behind_an_endbr_counts_as_the_entry(way: Way) -> None:
    """As on Linux: the function's first instruction says so, and nothing is on the stack yet."""
    run = Returns(way, "calls=2")
    rp = Kretprobe(kp=Kprobe(symbol="endbr_target", offset=4), shadow=way.shadow)
    run.manager.register(rp)
    run.run()
    assert rp.returned == rp.entries > 0


def test_linux_returns_into_another_task_are_noted(way: Way) -> None:
    """__switch_to is refused by Linux; here it is only said. The embedded guest's switch_to is no such name."""
    assert Returns(way, "").probe("switch_to").notes == ()
