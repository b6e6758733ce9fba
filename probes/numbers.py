"""Numbers as the kernel reads them, whose errors and leftovers its error messages show.

Rules: pure, standard library only. Source: lib/kstrtox.c, Linux 6.12.
"""

from __future__ import annotations

import errno
from typing import Final

_DIGITS: Final = "0123456789abcdef"
_U64: Final = 1 << 64


class NumberError(ValueError):
    """`errno` is EINVAL for what is no number, ERANGE for one that does not fit."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode[number])
        self.errno = number


def kstrtoul(text: str, bits: int = 64, base: int = 0) -> int:
    """An unsigned number of `bits`: base 0 takes 0x and a leading 0 for octal; one + is allowed, no -."""
    value = _whole(text.removeprefix("+"), base)
    if value >= 1 << bits:
        raise NumberError(errno.ERANGE)
    return value


def kstrtol(text: str, bits: int = 64, base: int = 0) -> int:
    """A signed number of `bits`."""
    if text.startswith("-"):
        value = -_whole(text[1:], base)
    else:
        value = _whole(text.removeprefix("+"), base)
    if not -(1 << bits - 1) <= value < 1 << bits - 1:
        raise NumberError(errno.ERANGE)
    return value


def number(text: str, *, signed: bool = False) -> int | None:
    """kstrtoull() or kstrtoll(), base 0; None where they take it for no number, or not for one of 64 bits."""
    try:
        return kstrtol(text) if signed else kstrtoul(text)
    except NumberError:
        return None


def simple_strtoul(text: str, base: int = 0) -> tuple[int, str]:
    """The number that `text` begins with (0 where there is none, cut to 64 bits) and what follows it."""
    digits, base = _prefix(text, base)
    value, count = _leading(digits, base)
    return value % _U64, digits[count:] if count else text


def _whole(text: str, base: int) -> int:
    digits, base = _prefix(text, base)
    value, count = _leading(digits, base)
    if value >= _U64:
        raise NumberError(errno.ERANGE)
    if not count or count != len(digits):
        raise NumberError(errno.EINVAL)
    return value


def _prefix(text: str, base: int) -> tuple[str, int]:
    """The digits without their prefix, and the base it asks for."""
    if base == 0:
        if text[:1] != "0":
            base = 10
        elif text[1:2] in ("x", "X") and text[2:3] and text[2].lower() in _DIGITS:
            base = 16
        else:
            base = 8
    if base == 16 and text[:2].lower() == "0x":
        text = text[2:]
    return text, base


def _leading(digits: str, base: int) -> tuple[int, int]:
    alphabet = _DIGITS[:base]
    count = 0
    while count < len(digits) and digits[count].lower() in alphabet:
        count += 1
    # int() of thousands of digits is slow and limited; whatever is this long overflows anyway.
    if count > 80 and digits[: count - 80].strip("0"):
        return _U64, count
    return int(digits[max(0, count - 80) : count] or "0", base), count
