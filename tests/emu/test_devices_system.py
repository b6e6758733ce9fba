"""Reset, power-off, exit status and the debug port."""

from __future__ import annotations

import pytest

from emu.devices.bus import Bus
from emu.devices.debugport import DebugPort
from emu.devices.state import StateError
from emu.devices.system import System


class Bench:
    """The ports on a bus, and the calls they made."""

    def __init__(self) -> None:
        self.bus = Bus()
        self.calls: list[str | int] = []
        self.system = System()
        self.system.on_reset = lambda: self.calls.append("reset")
        self.system.on_power_off = lambda: self.calls.append("power off")
        self.system.on_exit = self.calls.append
        self.bus.add(self.system)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(
    ("port", "size", "value", "call"),
    [
        (0x64, 1, 0xFE, "reset"),
        (0x92, 1, 0x03, "reset"),
        (0xCF9, 1, 0x06, "reset"),
        (0xCF9, 1, 0x0E, "reset"),
        (0x604, 2, 0x2000, "power off"),
        (0x604, 2, 0x3400, "power off"),
        (0x605, 1, 0x20, "power off"),
        (0x501, 1, 0, 0),
        (0x501, 4, 0x2A, 0x2A),
    ],
)
def test_request(bench: Bench, port: int, size: int, value: int, call: str | int) -> None:
    """One write, one call."""
    bench.bus.write(port, size, value)
    assert bench.calls == [call]


@pytest.mark.parametrize(
    ("port", "size", "value"),
    [
        (0x64, 1, 0xD1),
        (0x92, 1, 0x02),
        (0xCF9, 1, 0x02),
        (0xCF8, 4, 0x80000600),
        (0x604, 2, 0x1C00),
        (0x604, 1, 0x20),
        (0x8900, 1, ord("S")),
    ],
)
def test_no_request(bench: Bench, port: int, size: int, value: int) -> None:
    """Keyboard commands, A20, the kind of reset, a PCI address over 0xcf9, a sleep type without its enable."""
    bench.bus.write(port, size, value)
    assert bench.calls == []


@pytest.mark.parametrize("text", ["Shutdown", "ShutShutdown", "SShutdown", "xShutdown"])
def test_shutdown_spelled_out_powers_off_once(bench: Bench, text: str) -> None:
    """Whatever stood before it."""
    for letter in text.encode():
        bench.bus.write(0x8900, 1, letter)
    assert bench.calls == ["power off"]


@pytest.mark.parametrize(
    ("port", "size", "value"),
    [(0x64, 1, 0xFF), (0x92, 1, 0x02), (0xCF8, 4, 0xFFFF_FFFF), (0xCF9, 1, 0x00), (0x604, 2, 0xFFFF), (0x501, 1, 0xFF)],
)
def test_reads(bench: Bench, port: int, size: int, value: int) -> None:
    """A20 is open, reset control reads back, all else is absent."""
    assert bench.bus.read(port, size) == value


def test_reset_control_keeps_the_kind_and_not_the_trigger(bench: Bench) -> None:
    """Linux reads it, adds its code and writes it back."""
    bench.bus.write(0xCF9, 1, 0x0E)
    assert bench.bus.read(0xCF9, 1) == 0x0A


def test_half_spelled_shutdown_survives_a_snapshot(bench: Bench) -> None:
    """The restored machine needs only the rest of the word."""
    for letter in b"Shut":
        bench.bus.write(0x8900, 1, letter)
    other = Bench()
    other.system.load(bench.system.state())
    for letter in b"down":
        other.bus.write(0x8900, 1, letter)
    assert other.calls == ["power off"]


def test_damaged_state_is_refused(bench: Bench) -> None:
    """More letters than the word has."""
    with pytest.raises(StateError, match="system: spelled"):
        bench.system.load({"control": 0, "spelled": 8})


def test_debug_port_outputs_bytes_and_reads_its_number() -> None:
    """A wide write gives only the byte that is the port's."""
    bus, port, sent = Bus(), DebugPort(), bytearray()
    port.on_output = sent.extend
    bus.add(port)
    bus.write(0xE9, 1, ord("h"))
    bus.write(0xE9, 2, ord("i"))
    assert (bytes(sent), bus.read(0xE9, 1)) == (b"hi", 0xE9)
