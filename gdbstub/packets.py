"""The packets a session answers, declared on their handlers, and the parsing of their fields.

Rules: no protocol state and no machine here. A packet exists because a method carries `@packet`; dispatch and what the
stub announces are taken from the same declarations, so that it cannot promise what nobody handles.
"""

from __future__ import annotations

import binascii
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar


class PacketOwner(Protocol):
    def allows(self, name: str, /) -> bool:
        """Whether packet `name` exists for its client."""
        ...


Owner = TypeVar("Owner", bound=PacketOwner)
Handler = TypeVar("Handler", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Declaration:
    """One packet of the table.

    `feature` is its word in our qSupported reply. With `negotiated`, that word is said only to a client that said it;
    those of `also` are said to all.
    `anytime` packets are answered while the guest runs, and to a client that is not (yet) the debugger. A packet whose
    attribute `requires` of the session is None is unknown to that session and not announced.
    """

    name: str
    feature: str | None = None
    negotiated: bool = False
    anytime: bool = False
    requires: str | None = None
    also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """A declaration with the attribute name of its handler."""

    declaration: Declaration
    method: str


_MARK = "_packet_declarations"


def packet(
    name: str,
    *,
    feature: str | None = None,
    negotiated: bool = False,
    anytime: bool = False,
    requires: str | None = None,
    also: tuple[str, ...] = (),
) -> Callable[[Handler], Handler]:
    """Declare the decorated method the handler of packet `name`; may be given several times on one method.

    The handler is called with what follows the name, without the separator. Names are whole words: "vCont" does not
    catch "vContX"; "qXfer:features:read" and "vFile:open" are names too.
    """
    declaration = Declaration(name, feature, negotiated, anytime, requires, also)

    def mark(handler: Handler) -> Handler:
        setattr(handler, _MARK, (declaration, *getattr(handler, _MARK, ())))
        return handler

    return mark


_SEPARATORS = re.compile(rb"[:;,=]")
_SHORT, _KEPT = 32, 256  # bytes of packets whose look-up is remembered, and how many of them
_LONGEST = 3  # separators looked at: "qXfer:features:read:..."


class PacketTable(Generic[Owner]):
    """All declarations of a class and its bases, for look-up and for qSupported."""

    def __init__(self, owner: type[Owner]) -> None:
        self._entries: dict[bytes, Entry] = {}
        self._known = functools.lru_cache(_KEPT)(self._look_up)  # a client says the same few things all day
        members = {name: member for part in reversed(owner.__mro__) for name, member in vars(part).items()}
        for attribute, member in members.items():
            for declaration in getattr(member, _MARK, ()):
                name = declaration.name.encode()
                if name in self._entries:
                    raise TypeError(f"packet {declaration.name!r} is declared twice")
                self._entries[name] = Entry(declaration, attribute)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def find(self, owner: Owner, payload: bytes) -> tuple[Entry, bytes] | None:
        """The entry for `payload` and what follows the name, or None for a packet `owner` does not know."""
        found = self._known(payload) if len(payload) <= _SHORT else self._look_up(payload)
        return found if found is not None and self._available(owner, found[0].declaration) else None

    def _look_up(self, payload: bytes) -> tuple[Entry, bytes] | None:
        for name, rest in _splits(payload):
            entry = self._entries.get(name)
            if entry is not None:
                return entry, rest
        return None

    def features(self, owner: Owner, announced: frozenset[str]) -> list[str]:
        """The words of a qSupported reply to a client that `announced` these."""
        words: list[str] = []
        for declaration in (entry.declaration for entry in self):
            if not self._available(owner, declaration):
                continue
            if declaration.feature is not None and (not declaration.negotiated or declaration.feature in announced):
                words.append(declaration.feature)
            words.extend(declaration.also)
        return words

    @staticmethod
    def _available(owner: Owner, declaration: Declaration) -> bool:
        if not owner.allows(declaration.name):
            return False
        return declaration.requires is None or getattr(owner, declaration.requires) is not None


def _splits(payload: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Ways to read `payload` as a name and the rest, longest name first."""
    if payload[:1] not in (b"q", b"Q", b"v", b"j", b"_"):
        yield payload[:2], payload[2:].removeprefix(b",")
        yield payload[:1], payload[1:]
        return
    yield payload, b""
    ends = [match.start() for match, _ in zip(_SEPARATORS.finditer(payload), range(_LONGEST), strict=False)]
    for end in reversed(ends):
        yield payload[:end], payload[end + 1 :]


# --------------------------------------------------------------------------------------------------------------- fields


class PacketError(Exception):
    """A packet that cannot be carried out; the text goes to a client that shows such texts, E01 to others."""


ADDRESSES: Final = 1 << 64
"""As many as a number of the protocol tells apart."""

_NUMBER = re.compile(rb"[0-9a-fA-F]{1,16}")


def number(text: bytes) -> int:
    """A hexadecimal number of at most 64 bits; PacketError for anything else (int() would take signs and spaces)."""
    if _NUMBER.fullmatch(text) is None:
        raise PacketError("a hexadecimal number is expected")
    return int(text, 16)


def fields(text: bytes, count: int) -> list[bytes]:
    """Exactly `count` fields between commas."""
    parts = text.split(b",")
    if len(parts) != count:
        raise PacketError(f"{count} fields are expected, not {len(parts)}")
    return parts


def pair(text: bytes) -> tuple[int, int]:
    """Two numbers: an address and a length, an offset and a length, a range."""
    first, second = fields(text, 2)
    return number(first), number(second)


def unhex(text: bytes) -> bytes:
    """The bytes that pairs of hexadecimal digits say."""
    try:
        return binascii.unhexlify(text)
    except binascii.Error as error:
        raise PacketError("pairs of hexadecimal digits are expected") from error


_EXPRESSION = re.compile(rb"X([0-9a-fA-F]{1,8}),")


def expression(text: bytes) -> tuple[bytes, bytes]:
    """The code of the agent expression (`X length,hex digits`) that `text` begins with, and what follows it."""
    match = _EXPRESSION.match(text)
    if match is None:
        raise PacketError("an agent expression is expected")
    end = match.end() + 2 * int(match[1], 16)
    if end > len(text):
        raise PacketError("an agent expression is shorter than its length says")
    return unhex(text[match.end() : end]), text[end:]
