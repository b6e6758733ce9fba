"""The port bus: dispatch, absent ports, splitting of wide accesses, the log."""

from __future__ import annotations

import pytest

from emu.devices.bus import Bus


class Recorder:
    """A device that notes its accesses and reads as the low byte of its port, in every byte."""

    def __init__(self, ports: range, access_bytes: int = 1) -> None:
        self.ports = (ports,)
        self.access_bytes = access_bytes
        self.seen: list[tuple[int, int, int]] = []

    def read(self, port: int, size: int) -> int:
        return int.from_bytes(bytes([port & 0xFF]) * size, "little")

    def write(self, port: int, size: int, value: int) -> None:
        self.seen.append((port, size, value))


@pytest.mark.parametrize(("size", "ones"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFF_FFFF)])
def test_absent_port_reads_all_ones(size: int, ones: int) -> None:
    """Nothing drives the data lines."""
    assert Bus().read(0xCFC, size) == ones


def test_write_to_an_absent_port_is_lost() -> None:
    """No error: hardware that is not there behaves so."""
    bus = Bus()
    bus.write(0x80, 4, 0x12345678)
    assert bus.read(0x80, 4) == 0xFFFF_FFFF


def test_wide_write_to_byte_registers_is_split_low_byte_first() -> None:
    """As the AT's bus conversion does."""
    bus, device = Bus(), Recorder(range(0x40, 0x43))
    bus.add(device)
    bus.write(0x40, 4, 0x44332211)
    assert device.seen == [(0x40, 1, 0x11), (0x41, 1, 0x22), (0x42, 1, 0x33)]


def test_wide_read_is_put_together_with_ones_where_nothing_is() -> None:
    """The last of four ports is absent."""
    bus = Bus()
    bus.add(Recorder(range(0x40, 0x43)))
    assert bus.read(0x40, 4) == 0xFF424140


def test_wide_read_that_starts_before_a_device_still_reaches_it() -> None:
    """The port that the access starts at does not decide for the others."""
    bus = Bus()
    bus.add(Recorder(range(0x40, 0x43)))
    assert bus.read(0x3F, 2) == 0x40FF


def test_wide_device_gets_the_access_whole() -> None:
    """Up to its own width."""
    bus, device = Bus(), Recorder(range(0xCF8, 0xCFC), access_bytes=4)
    bus.add(device)
    bus.write(0xCF8, 4, 0x80000400)
    assert device.seen == [(0xCF8, 4, 0x80000400)]


def test_access_at_the_last_port_wraps() -> None:
    """Ports are 16 bits wide."""
    bus, device = Bus(), Recorder(range(1))
    bus.add(device)
    bus.write(0xFFFF, 2, 0x2211)
    assert device.seen == [(0, 1, 0x22)]


def test_value_is_cut_to_the_size_of_the_access() -> None:
    """A device never sees more bits than the guest wrote."""
    bus, device = Bus(), Recorder(range(0x40, 0x41))
    bus.add(device)
    bus.write(0x40, 1, 0xABCD)
    assert device.seen == [(0x40, 1, 0xCD)]


def test_two_devices_cannot_share_a_port() -> None:
    """A mistake in the wiring is found when the machine is built."""
    bus = Bus()
    bus.add(Recorder(range(0x40, 0x44)))
    with pytest.raises(ValueError, match="0x43"):
        bus.add(Recorder(range(0x43, 0x44)))


def test_log_sees_each_access_of_the_guest_once() -> None:
    """A split access is one line, with what the guest wrote or read."""
    bus = Bus()
    bus.add(Recorder(range(0x40, 0x43)))
    lines: list[tuple[str, int, int, int]] = []
    bus.log = lambda *entry: lines.append(entry)
    bus.write(0x40, 2, 0x2211)
    bus.read(0x41, 1)
    assert lines == [("out", 0x40, 2, 0x2211), ("in", 0x41, 1, 0x41)]
