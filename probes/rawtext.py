"""A guest's strings: bytes in no known encoding, kept in `str` the way Python keeps file names (PEP 383).

Rules: pure. What is UTF-8 reads as such; any other byte above 0x7f is a lone surrogate, which `encode` turns into that
byte again: ftrace's text shows strings byte for byte. Outputs that have to be Unicode take `readable`.
"""

from __future__ import annotations

from typing import Final

LATIN1_LETTERS: Final = r"\udcc0-\udcd6\udcd8-\udcf6\udcf8-\udcff"
"""For a regular expression's [set]: the bytes that the kernel's isalpha() takes for letters beside ASCII's (_ctype[],
lib/ctype.c). One that is part of a character's UTF-8 never stands alone, so no name can have it."""


def decode(raw: bytes) -> str:
    """What the guest's bytes are in here."""
    return raw.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    """The guest's bytes again. Never raises: a surrogate that is none of its bytes becomes `?`."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")


def readable(text: str) -> str:
    r"""Unicode that anything can encode: a byte that is no UTF-8 becomes `\xNN`."""
    return text if text.isascii() else encode(text).decode("utf-8", "backslashreplace")


def bytewise(text: str) -> str:
    """One character a byte, as C compares, matches and cuts strings."""
    return text if text.isascii() else encode(text).decode("latin-1")


def cut(text: str, size: int) -> str:
    """Its first `size` bytes."""
    return text[:size] if text.isascii() else decode(encode(text)[:size])


def padded(text: str, size: int) -> str:
    """With spaces behind it up to `size` bytes, as printf's %-50s counts; before it for a negative size."""
    missing = " " * (abs(size) - (len(text) if text.isascii() else len(encode(text))))
    return missing + text if size < 0 else text + missing
