"""Names to addresses, for a person who may have misspelt one.

Rules: reads the machine's symbols and nothing else; of `probes` it imports errors and scope.
"""

from __future__ import annotations

import errno
from typing import Protocol

from emu.iface import Machine
from probes.errors import ProbeError
from probes.scope import ENDBR_SIZE, KernelText, starts_with_endbr


class Functions(Protocol):
    """Guest code by name, from wherever a user may have put it."""

    def check(self, name: str) -> None:
        """ProbeError ENOENT where nothing has that name."""
        ...

    def address(self, name: str) -> int:
        """Where it is in the address space in force: ask at each use."""
        ...


class ImageFunctions:
    """Functions of the guest's own image."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def check(self, name: str) -> None:
        resolve(self._machine, name)

    def address(self, name: str) -> int:
        return resolve(self._machine, name)


def resolve(machine: Machine, target: str | int) -> int:
    """The address that a symbol's name or an address means; ProbeError ENOENT with names a person may have meant."""
    if isinstance(target, int):
        return target
    found = machine.symbols.lookup(target)
    if found:
        return found[0].address
    raise ProbeError(errno.ENOENT, f"no symbol {target}", hint=did_you_mean(machine, target))


def is_entry(machine: Machine, address: int) -> bool:
    """A function starts at `address`, or its ENDBR ends there; True where no symbol says anything."""
    found = machine.symbols.find(address)
    if found is None or found[1] == 0:
        return True
    return found[1] == ENDBR_SIZE and starts_with_endbr(machine, found[0].address)


def did_you_mean(machine: KernelText, name: str) -> str | None:
    """A line that names symbols like `name`, or None."""
    near = list(machine.symbols.suggest(name))[:3]
    return f"did you mean {', '.join(near)}?" if near else None
