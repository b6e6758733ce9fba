"""The devices together: their wiring, and one state for all."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.clock import Clock
from emu.devices.pc import Devices
from emu.devices.state import StateError


class Bench:
    """A PC without a processor: the test moves time and does the processor's port accesses."""

    def __init__(self) -> None:
        self.ns = 0
        self.clock = Clock(lambda: self.ns)
        self.devices = Devices(self.clock, 256 << 20)
        self.sent = bytearray()
        self.devices.uart.on_output = self.sent.extend

    def initialise_pic(self) -> None:
        for base, vector, cascade in ((0x20, 0x30, 0x04), (0xA0, 0x38, 0x02)):
            for port, value in ((base, 0x11), (base + 1, vector), (base + 1, cascade), (base + 1, 1), (base + 1, 0)):
                self.devices.bus.write(port, 1, value)

    def advance(self, ns: int) -> None:
        """Let `ns` pass, stopping at each deadline, with a few at most so that a fast timer cannot stall the test."""
        end = self.ns + ns
        for _ in range(100):
            deadline = self.clock.next_deadline_ns()
            if deadline is None or deadline > end:
                break
            self.ns = max(self.ns, deadline)
            self.clock.run_due()
        self.ns = end
        self.clock.run_due()


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.initialise_pic()
    return bench


def test_timer_is_irq_0(bench: Bench) -> None:
    """A one-shot of channel 0."""
    bench.devices.bus.write(0x43, 1, 0x30)
    bench.devices.bus.write(0x40, 2, 10)
    bench.devices.bus.write(0x40, 1, 0)
    bench.advance(20_000)
    assert bench.devices.pic.acknowledge() == 0x30


def test_serial_port_is_irq_4(bench: Bench) -> None:
    """The THR-empty interrupt, through OUT2."""
    bench.devices.bus.write(0x3FC, 1, 0x08)
    bench.devices.bus.write(0x3F9, 1, 0x02)
    assert bench.devices.pic.acknowledge() == 0x34


def test_reset_silences_everything(bench: Bench) -> None:
    """No interrupt pending and no timer left."""
    bench.devices.bus.write(0x43, 1, 0x34)
    bench.devices.bus.write(0x40, 1, 0)
    bench.devices.bus.write(0x40, 1, 1)
    bench.devices.bus.write(0x3FC, 1, 0x08)
    bench.devices.bus.write(0x3F9, 1, 0x02)
    bench.devices.reset()
    assert not bench.devices.pic.pending()
    assert bench.clock.next_deadline_ns() is None


@pytest.mark.parametrize("name", ["pic", "pit", "speaker", "uart", "cmos", "system", "debug"])
def test_refused_state_changes_nothing(bench: Bench, name: str) -> None:
    """Also where the devices before the damaged one had taken theirs over."""
    other = Bench()
    before = other.devices.state()
    damaged = {**bench.devices.state(), name: []}
    bench.devices.bus.write(0x3FF, 1, 0x77)
    with pytest.raises(StateError):
        other.devices.load(damaged)
    assert other.devices.state() == before


CHIPS = [0x20, 0x21, 0x40, 0x42, 0x43, 0x61, 0x70, 0x71, 0xA0, 0xA1, *range(0x3F8, 0x400), 0x4D0, 0xCF9]
PORTS = st.sampled_from([*CHIPS, 0x64, 0x92, 0xE9, 0x501, 0x604, 0x8900, 0xCF8, 0xFFFF])
SIZES = st.sampled_from([1, 1, 2, 4])
OPERATIONS = st.one_of(
    st.tuples(st.just("write"), PORTS, SIZES, st.integers(0, 0xFFFF_FFFF)),
    st.tuples(st.just("read"), st.one_of(PORTS, st.integers(0, 0xFFFF)), SIZES, st.none()),
    st.tuples(st.just("advance"), st.integers(0, 10_000_000), st.none(), st.none()),
    st.tuples(st.just("receive"), st.binary(max_size=20), st.none(), st.none()),
    st.tuples(st.just("acknowledge"), st.none(), st.none(), st.none()),
    st.tuples(st.just("reset"), st.none(), st.none(), st.none()),
)


def apply(bench: Bench, operations: list) -> list:
    """All that a guest or a host could see."""
    seen = []
    for name, what, size, value in operations:
        if name == "write":
            bench.devices.bus.write(what, size, value)
        elif name == "read":
            got = bench.devices.bus.read(what, size)
            assert 0 <= got < 1 << 8 * size
            seen.append(got)
        elif name == "advance":
            bench.advance(what)
        elif name == "receive":
            bench.devices.uart.receive(what)
        elif name == "reset":
            bench.devices.reset()
        elif bench.devices.pic.pending():
            seen.append(bench.devices.pic.acknowledge())
        seen.append((bench.devices.pic.pending(), bench.clock.next_deadline_ns()))
    return [*seen, bytes(bench.sent)]


@given(st.lists(OPERATIONS), st.lists(OPERATIONS))
def test_any_accesses_are_harmless_and_survive_a_snapshot(first: list, then: list) -> None:
    """No access raises; what is saved through JSON and restored behaves as what never stopped."""
    bench, other = Bench(), Bench()
    apply(bench, first)
    other.ns = bench.ns
    other.clock.load(json.loads(json.dumps(bench.clock.state())))
    other.devices.load(json.loads(json.dumps(bench.devices.state())))
    other.sent[:] = bench.sent
    assert apply(bench, then) == apply(other, then)


@pytest.mark.parametrize("seed", range(4))
def test_long_random_use_is_the_same_twice(seed: int) -> None:
    """20,000 accesses from a seed, which reach states that short examples do not."""

    def run() -> list:
        bench, source = Bench(), random.Random(seed)
        seen = []
        for _ in range(20_000):
            port, size = source.choice(CHIPS), source.choice((1, 1, 1, 2, 4))
            if source.random() < 0.5:
                bench.devices.bus.write(port, size, source.getrandbits(32))
            else:
                seen.append(bench.devices.bus.read(port, size))
            bench.ns += source.randrange(2000)
            bench.clock.run_due()
            if bench.devices.pic.pending():
                seen.append(bench.devices.pic.acknowledge())
        return [*seen, bench.devices.state()]

    assert run() == run()
