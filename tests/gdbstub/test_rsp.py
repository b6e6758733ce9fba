"""The codec: framing, acknowledgement, escapes, runs and limits, on bytes alone.

The invariant behind the random tests: whatever arrives, in whatever portions, the codec yields exactly the packets that
are whole and undamaged, keeps no more than its limit, and never raises.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdbstub.rsp import (
    NEED_DATA,
    Ack,
    BadChecksum,
    Codec,
    Event,
    Interrupt,
    Nack,
    Notification,
    Packet,
    TooLong,
    checksum,
    compress,
    escape,
    expand,
    fit,
    frame,
    unescape,
)

runs = st.lists(st.tuples(st.sampled_from(b"0f }]*#$\x03\xffa"), st.integers(1, 250)), max_size=8).map(
    lambda pairs: b"".join(bytes([byte]) * count for byte, count in pairs)
)
payloads = st.one_of(st.binary(max_size=300), runs)
garbage = st.binary(max_size=20).map(lambda data: data.translate(None, b"$%+-#\x03"))


def events(codec: Codec, *portions: bytes) -> list[Event]:
    seen = []
    for portion in portions:
        codec.receive_data(portion)
        while (event := codec.next_event()) is not NEED_DATA:
            seen.append(event)
    return seen


def portions(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(st.binary(max_size=2000))
def test_checksum_is_the_sum_modulo_256(data: bytes):
    """The Adler-32 shortcut against the definition, across its block size."""
    assert checksum(data) == sum(data) % 256


@pytest.mark.parametrize("size", [255, 256, 257, 512, 0x20000])
def test_checksum_of_the_largest_bytes_does_not_wrap_early(size: int):
    """0xff bytes are the worst case for the modulus of Adler-32."""
    assert checksum(b"\xff" * size) == 255 * size % 256


@given(payloads)
def test_escape_hides_every_special_byte(data: bytes):
    """Nothing of `#$*` is left on the wire, and unescape brings all of it back."""
    assert not set(escape(data)) & set(b"#$*")
    assert unescape(escape(data)) == data


@given(payloads, st.integers(2, 400))
def test_fit_gives_a_prefix_that_fits(data: bytes, limit: int):
    """A reply never grows past the announced size through escaping."""
    prefix = fit(data, limit)
    assert data.startswith(prefix)
    assert len(escape(prefix)) <= limit
    assert bool(prefix) == bool(data)


@given(runs)
def test_runs_come_back(data: bytes):
    """compress and expand are inverse on anything that is escaped."""
    assert expand(compress(escape(data))) == escape(data)


@pytest.mark.parametrize("length", range(1, 200))
@pytest.mark.parametrize("pad", [0, 2000])
def test_a_run_never_has_a_forbidden_count(length: int, pad: int):
    """Counts `#` `$` would end or start a packet; `+` `-` confuse a peer that looks for acknowledgements."""
    data = b"ab" * pad + b"0" * length
    encoded = compress(data)
    counts = {encoded[index + 1 : index + 2] for index in range(len(encoded)) if encoded[index : index + 1] == b"*"}
    assert not counts & {b"#", b"$", b"+", b"-"}
    assert expand(encoded) == data


def test_a_long_run_gets_shorter():
    """Encoding is of use: a page of zeros in hex takes a few hundred bytes, on both sides of the short limit."""
    assert len(compress(b"0" * 1000)) < 40
    assert len(compress(b"0" * 8192)) < 400


def test_a_run_may_be_continued():
    """Other stubs chain counts: `0*~*~` is a zero, 97 more and 97 more."""
    assert expand(b"a0*~*~b") == b"a" + b"0" * 195 + b"b"


@given(payloads, st.lists(st.integers(0, 1000), max_size=5))
def test_any_payload_in_any_split_arrives(data: bytes, cuts: list[int]):
    """What one end frames the other end reads, however the stream was cut."""
    wire = Codec().reply(data)
    assert events(Codec(debugger=True), *portions(wire, cuts)) == [Packet(data)]


@given(st.lists(st.tuples(garbage, payloads), max_size=4), st.lists(st.integers(0, 1000), max_size=5))
def test_garbage_between_packets_is_ignored(items: list[tuple[bytes, bytes]], cuts: list[int]):
    """Line noise between packets neither becomes an event nor costs a packet."""
    wire = b"".join(noise + frame(data) for noise, data in items)
    assert events(Codec(debugger=True), *portions(wire, cuts)) == [Packet(data) for _, data in items]


@given(st.binary(max_size=400), st.lists(st.integers(0, 1000), max_size=4))
def test_random_input_is_survived(data: bytes, cuts: list[int]):
    """Random bytes never raise; a packet after them is still read (`#00` ends what they left open)."""
    codec = Codec(limit=64)
    events(codec, *portions(data, cuts))
    assert Packet(b"g") in events(codec, b"#00$g#67")


@given(payloads, st.lists(st.integers(0, 1000), max_size=5))
def test_a_debugger_encodes_no_runs(data: bytes, cuts: list[int]):
    """A stub does not read them: `m20000,10000` must arrive with all its zeros."""
    wire = Codec(debugger=True).reply(data)
    assert events(Codec(), *portions(wire, cuts)) == [Packet(data)]


def test_two_packets_in_one_read_both_count():
    """A client may send without waiting; the second must not be lost."""
    assert events(Codec(), b"$g#67$?#3f") == [Packet(b"g"), Packet(b"?")]


def test_interrupt_and_acks_are_seen_between_packets():
    """0x03 between packets is Ctrl-C."""
    assert events(Codec(), b"+\x03$g#67-") == [Ack(), Interrupt(), Packet(b"g"), Nack()]


@pytest.mark.parametrize("text", [b"$?#\x033f", b"$?#3\x03f"])
def test_interrupt_among_the_digits_of_a_checksum_is_no_digit(text: bytes):
    """A debugger's Ctrl-C does not wait for the packet's end, and the packet is whole without it."""
    for cut in range(1, len(text)):
        assert events(Codec(), text[:cut], text[cut:]) == [Interrupt(), Packet(b"?")]


def test_interrupt_byte_inside_a_packet_is_data():
    """`}` 0x03 is how `#` travels in binary data: no Ctrl-C."""
    assert events(Codec(), frame(b"X0,1:#")) == [Packet(b"X0,1:#")]


def test_a_packet_is_acknowledged_until_no_ack_mode():
    """QStartNoAckMode's own OK still goes with its `+`; nothing does after it."""
    codec = Codec()
    events(codec, frame(b"QStartNoAckMode"))
    assert codec.reply(b"OK") == b"+$OK#9a"
    codec.start_no_ack_mode()
    events(codec, b"+$g#67")
    assert codec.reply(b"00") == b"$00#60"


def test_damaged_packet_is_asked_for_again():
    """`-` in ack mode; the event carries both sums."""
    codec = Codec()
    assert events(codec, b"$g#68") == [BadChecksum(0x67, b"68")]
    assert codec.acknowledgements() == b"-"


def test_a_checksum_that_is_no_number_is_damage():
    """`int()` would take ` 7` or `+7`."""
    assert events(Codec(), b"$\x07#+7") == [BadChecksum(7, b"+7")]


def test_nack_sends_the_last_reply_again():
    """Only the last one, and only after there was one."""
    codec = Codec()
    events(codec, b"-")
    assert codec.acknowledgements() == b""
    codec.reply(b"1")
    codec.reply(b"2")
    assert events(codec, b"-") == [Nack()]
    assert codec.acknowledgements() == frame(b"2")


def test_an_abandoned_packet_is_dropped():
    """gdb starts anew with `$` after a timeout; the half packet before it is not part of the new one."""
    assert events(Codec(), b"$m1000,$g#67") == [Packet(b"g")]


def test_notification_is_neither_acknowledged_nor_resent():
    """`%` packets stand outside the exchange of replies."""
    codec = Codec()
    assert events(codec, frame(b"Stop:T05", lead=b"%")) == [Notification(b"Stop:T05")]
    assert codec.acknowledgements() == b""
    stub = Codec()
    last = stub.reply(b"OK")
    stub.notify(b"Stop:T05")
    events(stub, b"-")
    assert stub.acknowledgements() == last


def test_damaged_notification_is_lost_in_silence():
    """Nothing to ask for again."""
    codec = Codec()
    assert events(codec, b"%Stop:T05#00") == []
    assert codec.acknowledgements() == b""


@given(st.integers(0, 200), st.lists(st.integers(0, 1000), max_size=5))
def test_a_packet_up_to_the_limit_is_taken_and_a_longer_one_is_not(size: int, cuts: list[int]):
    """The limit is exact in every split, and the packet after a dropped one is read."""
    codec = Codec(limit=100)
    seen = events(codec, *portions(b"$%b#%02x" % (b"a" * size, checksum(b"a" * size)), cuts), b"$g#67")
    assert seen == [Packet(b"a" * size) if size <= 100 else TooLong(100), Packet(b"g")]


def test_unfinished_input_is_bounded():
    """A peer that never ends its packet makes us keep no more than the limit."""
    codec = Codec(limit=1000)
    codec.receive_data(b"$")
    for _ in range(100):
        codec.receive_data(b"a" * 500)
        assert codec.next_event() is NEED_DATA
        assert len(codec._input) <= 1501
    assert events(codec, b"#00$g#67") == [TooLong(1000), Packet(b"g")]


@pytest.mark.parametrize("portion", [1, 4, 1000])
@pytest.mark.parametrize(
    ("data", "seen", "answer"),
    [
        (b"$%b$g#67", [Packet(b"g")], b"+"),
        (b"%%%b$g#67", [Packet(b"g")], b"+"),
        (b"$%b#0\x030", [Interrupt(), TooLong(100)], b"+"),
        (b"%%%b#00$g#67", [TooLong(100), Packet(b"g")], b"+"),
    ],
    ids=["given up", "notification given up", "Ctrl-C in its checksum", "a notification"],
)
def test_what_is_too_long_is_read_as_what_is_not(portion: int, data: bytes, seen: list[Event], answer: bytes):
    """Given up it counts for nothing, Ctrl-C is seen, and notifications are not acknowledged; in any portions."""
    codec = Codec(limit=100)
    whole = data % (b"a" * 200)
    assert events(codec, *(whole[at : at + portion] for at in range(0, len(whole), portion))) == seen
    assert codec.acknowledgements() == answer
