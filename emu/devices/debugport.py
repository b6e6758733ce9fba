"""Port 0xe9: what a guest writes there is output for a person, without a driver (Bochs, QEMU's isa-debugcon).

Rules: has no state. Reads give 0xe9, by which a guest knows that the port is there.
"""

from __future__ import annotations

from collections.abc import Callable

from emu.devices.state import State, section

PORT = 0xE9


def _discard(data: bytes) -> None:
    """Output nobody wants."""


class DebugPort:
    """`on_output` gets each byte written."""

    ports = (range(PORT, PORT + 1),)
    access_bytes = 1

    def __init__(self) -> None:
        self.on_output: Callable[[bytes], None] = _discard

    def reset(self) -> None:
        """Nothing to reset."""

    def read(self, port: int, size: int) -> int:
        return PORT

    def write(self, port: int, size: int, value: int) -> None:
        self.on_output(bytes((value,)))

    def state(self) -> State:
        return {}

    def load(self, state: object) -> None:
        section("debug port", "the whole", state)
