"""The MC146818 clock and its memory, on virtual time."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.clock import NS_PER_SECOND, Clock
from emu.devices.cmos import Cmos
from emu.devices.state import StateError

MIB = 1 << 20
DATE = (0x09, 0x08, 0x07, 0x04, 0x02, 0x00)  # year, month, day, hours, minutes, seconds


class Bench:
    def __init__(self, memory_bytes: int = 256 * MIB, epoch_s: int = 1_767_225_600) -> None:
        self.ns = 0
        self.cmos = Cmos(Clock(lambda: self.ns), memory_bytes, epoch_s)

    def get(self, index: int) -> int:
        self.cmos.write(0x70, 1, index)
        return self.cmos.read(0x71, 1)

    def put(self, index: int, value: int) -> None:
        self.cmos.write(0x70, 1, index)
        self.cmos.write(0x71, 1, value)

    def date(self) -> list[int]:
        return [self.get(index) for index in DATE]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_power_on_date_is_the_fixed_one_in_bcd(bench: Bench) -> None:
    """2026-01-01 00:00:00, a Thursday (5, Sunday being 1), century 20."""
    assert bench.date() == [0x26, 0x01, 0x01, 0, 0, 0]
    assert (bench.get(0x06), bench.get(0x32)) == (5, 0x20)


def test_date_follows_virtual_time(bench: Bench) -> None:
    """59 days, 13 h, 14 min and 15.9 s later."""
    bench.ns = (((59 * 24 + 13) * 60 + 14) * 60 + 15) * NS_PER_SECOND + 900_000_000
    assert bench.date() == [0x26, 0x03, 0x01, 0x13, 0x14, 0x15]


def test_date_at_power_on_can_be_chosen() -> None:
    """2000-02-29 12:34:56."""
    assert Bench(epoch_s=951_827_696).date() == [0x00, 0x02, 0x29, 0x12, 0x34, 0x56]


def test_binary_mode(bench: Bench) -> None:
    """Register B bit 2."""
    bench.put(0x0B, 0x06)
    assert (bench.get(0x09), bench.get(0x32)) == (26, 20)


@pytest.mark.parametrize(("hour", "byte"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)])
def test_12_hour_mode(bench: Bench, hour: int, byte: int) -> None:
    """Midnight and noon are twelve; bit 7 is PM."""
    bench.ns = hour * 3600 * NS_PER_SECOND
    bench.put(0x0B, 0x00)
    assert bench.get(0x04) == byte


def test_update_is_never_in_progress(bench: Bench) -> None:
    """Register A: the bytes can be read at any time."""
    bench.put(0x0A, 0xFF)
    assert bench.get(0x0A) == 0x7F


def test_battery_is_good(bench: Bench) -> None:
    """Register D bit 7."""
    assert bench.get(0x0D) == 0x80


@pytest.mark.parametrize(("mode", "eleven_pm", "midnight"), [(0x02, 0x23, 0x00), (0x00, 0x91, 0x12)])
def test_guest_sets_the_date_under_set(bench: Bench, mode: int, eleven_pm: int, midnight: int) -> None:
    """1999-12-31 23:59:58 while stopped; two full seconds after it goes on, a new century begins."""
    bench.ns = 123_456_789
    bench.put(0x0B, 0x80 | mode)
    for index, value in zip((0x32, *DATE), (0x19, 0x99, 0x12, 0x31, eleven_pm, 0x59, 0x58), strict=True):
        bench.put(index, value)
    bench.ns += 5 * NS_PER_SECOND
    bench.put(0x0B, mode)
    bench.ns += 2 * NS_PER_SECOND - 1
    assert bench.date() == [0x99, 0x12, 0x31, eleven_pm, 0x59, 0x59]
    bench.ns += 1
    assert bench.date() == [0x00, 0x01, 0x01, midnight, 0, 0]
    assert bench.get(0x32) == 0x20


@pytest.mark.parametrize(("byte", "hour"), [(0x12, 0x00), (0x01, 0x01), (0x92, 0x12), (0x91, 0x23)])
def test_hour_set_in_12_hour_mode(bench: Bench, byte: int, hour: int) -> None:
    """Read back in 24-hour mode: twelve is the first hour of its half of the day."""
    bench.put(0x0B, 0x00)
    bench.put(0x04, byte)
    bench.put(0x0B, 0x02)
    assert bench.get(0x04) == hour


def test_date_byte_can_be_set_while_it_runs(bench: Bench) -> None:
    """The others stay."""
    bench.put(0x08, 0x11)
    assert bench.date() == [0x26, 0x11, 0x01, 0, 0, 0]


def test_memory_keeps_what_is_written_over_a_reset(bench: Bench) -> None:
    """It has a battery; the interrupt enables go."""
    bench.put(0x50, 0xA5)
    bench.put(0x0B, 0x7A)
    bench.cmos.reset()
    assert (bench.get(0x50), bench.get(0x0B)) == (0xA5, 0x02)


def test_index_is_write_only_and_ignores_the_nmi_bit(bench: Bench) -> None:
    """Bit 7 of port 0x70."""
    bench.put(0x50, 0xA5)
    assert bench.get(0x80 | 0x50) == 0xA5
    assert bench.cmos.read(0x70, 1) == 0xFF


@pytest.mark.parametrize(
    ("memory_bytes", "extended", "above_16m"),
    [(8 * MIB, 7 * 1024, 0), (32 * MIB, 31 * 1024, 256), (256 * MIB, 0xFFFF, 240 * 16), (1 << 20, 0, 0)],
)
def test_memory_size_is_where_firmware_puts_it(memory_bytes: int, extended: int, above_16m: int) -> None:
    """KiB above 1 MiB, capped; 64 KiB units above 16 MiB; 640 KiB below."""
    bench = Bench(memory_bytes)

    def word(index: int) -> int:
        return bench.get(index) | bench.get(index + 1) << 8

    assert [word(index) for index in (0x15, 0x17, 0x30, 0x34)] == [640, extended, extended, above_16m]


def test_damaged_state_is_refused(bench: Bench) -> None:
    """128 bytes of memory, no fewer."""
    with pytest.raises(StateError, match="cmos: memory has 2 bytes"):
        bench.cmos.load({**bench.cmos.state(), "memory": "0000"})


OPERATIONS = st.one_of(
    st.tuples(st.integers(0, 127), st.integers(0, 255)),
    st.tuples(st.integers(0, 127), st.none()),
    st.tuples(st.just("wait"), st.integers(0, 10**12)),
)


def apply(bench: Bench, operations: list) -> list:
    seen = []
    for index, value in operations:
        if index == "wait":
            bench.ns += value
        elif value is None:
            seen.append(bench.get(index))
        else:
            bench.put(index, value)
        seen.append(bench.date())
    return seen


@given(st.lists(OPERATIONS), st.lists(OPERATIONS))
def test_restored_clock_goes_on_as_the_one_that_never_stopped(first: list, then: list) -> None:
    """Any bytes in any register, dates that are none included."""
    bench, other = Bench(), Bench(memory_bytes=MIB, epoch_s=0)
    apply(bench, first)
    other.ns = bench.ns
    other.cmos.load(json.loads(json.dumps(bench.cmos.state())))
    assert apply(bench, then) == apply(other, then)
