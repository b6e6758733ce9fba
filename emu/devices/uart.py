"""The 16550A serial port.

Rules: the line is infinitely fast and knows no time. A character written is out at once (THR and shift register are
always empty), since a baud rate would only make the guest wait; a character sent by the host is in the FIFO as soon as
there is room, since nothing may be lost on a line without flow control. So the silence that makes a receive time-out
follows at once too. Source: National Semiconductor PC16550D datasheet (TL/C/8652).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from emu.devices import state as saved
from emu.devices.state import BYTE, FLAG, Hex, Int, Layout, State

COM1 = 0x3F8
QUEUE_LIMIT = 1 << 20  # bytes of host input that wait for the guest

_RBR_THR, _IER, _IIR_FCR, _LCR, _MCR, _LSR, _MSR, _SCR = range(8)

_IER_RX, _IER_THRE, _IER_LINE, _IER_MODEM = 1, 2, 4, 8
_IIR_NONE, _IIR_MODEM, _IIR_THRE, _IIR_RX, _IIR_LINE, _IIR_TIMEOUT = 0x1, 0x0, 0x2, 0x4, 0x6, 0xC
_IIR_FIFOS = 0xC0
_FCR_ENABLE, _FCR_CLEAR_RX = 1, 2
_LCR_DLAB = 0x80
_MCR_OUT2, _MCR_LOOP = 0x08, 0x10
_LSR_DATA, _LSR_OVERRUN, _LSR_EMPTY = 0x01, 0x02, 0x60

_FIFO_SIZE = 16
_TRIGGER = (1, 4, 8, 14)  # bytes, by bits 7 and 6 of FCR

# What a null-modem cable to a listening terminal shows: carrier, data set ready, clear to send.
_CABLE = 0xB0


def _discard(data: bytes) -> None:
    """Data nobody wants."""


class Uart:
    """One port. `set_irq` drives its interrupt line (through OUT2, as PCs wire it); `on_output` gets what is sent,
    `on_receive` what the host sends, before it has any effect."""

    access_bytes = 1

    _LAYOUT: ClassVar[Layout] = {
        "ier": Int(0, 0x0F),
        "fcr": BYTE,
        "lcr": BYTE,
        "mcr": Int(0, 0x1F),
        "scr": BYTE,
        "dll": BYTE,
        "dlm": BYTE,
        "msr_delta": Int(0, 0x0F),
        "overrun": FLAG,
        "thre": FLAG,
        "line": FLAG,
        "fifo": Hex(0, _FIFO_SIZE),
        "queue": Hex(0, QUEUE_LIMIT),
    }

    def __init__(self, set_irq: Callable[[bool], None], base: int = COM1) -> None:
        self.ports = (range(base, base + 8),)
        self.on_output: Callable[[bytes], None] = _discard
        self.on_receive: Callable[[bytes], None] = _discard
        self._set_irq = set_irq
        self._base = base
        self.queue = bytearray()  # from the host, not yet in the FIFO
        self.fifo = bytearray()
        self.line = False  # what set_irq was last given
        self._clear()

    def _clear(self) -> None:
        self.ier = self.fcr = self.lcr = self.mcr = self.scr = 0
        self.dll, self.dlm = 1, 0
        self.msr_delta = 0
        self.overrun = False
        self.thre = True  # the THR-empty interrupt is pending, enabled or not
        self.fifo.clear()

    def reset(self) -> None:
        """Master reset. What the host has sent and the guest not fetched waits on, as in the host's own buffer."""
        self._clear()
        self._fill()
        self._update()

    def receive(self, data: bytes) -> int:
        """Send `data` to the guest; how many bytes were taken. The rest found no room within QUEUE_LIMIT."""
        self.on_receive(data)
        taken = data[: QUEUE_LIMIT - len(self.queue)]
        self.queue += taken
        self._fill()
        self._update()
        return len(taken)

    def read(self, port: int, size: int) -> int:
        register = port - self._base
        if register == _LSR:
            value = _LSR_EMPTY | bool(self.fifo) * _LSR_DATA
            if self.overrun:
                value |= _LSR_OVERRUN
                self.overrun = False
                self._update()
            return value
        if register == _RBR_THR:
            return self.dll if self.lcr & _LCR_DLAB else self._take()
        if register == _IER:
            return self.dlm if self.lcr & _LCR_DLAB else self.ier
        if register == _IIR_FCR:
            return self._read_iir()
        if register == _MSR:
            value = self._modem_inputs() | self.msr_delta
            self.msr_delta = 0
            self._update()
            return value
        return self.lcr if register == _LCR else self.mcr if register == _MCR else self.scr

    def write(self, port: int, size: int, value: int) -> None:
        register = port - self._base
        if register == _RBR_THR:
            if self.lcr & _LCR_DLAB:
                self.dll = value
            else:
                self._send(value)
        elif register == _IER:
            if self.lcr & _LCR_DLAB:
                self.dlm = value
            else:
                self._write_ier(value & 0x0F)
        elif register == _IIR_FCR:
            self._write_fcr(value)
        elif register == _LCR:
            self.lcr = value
        elif register == _MCR:
            self._write_mcr(value & 0x1F)
        elif register == _SCR:
            self.scr = value
        # LSR and MSR are not for writing.

    def _send(self, value: int) -> None:
        if self.mcr & _MCR_LOOP:
            self._loop_back(value)
        else:
            self.on_output(bytes((value,)))
        if self.ier & _IER_THRE:
            # The write takes the interrupt back and the empty THR asks for it again: an edge for each character.
            self.thre = False
            self._update()
            self.thre = True
            self._update()
        else:
            self.thre = True

    def _loop_back(self, value: int) -> None:
        if len(self.fifo) < self._fifo_size():
            self.fifo.append(value)
        else:
            self.overrun = True
            if not self.fcr & _FCR_ENABLE:
                self.fifo[0] = value  # without FIFOs the later character replaces the earlier
        self._update()

    def _take(self) -> int:
        """RBR. The read ends a receive time-out; a new one, or the next character, is an edge of its own."""
        value = self.fifo.pop(0) if self.fifo else 0
        self._update(timeout=False)
        self._fill()
        self._update()
        return value

    def _fifo_size(self) -> int:
        return _FIFO_SIZE if self.fcr & _FCR_ENABLE else 1

    def _fill(self) -> None:
        """Let waiting host input into the FIFO; a loopback cuts it off from the line."""
        room = self._fifo_size() - len(self.fifo)
        if self.queue and room > 0 and not self.mcr & _MCR_LOOP:
            self.fifo += self.queue[:room]
            del self.queue[:room]

    def _cause(self, timeout: bool) -> int:
        """The identification of the interrupt of highest priority; datasheet, table IV."""
        ier = self.ier
        if ier & _IER_LINE and self.overrun:
            return _IIR_LINE
        if ier & _IER_RX and self.fifo:
            if not self.fcr & _FCR_ENABLE or len(self.fifo) >= _TRIGGER[self.fcr >> 6]:
                return _IIR_RX
            if timeout:
                return _IIR_TIMEOUT
        if ier & _IER_THRE and self.thre:
            return _IIR_THRE
        if ier & _IER_MODEM and self.msr_delta:
            return _IIR_MODEM
        return _IIR_NONE

    def _update(self, timeout: bool = True) -> None:
        """Drive the interrupt line. OUT2 gates it, and its pin is off in loopback."""
        level = self.mcr & (_MCR_OUT2 | _MCR_LOOP) == _MCR_OUT2 and self._cause(timeout) != _IIR_NONE
        if level != self.line:
            self.line = level
            self._set_irq(level)

    def _read_iir(self) -> int:
        cause = self._cause(timeout=True)
        if cause == _IIR_THRE:
            self.thre = False
            self._update()
        return cause | _IIR_FIFOS if self.fcr & _FCR_ENABLE else cause

    def _write_ier(self, value: int) -> None:
        if value & ~self.ier & _IER_THRE:
            self.thre = True  # enabling it with THR empty asks at once
        self.ier = value
        self._update()

    def _write_fcr(self, value: int) -> None:
        if (value ^ self.fcr) & _FCR_ENABLE or value & _FCR_CLEAR_RX:
            self.fifo.clear()
        # The other bits are taken only together with the enable bit.
        self.fcr = value if value & _FCR_ENABLE else 0
        self._update()
        self._fill()
        self._update()

    def _write_mcr(self, value: int) -> None:
        before = self._modem_inputs()
        self.mcr = value
        after = self._modem_inputs()
        changed = (before ^ after) >> 4
        # Ring is noted when it ends, the others at each change.
        self.msr_delta |= changed & 0x0B | changed & before >> 4 & 0x04
        self._fill()
        self._update()

    def _modem_inputs(self) -> int:
        """Bits 7 to 4 of MSR: DCD, RI, DSR, CTS; in loopback OUT2, OUT1, DTR, RTS."""
        mcr = self.mcr
        if not mcr & _MCR_LOOP:
            return _CABLE
        return (mcr & 0x0C) << 4 | (mcr & 0x02) << 3 | (mcr & 0x01) << 5

    def state(self) -> State:
        return saved.save(self, self._LAYOUT)

    def load(self, state: object) -> None:
        saved.load(self, self._LAYOUT, "uart", state)
