"""Where files' bytes are mapped: which address of which address space is whose, and the breaks that this needs.

Rules: the machine's thread; a part of `uprobes`. An address is armed once (`emu.iface.CodeBreaks`) however many spaces
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
    """`left(place, space, address)` is called when a mapping of a place has been forgotten."""

    def __init__(self, machine: Machine, left: Callable[[Place, int, int], None]) -> None:
        self._machine = machine
        self._left = left
        self._spaces: dict[int, dict[int, Place]] = {}  # address space -> address -> what is there
        self._mappings: Counter[Place] = Counter()
        self._doubtful: set[tuple[int, int]] = set()
        self._users: Counter[int] = Counter()  # address -> who wants a break there, in how many spaces

    def at(self, space: int, address: int) -> Place | None:
        return self._spaces.get(space, {}).get(address)

    def within(self, space: int, start: int, end: int) -> list[tuple[int, Place]]:
        """(address, place) of a range."""
        return [(at, place) for at, place in self._spaces.get(space, {}).items() if start <= at < end]

    def doubt(self, space: int, address: int) -> None:
        """Something else may be mapped there by now; until `confirm`."""
        self._doubtful.add((space, address))

    def is_doubtful(self, space: int, address: int) -> bool:
        return bool(self._doubtful) and (space, address) in self._doubtful

    def confirm(self, space: int, address: int) -> None:
        self._doubtful.discard((space, address))

    @property
    def doubtful(self) -> list[tuple[int, int]]:
        return list(self._doubtful)

    def is_mapped(self, place: Place) -> bool:
        return place in self._mappings

    def of(self, place: Place) -> Iterator[tuple[int, int]]:
        """(address space, address) of every mapping."""
        for space, sites in self._spaces.items():
            yield from ((space, address) for address, known in sites.items() if known is place)

    def spaces(self) -> list[int]:
        """Those with something in them."""
        return list(self._spaces)

    def enter(self, region: Region, place: Place) -> None:
        """A mapping is there; nothing happens where it leaves the place out, or was told before."""
        address = region.address(place.offset)
        known = None if address is None else self.at(region.space, address)
        if address is None:
            return
        self.confirm(region.space, address)
        if known is place:
            return
        if known is not None:
            self.leave(region.space, address)  # another file was there, whose end nobody told
        self._put(region.space, address, place)

    def leave(self, space: int, address: int) -> None:
        sites = self._spaces[space]
        place = sites.pop(address)
        if not sites:
            del self._spaces[space]
        self._mappings[place] -= 1
        if not self._mappings[place]:
            del self._mappings[place]
        self._doubtful.discard((space, address))
        self._left(place, space, address)
        self.unuse(address)

    def drop(self, place: Place) -> None:
        """It is nowhere any more."""
        for space, address in list(self.of(place)):
            self.leave(space, address)

    def fork(self, parent: int, child: int) -> None:
        """The child has what the parent has."""
        self.end(child)
        for address, place in self._spaces.get(parent, {}).items():
            self._put(child, address, place)
            if self.is_doubtful(parent, address):
                self.doubt(child, address)

    def end(self, space: int) -> None:
        for address in list(self._spaces.get(space, ())):
            self.leave(space, address)

    def _put(self, space: int, address: int, place: Place) -> None:
        self._spaces.setdefault(space, {})[address] = place
        self._mappings[place] += 1
        self.use(address)

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
