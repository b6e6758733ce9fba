"""Ports by which a guest resets the machine, switches it off, or ends the run with a status.

Rules: nothing happens here but a call; the machine turns it into a stop. What is written to and by whom:

    0x64    keyboard controller, command 0xfe: reset. There is no such controller otherwise: reads are 0xff
    0x92    bit 0: fast reset; bit 1: A20, always open
    0xcf8   dword: the PCI configuration address. There is no PCI: lost, reads are all ones
    0xcf9   reset control (82371AB, RC): bit 2 resets
    0x604   word, bit 13 (SLP_EN): power off, as QEMU's ACPI PM1a control
    0x8900  the letters "Shutdown": power off, as in Bochs
    0x501   the exit status of the run, as QEMU's isa-debug-exit but unchanged: 0 is success
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from emu.devices import state as saved
from emu.devices.state import BYTE, Int, Layout, State

KEYBOARD = 0x64
FAST_RESET = 0x92
PCI_ADDRESS = 0xCF8
RESET_CONTROL = 0xCF9
PM1A_CONTROL = 0x604
SHUTDOWN = 0x8900
EXIT = 0x501

_PULSE_RESET = 0xFE
_A20 = 0x02
_RESET_CPU = 0x04
_SLEEP_ENABLE = 0x2000
_SHUTDOWN_WORD = b"Shutdown"


def _nothing() -> None:
    """A request that nobody listens to."""


def _ignore(status: int) -> None:
    """A status that nobody listens to."""


class System:
    """The three requests as callbacks, called from within the guest's OUT; the status of `on_exit` is 0 to 255."""

    ports = (
        range(KEYBOARD, KEYBOARD + 1),
        range(FAST_RESET, FAST_RESET + 1),
        range(PCI_ADDRESS, PCI_ADDRESS + 4),
        range(PM1A_CONTROL, PM1A_CONTROL + 2),
        range(SHUTDOWN, SHUTDOWN + 1),
        range(EXIT, EXIT + 1),
    )
    # Whole accesses, because 0xcf8 as a dword and 0xcf9 as a byte are two things.
    access_bytes = 4

    _LAYOUT: ClassVar[Layout] = {"control": BYTE, "spelled": Int(0, len(_SHUTDOWN_WORD) - 1)}

    def __init__(self) -> None:
        self.on_reset: Callable[[], None] = _nothing
        self.on_power_off: Callable[[], None] = _nothing
        self.on_exit: Callable[[int], None] = _ignore
        self.reset()

    def reset(self) -> None:
        self.control = 0  # of 0xcf9
        self.spelled = 0  # letters of "Shutdown" written so far

    def read(self, port: int, size: int) -> int:
        absent = (1 << 8 * size) - 1
        if port == FAST_RESET:
            return absent & ~0xFF | _A20
        if port == RESET_CONTROL:
            return absent & ~0xFF | self.control
        return absent

    def write(self, port: int, size: int, value: int) -> None:
        byte = value & 0xFF
        if port == KEYBOARD:
            if byte == _PULSE_RESET:
                self.on_reset()
        elif port == FAST_RESET:
            if byte & 1:
                self.on_reset()
        elif port == RESET_CONTROL:
            # RC holds the kind of reset; the bit that starts it does not stay.
            self.control = byte & ~_RESET_CPU
            if byte & _RESET_CPU:
                self.on_reset()
        elif port in (PM1A_CONTROL, PM1A_CONTROL + 1):
            if value << 8 * (port - PM1A_CONTROL) & _SLEEP_ENABLE:
                self.on_power_off()
        elif port == SHUTDOWN:
            self._spell(byte)
        elif port == EXIT:
            self.on_exit(byte)

    def _spell(self, byte: int) -> None:
        if byte != _SHUTDOWN_WORD[self.spelled]:
            self.spelled = 0
        if byte == _SHUTDOWN_WORD[self.spelled]:
            self.spelled += 1
        if self.spelled == len(_SHUTDOWN_WORD):
            self.spelled = 0
            self.on_power_off()

    def state(self) -> State:
        return saved.save(self, self._LAYOUT)

    def load(self, state: object) -> None:
        saved.load(self, self._LAYOUT, "system", state)
