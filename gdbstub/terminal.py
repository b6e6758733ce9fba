"""The terminal this program was started on: its modes, the keys that are ours, and what we say to the person there.

Rules: no trio, no machine. A terminal is raw while the guest has it, so that Ctrl-C goes to the guest; Ctrl-A is ours.
Standard output belongs to the guest or to data; everything for the person goes to standard error.
"""

from __future__ import annotations

import contextlib
import enum
import os
import sys
import termios
import tty
from collections.abc import Iterator

HELP = """
Ctrl-A x  end the machine and this program
Ctrl-A c  interrupt the guest into the debugger that is attached
Ctrl-A h  this help
Ctrl-A Ctrl-A  send Ctrl-A to the guest
"""
_ESCAPE = 0x01
_ERASE_LINE = "\r\x1b[K"  # ECMA-48, 8.3.41


class Key(enum.Enum):
    """What Ctrl-A commands ask for."""

    END = "x"
    INTERRUPT = "c"
    HELP = "h"


class Keys:
    """Splits typed bytes into what the guest gets and what is for us. Keeps a Ctrl-A that ends a portion."""

    def __init__(self) -> None:
        self._escaped = False

    def take(self, data: bytes) -> Iterator[bytes | Key]:
        """The parts of `data` in order; Ctrl-A with a key that means nothing is dropped."""
        plain = bytearray()
        for byte in data:
            if not self._escaped:
                if byte == _ESCAPE:
                    self._escaped = True
                else:
                    plain.append(byte)
                continue
            self._escaped = False
            if byte == _ESCAPE:
                plain.append(byte)
                continue
            if plain:
                yield bytes(plain)
                plain.clear()
            with contextlib.suppress(ValueError):
                yield Key(chr(byte).lower())
        if plain:
            yield bytes(plain)


@contextlib.contextmanager
def raw_terminal(descriptor: int) -> Iterator[bool]:
    """Each key as it is typed, no echo, no signals; as before on leaving. False where it is no terminal."""
    if not os.isatty(descriptor):
        yield False
        return
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor, termios.TCSANOW)
        modes = termios.tcgetattr(descriptor)
        modes[1] |= termios.OPOST | termios.ONLCR  # our own messages end lines with \n
        termios.tcsetattr(descriptor, termios.TCSANOW, modes)
        yield True
    finally:
        # Not TCSADRAIN: where nobody reads the terminal's other end any more, draining would wait for ever.
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(descriptor, termios.TCSANOW, before)


class _Messages:
    """Lines on standard error, and below them a status line that the next line replaces."""

    def __init__(self) -> None:
        self._status = False

    def say(self, text: str) -> None:
        self._write((_ERASE_LINE if self._status else "") + text + "\n")
        self._status = False

    def show_status(self, text: str) -> None:
        if text or self._status:
            self._write(_ERASE_LINE + text)
        self._status = bool(text)

    def _write(self, text: str) -> None:
        # In one piece, since threads write beside each other. With nobody left to read there is nothing to be done.
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()


_messages = _Messages()


def say(text: str) -> None:
    """A line for the person at the terminal, on standard error. From any thread."""
    _messages.say(text)


def show_status(text: str) -> None:
    """A line that stays until the next one; empty takes it away. Only where standard error is a terminal."""
    if os.isatty(2):
        _messages.show_status(text)
