"""The guest's serial console on the host: a terminal, a file, a socket, or nowhere.

Rules: output is called in the machine's thread and writes straight to a descriptor; input is read by whoever runs the
program and passes through `Keys`. A terminal is raw while the guest has it, so that Ctrl-C goes to the guest; Ctrl-A is
ours.
"""

from __future__ import annotations

import contextlib
import enum
import os
import sys
import termios
import tty
from collections.abc import Callable, Iterator

HELP = """
Ctrl-A x  end the machine and this program
Ctrl-A c  interrupt the guest into the debugger that is attached
Ctrl-A h  this help
Ctrl-A Ctrl-A  send Ctrl-A to the guest
"""
_ESCAPE = 0x01


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
            with contextlib.suppress(ValueError):  # another key: nothing
                yield Key(chr(byte).lower())
        if plain:
            yield bytes(plain)


@contextlib.contextmanager
def raw_terminal(descriptor: int) -> Iterator[None]:
    """Each key as it is typed, no echo, no signals; as before on leaving. Nothing where it is no terminal."""
    if not os.isatty(descriptor):
        yield
        return
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor, termios.TCSANOW)
        modes = termios.tcgetattr(descriptor)
        modes[1] |= termios.OPOST | termios.ONLCR  # our own messages end lines with \n
        termios.tcsetattr(descriptor, termios.TCSANOW, modes)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def writer(descriptor: int, on_gone: Callable[[], None]) -> Callable[[bytes], None]:
    """A console sink for a descriptor; `on_gone` is called, once, when nobody reads it any more."""
    gone = False

    def write(data: bytes) -> None:
        nonlocal gone
        if gone:
            return
        try:
            os.write(descriptor, data)
        except (BrokenPipeError, OSError):
            gone = True
            on_gone()

    return write


def say(text: str) -> None:
    """A line for the person at the terminal, on standard error."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201  # this is the program's voice
