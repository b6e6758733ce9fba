"""What the kernel's own tests ask of kprobes, redone on the embedded guest with both word sizes.

KUnit's test_kprobes.c, the boot self-test of trace_kprobe.c and tools/testing/selftests/ftrace (Linux 6.12).
Elsewhere: test_kprobe_missed in test_calls, return probes in test_kretprobe and test_kretprobe_events, the samples in
test_objects, modules and ftrace in test_modules and test_patching, profile and busy_check in test_tracefs, jprobes in
test_jprobe.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from emu.insn import spans
from emu.stops import Halted
from probes import Kprobe, Manager, ProbeError, Regs
from tests.support.embedded import Guest, power_on

CALLS = "calls=99 exit=0"
ENOUGH = 1_000_000
BOOTED = 20_000
"""Instructions after which the guest has its tables and about ten of its 99 rounds of calls behind it."""


@pytest.fixture(params=[64, 32])
def guest(request: pytest.FixtureRequest) -> Guest:
    machine = power_on(request.param, CALLS)
    machine.run(BOOTED)
    return Guest(machine, request.param)


def run_until(guest: Guest, happened: Callable[[], object]) -> None:
    """Runs on until `happened()`, which it does long before the guest ends."""
    while not happened():
        assert not isinstance(guest.machine.run(500), Halted)


def test_kprobe(guest: Guest) -> None:
    """The pre-handler calls a function and stores what it gives, the post-handler sees that and calls too; a second
    registration of the same probe works like the first."""
    manager, seen = Manager(guest.machine), []

    def pre(probe: Kprobe, regs: Regs) -> None:
        seen.append(("pre", regs.call("recursed_target", 300)))

    def post(probe: Kprobe, regs: Regs) -> None:
        seen.append(("post", seen[-1][1] + 3))

    probe = Kprobe(symbol="target", pre_handler=pre, post_handler=post)
    for _ in range(2):
        seen.clear()
        manager.register(probe)
        hits = probe.hits
        run_until(guest, lambda before=hits: probe.hits > before)
        manager.unregister(probe)
        assert seen[:2] == [("pre", 100), ("post", 103)]
    calls = len(seen)
    guest.machine.run(ENOUGH)
    assert len(seen) == calls


def test_kprobes(guest: Guest) -> None:
    """An array of two: each function runs its own pair of handlers and no other, once for each of its calls."""
    manager, seen = Manager(guest.machine), []

    def note(when: str) -> Callable[[Kprobe, Regs], None]:
        return lambda probe, regs: seen.append((probe.symbol, when))

    pair = [Kprobe(symbol=name, pre_handler=note("pre"), post_handler=note("post")) for name in ("target", "target2")]
    before = guest.counters
    manager.register_many(pair)
    guest.machine.run(ENOUGH)
    after = guest.counters
    for probe in pair:
        name = str(probe.symbol)
        calls = after[name] - before.get(name, 0)
        assert [seen.count((name, when)) for when in ("pre", "post")] == [calls, calls]
        assert calls >= 9
        manager.unregister(probe)
    assert guest.machine.text.armed_bytes() == {}


def test_boot_self_test(guest: Guest) -> None:
    """testprobe adds up 1 to 6: each event is hit once by each call, the second sees 21, and both can be deleted."""
    manager = Manager(guest.machine)
    manager.add("kprobe", "p:testprobe testprobe $stack $stack0 +0($stack)")
    manager.add("kprobe", "r:testprobe2 testprobe $retval")
    before = guest.counters["testprobe"]
    guest.machine.run(ENOUGH)
    calls = guest.counters["testprobe"] - before
    assert calls > 50
    assert [(status.name, status.hits) for status in manager.status()] == [
        ("kprobes/testprobe", calls),
        ("kprobes/testprobe2", calls),
    ]
    entry, back = manager.trace.last()[:2]
    words = {name: value for name, _, value in entry.arguments}
    assert words["arg2"] == words["arg3"]
    assert [value for _, _, value in back.arguments] == [21]
    manager.delete("all")
    assert manager.list() == []


def test_boundaries_of_a_function(guest: Guest) -> None:
    """kprobe_insn_boundary: of the offsets 0 to 255 exactly the instructions' are taken, and with all of them armed the
    guest ends as without."""
    bare = power_on(guest.bits, CALLS)
    bare.run(ENOUGH)
    manager, start = Manager(guest.machine), guest.address("exercise")
    code = guest.machine.memory.read(start, 271)
    expected = {begin for begin, _ in spans(code, guest.bits) if begin < 256}
    taken, refused = set(), set()
    for offset in range(256):
        try:
            manager.register(Kprobe(symbol="exercise", offset=offset))
            taken.add(offset)
        except ProbeError as refusal:
            refused.add(refusal.errno)
    assert (taken, refused) == (expected, {errno.EILSEQ})
    guest.machine.run(ENOUGH)
    assert (guest.machine.instructions, guest.machine.console.text) == (bare.instructions, bare.console.text)
    assert guest.machine.ram_sha256() == bare.ram_sha256()


def test_multiple_kprobes(guest: Guest) -> None:
    """256 events are defined, switched on and off and deleted; nothing of them stays."""
    manager = Manager(guest.machine)
    for offset in range(256):
        manager.add("kprobe", f"p:many{offset} target", {"disabled": True})
    assert manager.enable("many*") == [f"kprobes/many{offset}" for offset in range(256)]
    run_until(guest, lambda: manager.status()[0].hits)
    manager.disable("all")
    assert len({status.hits for status in manager.status()}) == 1
    manager.delete("many*")
    assert manager.list() == []
    assert guest.machine.text.armed_bytes() == {}


def test_args_type(guest: Guest) -> None:
    """kprobe_args_type: one stack word as s, u, x and as a bit field is the same bits, for every width."""
    manager = Manager(guest.machine)
    widths = (8, 16, 32, 64)
    fetches = [f"{kind}{width}=+0($stack):{kind}{width}" for width in widths for kind in "sux"]
    fetches += [f"b{width}=+0($stack):b4@4/{width}" for width in widths]
    manager.add("kprobe", f"p:types target {' '.join(fetches)}")
    run_until(guest, lambda: len(manager.trace))
    values = {name: value for name, _, value in manager.trace.last()[0].arguments}
    for width in widths:
        assert values[f"s{width}"] % (1 << width) == values[f"u{width}"] == values[f"x{width}"]
        assert values[f"b{width}"] == values[f"u{width}"] >> 4 & 15
