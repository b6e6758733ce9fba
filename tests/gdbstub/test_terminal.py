"""Keys, terminal modes and messages, on a real pseudo-terminal where modes matter."""

from __future__ import annotations

import os
import pty
import termios
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdbstub import terminal
from gdbstub.terminal import Key, Keys, raw_terminal, say, show_status


@pytest.fixture
def pseudo_terminal() -> Iterator[tuple[int, int]]:
    """(our side, the program's side)."""
    ours, its = pty.openpty()
    yield ours, its
    os.close(ours)
    os.close(its)


def taken(*portions: bytes) -> list[bytes | Key]:
    keys = Keys()
    return [part for portion in portions for part in keys.take(portion)]


@pytest.mark.parametrize(
    ("portions", "parts"),
    [
        ([b"ls\r\x03"], [b"ls\r\x03"]),
        ([b"\x01x"], [Key.END]),
        ([b"\x01C"], [Key.INTERRUPT]),
        ([b"a\x01hb"], [b"a", Key.HELP, b"b"]),
        ([b"\x01\x01"], [b"\x01"]),
        ([b"a\x01?b"], [b"a", b"b"]),
        ([b"a\x01", b"xb"], [b"a", Key.END, b"b"]),
    ],
)
def test_ctrl_a_is_ours_and_the_rest_the_guests(portions: Sequence[bytes], parts: list[bytes | Key]):
    """Also where a portion ends between Ctrl-A and its key; an unknown key is dropped with it."""
    assert taken(*portions) == parts


@given(st.binary(), st.integers(min_value=0))
def test_keys_do_not_depend_on_how_input_is_cut(data: bytes, at: int):
    """Any bytes, cut anywhere: the guest gets the same bytes, and we the same keys."""

    def flat(parts: list[bytes | Key]) -> list[int | Key]:
        return [item for part in parts for item in (part if isinstance(part, bytes) else [part])]

    at %= len(data) + 1
    assert flat(taken(data[:at], data[at:])) == flat(taken(data))


def test_raw_terminal_hands_over_ctrl_c_and_is_undone(pseudo_terminal: tuple[int, int]):
    """No signals, no echo inside; exactly the modes of before on leaving, also by an exception."""
    _, its = pseudo_terminal
    before = termios.tcgetattr(its)

    def use() -> None:
        with raw_terminal(its) as is_terminal:
            assert is_terminal
            assert not termios.tcgetattr(its)[3] & (termios.ISIG | termios.ECHO | termios.ICANON)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert termios.tcgetattr(its) == before


def test_a_pipe_has_no_modes():
    """And nothing is tried on it."""
    reading, writing = os.pipe()
    with raw_terminal(reading) as is_terminal:
        assert not is_terminal
    os.close(reading)
    os.close(writing)


def test_a_message_takes_the_place_of_the_status_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The status line is erased, not left above; without one nothing is erased."""
    monkeypatch.setattr(terminal.os, "isatty", lambda descriptor: descriptor == 2)
    say("one")
    show_status("half done")
    say("two")
    show_status("")
    assert capsys.readouterr().err == "one\n\r\x1b[Khalf done\r\x1b[Ktwo\n"


def test_no_status_line_in_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A log file of standard error has lines only."""
    monkeypatch.setattr(terminal.os, "isatty", lambda _: False)
    show_status("half done")
    assert capsys.readouterr().err == ""
