"""The 8254 against its datasheet (Intel 231164), and Linux's calibration against it.

Times are in pulses of CLK: a count written between pulse 0 and pulse 1 is loaded by pulse 1.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.clock import Clock
from emu.devices.pit import FREQUENCY, Pit, SpeakerPort, ns_of, ticks_at
from emu.devices.state import StateError


class Bench:
    """A timer with its port 0x61 on a clock moved by hand; `edges` are the ticks at which IRQ 0 went up."""

    def __init__(self) -> None:
        self.ns = 0
        self.clock = Clock(lambda: self.ns)
        self.edges: list[int] = []
        self.line = False
        self.pit = Pit(self.clock, self._set_irq)
        self.speaker = SpeakerPort(self.clock, self.pit)

    def _set_irq(self, level: bool) -> None:
        if level and not self.line:
            self.edges.append(ticks_at(self.ns))
        self.line = level

    def to(self, tick: int) -> None:
        """Go to `tick`, stopping at each deadline on the way as the engine does."""
        end = ns_of(tick)
        while (deadline := self.clock.next_deadline_ns()) is not None and deadline <= end:
            self.ns = max(self.ns, deadline)
            self.clock.run_due()
        self.ns = max(self.ns, end)

    def program(self, channel: int, mode: int, count: int, bcd: int = 0) -> None:
        self.pit.write(0x43, 1, channel << 6 | 0x30 | mode << 1 | bcd)
        self.count(channel, count)

    def count(self, channel: int, count: int) -> None:
        self.pit.write(0x40 + channel, 1, count & 0xFF)
        self.pit.write(0x40 + channel, 1, count >> 8)

    def read(self, channel: int) -> int:
        """Latch and read two bytes."""
        self.pit.write(0x43, 1, channel << 6)
        low = self.pit.read(0x40 + channel, 1)
        return low | self.pit.read(0x40 + channel, 1) << 8

    def out(self, channel: int) -> bool:
        """OUT from the status byte."""
        self.pit.write(0x43, 1, 0xE0 | 2 << channel)
        return bool(self.pit.read(0x40 + channel, 1) & 0x80)

    def gate(self, level: bool) -> None:
        self.speaker.write(0x61, 1, level)

    def waveform(self, channel: int, first: int, last: int) -> str:
        """OUT at each tick of the range, as a row of H and L."""
        levels = []
        for tick in range(first, last + 1):
            self.to(tick)
            levels.append("H" if self.out(channel) else "L")
        return "".join(levels)

    def values(self, channel: int, first: int, last: int) -> list[int]:
        counts = []
        for tick in range(first, last + 1):
            self.to(tick)
            counts.append(self.read(channel))
        return counts


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_mode_0_goes_high_n_plus_1_pulses_after_the_write(bench: Bench) -> None:
    """And raises IRQ 0 then, once."""
    bench.program(0, 0, 4)
    assert bench.waveform(0, 0, 7) == "LLLLLHHH"
    bench.to(300_000)
    assert bench.edges == [5]


def test_mode_0_counts_on_below_zero(bench: Bench) -> None:
    """The counting element wraps to 0xffff."""
    bench.program(0, 0, 2)
    assert bench.values(0, 1, 4) == [2, 1, 0, 0xFFFF]


def test_mode_0_first_byte_of_a_new_count_stops_and_lowers_out(bench: Bench) -> None:
    """The second byte lets it go on from the new count."""
    bench.program(0, 0, 4)
    bench.to(10)
    bench.pit.write(0x40, 1, 3)
    assert bench.waveform(0, 10, 14) == "LLLLL"
    bench.pit.write(0x40, 1, 0)
    assert bench.waveform(0, 14, 18) == "LLLLH"


def test_mode_0_one_byte_count_lowers_out_at_once(bench: Bench) -> None:
    """With low-byte access that byte is the whole count."""
    bench.pit.write(0x43, 1, 0x10)
    bench.pit.write(0x40, 1, 2)
    assert bench.waveform(0, 0, 4) == "LLLHH"
    bench.pit.write(0x40, 1, 2)
    assert bench.waveform(0, 4, 7) == "LLLH"


def test_mode_0_gate_suspends_counting(bench: Bench) -> None:
    """Channel 2: five pulses with the gate closed come on top."""
    bench.gate(True)
    bench.program(2, 0, 4)
    bench.to(2)
    bench.gate(False)
    bench.to(7)
    assert bench.read(2) == 3
    bench.gate(True)
    assert bench.waveform(2, 7, 10) == "LLLH"


def test_mode_0_count_written_with_the_gate_closed_takes_n_pulses(bench: Bench) -> None:
    """It is loaded all the same, so that no pulse is needed for that when the gate opens."""
    bench.program(2, 0, 3)
    bench.to(10)
    bench.gate(True)
    assert bench.waveform(2, 10, 13) == "LLLH"


def test_mode_1_is_a_one_shot_of_n_pulses_from_the_trigger(bench: Bench) -> None:
    """OUT goes low on the pulse after the gate rises."""
    bench.program(2, 1, 3)
    assert bench.waveform(2, 0, 2) == "HHH"
    bench.gate(True)
    assert bench.waveform(2, 2, 7) == "HLLLHH"


def test_mode_1_a_second_trigger_starts_over(bench: Bench) -> None:
    """The gate's level does not matter, its rising edge does."""
    bench.program(2, 1, 4)
    bench.gate(True)
    bench.to(3)
    bench.gate(False)
    bench.gate(True)
    assert bench.waveform(2, 3, 9) == "LLLLLHH"


def test_mode_2_is_low_for_the_last_pulse_of_each_period(bench: Bench) -> None:
    """The first low comes N pulses after the write."""
    bench.program(0, 2, 3)
    assert bench.waveform(0, 0, 8) == "HHHLHHLHH"


def test_mode_2_counts_n_to_1(bench: Bench) -> None:
    """Zero is never seen."""
    bench.program(0, 2, 3)
    assert bench.values(0, 1, 6) == [3, 2, 1, 3, 2, 1]


def test_mode_2_raises_irq_0_each_period_without_drift(bench: Bench) -> None:
    """HZ=250 as Linux programs it: 4772 pulses, exactly, a thousand times over."""
    bench.program(0, 2, 4772)
    bench.edges.clear()
    bench.to(1 + 1000 * 4772)
    assert bench.edges == [1 + 4772 * period for period in range(1, 1001)]


def test_mode_2_takes_a_new_count_at_the_end_of_the_period(bench: Bench) -> None:
    """The period under way keeps its length."""
    bench.program(0, 2, 10)
    bench.edges.clear()
    bench.to(5)
    bench.count(0, 4)
    bench.to(20)
    assert bench.edges == [11, 15, 19]


def test_mode_2_gate_raises_out_and_its_rise_reloads(bench: Bench) -> None:
    """Closed at the last pulse of the period."""
    bench.gate(True)
    bench.program(2, 2, 4)
    assert bench.waveform(2, 0, 4) == "HHHHL"
    bench.gate(False)
    assert bench.waveform(2, 4, 6) == "HHH"
    bench.gate(True)
    assert bench.values(2, 7, 10) == [4, 3, 2, 1]


def test_mode_3_even_count_is_a_square_wave(bench: Bench) -> None:
    """Half the period high, half low, counting by two."""
    bench.program(0, 3, 4)
    assert bench.waveform(0, 1, 8) == "HHLLHHLL"
    assert bench.values(0, 9, 12) == [4, 2, 4, 2]


def test_mode_3_odd_count_is_high_one_pulse_longer(bench: Bench) -> None:
    """(N+1)/2 high, (N-1)/2 low; N-1 is loaded."""
    bench.program(0, 3, 5)
    assert bench.waveform(0, 1, 10) == "HHHLLHHHLL"
    assert bench.values(0, 11, 15) == [4, 2, 0, 4, 2]


def test_mode_3_takes_a_new_count_at_the_end_of_the_half(bench: Bench) -> None:
    """The low half after it has the new length."""
    bench.program(0, 3, 8)
    bench.to(2)
    bench.count(0, 4)
    assert bench.waveform(0, 2, 10) == "HHHLLHHLL"


def test_count_written_in_a_low_half_does_not_withdraw_the_interrupt(bench: Bench) -> None:
    """The line stays up from one edge to the next, so that a busy guest loses no tick."""
    bench.program(0, 3, 10)
    bench.to(18)
    bench.count(0, 10)
    assert (bench.out(0), bench.line) == (False, True)


@pytest.mark.parametrize("mode", [2, 3])
def test_forbidden_count_1_is_a_period_of_2(bench: Bench, mode: int) -> None:
    """The datasheet gives it no meaning; OUT still has an edge in each period."""
    bench.program(0, mode, 1)
    bench.edges.clear()
    bench.to(7)
    assert bench.edges == [3, 5, 7]


def test_mode_4_strobes_once_after_n_plus_1_pulses(bench: Bench) -> None:
    """Linux's one-shot clock event: IRQ 0 rises at the end of the strobe and never again."""
    bench.program(0, 4, 3)
    bench.edges.clear()
    assert bench.waveform(0, 0, 7) == "HHHHLHHH"
    bench.to(200_000)
    assert bench.edges == [5]


def test_mode_4_new_count_starts_over(bench: Bench) -> None:
    """One count after another, as a tickless kernel does; only the last one strobes."""
    bench.program(0, 4, 100)
    bench.edges.clear()
    bench.to(50)
    bench.count(0, 10)
    bench.to(1000)
    assert bench.edges == [50 + 1 + 10 + 1]


def test_mode_5_strobes_n_plus_1_pulses_after_the_trigger(bench: Bench) -> None:
    """Without a trigger nothing happens."""
    bench.program(2, 5, 2)
    assert bench.waveform(2, 0, 5) == "HHHHHH"
    bench.gate(True)
    assert bench.waveform(2, 5, 10) == "HHHLHH"


def test_control_word_silences_a_periodic_channel(bench: Bench) -> None:
    """Mode 0 without a count: OUT low, and no timer is left."""
    bench.program(0, 2, 100)
    bench.pit.write(0x43, 1, 0x30)
    assert (bench.line, bench.clock.next_deadline_ns()) == (False, None)


def test_count_0_is_65536(bench: Bench) -> None:
    """The largest count."""
    bench.program(0, 2, 0)
    bench.edges.clear()
    bench.to(70_000)
    assert bench.edges == [65_537]


def test_bcd_counts_in_decimal(bench: Bench) -> None:
    """0x0100 is a hundred, and below it comes 0x0099."""
    bench.program(0, 2, 0x0100, bcd=1)
    assert bench.values(0, 1, 2) == [0x0100, 0x0099]


def test_bcd_count_0_is_10000(bench: Bench) -> None:
    """It reads as 0, the next is 9999."""
    bench.program(0, 2, 0, bcd=1)
    assert bench.values(0, 1, 2) == [0, 0x9999]


@pytest.mark.parametrize(("access", "written", "loaded"), [(1, 0x50, 0x0050), (2, 0x50, 0x5000)])
def test_single_byte_access_leaves_the_other_byte_zero(bench: Bench, access: int, written: int, loaded: int) -> None:
    """And one read gives the byte that is meant."""
    bench.pit.write(0x43, 1, access << 4 | 4)
    bench.pit.write(0x40, 1, written)
    bench.to(1)
    assert bench.pit.read(0x40, 1) == written
    bench.edges.clear()
    bench.to(1 + loaded)
    assert bench.edges == [1 + loaded]


def test_latched_count_stands_until_read(bench: Bench) -> None:
    """A second latch command before that is ignored; both bytes are of the same moment."""
    bench.program(0, 2, 0x1000)
    bench.to(1)
    bench.pit.write(0x43, 1, 0x00)
    bench.to(500)
    bench.pit.write(0x43, 1, 0x00)
    assert (bench.pit.read(0x40, 1), bench.pit.read(0x40, 1)) == (0x00, 0x10)
    assert bench.pit.read(0x40, 1) == 0x1000 - 499 & 0xFF


def test_read_back_gives_status_before_count(bench: Bench) -> None:
    """Of each channel asked for; status has the control word's low bits, OUT and null count."""
    bench.program(0, 2, 0x1234)
    bench.to(1)
    bench.pit.write(0x43, 1, 0xC2)
    assert [bench.pit.read(0x40, 1) for _ in range(3)] == [0xB4, 0x34, 0x12]


def test_null_count_until_the_count_is_loaded(bench: Bench) -> None:
    """Bit 6 of the status: the next pulse of CLK loads it."""
    bench.program(0, 2, 100)
    bench.pit.write(0x43, 1, 0xE2)
    assert bench.pit.read(0x40, 1) & 0x40
    bench.to(1)
    bench.pit.write(0x43, 1, 0xE2)
    assert not bench.pit.read(0x40, 1) & 0x40


def test_port_61_shows_gate_speaker_and_out_2(bench: Bench) -> None:
    """Bits 0 and 1 as written, bit 5 is OUT2."""
    bench.speaker.write(0x61, 1, 0xF3)
    bench.program(2, 0, 2)
    assert bench.speaker.read(0x61, 1) & 0x2F == 0x03
    bench.to(3)
    assert bench.speaker.read(0x61, 1) & 0x2F == 0x23


def test_port_61_refresh_bit_toggles_every_15_us(bench: Bench) -> None:
    """Old delay loops count these: 18 pulses each."""
    bits = []
    for period in range(4):
        bench.to(18 * period)
        bits.append(bench.speaker.read(0x61, 1) >> 4 & 1)
    assert bits == [0, 1, 0, 1]


def test_late_service_gives_one_edge_and_keeps_the_grid(bench: Bench) -> None:
    """Periods nobody looked at merge, as in an edge-triggered controller."""
    bench.program(0, 2, 100)
    bench.edges.clear()
    bench.ns = ns_of(1 + 350)
    bench.clock.run_due()
    assert len(bench.edges) == 1
    assert bench.clock.next_deadline_ns() == ns_of(1 + 400)


def test_linux_quick_pit_calibrate_finds_1_ghz(bench: Bench) -> None:
    """arch/x86/kernel/tsc.c, 6.1: waits for the MSB to change; 14 instructions a poll, as compiled.

    It must be content after the first two changes, which is what keeps the boot fast.
    """
    bench.gate(True)
    bench.program(2, 0, 0xFFFF)

    def msb_is(value: int) -> bool:
        bench.ns += 5
        bench.pit.read(0x42, 1)
        bench.ns += 2
        return bench.pit.read(0x42, 1) == value

    def expect_msb(value: int) -> tuple[int, int, int]:
        """Polls, time of the last one that saw `value`, uncertainty."""
        polls = tsc = previous = 0
        while msb_is(value):
            bench.ns += 7
            polls, previous, tsc = polls + 1, tsc, bench.ns
        return polls, tsc, bench.ns - previous

    msb_is(0)  # "the PIT starts counting at the next edge, so we need to delay for a microsecond"
    polls, start, uncertain_1 = expect_msb(0xFF)
    assert polls > 5
    polls, end, uncertain_2 = expect_msb(0xFE)
    assert polls > 5
    delta = end - start
    assert uncertain_1 + uncertain_2 < delta >> 11
    assert delta * FREQUENCY // (256 * 1000) == pytest.approx(1_000_000, rel=500e-6)


def test_linux_pit_calibrate_tsc_finds_1_ghz(bench: Bench) -> None:
    """The slow way: 10 ms of channel 2 in mode 0, polling OUT2 at port 0x61."""
    latch = FREQUENCY // 100
    bench.speaker.write(0x61, 1, bench.speaker.read(0x61, 1) & ~2 | 1)
    bench.program(2, 0, latch)
    start = bench.ns
    while not bench.speaker.read(0x61, 1) & 0x20:
        bench.ns += 100
    assert bench.ns - start == pytest.approx(10_000_000, rel=100e-6)


def test_damaged_state_is_refused(bench: Bench) -> None:
    """The message names the counter and the field."""
    state = bench.pit.state()
    counters = state["counters"]
    assert isinstance(counters, list)
    counters[1]["count"] = 0
    with pytest.raises(StateError, match="pit counter 1: count"):
        bench.pit.load(state)


@given(st.integers(0, 5), st.integers(0, 1), st.integers(1, 12), st.integers(0, 20), st.integers(1, 12))
def test_irq_0_rises_exactly_where_out_does(mode: int, bcd: int, count: int, when: int, second: int) -> None:
    """The timers on the clock agree with OUT seen tick by tick, also across a new count."""
    counts = [int(str(value), 16) if bcd else value for value in (count, second)]
    stepped, timed = Bench(), Bench()
    for bench in (stepped, timed):
        bench.program(0, mode, counts[0], bcd)
    levels = stepped.waveform(0, 0, when)
    for bench in (stepped, timed):
        bench.to(when)
        bench.count(0, counts[1])
    levels += stepped.waveform(0, when, 60)
    timed.to(60)
    ticks = [*range(when + 1), *range(when, 61)]
    rises = [ticks[at] for at in range(1, len(levels)) if levels[at - 1 : at + 1] == "LH"]
    assert [edge for edge in timed.edges if edge > 0] == rises


OPERATIONS = st.one_of(
    st.tuples(st.sampled_from([0x40, 0x41, 0x42, 0x43, 0x61]), st.integers(0, 255)),
    st.tuples(st.sampled_from([0x40, 0x42, 0x61]), st.none()),
    st.tuples(st.just("wait"), st.integers(0, 300)),
)


def apply(bench: Bench, operations: list) -> list:
    """What the reads gave, and when IRQ 0 rose."""
    bench.edges.clear()
    seen = []
    for port, value in operations:
        device = bench.speaker if port == 0x61 else bench.pit
        if port == "wait":
            bench.to(ticks_at(bench.ns) + value)
        elif value is None:
            seen.append(device.read(port, 1))
        else:
            device.write(port, 1, value)
    return [*seen, *bench.edges]


def test_a_counter_is_described_as_its_program_reads_it() -> None:
    """A decimal counter in decimal, a count on its way, and without loading what is due."""
    bench = Bench()
    bench.program(0, 2, 0x1000, bcd=1)
    assert "mode 2 (rate generator), 1000 about to be loaded, gate high, out high" in bench.pit.lines()[0]
    bench.to(11)
    assert "at 990 of 1000 (1193.2 Hz)" in bench.pit.lines()[0]


@given(st.lists(OPERATIONS), st.lists(OPERATIONS))
def test_restored_timer_behaves_as_the_one_that_never_stopped(first: list, then: list) -> None:
    """Any history, then saved through JSON, then any future: the same reads and the same interrupts."""
    bench, other = Bench(), Bench()
    apply(bench, first)
    saved = json.loads(json.dumps([bench.pit.state(), bench.speaker.state()]))
    other.ns, other.line = bench.ns, bench.line
    other.pit.load(saved[0])
    other.speaker.load(saved[1])
    assert apply(bench, then) == apply(other, then)


TICK = st.one_of(st.none(), st.integers(-(1 << 63), 1 << 63), st.integers(0, 100))
COUNTER = st.fixed_dictionaries(
    {
        "control": st.integers(0x10, 0x3F),
        "gate": st.booleans(),
        "count": st.integers(1, 0x10000),
        "reload": st.one_of(st.none(), st.integers(1, 0x10000)),
        "load_at": TICK,
        "start": TICK,
        "frozen": TICK,
        "null": st.booleans(),
        "first_byte": st.none(),
        "second_read": st.booleans(),
        "latch": st.none(),
        "status": st.none(),
    }
)


@given(st.lists(COUNTER, min_size=3, max_size=3), TICK, st.lists(OPERATIONS))
def test_any_state_in_range_is_usable(counters: list, edge: int | None, operations: list) -> None:
    """A snapshot whose fields are each possible and together are not: no error, and every byte is one."""
    bench = Bench()
    bench.pit.load({"counters": counters, "edge": edge})
    before = bench.pit.state()
    assert len(bench.pit.lines()) == 3
    assert bench.pit.state() == before
    seen = apply(bench, operations)
    assert all(0 <= value <= 0xFF for value in seen[: len(seen) - len(bench.edges)])
