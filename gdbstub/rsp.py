"""The wire of the GDB remote serial protocol, without I/O: bytes in, events out, framed bytes to send.

Rules: standard library only, imports nothing of ours; no sockets, no time, no meaning of any packet. One `Codec` is one
end of one connection and is not thread-safe. Its user hands it what arrived with `receive_data`, takes events with
`next_event` until NEED_DATA, and sends what `reply` (or `acknowledgements`) returns.

Source: GDB manual, appendix E, "Overview", "Packet Acknowledgment", "Notification Packets"; the forbidden run counts
are those of gdbserver's `try_rle`.
"""

from __future__ import annotations

import enum
import functools
import re
import zlib
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

MAX_PACKET: Final = 0x20000
"""Bytes between `$` and `#` that an end accepts by default: announced as PacketSize."""

MONITOR_STATUS: Final = "monitor-status+"
"""Our own feature word: a client that says it gets E01 after the text of a refused `qRcmd`, where gdb gets OK."""

# --------------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Packet:
    """A whole packet with the right checksum; `payload` is unescaped."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Notification:
    """A `%` packet: never acknowledged."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class BadChecksum:
    """A packet that arrived damaged; in ack mode the peer has been asked (see `acknowledgements`) to send it again."""

    expected: int
    received: bytes


@dataclass(frozen=True, slots=True)
class TooLong:
    """A packet longer than the codec takes; all of it was dropped, and it counts as received."""

    limit: int


@dataclass(frozen=True, slots=True)
class Interrupt:
    """The byte 0x03 between packets: Ctrl-C."""


@dataclass(frozen=True, slots=True)
class Ack:
    """`+`"""


@dataclass(frozen=True, slots=True)
class Nack:
    """`-`: the last packet sent is due again (see `acknowledgements`)."""


class _Sentinel(enum.Enum):
    NEED_DATA = "NEED_DATA"


NEED_DATA: Final = _Sentinel.NEED_DATA
Event: TypeAlias = Packet | Notification | BadChecksum | TooLong | Interrupt | Ack | Nack
NextEvent: TypeAlias = Event | Literal[_Sentinel.NEED_DATA]

# ----------------------------------------------------------------------------------------------------- pure functions

_ADLER_BLOCK = 256  # bytes: 256 * 255 + 1 < 65521, so that Adler-32's low half is 1 + the plain sum


def checksum(data: bytes | bytearray | memoryview) -> int:
    """The sum of all bytes modulo 256.

    Adler-32's low half is such a sum computed in C: 1 GB/s where `sum()` does 0.15 (Python 3.11, 128 KiB).
    """
    if len(data) <= _ADLER_BLOCK:
        return (zlib.adler32(data) - 1) & 0xFF
    view = memoryview(data)
    blocks = range(0, len(view), _ADLER_BLOCK)
    return (sum([zlib.adler32(view[start : start + _ADLER_BLOCK]) for start in blocks]) - len(blocks)) & 0xFF


_ESCAPED = re.compile(rb"\}(.)", re.DOTALL)


def escape(data: bytes) -> bytes:
    """`data` with `#`, `$`, `}` and `*` escaped."""
    # Four passes in C are five times as fast as one through `re` with a function; the escape itself comes first.
    return data.replace(b"}", b"}]").replace(b"#", b"}\x03").replace(b"$", b"}\x04").replace(b"*", b"}\n")


def unescape(data: bytes) -> bytes:
    """The inverse of `escape`; an escape character that ends the data stands for itself."""
    if b"}" not in data:
        return data
    return _ESCAPED.sub(lambda match: bytes((match[1][0] ^ 0x20,)), data)


def fit(data: bytes, limit: int) -> bytes:
    """A prefix of `data` that is at most `limit` bytes when escaped; never empty for data and a limit of 2 or more."""
    if len(data) * 2 <= limit:
        return data
    data = data[:limit]
    if len(data) + sum(data.count(special) for special in b"#$}*") <= limit:
        return data
    return data[: limit // 2]


_RUN_MAX = 98  # the byte itself and 97 more: 97 + 29 = 126, the last printable character
_ANY_RUN = re.compile(rb"(.)\1{3,97}", re.DOTALL)
_ZEROS = (b"0" * _RUN_MAX, b"0*~")
_SHORT = 1024
_ONE_PIECE = 128  # bytes; shorter ones go in one piece over any wire, and take longer to encode than to send
_FORBIDDEN_COUNTS = b"#$+-"


def _run(match: re.Match[bytes]) -> bytes:
    length = len(match[0])
    byte = match[0][:1]
    tail = b""
    while length + 28 in _FORBIDDEN_COUNTS:
        length -= 1
        tail += byte
    return byte + b"*" + bytes((length + 28,)) + tail


def compress(data: bytes) -> bytes:
    """`data` (already escaped) with runs of equal bytes as `byte * count`.

    The expression that finds runs of anything costs 30 ns a byte and 1 us a run, so a payload above 1 KiB has only its
    longest runs of `0` (empty memory in hex) encoded, at the speed of a copy.
    """
    return _ANY_RUN.sub(_run, data) if len(data) <= _SHORT else data.replace(*_ZEROS)


_RLE = re.compile(rb"(.)((?:\*[ -~])+)", re.DOTALL)  # a run may be followed by more of the same


def expand(data: bytes) -> bytes:
    """The inverse of `compress`; less than 50 times as long as `data`."""
    if b"*" not in data:
        return data
    return _RLE.sub(lambda match: match[1] * (1 + sum(count - 29 for count in match[2][1::2])), data)


def frame(payload: bytes, *, lead: bytes = b"$", runs: bool = True) -> bytes:
    """`payload` as it goes on the wire: escaped, with its checksum, runs encoded unless that is not wanted."""
    body = escape(payload)
    if runs and len(body) > _ONE_PIECE:
        body = compress(body)
    return b"%b%b#%02x" % (lead, body, checksum(body))


# --------------------------------------------------------------------------------------------------------------- codec

_START = re.compile(rb"[$%+\-\x03]")
_EVENTS: dict[int, Event] = {ord("+"): Ack(), ord("-"): Nack(), 0x03: Interrupt()}
_HEX_DIGITS = frozenset(b"0123456789abcdefABCDEF")


class Codec:
    """One end of a connection.

    With `debugger` it is the debugger's end: runs are read but not written, for only a stub may encode them. `limit`
    bounds the unfinished input that is kept, whatever the peer sends. After `start_no_ack_mode` nothing is acknowledged
    any more.
    """

    def __init__(self, *, limit: int = MAX_PACKET, debugger: bool = False) -> None:
        self.ack_mode = True
        self._limit = limit
        self._debugger = debugger
        self._input = bytearray()
        self._searched = 0  # bytes of _input already known to hold no '#'
        self._skipping = False  # inside a packet that is too long
        self._last_sent = b""
        self._due = b""

    def receive_data(self, data: bytes | bytearray) -> None:
        """Take bytes that arrived, in any portions."""
        self._input += data

    def next_event(self) -> NextEvent:
        """The next event in what was received so far, or NEED_DATA."""
        while self._input:
            if self._input[0] not in b"$%":
                if (event := self._take_single()) is not None:
                    return event
                continue
            end = self._input.find(b"#", self._searched)
            if end >= 0 and (at := self._input.find(0x03, end + 1, end + 3)) >= 0:
                del self._input[at]  # no digit of a checksum: Ctrl-C does not wait for the packet's end
                return Interrupt()
            if end < 0 or len(self._input) < end + 3:
                return self._unfinished(end)
            # gdb starts anew where it gave up on a packet: what stands before the last '$' was abandoned.
            start = self._input.rfind(b"$", 1, end)
            if start > 0:
                self._abandon(start)
                end -= start
            event = self._take_packet(end)
            if event is not None:
                return event
        return NEED_DATA

    def reply(self, payload: bytes) -> bytes:
        """`payload` framed, after the acknowledgements that are due. It is sent again if the peer answers `-`."""
        self._last_sent = frame(payload, runs=not self._debugger)
        return self.acknowledgements() + self._last_sent

    def notify(self, payload: bytes) -> bytes:
        """`payload` as a notification, after the acknowledgements that are due; it is never sent again."""
        return self.acknowledgements() + frame(payload, lead=b"%", runs=not self._debugger)

    def acknowledgements(self) -> bytes:
        """What the events so far ask to be sent: `+`, `-`, or the last reply again. Empty most of the time."""
        due, self._due = self._due, b""
        return due

    def start_no_ack_mode(self) -> None:
        """From the next packet on neither end acknowledges (QStartNoAckMode: call it when its OK is framed)."""
        self.ack_mode = False

    def _drop(self, count: int) -> None:
        del self._input[:count]
        self._searched = 0

    def _take_single(self) -> Event | None:
        """Drop garbage, and take one `+`, `-` or 0x03; None where a packet begins or nothing is left."""
        match = _START.search(self._input)
        if match is None:
            self._drop(len(self._input))
            return None
        byte = self._input[match.start()]
        event = _EVENTS.get(byte)
        self._drop(match.start() + (event is not None))
        if isinstance(event, Nack) and self.ack_mode:
            self._due += self._last_sent
        return event

    def _abandon(self, count: int) -> None:
        """Drop what stands before the start of another packet."""
        self._drop(count)
        self._skipping = False

    def _unfinished(self, end: int) -> NextEvent:
        """Of a packet that is longer than the limit already, keep nothing but its first byte."""
        size = len(self._input) if end < 0 else end
        if self._skipping or size > self._limit + 1:
            start = self._input.rfind(b"$", 1, size)
            if start > 0:
                self._abandon(start)
                size -= start
            self._skipping = self._skipping or size > self._limit + 1
        if self._skipping:
            del self._input[1:size]
            size = 1
        self._searched = size
        return NEED_DATA

    def _take_packet(self, end: int) -> Event | None:
        """The packet from the first byte to the `#` at `end`; None for a damaged notification, which is just lost."""
        whole = bytes(self._input[: end + 3])
        self._drop(end + 3)
        notification = whole[0] == ord("%")
        too_long, self._skipping = self._skipping or end > self._limit + 1, False
        if too_long:
            self._due += b"+" if self.ack_mode and not notification else b""
            return TooLong(self._limit)
        event = _parse(whole, self._debugger) if end > _REMEMBERED else _remembered(whole, self._debugger)
        if notification:
            return event if isinstance(event, Notification) else None
        if self.ack_mode:
            self._due += b"+" if isinstance(event, Packet) else b"-"
        return event


def _parse(whole: bytes, runs: bool) -> Packet | Notification | BadChecksum:
    """The event of a packet or notification with its two digits; `runs`: the peer may encode them."""
    body, digits = whole[1:-3], whole[-2:]
    expected = checksum(body)
    if digits != b"%02x" % expected and not (_HEX_DIGITS.issuperset(digits) and int(digits, 16) == expected):
        return BadChecksum(expected, digits)
    payload = unescape(expand(body) if runs else body)
    return Packet(payload) if whole[:1] == b"$" else Notification(payload)


_REMEMBERED: Final = 32  # bytes; a client says the same few short things over and over
_remembered = functools.lru_cache(256)(_parse)
