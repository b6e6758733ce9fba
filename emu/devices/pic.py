"""The PC's interrupt controllers: two 8259A, the slave's INT on the master's IR2, with the chipset's ELCR.

Rules: devices drive lines with `set_irq`; the machine asks `pending` before each instruction batch and `acknowledge`s
when it delivers. Source: Intel 8259A datasheet (order 231468), ELCR as in the 82371AB (PIIX4) datasheet, section 4.2.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from emu.devices import state as saved
from emu.devices.state import BYTE, FLAG, Int, Layout, State

MASTER = 0x20
SLAVE = 0xA0
ELCR = 0x4D0

CASCADE = 2  # the master's input that the slave's INT drives
SPURIOUS = 7  # the input a chip names when the request is gone by the time of INTA

# Lines that no PC can make level-triggered: timer, keyboard, cascade; clock, coprocessor (82371AB, ELCR1 and ELCR2).
_ELCR_MASK = (0xF8, 0xDE)

# Vectors that firmware sets before any operating system: 0x08 and 0x70. Nothing is unmasked until a guest does.
_FIRMWARE_VECTORS = (0x08, 0x70)


def _nothing() -> None:
    """The hook of a controller nobody listens to."""


class _Chip:
    """One 8259A. Inputs, registers and masks are bytes, bit n for IRn."""

    _LAYOUT: ClassVar[Layout] = {
        "lines": BYTE,
        "irr": BYTE,
        "isr": BYTE,
        "imr": BYTE,
        "elcr": BYTE,
        "vector": Int(0, 0xF8),
        "lowest": Int(0, 7),
        "expect": Int(0, 4),
        "icw1": BYTE,
        "special_mask": FLAG,
        "special_nested": FLAG,
        "auto_eoi": FLAG,
        "auto_rotate": FLAG,
        "read_isr": FLAG,
        "poll": FLAG,
    }

    def __init__(self, vector: int, cascade: int) -> None:
        self._firmware_vector = vector
        self._cascade = cascade  # mask of inputs that come from another 8259A
        self.reset()

    def describe(self) -> str:
        """The registers by the datasheet's names, the lines and the modes."""
        modes = ("auto_eoi", "auto_rotate", "special_mask", "special_nested", "poll")
        on = "".join(", " + mode.replace("_", " ") for mode in modes if getattr(self, mode))
        return (
            f"IRR {self.irr:02x}, ISR {self.isr:02x}, IMR {self.imr:02x}, inputs {self.lines:02x}, level-triggered "
            f"{self.elcr:02x}; vectors {self.vector:#x} to {self.vector + 7:#x}, IR{self.lowest} last{on}"
        )

    def reset(self) -> None:
        self.lines = 0  # input levels
        self.elcr = 0  # which inputs are level-triggered
        self.vector = self._firmware_vector
        self.expect = 0  # the ICW that the next write to the data port is, 0 for OCW1
        self.icw1 = 0
        self._initialise()
        self.imr = 0xFF

    def _initialise(self) -> None:
        """What ICW1 does: edge latches, mask, priorities and modes as the datasheet lists them under ICW1."""
        self.irr = self.lines & self.elcr
        self.isr = 0
        self.imr = 0
        self.lowest = 7  # the input of lowest priority; the one after it has the highest
        self.special_mask = False
        self.special_nested = False
        self.auto_eoi = False
        self.auto_rotate = False
        self.read_isr = False
        self.poll = False

    def set_line(self, line: int, level: bool) -> None:
        bit = 1 << line
        if not level:
            # A request must stay up until INTA; one that falls before is gone, whatever the trigger mode.
            self.lines &= ~bit
            self.irr &= ~bit
        else:
            if not self.lines & bit or self.elcr & bit:
                self.irr |= bit
            self.lines |= bit

    def set_elcr(self, value: int) -> None:
        self.elcr = value
        self.irr |= self.lines & value

    def _first(self, mask: int) -> int:
        """The position by priority (0 the highest) of the first input in `mask`, which is not empty."""
        shift = (self.lowest + 1) & 7
        rotated = (mask >> shift | mask << 8 - shift) & 0xFF
        return (rotated & -rotated).bit_length() - 1

    def request(self) -> int | None:
        """The input that INT stands for now: unmasked, and above all in service."""
        requests = self.irr & ~self.imr
        if not requests:
            return None
        in_service = self.isr
        if self.special_mask:
            in_service &= ~self.imr
        if self.special_nested:
            in_service &= ~self._cascade  # the slave has looked at its own priorities already
        position = self._first(requests)
        if in_service and self._first(in_service) <= position:
            return None
        return (position + self.lowest + 1) & 7

    def take(self, line: int) -> None:
        """INTA for `line`."""
        bit = 1 << line
        self.irr = self.irr & ~bit | self.lines & self.elcr
        if not self.auto_eoi:
            self.isr |= bit
        elif self.auto_rotate:
            self.lowest = line

    def read(self, data: bool) -> int:
        if data:
            return self.imr
        return self.isr if self.read_isr else self.irr

    def read_poll(self) -> int:
        """The read after a poll command, at either port: an INTA that answers with bit 7 and the input, or 0."""
        self.poll = False
        line = self.request()
        if line is None:
            return 0
        self.take(line)
        return 0x80 | line

    def write_command(self, value: int) -> None:
        if value & 0x10:
            self.icw1 = value
            self._initialise()
            self.expect = 2
        elif value & 0x08:
            self._write_ocw3(value)
        else:
            self._write_ocw2(value >> 5, value & 7)

    def write_data(self, value: int) -> None:
        expect = self.expect
        if not expect:
            self.imr = value
            return
        if expect == 2:
            self.vector = value & 0xF8
        elif expect == 4:
            self.auto_eoi = bool(value & 0x02)
            self.special_nested = bool(value & 0x10)
        # ICW3 says where the cascade is; on a PC that is soldered.
        single, with_icw4 = self.icw1 & 0x02, self.icw1 & 0x01
        if expect == 2 and not single:
            self.expect = 3
        else:
            self.expect = 4 if expect < 4 and with_icw4 else 0

    def _write_ocw2(self, command: int, line: int) -> None:
        """`command` is R, SL, EOI; datasheet, figure 8."""
        rotate, specific, end = command & 4, command & 2, command & 1
        if not end:
            if specific and rotate:
                self.lowest = line
            elif not specific:
                self.auto_rotate = bool(rotate)
            return
        if not specific:
            served = self.isr & ~self.imr if self.special_mask else self.isr
            if not served:
                return
            line = (self._first(served) + self.lowest + 1) & 7
        self.isr &= ~(1 << line)
        if rotate:
            self.lowest = line

    def _write_ocw3(self, value: int) -> None:
        if value & 0x40:
            self.special_mask = bool(value & 0x20)
        if value & 0x04:
            self.poll = True
        elif value & 0x02:
            self.read_isr = bool(value & 0x01)

    def state(self) -> State:
        return saved.save(self, self._LAYOUT)

    def load(self, name: str, state: object) -> None:
        saved.load(self, self._LAYOUT, name, state)


class Pic:
    """Both chips as one controller of 16 lines. `on_raise` is called each time `pending()` turns true."""

    ports = (range(MASTER, MASTER + 2), range(SLAVE, SLAVE + 2), range(ELCR, ELCR + 2))
    access_bytes = 1

    def __init__(self) -> None:
        self.on_raise: Callable[[], None] = _nothing
        self._master = _Chip(_FIRMWARE_VECTORS[0], 1 << CASCADE)
        self._slave = _Chip(_FIRMWARE_VECTORS[1], 0)
        self._pending = False

    def reset(self) -> None:
        """Everything masked; lines are taken for low until a device drives them."""
        self._master.reset()
        self._slave.reset()
        self._update()

    def set_irq(self, line: int, level: bool) -> None:
        """Drive IRQ `line`, 0 to 15. IRQ 2 is the cascade; what was wired to it on the XT is IRQ 9."""
        if line >= 8:
            self._slave.set_line(line - 8, level)
        elif line == CASCADE:
            self._slave.set_line(1, level)
        else:
            self._master.set_line(line, level)
        self._update()

    def lines(self) -> list[str]:
        """One line a chip, for people: registers in hex, bit n for input n, and the modes that are on."""
        return [f"pic {name}: {chip.describe()}" for name, chip in (("master", self._master), ("slave", self._slave))]

    def pending(self) -> bool:
        """Whether INTR is raised: some interrupt is to be delivered as soon as the processor takes one."""
        return self._pending

    def acknowledge(self) -> int:
        """INTA: the vector to deliver. Without a request it is that of IR7 (spurious), with nothing in service."""
        line = self._master.request()
        if line is None:
            return self._master.vector + SPURIOUS
        self._master.take(line)
        vector = self._master.vector + line
        if line == CASCADE:
            vector = self._acknowledge_slave()
        self._update()
        return vector

    def _acknowledge_slave(self) -> int:
        line = self._slave.request()
        # INT falls with INTA, so that a request which is still above those in service makes a new edge.
        self._master.set_line(CASCADE, False)
        if line is None:
            return self._slave.vector + SPURIOUS
        self._slave.take(line)
        return self._slave.vector + line

    def read(self, port: int, size: int) -> int:
        if port >= ELCR:
            return (self._slave if port & 1 else self._master).elcr
        chip = self._slave if port >= SLAVE else self._master
        if not chip.poll:
            return chip.read(data=bool(port & 1))
        value = chip.read_poll()
        self._update()
        return value

    def write(self, port: int, size: int, value: int) -> None:
        if port >= ELCR:
            (self._slave if port & 1 else self._master).set_elcr(value & _ELCR_MASK[port & 1])
        else:
            chip = self._slave if port >= SLAVE else self._master
            if port & 1:
                chip.write_data(value)
            else:
                chip.write_command(value)
        self._update()

    def _update(self) -> None:
        self._master.set_line(CASCADE, self._slave.request() is not None)
        pending = self._master.request() is not None
        rose = pending and not self._pending
        self._pending = pending
        if rose:
            self.on_raise()

    def state(self) -> State:
        return {"master": self._master.state(), "slave": self._slave.state()}

    def load(self, state: object) -> None:
        chips = saved.section("pic", "the whole", state)
        self._master.load("pic master", chips.get("master"))
        self._slave.load("pic slave", chips.get("slave"))
        self._update()
