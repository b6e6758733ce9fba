"""The fuzz targets over their seeds, over random bytes, and over what fuzzing has found; without atheris."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.seeds import commands, conversations, streams
from tests.fuzz.targets import LIMIT, codec, machine, monitor, session


@pytest.mark.parametrize("stream", streams())
def test_streams_are_read_in_any_portions(stream: bytes):
    codec(stream)


@pytest.mark.parametrize("target", [session, machine])
@pytest.mark.parametrize("conversation", conversations())
def test_conversations_leave_nothing(target: Callable[[bytes], None], conversation: bytes):
    target(conversation)


@pytest.mark.parametrize("lines", commands())
def test_commands_leave_nothing(lines: bytes):
    monitor(lines)


@given(st.lists(st.sampled_from([b"$", b"%", b"#00", b"#", b"\x03", b"+", b"-", b"*", b"}", b"a" * LIMIT, b"$g#67"])))
def test_any_stream_is_read_in_any_portions(pieces: list[bytes]):
    codec(b"".join(pieces))


@given(st.binary())
@settings(max_examples=50)
def test_any_line_is_answered(data: bytes):
    session(data)


@pytest.mark.parametrize(
    ("target", "data"),
    [
        pytest.param(
            codec, b"\x01" + b"$" + b"a" * LIMIT + b"$g#67", id="a packet behind a long one that was given up"
        ),
        pytest.param(codec, b"\x01" + b"$" + b"a" * LIMIT + b"aa#\x0300", id="Ctrl-C in a long packet's checksum"),
        pytest.param(codec, b"\x01" + b"%" + b"a" * LIMIT + b"aa#00", id="a long notification is not acknowledged"),
        pytest.param(monitor, b"\0trace " + b"9" * 5000, id="a number that Python does not read"),
        pytest.param(session, b"\x80?\nc123456789abc\n", id="an address of 64 bits for a 32-bit machine"),
    ],
)
def test_what_was_found(target: Callable[[bytes], None], data: bytes):
    target(data)
