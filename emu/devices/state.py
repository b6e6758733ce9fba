"""How a device's state is written down and checked when it comes back.

Rules: no device lives here. A device declares its attributes once, as a `Layout`; `save` turns them into plain values
that JSON can hold and `load` refuses what does not fit before it changes anything, since a snapshot is a file and a
file may be damaged or hostile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from emu.iface import MachineError

State: TypeAlias = dict[str, object]


class StateError(MachineError):
    """A saved state that this device cannot take over: which field of which device, and why."""

    def __init__(self, device: str, field: str, reason: str) -> None:
        super().__init__(f"saved state of {device}: {field} {reason}")
        self.device = device
        self.field = field


class Field(Protocol):
    """One attribute: to a plain value and, checked, back. `decode` raises ValueError with the reason."""

    def encode(self, value: object) -> object: ...

    def decode(self, raw: object) -> object: ...


Layout: TypeAlias = Mapping[str, Field]


@dataclass(frozen=True, slots=True)
class Int:
    """An integer between `low` and `high`, both included and None for no bound; None where `optional`."""

    low: int | None = None
    high: int | None = None
    optional: bool = False

    def encode(self, value: object) -> object:
        return value

    def decode(self, raw: object) -> object:
        if raw is None and self.optional:
            return None
        if not isinstance(raw, int) or isinstance(raw, bool):
            raise ValueError(f"is {type(raw).__name__}, not an integer")
        if (self.low is not None and raw < self.low) or (self.high is not None and raw > self.high):
            raise ValueError(f"is out of range: {raw:#x}")
        return raw


@dataclass(frozen=True, slots=True)
class Flag:
    """True or False."""

    def encode(self, value: object) -> object:
        return value

    def decode(self, raw: object) -> object:
        if not isinstance(raw, bool):
            raise ValueError(f"is {type(raw).__name__}, not true or false")
        return raw


@dataclass(frozen=True, slots=True)
class Hex:
    """A bytearray of `low` to `high` bytes, saved as hexadecimal digits."""

    low: int
    high: int

    def encode(self, value: object) -> object:
        assert isinstance(value, bytearray)
        return value.hex()

    def decode(self, raw: object) -> object:
        if not isinstance(raw, str):
            raise ValueError(f"is {type(raw).__name__}, not hexadecimal digits")
        data = bytearray.fromhex(raw)
        if not self.low <= len(data) <= self.high:
            raise ValueError(f"has {len(data)} bytes")
        return data


BYTE = Int(0, 0xFF)
FLAG = Flag()


def save(owner: object, layout: Layout) -> State:
    """The attributes of `owner` that `layout` names."""
    return {name: field.encode(getattr(owner, name)) for name, field in layout.items()}


def load(owner: object, layout: Layout, device: str, state: object) -> None:
    """Set the attributes of `owner` from what `save` returned: all, or none and StateError naming `device`."""
    entries = section(device, "the whole", state)
    values: dict[str, object] = {}
    for name, field in layout.items():
        if name not in entries:
            raise StateError(device, name, "is missing")
        try:
            values[name] = field.decode(entries[name])
        except ValueError as error:
            raise StateError(device, name, str(error)) from error
    for name, value in values.items():
        setattr(owner, name, value)


def section(device: str, field: str, raw: object) -> Mapping[str, object]:
    """`raw`, found to be a mapping; StateError where it is something else."""
    if not isinstance(raw, Mapping):
        raise StateError(device, field, f"is {type(raw).__name__}, not a mapping")
    return raw
