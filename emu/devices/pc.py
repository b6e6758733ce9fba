"""The PC's devices, wired together: the one place that knows which interrupt line is whose.

Rules: composition only. Callbacks (`pic.on_raise`, `uart.on_output`, `system.on_reset` ...) are for the machine to set
and are no part of the state.
"""

from __future__ import annotations

from collections.abc import Callable

from emu.clock import Clock
from emu.devices.bus import Bus, Device
from emu.devices.cmos import EPOCH_S, Cmos
from emu.devices.debugport import DebugPort
from emu.devices.pic import Pic
from emu.devices.pit import Pit, SpeakerPort
from emu.devices.state import State, StateError, section
from emu.devices.system import System
from emu.devices.uart import Uart

IRQ_TIMER = 0
IRQ_COM1 = 4


class Devices:
    """All devices on one bus, in power-on state. `memory_bytes` and `epoch_s` are for the CMOS: see `cmos.Cmos`."""

    def __init__(self, clock: Clock, memory_bytes: int, epoch_s: int = EPOCH_S) -> None:
        self.bus = Bus()
        self.pic = Pic()
        self.pit = Pit(clock, self._line(IRQ_TIMER))
        self.speaker = SpeakerPort(clock, self.pit)
        self.uart = Uart(self._line(IRQ_COM1))
        self.cmos = Cmos(clock, memory_bytes, epoch_s)
        self.system = System()
        self.debug = DebugPort()
        self._devices: dict[str, Device] = {
            "pic": self.pic,
            "pit": self.pit,
            "speaker": self.speaker,
            "uart": self.uart,
            "cmos": self.cmos,
            "system": self.system,
            "debug": self.debug,
        }
        for device in self._devices.values():
            self.bus.add(device)

    def _line(self, irq: int) -> Callable[[bool], None]:
        set_irq = self.pic.set_irq
        return lambda level: set_irq(irq, level)

    def reset(self) -> None:
        """As the reset button does: time, CMOS memory and waiting host input stay."""
        for device in self._devices.values():
            device.reset()

    def state(self) -> State:
        """Plain values that JSON can hold; the clock's own state is not in it."""
        return {name: device.state() for name, device in self._devices.items()}

    def load(self, state: object) -> None:
        """Take over what `state` returned, timers included, at the clock's time then: load the clock as well.

        StateError where something does not fit; then all devices are as they were.
        """
        entries = section("devices", "the whole", state)
        before = self.state()
        try:
            self._load(entries.get)
        except StateError:
            self._load(before.get)
            raise

    def _load(self, entry: Callable[[str], object]) -> None:
        for name, device in self._devices.items():
            device.load(entry(name))
