"""Type profiles: what a kernel without BTF does not say of itself, as a few KB of text that belong to one build.

Rules: pure but for reading the profile's file; text in, BTF out, so that every reader of types has one source. Profiles
for the kernels we test lie beside this module, those that a user has made (generate.py) in the cache, named by
build-id: a profile is never used for another build.

A profile's lines; numbers are decimal, addresses hexadecimal, # begins a comment:

    kernel RELEASE BITS BUILD-ID
    int SIZE s|u|b NAME                          an integer type: signed, unsigned, _Bool
    variable ADDRESS NAME TYPE                   of a per-cpu variable the offset
    constant VALUE NAME
    struct|union SIZE NAME                       its members follow; what is not listed is left out
     OFFSET NAME TYPE                            in bytes
     OFFSET.BIT:WIDTH NAME TYPE                  a bit field

TYPE is an integer's name, `struct NAME`, `union NAME`, `void` or `function`, then from the inside out `*` for a pointer
to it and `[N]` for an array of it: `char *[4]` is four pointers.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from emu.images.cache import cache_root
from probes.btf import MAGIC, Kind

_LIMIT: Final = 1 << 20  # bytes of a profile's text; those we make have 10,000
_MEMBER: Final = re.compile(r" (\d{1,7})(?:\.(\d{1,2}):(\d{1,2}))? (\w+) (.+)")
_TYPE: Final = re.compile(r"((?:struct |union )?[\w. ]*[\w.]) ?((?:\*|\[\d{1,7}\])*)")
_SUFFIX: Final = re.compile(r"\*|\[\d+\]")
_SIGNS: Final = {"s": 1 << 24, "u": 0, "b": 1 << 26}


class ProfileError(ValueError):
    """Text that is no profile; one line."""


@dataclass(frozen=True, slots=True)
class Profile:
    """`btf` as an image's .BTF section would be; `variables`: name -> (address, type as TYPE above)."""

    release: str
    bits: int
    build_id: str
    btf: bytes
    variables: Mapping[str, tuple[int, str]]


def find_profile(build_id: bytes | None) -> Profile | None:
    """The profile of that build, ours or the user's; None where there is none. ProfileError for a damaged one."""
    if not build_id:
        return None
    name = f"{build_id.hex()}.txt"
    for folder in (resources.files("probes.linux") / "profiles", user_profiles()):
        file = folder / name
        if file.is_file():
            try:
                profile = read_profile(file.read_bytes()[: _LIMIT + 1].decode("ascii"))
            except (OSError, UnicodeDecodeError) as error:
                raise ProfileError(f"the type profile {name} cannot be read: {error}") from error
            if profile.build_id == build_id.hex():
                return profile
    return None


def user_profiles() -> Path:
    """The folder of the profiles that a user has made."""
    return cache_root() / "profiles"


def read_profile(text: str) -> Profile:
    """ProfileError says which line is wrong."""
    if len(text) > _LIMIT:
        raise ProfileError("the type profile is too large")
    return _Reader().read(text)


class _Reader:
    def __init__(self) -> None:
        self._writer = _BtfWriter()
        self._head: tuple[str, int, str] | None = None
        self._variables: dict[str, tuple[int, str]] = {}
        self._constants: list[tuple[str, int]] = []
        self._members: list[tuple[str, int, int, str]] = []
        self._open: tuple[Kind, str, int] | None = None

    def read(self, text: str) -> Profile:
        for number, line in enumerate(text.splitlines(), 1):
            try:
                self._line(line.partition("#")[0].rstrip())
            except (ValueError, KeyError, struct.error) as error:
                raise ProfileError(f"line {number} of the type profile is wrong: {error}") from error
        self._close()
        if self._head is None:
            raise ProfileError("the type profile does not say whose it is")
        self._writer.constants(self._constants)
        for _, spelled in self._variables.values():
            self._type(spelled)
        return Profile(*self._head, self._writer.data(), self._variables)

    def _line(self, line: str) -> None:
        if not line:
            return
        if line.startswith(" "):
            match = _MEMBER.fullmatch(line)
            if match is None or self._open is None:
                raise ValueError("no member")
            offset, bit, width, name, spelled = match.groups()
            position = int(offset) * 8 + int(bit or 0)
            self._members.append((name, position, int(width or 0), spelled))
            return
        self._close()
        word, rest = line.split(" ", 1)
        if word == "kernel":
            release, bits, build_id = rest.split()
            self._head = release, int(bits), build_id
            self._writer.pointer_size = int(bits) // 8
        elif word == "int":
            size, sign, name = rest.split(" ", 2)
            self._writer.integer(name, int(size), _SIGNS[sign])
        elif word == "variable":
            address, name, spelled = rest.split(" ", 2)
            self._variables[name] = int(address, 16), spelled
        elif word == "constant":
            value, name = rest.split()
            self._constants.append((name, int(value)))
        else:
            size, name = rest.split()
            self._open = {"struct": Kind.STRUCT, "union": Kind.UNION}[word], name, int(size)

    def _close(self) -> None:
        if self._open is not None:
            kind, name, size = self._open
            members = [(name, at, width, self._type(spelled)) for name, at, width, spelled in self._members]
            self._writer.aggregate(kind, name, size, members)
            self._open = None
            self._members = []

    def _type(self, spelled: str) -> int:
        match = _TYPE.fullmatch(spelled)
        if match is None:
            raise ValueError(f"{spelled!r} is no type")
        made = self._writer.base(match[1])
        for suffix in _SUFFIX.findall(match[2]):
            made = self._writer.pointer(made) if suffix == "*" else self._writer.array(made, int(suffix[1:-1]))
        return made


class _BtfWriter:
    """Builds a .BTF section (btf.py has the layouts). Types get their ids when they are first named."""

    def __init__(self) -> None:
        self.pointer_size = 8
        self._ids: dict[tuple[object, ...], int] = {}
        self._types: list[bytes] = []
        self._strings = bytearray(1)
        self._names: dict[str, int] = {"": 0}

    def integer(self, name: str, size: int, encoding: int) -> None:
        self._set(self._id(Kind.INT, name), self._head(name, Kind.INT, 0, size, struct.pack("<I", encoding | 8 * size)))

    def base(self, name: str) -> int:
        """The id of an integer, a struct or union, void or a function by name; aggregates may come later."""
        for prefix, kind in (("struct ", Kind.STRUCT), ("union ", Kind.UNION)):
            if name.startswith(prefix):
                return self._id(kind, name.removeprefix(prefix))
        if name == "void":
            return 0
        if name == "function":
            return self._once((Kind.FUNC_PROTO,), self._head("", Kind.FUNC_PROTO, 0, 0))
        if (Kind.INT, name) not in self._ids:
            raise ValueError(f"no type {name}")
        return self._ids[Kind.INT, name]

    def pointer(self, target: int) -> int:
        return self._once((Kind.PTR, target), self._head("", Kind.PTR, 0, target))

    def array(self, element: int, count: int) -> int:
        index = self.base("unsigned int")
        detail = struct.pack("<III", element, index, count)
        return self._once((Kind.ARRAY, element, count), self._head("", Kind.ARRAY, 0, 0, detail))

    def aggregate(self, kind: Kind, name: str, size: int, members: list[tuple[str, int, int, int]]) -> None:
        """`members`: (name, offset in bits, width in bits or 0, type)."""
        fields = any(width for _, _, width, _ in members)  # then offsets carry widths: BTF's kind_flag
        rows = [
            struct.pack("<III", self._string(name), type_id, at | width << 24 if fields else at)
            for name, at, width, type_id in members
        ]
        self._set(self._id(kind, name), self._head(name, kind, len(rows), size, b"".join(rows), fields))

    def constants(self, values: list[tuple[str, int]]) -> None:
        rows = [struct.pack("<II", self._string(name), value & 0xFFFFFFFF) for name, value in values]
        self._once((Kind.ENUM,), self._head("", Kind.ENUM, len(rows), 4, b"".join(rows)))

    def data(self) -> bytes:
        """The section. Structures that were named but never described are incomplete ones."""
        for (kind, *name), type_id in self._ids.items():
            if not self._types[type_id - 1]:
                self._set(type_id, self._head(str(name[0]), Kind.FWD, 0, 0, flag=kind is Kind.UNION))
        types, strings = b"".join(self._types), bytes(self._strings)
        header = struct.pack("<HBBIIIII", MAGIC, 1, 0, 24, 0, len(types), len(types), len(strings))
        return header + types + strings

    def _head(self, name: str, kind: Kind, count: int, third: int, tail: bytes = b"", flag: bool = False) -> bytes:
        return struct.pack("<III", self._string(name), flag << 31 | kind << 24 | count, third) + tail

    def _id(self, *key: object) -> int:
        if key not in self._ids:
            self._types.append(b"")
            self._ids[key] = len(self._types)
        return self._ids[key]

    def _set(self, type_id: int, data: bytes) -> None:
        self._types[type_id - 1] = data

    def _once(self, key: tuple[object, ...], data: bytes) -> int:
        made = self._id(*key)
        self._set(made, data)
        return made

    def _string(self, text: str) -> int:
        if text not in self._names:
            self._names[text] = len(self._strings)
            self._strings += text.encode("ascii") + b"\0"
        return self._names[text]
