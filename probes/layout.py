"""How an event's record is laid out: the fields its `format` file lists, what packs a hit, what takes it apart again.

Rules: pure. A record's payload is what the guest's own ftrace would write for the event (kernel/trace/trace_probe.c and
trace_events.c, Linux 6.12): common fields, the probed address, then the arguments without padding; a string is a
`__data_loc` word, its place and length, and its bytes behind the fixed part.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import construct

from probes import rawtext
from probes.fetch import Scalar, Value
from probes.fetchargs import FetchArg
from probes.fetchtypes import FetchType

COMMON: Final = (("common_type", 2, False), ("common_flags", 1, False), ("common_preempt_count", 1, False))
_COMMON_TYPES: Final = ("unsigned short", "unsigned char", "unsigned char")
MAX_PAYLOAD: Final = 0xFFFF  # what a __data_loc word can point to
_NUMBERS: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a record: C type, place and size in bytes, as the `format` file has them.

    `array` is what stands behind the name there. `text` marks strings, and `parts` is how many there are side by side.
    """

    name: str
    type: str
    offset: int
    size: int
    signed: bool
    array: str = ""
    text: bool = False
    parts: int = 1

    def line(self) -> str:
        where = f"offset:{self.offset};\tsize:{self.size};\tsigned:{int(self.signed)};"
        return f"\tfield:{self.type} {self.name}{self.array};\t{where}"


class Layout:
    """The record of one event. `word` is the guest's word in bytes, `is_return` that of a return probe."""

    def __init__(self, args: Sequence[FetchArg], is_return: bool, word: int) -> None:
        self.args = tuple(args)
        self.is_return = is_return
        self.word = word
        self.common = self._common()
        self.fields = self._own()
        self.fixed = self.fields[-1].offset + self.fields[-1].size
        self.pack_head = struct.Struct("<HBBi" + _NUMBERS[word] * (2 if is_return else 1))
        self._pieces = tuple(_piece(arg.type) for arg in self.args)
        self._numbers = struct.Struct("<" + "".join(piece.code for piece in self._pieces))
        self._plain = not any(piece.text or piece.count for piece in self._pieces)
        self._masks = tuple((1 << 8 * piece.size) - 1 for piece in self._pieces)

    @functools.cached_property
    def construct(self) -> construct.Struct[object, object]:
        """The fixed part as construct reads it: for tools, and the reference that `pack` is tested against."""
        members = []
        for field in (*self.common, *self.fields):
            if field.text:
                one = construct.Struct("offset" / construct.Int16ul, "length" / construct.Int16ul)
                members.append(field.name / (one if field.parts == 1 else construct.Array(field.parts, one)))
            elif field.parts == 1:
                members.append(field.name / construct.BytesInteger(field.size, field.signed, swapped=True))
            else:
                element = construct.BytesInteger(field.size // field.parts, field.signed, swapped=True)
                members.append(field.name / construct.Array(field.parts, element))
        return construct.Struct(*members)

    # --------------------------------------------------------------------------------------------- to bytes and back

    def pack(self, head: tuple[int, ...], values: Sequence[Value]) -> bytes:
        """`head`: type, flags, preempt count, pid, and ip (of a return: function, return address)."""
        if self._plain:
            masked = zip(values, self._masks, strict=True)
            numbers = [value & mask for value, mask in masked]  # type: ignore[operator]  # `_plain`: all are numbers
            return self.pack_head.pack(*head) + self._numbers.pack(*numbers)
        flat: list[int] = []
        tail = bytearray()
        for piece, mask, value in zip(self._pieces, self._masks, values, strict=True):
            parts = value if isinstance(value, tuple) else (value,)
            for part in parts:
                flat.append(self._string(part, tail) if piece.text else _number(part) & mask)
        return self.pack_head.pack(*head) + self._numbers.pack(*flat) + tail

    def _string(self, value: Scalar, tail: bytearray) -> int:
        """The __data_loc word of a string that is put behind the rest; one that failed has length 0."""
        at = self.fixed + len(tail)
        if value is None or at >= MAX_PAYLOAD:
            return min(at, MAX_PAYLOAD)
        data = rawtext.encode(str(value))[: MAX_PAYLOAD - at - 1] + b"\0"
        tail += data
        return len(data) << 16 | at

    def head(self, payload: bytes) -> tuple[int, ...]:
        return self.pack_head.unpack_from(payload)

    def values(self, payload: bytes) -> tuple[Value, ...]:
        """The arguments of a payload that `pack` made."""
        flat = iter(self._numbers.unpack_from(payload, self.pack_head.size))
        return tuple(piece.take(flat, payload) for piece in self._pieces)

    # ----------------------------------------------------------------------------------------------- the format file

    def format(self, name: str, number: int) -> str:
        """The text of `events/GRP/EV/format`."""
        lines = [f"name: {name}", f"ID: {number}", "format:"]
        lines += [field.line() for field in self.common]
        lines += ["", *(field.line() for field in self.fields)]
        return "\n".join([*lines, "", f"print fmt: {self._print_format()}"]) + "\n"

    def _common(self) -> tuple[Field, ...]:
        fields, at = [], 0
        for (name, size, signed), kind in zip(COMMON, _COMMON_TYPES, strict=True):
            fields.append(Field(name, kind, at, size, signed))
            at += size
        return (*fields, Field("common_pid", "int", at, 4, signed=True))

    def _own(self) -> tuple[Field, ...]:
        names = ("__probe_func", "__probe_ret_ip") if self.is_return else ("__probe_ip",)
        fields = [
            Field(name, "unsigned long", 8 + i * self.word, self.word, signed=False) for i, name in enumerate(names)
        ]
        at = 8 + len(names) * self.word
        for arg in self.args:
            fields.append(_field(arg, at))
            at += fields[-1].size
        return tuple(fields)

    def _print_format(self) -> str:
        texts = [f"{arg.name}={_print_one(arg.type)}" for arg in self.args]
        values = ["REC->__probe_func", "REC->__probe_ret_ip"] if self.is_return else ["REC->__probe_ip"]
        for arg in self.args:
            read = "__get_str({})" if arg.type.is_string else "REC->{}"
            names = [f"{arg.name}[{i}]" for i in range(arg.type.count)] if arg.type.count else [arg.name]
            values += [read.format(name) for name in names]
        place = "(%lx <- %lx)" if self.is_return else "(%lx)"
        return f'"{" ".join([place, *texts])}", {", ".join(values)}'


def _number(value: Scalar) -> int:
    return value if isinstance(value, int) else 0


@dataclass(frozen=True, slots=True)
class _Piece:
    """How one argument is stored: `count` elements (0: not an array) of `size` bytes; `code` is struct's for all."""

    code: str
    size: int
    count: int
    signed: bool
    text: bool

    def take(self, flat: Iterator[int], payload: bytes) -> Value:
        if not self.count:
            return self._one(next(flat), payload)
        return tuple(self._one(next(flat), payload) for _ in range(self.count))

    def _one(self, raw: int, payload: bytes) -> Scalar:
        if self.text:
            length, at = raw >> 16, raw & 0xFFFF
            return rawtext.decode(payload[at : at + length - 1]) if length else None
        sign = 1 << (8 * self.size - 1)
        return (raw ^ sign) - sign if self.signed else raw


def _piece(kind: FetchType) -> _Piece:
    signed = kind.signed and not kind.is_string
    return _Piece(_NUMBERS[kind.size] * (kind.count or 1), kind.size, kind.count, signed, kind.is_string)


def _field(arg: FetchArg, at: int) -> Field:
    kind = arg.type
    c_type, bracket, _ = kind.c_type.partition("[") if kind.count and not kind.is_string else (kind.c_type, "", "")
    array = "[]" if bracket else ""
    return Field(arg.name, c_type, at, kind.field_size, kind.signed, array, kind.is_string, kind.count or 1)


def _print_one(kind: FetchType) -> str:
    one = kind.print_format
    return "{" + ",".join([one] * kind.count) + "}" if kind.count else one
