"""The 8254 interval timer (channel 0 on IRQ 0, channel 2 on the speaker) and port 0x61, which gates channel 2.

Rules: nothing counts. A counter is a function of the CLK pulses since it was loaded, so that reading it costs the same
at any time, and only the rising edges of channel 0's output are timers on the clock. Source: Intel 8254 datasheet
(order 231164); port 0x61 as in the 82371AB (PIIX4) datasheet, NMISC.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import ClassVar

from emu.clock import NS_PER_SECOND, Clock, Timer
from emu.devices import state as saved
from emu.devices.state import BYTE, FLAG, Int, Layout, State

FREQUENCY = 1_193_182  # Hz; 14.31818 MHz / 12
BASE = 0x40
CONTROL = BASE + 3
SPEAKER = 0x61

_TRIGGERED = (1, 5)  # counting starts with a rising gate only
_PERIODIC = (2, 3)
_MODES = ("one count", "one-shot", "rate generator", "square wave", "software strobe", "hardware strobe")

_LOW_BYTE, _HIGH_BYTE, _BOTH = 1, 2, 3  # RW1 and RW0 of the control word

_TICK = Int(-(1 << 63), 1 << 63, optional=True)

# The refresh request that toggles bit 4 of port 0x61: channel 1 as every BIOS programs it, divided by 18.
_REFRESH_TICKS = 18


def ticks_at(ns: int) -> int:
    """CLK pulses until `ns` after power-on."""
    return ns * FREQUENCY // NS_PER_SECOND


def ns_of(tick: int) -> int:
    """The first nanosecond at which `ticks_at` is `tick`."""
    return -(-tick * NS_PER_SECOND // FREQUENCY)


class _Counter:
    """One counter. All times are ticks of CLK since power-on; `settle` must have been called for the tick asked about.

    `start` is the tick at which the counting element was last loaded with `count`; None before that. `reload` is the
    count register, None until written, and `load_at` the tick at which it will be loaded next.
    """

    _LAYOUT: ClassVar[Layout] = {
        "control": Int(0x10, 0x3F),
        "gate": FLAG,
        "count": Int(1, 0x10000),
        "reload": Int(1, 0x10000, optional=True),
        "load_at": _TICK,
        "start": _TICK,
        "frozen": _TICK,
        "null": FLAG,
        "first_byte": Int(0, 0xFF, optional=True),
        "second_read": FLAG,
        "latch": Int(0, 0xFFFF, optional=True),
        "status": Int(0, 0xFF, optional=True),
    }

    def __init__(self, gate: bool) -> None:
        self._gate_at_reset = gate
        self.reset()

    def reset(self) -> None:
        """Mode 0, idle. The datasheet leaves this undefined; low keeps IRQ 0 quiet until a guest asks for it."""
        self.gate = self._gate_at_reset
        self.count = 0x10000  # what the counting element was loaded with
        self.program(0x30)

    @property
    def mode(self) -> int:
        mode = self.control >> 1 & 7
        return mode - 4 if mode > 5 else mode

    def program(self, control: int) -> None:
        """Take the low six bits of a control word: stops the counter and drops what was latched."""
        self.control = control
        self.reload: int | None = None
        self.load_at: int | None = None
        self.start: int | None = None
        self.frozen: int | None = None  # pulses counted when the gate closed, None while it counts
        self.null = True  # a count is written but not yet in the counting element
        self.first_byte: int | None = None
        self.second_read = False
        self.latch: int | None = None
        self.status: int | None = None

    def settle(self, tick: int) -> None:
        """Do the loading of the counting element that is due at `tick`."""
        at = self.load_at
        if at is None or tick < at or self.reload is None:
            return
        start = at
        old = self.start if self.frozen is None else None
        if self.mode == 3 and old is not None and (at - old) % self.count:
            # Mode 3 loads at the end of each half: after the high one, the low half of the new square wave follows.
            start = at - (self.reload + 1) // 2
        self.start = start
        self.count = self.reload
        self.frozen = None if self.gate or self.mode in _TRIGGERED else 0
        self.load_at = None
        self.null = False

    def _elapsed(self, tick: int, start: int) -> int:
        return tick - start if self.frozen is None else self.frozen

    def out(self, tick: int) -> bool:
        """The OUT pin."""
        mode = self.mode
        if self.start is None:
            return mode != 0
        elapsed, count = self._elapsed(tick, self.start), self.count
        if mode in (0, 1):
            return elapsed >= count
        if mode in (4, 5):
            return elapsed != count
        if not self.gate:
            return True
        if mode == 2:
            return elapsed % count != count - 1
        return elapsed % count < (count + 1) // 2

    def value(self, tick: int) -> int:
        """The counting element as a read of two bytes gives it, binary or BCD.

        A first count reads as if it were loaded already: drivers take it that their I/O outlasts a pulse of CLK (see
        Linux's quick_pit_calibrate), but here an instruction takes a nanosecond.
        """
        count = self.count
        if self.start is None:
            value = self.reload or count
        else:
            elapsed = self._elapsed(tick, self.start)
            if self.mode == 2:
                value = count - elapsed % count
            elif self.mode == 3:
                high = (count + 1) // 2
                position = elapsed % count
                value = count - count % 2 - 2 * (position if position < high else position - high)
            else:
                value = count - elapsed
        return _to_bcd(value % 10_000) if self.control & 1 else value & 0xFFFF

    def next_rise(self, tick: int) -> int | None:
        """The first tick after `tick` at which OUT goes up, if nobody touches the counter."""
        rise = None
        if self.start is not None and self.frozen is None:
            elapsed, count = self._elapsed(tick, self.start), self.count
            if self.mode in _PERIODIC:
                rise = self.start + (elapsed // count + 1) * count
            else:
                end = count + (self.mode in (4, 5))
                rise = self.start + end if elapsed < end else None
        if self.load_at is None or self.reload is None or (rise is not None and rise <= self.load_at):
            return rise
        after = copy.copy(self)
        after.settle(self.load_at)
        return after.next_rise(self.load_at)

    def write(self, value: int, tick: int) -> None:
        """A byte to the counter's port."""
        access = self.control >> 4
        if access == _LOW_BYTE:
            self._set_count(value, tick)
        elif access == _HIGH_BYTE:
            self._set_count(value << 8, tick)
        elif self.first_byte is None:
            self.first_byte = value
            if self.mode == 0:
                self._stop()
        else:
            value = value << 8 | self.first_byte
            self.first_byte = None
            self._set_count(value, tick)

    def _stop(self) -> None:
        """Writing a count in mode 0 stops the counter and lowers OUT at once."""
        self.start = self.frozen = self.load_at = None

    def _set_count(self, value: int, tick: int) -> None:
        if self.control & 1:
            count = _from_bcd(value) or 10_000
        else:
            count = value or 0x10000
        mode = self.mode
        if mode in _PERIODIC and count == 1:
            count = 2  # the datasheet forbids 1 here
        self.reload = count
        self.null = True
        if mode in _TRIGGERED:
            return
        if mode == 0:
            self._stop()
        if mode in _PERIODIC and self.start is not None:
            self.load_at = self._end_of_part(tick, self.start) if self.frozen is None else None
        else:
            self.load_at = tick + 1

    def _end_of_part(self, tick: int, start: int) -> int:
        """Where a running mode 2 or 3 takes a new count: the end of the period, or of the half."""
        position = (tick - start) % self.count
        high = (self.count + 1) // 2
        if self.mode == 3 and position < high:
            return tick - position + high
        return tick - position + self.count

    def set_gate(self, gate: bool, tick: int) -> None:
        """Drive GATE; datasheet, figure 21."""
        if gate == self.gate:
            return
        self.gate = gate
        mode = self.mode
        if mode in _TRIGGERED:
            if gate and self.reload is not None:
                self.load_at = tick + 1
        elif self.start is None:
            return  # the count is still to be loaded, which the gate does not prevent
        elif not gate:
            self.frozen = self._elapsed(tick, self.start)
            if mode in _PERIODIC:
                self.load_at = None
        elif mode in _PERIODIC:
            self.load_at = tick + 1
        elif self.frozen is not None:
            self.start = tick - self.frozen
            self.frozen = None

    def latch_count(self, tick: int) -> None:
        if self.latch is None:
            self.latch = self.value(tick)

    def latch_status(self, tick: int) -> None:
        if self.status is None:
            self.status = self.out(tick) << 7 | self.null << 6 | self.control

    def read(self, tick: int) -> int:
        """A byte from the counter's port: latched status, then latched count, then the count as it goes."""
        if self.status is not None:
            status, self.status = self.status, None
            return status
        value = self.value(tick) if self.latch is None else self.latch
        access = self.control >> 4
        if access == _BOTH and not self.second_read:
            self.second_read = True
            return value & 0xFF
        self.second_read = False
        self.latch = None
        return value & 0xFF if access == _LOW_BYTE else value >> 8

    def describe(self, tick: int) -> str:
        """Mode, count and pins, for people."""
        parts = [f"mode {self.mode} ({_MODES[self.mode]})"]
        if self.start is None:
            parts.append("not started" if self.reload is None else f"{self.reload} about to be loaded")
        else:
            rate = f" ({FREQUENCY / self.count:.1f} Hz)" if self.mode in _PERIODIC else ""
            value = self.value(tick)
            parts.append(f"at {_from_bcd(value) if self.control & 1 else value} of {self.count}{rate}")
        parts.append(f"gate {'high' if self.gate else 'low'}")
        parts.append(f"out {'high' if self.out(tick) else 'low'}")
        return ", ".join(parts)

    def state(self) -> State:
        return saved.save(self, self._LAYOUT)

    def load(self, name: str, state: object) -> None:
        saved.load(self, self._LAYOUT, name, state)


def _to_bcd(value: int) -> int:
    return value % 10 | value // 10 % 10 << 4 | value // 100 % 10 << 8 | value // 1000 << 12


def _from_bcd(value: int) -> int:
    """Digits above 9 count as what they are: no BCD, but no error on the chip either."""
    return (value & 15) + 10 * (value >> 4 & 15) + 100 * (value >> 8 & 15) + 1000 * (value >> 12)


class Pit:
    """The 8254. `set_irq` drives IRQ 0.

    The line goes up when channel 0's OUT does. The low part of modes 2 to 5 before that edge is drawn together with it,
    so that an interrupt stays requested until it is taken: as on the chip but for the last microsecond of a period.
    """

    ports = (range(BASE, BASE + 4),)
    access_bytes = 1

    def __init__(self, clock: Clock, set_irq: Callable[[bool], None]) -> None:
        self._clock = clock
        self._set_irq = set_irq
        self._counters = (_Counter(gate=True), _Counter(gate=True), _Counter(gate=False))
        self._timer: Timer | None = None
        self._edge: int | None = None  # the tick `_timer` stands for

    def reset(self) -> None:
        """All channels idle in mode 0, IRQ 0 low, the speaker's gate closed."""
        for counter in self._counters:
            counter.reset()
        self._set_irq(False)
        self._schedule(None)

    def read(self, port: int, size: int) -> int:
        if port == CONTROL:
            return 0xFF  # the control word register cannot be read
        tick = ticks_at(self._clock.now_ns)
        return self._settled(port - BASE, tick).read(tick)

    def write(self, port: int, size: int, value: int) -> None:
        tick = ticks_at(self._clock.now_ns)
        if port != CONTROL:
            self._settled(port - BASE, tick).write(value, tick)
            changed = port == BASE
        elif value >= 0xC0:
            self._read_back(value, tick)
            changed = False
        elif not value & 0x30:
            self._settled(value >> 6, tick).latch_count(tick)
            changed = False
        else:
            self._counters[value >> 6].program(value & 0x3F)
            changed = value < 0x40
        if changed:
            self._follow_channel_0(tick)

    def _read_back(self, value: int, tick: int) -> None:
        for channel in range(3):
            if value & 2 << channel:
                counter = self._settled(channel, tick)
                if not value & 0x20:
                    counter.latch_count(tick)
                if not value & 0x10:
                    counter.latch_status(tick)

    def _settled(self, channel: int, tick: int) -> _Counter:
        counter = self._counters[channel]
        counter.settle(tick)
        return counter

    def _follow_channel_0(self, tick: int) -> None:
        counter = self._settled(0, tick)
        self._set_irq(counter.mode != 0 or counter.out(tick))
        self._schedule(counter.next_rise(tick))

    def _schedule(self, edge: int | None) -> None:
        if self._timer is not None:
            self._clock.cancel(self._timer)
        self._edge = edge
        self._timer = None if edge is None else self._clock.schedule(ns_of(edge), self._rise)

    def _rise(self) -> None:
        """Channel 0's OUT went up; if this comes late, the edges missed meanwhile are one."""
        tick = ticks_at(self._clock.now_ns)
        self._set_irq(False)
        self._set_irq(True)
        self._schedule(self._settled(0, tick).next_rise(tick))

    def set_gate_2(self, gate: bool) -> None:
        """Drive channel 2's GATE."""
        tick = ticks_at(self._clock.now_ns)
        self._settled(2, tick).set_gate(gate, tick)

    def out_2(self) -> bool:
        """Channel 2's OUT."""
        tick = ticks_at(self._clock.now_ns)
        return self._settled(2, tick).out(tick)

    def lines(self) -> list[str]:
        """One line a counter, for people. Changes nothing: a count that is due is loaded into a copy."""
        tick = ticks_at(self._clock.now_ns)
        shown = []
        for channel, own in enumerate(self._counters):
            counter = copy.copy(own)
            counter.settle(tick)
            shown.append(f"pit counter {channel}: {counter.describe(tick)}")
        return shown

    def state(self) -> State:
        return {"counters": [counter.state() for counter in self._counters], "edge": self._edge}

    def load(self, state: object) -> None:
        entries = saved.section("pit", "the whole", state)
        counters = entries.get("counters")
        if not isinstance(counters, list) or len(counters) != len(self._counters):
            raise saved.StateError("pit", "counters", "is not a list of three")
        try:
            edge = _TICK.decode(entries.get("edge"))
        except ValueError as error:
            raise saved.StateError("pit", "edge", str(error)) from error
        for channel, (counter, entry) in enumerate(zip(self._counters, counters, strict=True)):
            counter.load(f"pit counter {channel}", entry)
        assert edge is None or isinstance(edge, int)
        self._schedule(edge)


class SpeakerPort:
    """Port 0x61: bit 0 gates channel 2, bit 1 lets it to the speaker; bit 4 toggles with refresh, bit 5 is OUT2."""

    ports = (range(SPEAKER, SPEAKER + 1),)
    access_bytes = 1

    _LAYOUT: ClassVar[Layout] = {"control": BYTE}

    def __init__(self, clock: Clock, pit: Pit) -> None:
        self._clock = clock
        self._pit = pit
        self.control = 0

    def reset(self) -> None:
        """Gate closed; `Pit.reset` closes it at the counter."""
        self.control = 0

    def read(self, port: int, size: int) -> int:
        refresh = ticks_at(self._clock.now_ns) // _REFRESH_TICKS & 1
        return self.control | refresh << 4 | self._pit.out_2() << 5

    def write(self, port: int, size: int, value: int) -> None:
        self.control = value & 0x0F
        self._pit.set_gate_2(bool(value & 1))

    def state(self) -> State:
        return saved.save(self, self._LAYOUT)

    def load(self, state: object) -> None:
        saved.load(self, self._LAYOUT, "port 0x61", state)
