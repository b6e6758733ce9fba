"""The MC146818 clock with its battery-backed memory, behind ports 0x70 (index) and 0x71 (data).

Rules: the date is a fixed one plus virtual time, never the host's, so that two runs read the same. It raises no
interrupt (IRQ 8): the alarm is memory, register C reads 0. Source: Motorola MC146818A datasheet; the bytes above 0x0d
as PC firmware leaves them (Ralf Brown's list, CMOS.LST).
"""

from __future__ import annotations

import calendar
import time
from typing import ClassVar

from emu.clock import NS_PER_SECOND, Clock
from emu.devices import state as saved
from emu.devices.state import FLAG, Hex, Int, Layout, State

INDEX = 0x70
DATA = 0x71

EPOCH_S = 1_767_225_600  # 2026-01-01 00:00:00 UTC

_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR = 0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09
_A, _B, _C, _D = 0x0A, 0x0B, 0x0C, 0x0D
_CENTURY = 0x32
_TIME = (_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR, _CENTURY)

_A_DEFAULT = 0x26  # 32.768 kHz crystal, 1024 Hz periodic rate; bit 7, UIP, is never seen set
_B_SET, _B_BINARY, _B_24H = 0x80, 0x04, 0x02
_B_INTERRUPTS = 0x78  # PIE, AIE, UIE, SQWE: what a reset clears
_D_VALID = 0x80
_PM = 0x80  # of the hours, in 12-hour mode

_KIB = 1 << 10
_MIB = 1 << 20
_BASE_KIB = 640

# More than any date and uptime need, and far from what gmtime refuses.
_BASE_BOUND_NS = 10**12 * NS_PER_SECOND


class Cmos:
    """The clock and 128 bytes of memory, of which firmware has filled in the size of RAM (`memory_bytes`).

    `epoch_s` is the time at power-on, in seconds since 1970 (UTC).
    """

    ports = (range(INDEX, DATA + 1),)
    access_bytes = 1

    _LAYOUT: ClassVar[Layout] = {
        "index": Int(0, 0x7F),
        "memory": Hex(128, 128),
        "stopped": FLAG,
        "base_ns": Int(-_BASE_BOUND_NS, _BASE_BOUND_NS),
    }

    def __init__(self, clock: Clock, memory_bytes: int, epoch_s: int = EPOCH_S) -> None:
        self._clock = clock
        self.index = 0
        self.base_ns = epoch_s * NS_PER_SECOND  # the date at virtual time 0
        self.stopped = False  # register B's SET: the time bytes stand in `memory` for the guest to change
        self.memory = bytearray(128)
        self.memory[_A] = _A_DEFAULT
        self.memory[_B] = _B_24H
        self._set_sizes(memory_bytes)

    def _set_sizes(self, memory_bytes: int) -> None:
        extended = min(max(memory_bytes - _MIB, 0) // _KIB, 0xFFFF)
        above_16m = min(max(memory_bytes - 16 * _MIB, 0) // (64 * _KIB), 0xFFFF)
        for index, value in ((0x15, _BASE_KIB), (0x17, extended), (0x30, extended), (0x34, above_16m)):
            self.memory[index : index + 2] = value.to_bytes(2, "little")

    def reset(self) -> None:
        """The battery keeps memory and time; only the interrupt enables and the index are lost."""
        self.index = 0
        self.memory[_B] &= ~_B_INTERRUPTS

    def read(self, port: int, size: int) -> int:
        if port == INDEX:
            return 0xFF  # write-only
        index = self.index
        if index in _TIME and not self.stopped:
            return self._time_bytes()[index]
        if index == _C:
            return 0
        if index == _D:
            return _D_VALID
        return self.memory[index]

    def write(self, port: int, size: int, value: int) -> None:
        if port == INDEX:
            self.index = value & 0x7F  # bit 7 masks NMI, of which there is none
            return
        index = self.index
        if index == _B:
            self._write_b(value)
        elif index in _TIME:
            self._write_time(index, value)
        elif index == _A:
            self.memory[_A] = value & 0x7F
        elif index not in (_C, _D):
            self.memory[index] = value

    def _write_b(self, value: int) -> None:
        stop = bool(value & _B_SET)
        if stop and not self.stopped:
            self._stop()
        self.memory[_B] = value
        if self.stopped and not stop:
            self._go()

    def _write_time(self, index: int, value: int) -> None:
        if self.stopped:
            self.memory[index] = value
        else:
            self._stop()
            self.memory[index] = value
            self._go()

    def _stop(self) -> None:
        for index, value in self._time_bytes().items():
            self.memory[index] = value
        self.stopped = True

    def _go(self) -> None:
        """Start from the time bytes: a full second passes until the first update."""
        self.base_ns = self._stored_time() * NS_PER_SECOND - self._clock.now_ns
        self.stopped = False

    def _time_bytes(self) -> dict[int, int]:
        """Each byte of the date and time as the guest reads it in register B's format."""
        now = time.gmtime((self.base_ns + self._clock.now_ns) // NS_PER_SECOND)
        hour, pm = now.tm_hour, 0
        if not self.memory[_B] & _B_24H:
            hour, pm = (hour + 11) % 12 + 1, _PM * (hour >= 12)
        return {
            _SECONDS: self._encode(now.tm_sec),
            _MINUTES: self._encode(now.tm_min),
            _HOURS: self._encode(hour) | pm,
            _WEEKDAY: self._encode((now.tm_wday + 1) % 7 + 1),  # Sunday is 1
            _DAY: self._encode(now.tm_mday),
            _MONTH: self._encode(now.tm_mon),
            _YEAR: self._encode(now.tm_year % 100),
            _CENTURY: self._encode(now.tm_year // 100 % 100),
        }

    def _stored_time(self) -> int:
        """Seconds since 1970 of the time bytes in memory; what is no date (month 0, 31 February) rolls over."""
        stored = {index: self._decode(self.memory[index]) for index in _TIME}
        hour = stored[_HOURS]
        if not self.memory[_B] & _B_24H:
            raw = self.memory[_HOURS]
            hour = self._decode(raw & ~_PM) % 12 + 12 * bool(raw & _PM)
        year = min(max(stored[_CENTURY] * 100 + stored[_YEAR], 1), 9998)
        month = min(max(stored[_MONTH], 1), 12)
        return calendar.timegm((year, month, stored[_DAY], hour, stored[_MINUTES], stored[_SECONDS]))

    def _encode(self, value: int) -> int:
        return value if self.memory[_B] & _B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self.memory[_B] & _B_BINARY else 10 * (value >> 4) + (value & 15)

    def state(self) -> State:
        return saved.save(self, self._LAYOUT)

    def load(self, state: object) -> None:
        saved.load(self, self._LAYOUT, "cmos", state)
