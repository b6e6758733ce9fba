"""The ring of records: what it keeps, what it overwrites, and that its bytes are what the layouts say."""

from __future__ import annotations

import construct
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.arch.x86 import AMD64, I386
from probes.layout import Layout
from probes.spec import parse
from probes.trace import HEADER, Record, Stored, TraceRing, context_flags, format_value
from tests.support.scopes import AnySymbol

HEADER_SIZE = HEADER.sizeof()


class Plain:
    """A kind whose payload is its event's name."""

    def record(self, stored: Stored, /) -> Record:
        head = (stored.timestamp_ns, stored.instructions, stored.payload.decode(), "g", stored.comm, 1, stored.cpu)
        return Record(*head, 1, 0, 0, "f+0x0/0x1", ())


def add(ring: TraceRing, name: str, at_ns: int = 0) -> None:
    ring.append(1, at_ns, 0, -1, 0, "sh", name.encode())


def ring_of(size: int) -> TraceRing:
    ring = TraceRing(size)
    ring.define(Plain())
    return ring


def names(ring: TraceRing) -> list[str]:
    return [record.event for record in ring.last()]


def test_the_ring_overwrites_its_oldest_and_counts_them() -> None:
    """Room for two: the third takes the place of the first, and the header says so."""
    ring = ring_of(2 * HEADER_SIZE + 10)
    for name in "abc":
        add(ring, name)
    assert (names(ring), len(ring), ring.overwritten) == (["b", "c"], 2, 1)
    assert "# entries-in-buffer/entries-written: 2/3   #P:1" in ring.lines()


def test_a_record_that_fits_nowhere_is_lost_alone() -> None:
    """One longer than half the ring is counted, and those there stay."""
    ring = ring_of(4 * HEADER_SIZE)
    add(ring, "a")
    add(ring, "x" * 3 * HEADER_SIZE)
    assert (names(ring), ring.overwritten) == (["a"], 1)


@given(
    st.integers(2 * (HEADER_SIZE + 50), 700),
    st.lists(st.integers(0, 40), max_size=60),
    st.integers(2 * (HEADER_SIZE + 50), 700),
)
def test_whatever_the_sizes_the_newest_are_kept_in_order(size: int, lengths: list[int], later: int) -> None:
    """Against a list: a suffix of what was written, no shorter than half the ring; also after a change of its size."""
    ring = ring_of(size)
    written = [f"{index:02}{'x' * length}" for index, length in enumerate(lengths)]
    for name in written:
        add(ring, name)
    kept = names(ring)
    assert kept == written[len(written) - len(kept) :]
    assert ring.written == len(written)
    assert len(kept) == len(written) or sum(HEADER_SIZE + len(name) for name in kept) >= size // 2 - HEADER_SIZE
    ring.resize(later)
    add(ring, "last")
    assert names(ring) == [*kept, "last"][-len(ring) :]


def test_a_snapshot_takes_what_is_there() -> None:
    """The ring begins anew; a second snapshot replaces the first."""
    ring = ring_of(1000)
    add(ring, "a")
    ring.take_snapshot()
    add(ring, "b")
    assert ring.snapshot is not None
    assert (names(ring.snapshot), names(ring)) == (["a"], ["b"])
    ring.take_snapshot()
    assert names(ring.snapshot) == ["b"]


def test_listeners_hear_each_record_until_they_leave() -> None:
    """A stream."""
    ring, heard = ring_of(1000), list[str]()
    unsubscribe = ring.subscribe(lambda record: heard.append(record.event))
    add(ring, "a")
    unsubscribe()
    add(ring, "b")
    assert heard == ["a"]


def test_last_gives_the_newest_in_order() -> None:
    """`trace 2` of three, `trace 0` of none."""
    ring = ring_of(1000)
    for name in "abc":
        add(ring, name)
    assert [record.event for record in ring.last(2)] == ["b", "c"]
    assert ring.last(0) == []


def test_kinds_that_are_gone_can_be_read_while_they_have_records() -> None:
    """Defining and deleting without end needs no memory without end."""
    ring = TraceRing(1000)
    number = ring.define(Plain())
    add(ring, "kept")
    ring.forget(number)
    for _ in range(1000):
        ring.forget(ring.define(Plain()))
    assert names(ring) == ["kept"]
    assert len(ring._kinds) < 600


def test_the_header_is_what_construct_says() -> None:
    """The layout that tools read is the one that hits write."""
    ring = ring_of(1000)
    ring.append(1, 5_000, 77, 4_000, 0, "a rather long name of a task", b"payload")
    found = HEADER.parse(bytes(ring._data))
    assert (found.size, found.kind, found.timestamp_ns) == (HEADER_SIZE + 7, 1, 5_000)
    assert (found.instructions, found.entered_ns, found.comm) == (77, 4_000, b"a rather long na")


@pytest.mark.parametrize("word", [8, 4])
def test_a_payload_is_what_the_format_file_says(word: int) -> None:
    """Offsets, sizes and signs of the fields, read by construct, and strings where __data_loc words point."""
    line = "p:e f a=%ax:u8 b=%ax:s16 s=+0(%ax):string v=+0(%ax):x16[2] t=+0(%ax):string[2] c=%ax:char k=%ax:symbol"
    layout = Layout(parse(line, AnySymbol(AMD64 if word == 8 else I386)).args, False, word)
    values = (300, -2, "one", (1, 2), (None, "two"), 65, 0xFFFFFFF0)
    payload = layout.pack((9, 1, 2, -3, 0xFFFFFF00), values)
    found = layout.construct.parse(payload)
    assert isinstance(found, construct.Container)
    assert (found.common_type, found.common_pid, found["__probe_ip"]) == (9, -3, 0xFFFFFF00)
    assert (found.a, found.b, list(found.v), found.c, found.k) == (300 & 0xFF, -2, [1, 2], 65, 0xFFFFFFF0)
    assert payload[found.s.offset :][: found.s.length] == b"one\0"
    assert found.t[0].length == 0
    assert layout.values(payload) == (44, -2, "one", (1, 2), (None, "two"), 65, 0xFFFFFFF0)


@pytest.mark.parametrize(
    ("flags", "count", "shown"),
    [
        (0, 0, "....."),
        (0x01, 0, "d...."),
        (0x81, 0x11, "D..11"),
        (0x24, 2, ".N.2."),
        (0x48, 0, "..Z.."),
        (0x18, 1, "..H1."),
    ],
)
def test_the_context_is_five_characters(flags: int, count: int, shown: str) -> None:
    """irqs-off, need-resched, hard or soft interrupt, preempt depth, migrate-disable, as trace_print_lat_fmt()."""
    assert context_flags(flags, count) == shown


def test_a_stack_takes_a_line_a_frame() -> None:
    """As the stacktrace trigger writes it."""
    record = Record(1_000, 0, "stack trace", "", "sh", 1, 0, 1, 0, 0, "", (), frames=("f", "g"))
    assert record.text() == "              sh-1       [000] d....     0.000001: <stack trace>\n => f\n => g"


@pytest.mark.parametrize(
    ("value", "kind", "shown"),
    [
        (65, "char", "'A'"),
        (255, "x8", "0xff"),
        (-1, "s8", "-1"),
        ("f+0x0/0x1", "symbol", "f+0x0/0x1"),
        (None, "symstr", "(fault)"),
    ],
)
def test_values_are_formatted_by_type(value: int | str | None, kind: str, shown: str) -> None:
    """The print functions of trace_probe.c."""
    assert format_value(value, kind) == shown
