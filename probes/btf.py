"""BTF: the type information a kernel carries in its own image (.BTF), read without a debugger's files.

Rules: pure; bytes in, types out; standard library only; any thread. Types are read when they are asked for, because a
kernel has a hundred thousand. Source: Linux 6.12, Documentation/bpf/btf.rst and include/uapi/linux/btf.h.
"""

from __future__ import annotations

import enum
import functools
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_WORDS_3 = struct.Struct("<III")
_WORDS_2 = struct.Struct("<II")
_MAX_NESTING = 64  # of typedefs and qualifiers, and of anonymous structures


class Kind(enum.IntEnum):
    """BTF_KIND_*."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


# bytes that follow the 12-byte header: fixed, and for each of its `vlen` elements
_FIXED = {Kind.INT: 4, Kind.ARRAY: 12, Kind.VAR: 4, Kind.DECL_TAG: 4}
_EACH = {Kind.STRUCT: 12, Kind.UNION: 12, Kind.ENUM: 8, Kind.FUNC_PROTO: 8, Kind.DATASEC: 12, Kind.ENUM64: 12}
_SIZED = frozenset((Kind.INT, Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.FLOAT, Kind.ENUM64))
_TRANSPARENT = frozenset((Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG))
_QUALIFIERS = {Kind.VOLATILE: "volatile", Kind.CONST: "const", Kind.RESTRICT: "restrict"}


class BtfError(ValueError):
    """Data that is no BTF, or contradicts itself; one line."""


@dataclass(frozen=True, slots=True)
class Member:
    """Of a struct or union: `bit_offset` from its start; `bit_size` is 0 unless it is a bit field."""

    name: str
    type_id: int
    bit_offset: int
    bit_size: int = 0


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    type_id: int


@dataclass(frozen=True, slots=True)
class Type:
    """One type. `size` is bytes where the kind has one; `target` is the id it refers to (pointee, element, prototype,
    return type); `detail` is the integer encoding word (INT) or the number of elements (ARRAY); `flag` is the
    kind_flag, which makes a FWD one of a union."""

    id: int
    kind: Kind
    name: str
    size: int = 0
    target: int = 0
    detail: int = 0
    flag: bool = False

    @property
    def signed(self) -> bool:
        """Of an INT."""
        return bool(self.detail >> 24 & 1)

    @property
    def boolean(self) -> bool:
        """Of an INT: _Bool."""
        return bool(self.detail >> 24 & 4)

    @property
    def bits(self) -> int:
        """Of an INT: its width, which may be less than 8 * size."""
        return self.detail & 0xFF


VOID = Type(0, Kind.VOID, "void")


class Btf:
    """All types of one image. BtfError where `data` is not BTF; types are checked when they are read."""

    def __init__(self, data: bytes, pointer_size: int = 8) -> None:
        self.pointer_size = pointer_size
        try:
            magic, version, _, header, type_off, type_len, str_off, str_len = _HEADER.unpack_from(data)
        except struct.error:
            raise BtfError("shorter than a BTF header") from None
        if (magic, version) != (MAGIC, 1):
            raise BtfError(f"magic {magic:#x} version {version}: not BTF")
        if header + max(type_off + type_len, str_off + str_len) > len(data):
            raise BtfError("sections lie outside the data")
        self._types = data[header + type_off : header + type_off + type_len]
        self._strings = data[header + str_off : header + str_off + str_len]
        self._at = array("I", [0])  # byte offset of each type by id; 0 is void
        self._ids: dict[tuple[int, str], list[int]] | None = None
        self._scan()

    def _scan(self) -> None:
        types, at, end, unpack = self._types, 0, len(self._types), _TYPE.unpack_from
        sizes = [(_FIXED.get(Kind(k), 0), _EACH.get(Kind(k), 0)) for k in range(len(Kind))]
        try:
            while at < end:
                self._at.append(at)
                info = unpack(types, at)[1]
                fixed, each = sizes[info >> 24 & 0x1F]
                at += 12 + fixed + each * (info & 0xFFFF)
        except (struct.error, IndexError):
            raise BtfError(f"type {len(self._at) - 1} is cut short or of no known kind") from None
        if at != end:
            raise BtfError("the last type is cut short")

    def __len__(self) -> int:
        """Number of types, void included; ids run from 0."""
        return len(self._at)

    def _string(self, offset: int) -> str:
        end = self._strings.find(b"\0", offset)
        if offset >= len(self._strings) or end < 0:
            raise BtfError(f"a name at {offset:#x} lies outside the strings")
        return self._strings[offset:end].decode("utf-8", "replace")

    def _raw(self, type_id: int) -> tuple[int, int, int, int]:
        """(offset of what follows, name offset, info, size or type)."""
        if not 0 < type_id < len(self._at):
            raise BtfError(f"there is no type {type_id}")
        at = self._at[type_id]
        name, info, third = _TYPE.unpack_from(self._types, at)
        return at + 12, name, info, third

    def __getitem__(self, type_id: int) -> Type:
        if type_id == 0:
            return VOID
        at, name_at, info, third = self._raw(type_id)
        kind, name = Kind(info >> 24 & 0x1F), self._string(name_at) if name_at else ""
        if kind is Kind.INT:
            return Type(type_id, kind, name, third, detail=_WORDS_2.unpack_from(self._types, at - 4)[1])
        if kind is Kind.ARRAY:
            element, _, count = _WORDS_3.unpack_from(self._types, at)
            return Type(type_id, kind, name, target=element, detail=count)
        if kind is Kind.PTR:
            return Type(type_id, kind, name, self.pointer_size, third)
        if kind in _SIZED:
            return Type(type_id, kind, name, third, flag=bool(info >> 31))
        return Type(type_id, kind, name, target=third, flag=bool(info >> 31))

    # ------------------------------------------------------------------------------------------------------- by name

    def _index(self) -> dict[tuple[int, str], list[int]]:
        if self._ids is None:
            self._ids = {}
            for type_id in range(1, len(self._at)):
                _, name_at, info, _ = self._raw(type_id)
                if name_at:
                    self._ids.setdefault((info >> 24 & 0x1F, self._string(name_at)), []).append(type_id)
        return self._ids

    def find(self, name: str, *kinds: Kind) -> Type | None:
        """The first type of that name and one of the kinds."""
        for kind in kinds:
            if found := self._index().get((kind, name)):
                return self[found[0]]
        return None

    def functions(self, name: str) -> list[Type]:
        """Every FUNC of that name; several static ones may share it."""
        return [self[type_id] for type_id in self._index().get((Kind.FUNC, name), ())]

    # ----------------------------------------------------------------------------------------------- parts of a type

    def members(self, type_: Type) -> Iterator[Member]:
        """Of a STRUCT or UNION, in order."""
        at, _, info, _ = self._raw(type_.id)
        for _ in range(info & 0xFFFF):
            name, member, offset = _WORDS_3.unpack_from(self._types, at)
            at += 12
            bit_size, bit_offset = (offset >> 24, offset & 0xFFFFFF) if info >> 31 else (0, offset)
            yield Member(self._string(name), member, bit_offset, bit_size)

    def parameters(self, prototype: Type) -> list[Parameter]:
        """Of a FUNC_PROTO; a variadic one ends in a parameter of type void without a name."""
        at, _, info, _ = self._raw(prototype.id)
        found = []
        for _ in range(info & 0xFFFF):
            name, parameter = _WORDS_2.unpack_from(self._types, at)
            at += 8
            found.append(Parameter(self._string(name) if name else "", parameter))
        return found

    def enumerators(self, type_: Type) -> Iterator[tuple[str, int]]:
        """(name, value) of an ENUM or ENUM64, values as unsigned numbers of its size."""
        at, _, info, _ = self._raw(type_.id)
        for _ in range(info & 0xFFFF):
            if type_.kind is Kind.ENUM64:
                name, low, high = _WORDS_3.unpack_from(self._types, at)
                at += 12
                yield self._string(name), low | high << 32
            else:
                name, value = _WORDS_2.unpack_from(self._types, at)
                at += 8
                yield self._string(name), value

    def prototype(self, function: Type) -> Type:
        """The FUNC_PROTO of a FUNC."""
        return self[function.target]

    # --------------------------------------------------------------------------------------------------- what follows

    def resolve(self, type_id: int) -> Type:
        """The type behind typedefs and qualifiers."""
        for _ in range(_MAX_NESTING):
            found = self[type_id]
            if found.kind not in _TRANSPARENT:
                return found
            type_id = found.target
        raise BtfError(f"type {type_id} refers to itself")

    def size(self, type_id: int) -> int:
        """Bytes; 0 for void, functions and incomplete types."""
        count = 1
        for _ in range(_MAX_NESTING):
            found = self.resolve(type_id)
            if found.kind is not Kind.ARRAY:
                return count * found.size
            count *= found.detail
            type_id = found.target
        raise BtfError(f"type {type_id} is nested too deeply")

    def member(self, type_: Type, name: str, depth: int = 0) -> Member | None:
        """A member by name, looked for in anonymous structures and unions too; its offset is from `type_`'s start."""
        if depth > _MAX_NESTING:
            raise BtfError(f"type {type_.id} is nested too deeply")
        for member in self.members(type_):
            if member.name == name:
                return member
            if not member.name:
                inner = self.resolve(member.type_id)
                if inner.kind in (Kind.STRUCT, Kind.UNION):
                    found = self.member(inner, name, depth + 1)
                    if found is not None:
                        return Member(name, found.type_id, member.bit_offset + found.bit_offset, found.bit_size)
        return None

    def offset(self, struct_name: str, path: str) -> int:
        """Bytes from the start of `struct struct_name` to `path` (members joined by dots); BtfError if none."""
        type_ = self.find(struct_name, Kind.STRUCT, Kind.UNION)
        bits = 0
        for name in path.split("."):
            member = self.member(type_, name) if type_ is not None and type_.kind in (Kind.STRUCT, Kind.UNION) else None
            if member is None:
                raise BtfError(f"struct {struct_name} has no {path}")
            bits += member.bit_offset
            type_ = self.resolve(member.type_id)
        return bits // 8

    def spell(self, type_id: int) -> str:
        """As C writes it: "struct file *", "const char *", "u64"."""
        found = self[type_id]
        match found.kind:
            case Kind.PTR:
                inner = self.spell(found.target)
                return f"{inner}*" if inner.endswith("*") else f"{inner} *"
            case Kind.STRUCT | Kind.UNION | Kind.ENUM | Kind.ENUM64 | Kind.FWD:
                word = {Kind.UNION: "union", Kind.ENUM: "enum", Kind.ENUM64: "enum"}.get(found.kind, "struct")
                return f"{word} {found.name or '(anonymous)'}"
            case Kind.VOLATILE | Kind.CONST | Kind.RESTRICT:
                return f"{_QUALIFIERS[found.kind]} {self.spell(found.target)}"
            case Kind.TYPE_TAG:
                return self.spell(found.target)
            case Kind.ARRAY:
                return f"{self.spell(found.target)}[{found.detail}]"
            case Kind.FUNC_PROTO:
                return f"{self.spell(found.target)} (*)()"
        return found.name or found.kind.name.lower()


@functools.lru_cache(maxsize=4)
def parse_btf(data: bytes, pointer_size: int) -> Btf:
    """A Btf is large and never changes: those who read the same kernel share it. BtfError."""
    return Btf(data, pointer_size)
