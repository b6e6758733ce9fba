"""printf as agent expressions have it: a format of gdb's, and 64-bit values where C would have arguments.

Rules: pure; standard library only. The format arrives as it stands between the user's quotes, escapes and all, and gdb
has checked it; what it cannot have checked (a float) is refused here. Source: gdbsupport/format.cc, gdbserver/ax.cc.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

MAX_STRING: Final = 4096  # bytes of a %s; gdbserver has no limit
MAX_WIDTH: Final = 1000  # characters of one conversion

_DIRECTIVE = re.compile(
    r"%(?P<flags>[-+ #0']*)(?P<width>\d{0,9})(?:\.(?P<precision>\d{0,9}))?"
    r"(?P<size>hh|h|ll|l|j|z|t|q)?(?P<kind>.)",
    re.S,
)
_ESCAPE = re.compile(r"\\(.?)", re.S)
_ESCAPES: Final = {
    "\\": "\\",
    "a": "\a",
    "b": "\b",
    "e": "\x1b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
    '"': '"',
}

ReadString: TypeAlias = Callable[[int, int], bytes]
"""(virtual address, most bytes) -> the C string there."""
_Convert: TypeAlias = Callable[[int, ReadString], str]


class FormatError(ValueError):
    """A format that cannot be printed; the text says why."""


class Template:
    """A parsed format. `arguments` is how many values it takes; `word` is the size of the guest's `long` in bytes."""

    def __init__(self, text: bytes, word: int) -> None:
        self._pieces: list[str | _Convert] = []
        source = text.decode("utf-8", "backslashreplace")
        at = 0
        while (found := source.find("%", at)) >= 0:
            self._pieces.append(_unescape(source[at:found]))
            match = _DIRECTIVE.match(source, found)
            if match is None:
                raise FormatError("the format ends inside a directive")
            self._pieces.append("%" if match["kind"] == "%" else _conversion(match, word))
            at = match.end()
        self._pieces.append(_unescape(source[at:]))
        self.arguments = sum(not isinstance(piece, str) for piece in self._pieces)

    def render(self, values: Sequence[int], read_string: ReadString) -> str:
        """The text; at least `arguments` values."""
        waiting = iter(values)
        return "".join(piece if isinstance(piece, str) else piece(next(waiting), read_string) for piece in self._pieces)


def _unescape(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        if match[1] not in _ESCAPES:
            raise FormatError(f"unknown escape {match[0]!r} in the format")
        return _ESCAPES[match[1]]

    return _ESCAPE.sub(replace, text)


def _conversion(match: re.Match[str], word: int) -> _Convert:
    kind = match["kind"]
    width, precision = int(match["width"] or 0), int(match["precision"] or 0)
    if max(width, precision) > MAX_WIDTH:
        raise FormatError(f"{match[0]!r} is wider than {MAX_WIDTH} characters")
    flags = match["flags"].replace("'", "")  # no locale here groups thousands
    limit = None if match["precision"] is None else precision
    if kind == "s":
        return _string(flags, width, limit)
    if kind == "c":
        return lambda value, _: _padded(chr(value & 0xFF), flags, width)
    if kind == "p":
        return lambda value, _: _padded(f"{value & ((1 << 8 * word) - 1):#x}", flags, width)
    if kind not in "diouxX":
        raise FormatError(f"{match[0]!r} is not supported in agent printf")
    size = {"hh": 1, "h": 2, None: 4, "l": word, "z": word, "t": word}.get(match["size"], 8)
    return _integer(kind, size, flags, width, limit)


def _padded(text: str, flags: str, width: int) -> str:
    return text.ljust(width) if "-" in flags else text.rjust(width)


def _string(flags: str, width: int, precision: int | None) -> _Convert:
    limit = MAX_STRING if precision is None else min(precision, MAX_STRING)

    def convert(value: int, read: ReadString) -> str:
        text = read(value, limit).decode("utf-8", "backslashreplace") if value else "(null)"
        return _padded(text, flags, width)

    return convert


def _integer(kind: str, size: int, flags: str, width: int, precision: int | None) -> _Convert:
    mask, sign = (1 << 8 * size) - 1, 1 << (8 * size - 1)
    prefix = {"o": "0", "x": "0x", "X": "0X"}.get(kind, "") if "#" in flags else ""
    plus = "+" if "+" in flags else " " if " " in flags else ""
    zeros = "0" in flags and "-" not in flags and precision is None

    def convert(value: int, _: ReadString) -> str:
        number = value & mask
        lead = prefix if number else ""
        if kind in "di":
            number = (number ^ sign) - sign
            lead = "-" if number < 0 else plus
        digits = format(abs(number), {"o": "o", "x": "x", "X": "X"}.get(kind, "d")).zfill(precision or 0)
        if zeros:
            digits = digits.zfill(width - len(lead))
        return _padded(lead + ("" if precision == 0 and not number else digits), flags, width)

    return convert
