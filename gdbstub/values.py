"""What values of options look like: text in, a value out, or argparse's refusal that says what to write instead.

Rules: standard library and this package's values; nothing is opened.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import cast

from gdbstub.address import Address, AddressError, Stdio, Tcp, parse_address
from gdbstub.commands import ConsolePlace, LogTopic, TraceFormat, TraceTarget

LOG_TOPICS = ("int", "syscall", "io", "rsp")
_TRACE_FORMATS: dict[str, TraceFormat] = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".pftrace": "pftrace",
    ".parquet": "parquet",
}
_SIZE = re.compile(r"(\d{1,9})([KMG]?)i?B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"e": b"\x1b", b"\\": b"\\"}


def size(text: str) -> int:
    """Bytes: 256M, 1G, 65536."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 256M or 1G")
    return int(match[1]) * _UNITS[match[2].upper()]


def number(text: str) -> int:
    """An address, decimal or 0x hexadecimal."""
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text!r} is no address: write 0x100000")
    return value


def count(text: str) -> int:
    """A number of instructions, at least 1; K, M and G count in thousands."""
    scale = {"K": 1_000, "M": 1_000_000, "G": 1_000_000_000}.get(text[-1:].upper(), 1)
    digits = (text[:-1] if scale > 1 else text).replace("_", "").replace(",", "")
    if not digits.isascii() or not digits.isdecimal() or len(digits) > 18 or not int(digits):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of instructions: write 500M or 2G")
    return int(digits) * scale


def pattern(text: str) -> str:
    """A regular expression, checked; bytes of the console are matched as Latin-1, so it becomes that too."""
    try:
        return re.compile(os.fsencode(text).decode("latin-1")).pattern
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def send(text: str) -> tuple[str, bytes]:
    """REGEX=>TEXT; in TEXT \\n, \\r, \\t, \\e, \\\\ and \\xHH (a byte) are understood."""
    awaited, arrow, typed = text.partition("=>")
    if not arrow:
        raise argparse.ArgumentTypeError(f"{text!r}: write 'REGEX=>TEXT', for example '/ # =>ls\\n'")

    def unescape(match: re.Match[bytes]) -> bytes:
        return bytes.fromhex(match[1][1:].decode()) if match[1][:1] == b"x" else _ESCAPES[match[1]]

    return pattern(awaited), re.sub(rb"\\(x[0-9a-fA-F]{2}|[nrte\\])", unescape, os.fsencode(typed))


def added(text: str) -> tuple[Path, str]:
    """HOST[:GUEST]; without GUEST it goes to the root folder under its own name."""
    host, _, guest = text.partition(":")
    path = Path(host)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{host!r} does not exist")
    return path, guest or "/" + path.resolve().name


def address(text: str) -> Address:
    """HOST:PORT, unix:PATH or -."""
    try:
        return parse_address(text)
    except AddressError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def endpoint(text: str) -> Address:
    """HOST:PORT or unix:PATH: where more than one client can come."""
    place = address(text)
    if isinstance(place, Stdio):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT or unix:PATH")
    return place


def console(text: str) -> ConsolePlace:
    """stdio, none, HOST:PORT, or a file: whatever has a slash or no colon."""
    if text == "stdio":
        return "stdio"
    if text == "none":
        return "none"
    if ":" in text and "/" not in text:
        place = address(text)
        if isinstance(place, Tcp):
            return place
        raise argparse.ArgumentTypeError(f"{text!r}: write stdio, none, HOST:PORT or a file")
    if text in ("", "-"):
        raise argparse.ArgumentTypeError(f"{text!r}: write stdio, none, HOST:PORT or a file")
    return Path(text)


def topics(text: str) -> frozenset[LogTopic]:
    """A comma-separated list of LOG_TOPICS."""
    chosen = frozenset(text.split(","))
    if not chosen <= set(LOG_TOPICS):
        raise argparse.ArgumentTypeError(f"{text!r}: write a comma-separated list of {', '.join(LOG_TOPICS)}")
    return cast("frozenset[LogTopic]", chosen)


def trace_target(text: str) -> TraceTarget:
    """A file whose suffix picks the format, or - for text on standard output."""
    if text == "-":
        return TraceTarget(None)
    path = Path(text)
    if path.suffix not in _TRACE_FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r}: the suffix picks the format, write {', '.join(_TRACE_FORMATS)}")
    return TraceTarget(path, _TRACE_FORMATS[path.suffix])
