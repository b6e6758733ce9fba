"""The I/O port bus: which device answers at a port.

Rules: knows no device by name. The engine's IN and OUT hooks call `read` and `write`, tens of thousands of times in a
boot: one dictionary look-up each. Where no device is, there is nothing: reads float high, writes are lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeAlias

from emu.devices.state import State

PORTS = 0x10000

IoLog: TypeAlias = Callable[[Literal["in", "out"], int, int, int], None]

_MASK = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF}


class PortDevice(Protocol):
    """What the bus needs of a device; `size` is 1, 2 or 4 bytes and never above `access_bytes`."""

    @property
    def ports(self) -> Sequence[range]: ...

    @property
    def access_bytes(self) -> int:
        """The widest access it takes in one piece: 1 for a chip of byte-wide registers."""
        ...

    def read(self, port: int, size: int) -> int:
        """An unsigned integer of `size` bytes."""
        ...

    def write(self, port: int, size: int, value: int) -> None: ...


class Device(PortDevice, Protocol):
    """What `pc.Devices` needs on top: power-on state, and its state as plain values that JSON can hold."""

    def reset(self) -> None: ...

    def state(self) -> State: ...

    def load(self, state: object) -> None:
        """Take over what `state` returned, so that all that follows is the same; StateError where it does not fit."""
        ...


class Bus:
    """Dispatch by port. `log`, where set, sees each access of the guest whole: direction, port, size, value."""

    def __init__(self) -> None:
        self.log: IoLog | None = None
        self._devices: dict[int, PortDevice] = {}

    def add(self, device: PortDevice) -> None:
        """Put `device` at all its ports; ValueError where one is taken."""
        for ports in device.ports:
            for port in ports:
                if port in self._devices:
                    raise ValueError(f"port {port:#x} is taken")
                self._devices[port] = device

    def read(self, port: int, size: int) -> int:
        """What IN gets: an unsigned integer of `size` (1, 2 or 4) bytes, all ones where nothing answers."""
        device = self._devices.get(port)
        if device is not None and size <= device.access_bytes:
            value = device.read(port, size)
        elif size == 1:
            value = 0xFF
        else:
            value = self._read_bytes(port, size)
        if self.log is not None:
            self.log("in", port, size, value)
        return value

    def write(self, port: int, size: int, value: int) -> None:
        """OUT of `size` (1, 2 or 4) bytes; bits of `value` above them are ignored."""
        value &= _MASK[size]
        if self.log is not None:
            self.log("out", port, size, value)
        device = self._devices.get(port)
        if device is not None and size <= device.access_bytes:
            device.write(port, size, value)
        elif size > 1:
            self._write_bytes(port, size, value)

    # A wide access to a chip with an 8-bit data bus becomes byte accesses to successive ports, lowest first, as the
    # AT's data-bus conversion and every ISA bridge since have done it.

    def _read_bytes(self, port: int, size: int) -> int:
        value = 0
        for index in range(size):
            at = (port + index) % PORTS
            device = self._devices.get(at)
            value |= (0xFF if device is None else device.read(at, 1)) << 8 * index
        return value

    def _write_bytes(self, port: int, size: int, value: int) -> None:
        for index in range(size):
            at = (port + index) % PORTS
            device = self._devices.get(at)
            if device is not None:
                device.write(at, 1, value >> 8 * index & 0xFF)
