"""Where files' bytes are mapped: which address of which address space is whose, and the breaks that this needs.

Rules: the machine's thread; a part of `uprobe`. An address is armed once (`emu.iface.CodeBreaks`) however many spaces
have something there; who is meant in the space that runs is asked at the hit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from emu.iface import Machine
from probes.programs import Region


class Located(Protocol):
    """A byte of a file."""

    offset: int


Place = TypeVar("Place", bound=Located)


class Sites(Generic[Place]):
    """`left(place, space, address)` is called before a mapping of a place is forgotten."""

    def __init__(self, machine: Machine, left: Callable[[Place, int, int], None]) -> None:
        self._machine = machine
        self._left = left
        self._spaces: dict[int, dict[int, Place]] = {}  # address space -> address -> what is there
        self._users: Counter[int] = Counter()  # address -> who wants a break there, in how many spaces

    def at(self, space: int, address: int) -> Place | None:
        return self._spaces.get(space, {}).get(address)

    def of(self, place: Place) -> Iterator[tuple[int, int]]:
        """(address space, address) of every mapping."""
        for space, sites in self._spaces.items():
            yield from ((space, address) for address, known in sites.items() if known is place)

    def spaces(self) -> list[int]:
        """Those with something in them."""
        return list(self._spaces)

    def enter(self, region: Region, place: Place) -> None:
        """A mapping is there; nothing happens where it leaves the place out."""
        address = region.address(place.offset)
        if address is None:
            return
        if self.at(region.space, address) is not None:
            self.leave(region.space, address)  # another file was there, whose end nobody told
        self._spaces.setdefault(region.space, {})[address] = place
        self.use(address)

    def leave(self, space: int, address: int) -> None:
        sites = self._spaces[space]
        self._left(sites.pop(address), space, address)
        if not sites:
            del self._spaces[space]
        self.unuse(address)

    def leave_range(self, space: int, start: int, end: int) -> None:
        for address in [at for at in self._spaces.get(space, ()) if start <= at < end]:
            self.leave(space, address)

    def drop(self, place: Place) -> None:
        """It is nowhere any more."""
        for space, address in list(self.of(place)):
            self.leave(space, address)

    def fork(self, parent: int, child: int) -> None:
        """The child has what the parent has."""
        self.end(child)
        for address, place in self._spaces.get(parent, {}).items():
            self._spaces.setdefault(child, {})[address] = place
            self.use(address)

    def end(self, space: int) -> None:
        for address in list(self._spaces.get(space, ())):
            self.leave(space, address)

    def use(self, address: int, fresh: bool = True) -> None:
        """One more space in which the address is a break. `fresh`: nothing there can have run in it."""
        self._users[address] += 1
        if self._users[address] == 1:
            self._machine.breaks.arm(address, fresh=fresh)
        elif not fresh:
            self._machine.breaks.refresh(address)

    def unuse(self, address: int) -> None:
        self._users[address] -= 1
        if not self._users[address]:
            del self._users[address]
            self._machine.breaks.disarm(address)
