"""The types of fetch arguments: how bytes are read, how a value is written, and what event formats say of a field.

Rules: pure; a table and a value. Source: probe_fetch_types and PRINT_TYPE_FUNCs of kernel/trace/trace_probe.c, 6.12.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

STRINGS: Final = frozenset(("string", "ustring"))
_SIZES: Final = {f"{kind}{bits}": bits // 8 for kind in "usx" for bits in (8, 16, 32, 64)} | {"char": 1}
_STRING_SIZE: Final = 4  # a string's field in a record is a 32-bit __data_loc: offset and length
_FORMATS: Final = {"u": "%u", "s": "%d", "x": "0x%x"}


@dataclass(frozen=True, slots=True)
class FetchType:
    """How fetched bytes are read and shown.

    `name` is u8..x64, char, symbol, symstr, string or ustring; `size` is bytes of one element in a record. A bitfield
    is `width` bits from bit `low` of a container of `size` bytes; `count` is an array's length, 0 for a scalar.
    `waits`: of a ustring whose page is not in memory the record waits for the page.
    """

    name: str
    size: int
    width: int = 0
    low: int = 0
    count: int = 0
    waits: bool = False

    @property
    def is_string(self) -> bool:
        """Its field is a __data_loc; values are str or None (see `fetch`)."""
        return self.name in STRINGS or self.name == "symstr"

    @property
    def signed(self) -> bool:
        """As events' format files say it: strings are, too."""
        return self.is_string or self.name in ("s8", "s16", "s32", "s64")

    @property
    def field_size(self) -> int:
        """Bytes of the whole field in a record."""
        return self.size * (self.count or 1)

    @property
    def c_type(self) -> str:
        """What an event's format file calls it: "u64", "__data_loc char[]", "u8[4]"."""
        if self.is_string:
            element = "__data_loc char[]"
        elif self.name in ("char", "symbol") or self.name.startswith("x"):
            element = f"u{8 * self.size}"
        else:
            element = self.name
        return f"{element}[{self.count}]" if self.count else element

    @property
    def print_format(self) -> str:
        """One element in `print fmt`, as C writes it inside that string."""
        if self.is_string:
            return r"\"%s\""
        if self.name in ("symbol", "char"):
            return {"symbol": "%pS", "char": "'%c'"}[self.name]
        shown = _FORMATS[self.name[0]]
        return f"{shown[:-1]}L{shown[-1]}" if self.size == 8 else shown

    def same_field(self, other: FetchType) -> bool:
        """Whether a further probe of an event may have `other` here: the kernel does not compare bitfields."""
        return (self.name, self.size, self.count) == (other.name, other.size, other.count)


def find_type(name: str, word: int, count: int = 0) -> FetchType | None:
    """The type of that name for a kernel whose words have `word` bytes; a bitfield's is its container's."""
    if name in STRINGS or name == "symstr":
        return FetchType(name, _STRING_SIZE, count=count)
    if name == "symbol":
        return FetchType(name, word, count=count)
    size = _SIZES.get(name)
    return None if size is None else FetchType(name, size, count=count)
