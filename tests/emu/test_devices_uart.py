"""The 16550A against its datasheet (National PC16550D), and the probes that Linux's 8250 driver makes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.devices.state import StateError
from emu.devices.uart import QUEUE_LIMIT, Uart

RBR = THR = DLL = 0x3F8
IER = DLM = 0x3F9
IIR = FCR = 0x3FA
LCR, MCR, LSR, MSR, SCR = 0x3FB, 0x3FC, 0x3FD, 0x3FE, 0x3FF

OUT2, LOOP = 0x08, 0x10
RX, THRE, LINE, MODEM = 1, 2, 4, 8


class Bench:
    """A port with what it sent, its interrupt line, and how often that rose."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.line = False
        self.edges = 0
        self.uart = Uart(self._set_irq)
        self.uart.on_output = self.sent.extend

    def _set_irq(self, level: bool) -> None:
        self.edges += level and not self.line
        self.line = level

    def read(self, port: int) -> int:
        return self.uart.read(port, 1)

    def write(self, port: int, value: int) -> None:
        self.uart.write(port, 1, value)


@pytest.fixture
def bench() -> Bench:
    """With interrupts let through to the controller (OUT2)."""
    bench = Bench()
    bench.write(MCR, OUT2)
    return bench


def test_character_written_is_output_at_once(bench: Bench) -> None:
    """And the transmitter is empty again, for the next one."""
    for byte in b"Linux":
        assert bench.read(LSR) & 0x60 == 0x60
        bench.write(THR, byte)
    assert bytes(bench.sent) == b"Linux"


def test_divisor_latch_hides_data_and_interrupt_enable(bench: Bench) -> None:
    """With DLAB set nothing is sent."""
    bench.write(IER, RX)
    bench.write(LCR, 0x83)
    bench.write(DLL, 0x0C)
    bench.write(DLM, 0x01)
    assert (bench.read(DLL), bench.read(DLM), bytes(bench.sent)) == (0x0C, 0x01, b"")
    bench.write(LCR, 0x03)
    assert bench.read(IER) == RX


def test_received_bytes_are_read_in_order(bench: Bench) -> None:
    """More than a FIFO holds: the rest follows as room comes."""
    text = bytes(range(100))
    bench.write(FCR, 0x01)
    bench.uart.receive(text)
    got = bytearray()
    while bench.read(LSR) & 1:
        got.append(bench.read(RBR))
    assert bytes(got) == text


def test_receive_takes_no_more_than_the_limit(bench: Bench) -> None:
    """A host that floods learns how much was taken; memory stays bounded."""
    flood = bytes(QUEUE_LIMIT + 100)
    assert bench.uart.receive(flood) == QUEUE_LIMIT
    assert bench.uart.receive(flood) == 1  # room made by the byte in the receiver


def test_receive_interrupt_without_fifo_comes_for_each_byte(bench: Bench) -> None:
    """Reading the byte lowers the line, the next byte raises it."""
    bench.write(IER, RX)
    bench.uart.receive(b"ab")
    assert bench.read(IIR) == 0x04
    assert (bench.read(RBR), bench.edges) == (ord("a"), 2)
    assert (bench.read(RBR), bench.edges, bench.line) == (ord("b"), 2, False)


@pytest.mark.parametrize(("bits", "level"), [(0x00, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
def test_fifo_trigger_level_tells_data_from_time_out(bench: Bench, bits: int, level: int) -> None:
    """At the level it is received data; one less is the end of a line gone silent."""
    bench.write(FCR, 0x01 | bits)
    bench.write(IER, RX)
    bench.uart.receive(bytes(level))
    assert bench.read(IIR) == 0xC4
    bench.read(RBR)
    assert bench.read(IIR) == (0xCC if level > 1 else 0xC1)


def test_time_out_comes_again_for_what_is_left(bench: Bench) -> None:
    """A handler that takes one byte per interrupt gets an edge for each."""
    bench.write(FCR, 0xC1)
    bench.write(IER, RX)
    bench.uart.receive(b"abc")
    edges = []
    for _ in range(3):
        bench.read(RBR)
        edges.append(bench.edges)
    assert edges == [2, 3, 3]


def test_thre_interrupt_comes_when_it_is_enabled(bench: Bench) -> None:
    """The transmitter is empty: Linux starts sending with this."""
    bench.write(IER, THRE)
    assert (bench.line, bench.read(IIR)) == (True, 0x02)


def test_reading_iir_ends_the_thre_interrupt(bench: Bench) -> None:
    """It is gone until the next character, though THR is still empty."""
    bench.write(IER, THRE)
    bench.read(IIR)
    assert (bench.line, bench.read(IIR)) == (False, 0x01)


def test_thre_interrupt_is_an_edge_for_each_character(bench: Bench) -> None:
    """Even where the handler did not read IIR in between."""
    bench.write(IER, THRE)
    for byte in b"abc":
        bench.write(THR, byte)
    assert bench.edges == 4


def test_linux_thre_test_sees_it_asserted_twice(bench: Bench) -> None:
    """drivers/tty/serial/8250/8250_port.c, serial8250_do_startup: otherwise it falls back to a polling timer."""
    seen = []
    for _ in range(2):
        bench.write(IER, THRE)
        seen.append(bench.read(IIR))
        bench.write(IER, 0)
    assert seen == [0x02, 0x02]


def test_interrupt_reaches_the_controller_only_through_out2(bench: Bench) -> None:
    """How PCs wire it."""
    bench.write(MCR, 0)
    bench.write(IER, THRE)
    assert not bench.line
    bench.write(MCR, OUT2)
    assert bench.line


def test_causes_are_named_by_priority(bench: Bench) -> None:
    """Line status, received data, THR empty, modem status; each ended by its own access."""
    bench.write(MCR, LOOP)
    bench.write(IER, 0x0F)
    bench.write(THR, ord("a"))
    bench.write(THR, ord("b"))  # overrun
    causes = []
    for register in (LSR, RBR, None, MSR):
        causes.append(bench.read(IIR))
        if register is not None:
            bench.read(register)
    assert [*causes, bench.read(IIR)] == [0x06, 0x04, 0x02, 0x00, 0x01]


def test_loopback_returns_what_is_sent(bench: Bench) -> None:
    """Nothing gets out, and what the host sends waits."""
    bench.write(MCR, LOOP)
    bench.uart.receive(b"host")
    bench.write(THR, ord("x"))
    assert (bench.read(RBR), bench.read(LSR) & 1, bytes(bench.sent)) == (ord("x"), 0, b"")
    bench.write(MCR, 0)
    assert bench.read(RBR) == ord("h")


@pytest.mark.parametrize(("outputs", "inputs"), [(0x1, 0x20), (0x2, 0x10), (0x4, 0x40), (0x8, 0x80), (0xA, 0x90)])
def test_loopback_connects_modem_outputs_to_inputs(bench: Bench, outputs: int, inputs: int) -> None:
    """DTR to DSR, RTS to CTS, OUT1 to RI, OUT2 to DCD; the last is Linux's test for a UART."""
    bench.write(MCR, LOOP | outputs)
    assert bench.read(MSR) & 0xF0 == inputs


def test_modem_change_is_noted_until_msr_is_read(bench: Bench) -> None:
    """Into loopback: DCD, DSR and CTS fall. RI is noted when it ends."""
    bench.write(MCR, LOOP)
    assert bench.read(MSR) == 0x0B
    assert bench.read(MSR) == 0x00
    bench.write(MCR, LOOP | 0x04)
    assert bench.read(MSR) == 0x40
    bench.write(MCR, LOOP)
    assert bench.read(MSR) == 0x04


def test_line_shows_a_ready_terminal(bench: Bench) -> None:
    """Carrier, data set ready, clear to send: getty does not wait."""
    assert bench.read(MSR) == 0xB0


def test_fifo_enable_shows_in_iir(bench: Bench) -> None:
    """Bits 7 and 6: how drivers find a 16550A."""
    bench.write(FCR, 0x01)
    assert bench.read(IIR) >> 6 == 3
    bench.write(FCR, 0x00)
    assert bench.read(IIR) >> 6 == 0


def test_clearing_the_fifo_drops_what_has_arrived(bench: Bench) -> None:
    """FCR bit 1; what had not yet arrived comes after it."""
    bench.write(FCR, 0x01)
    bench.uart.receive(b"0123456789abcdefX")
    bench.write(FCR, 0x03)
    assert (bench.read(RBR), bench.read(LSR) & 1) == (ord("X"), 0)


def test_overrun_in_loopback_is_reported_once(bench: Bench) -> None:
    """LSR bit 1 goes with the read."""
    bench.write(MCR, LOOP)
    bench.write(THR, ord("a"))
    bench.write(THR, ord("b"))
    assert (bench.read(LSR) & 2, bench.read(LSR) & 2, bench.read(RBR)) == (2, 0, ord("b"))


@pytest.mark.parametrize(("port", "kept"), [(IER, 0x0F), (LCR, 0xFF), (MCR, 0x1F), (SCR, 0xFF)])
def test_registers_keep_the_bits_they_have(bench: Bench, port: int, kept: int) -> None:
    """The others read 0: that is how drivers tell later chips."""
    bench.write(port, 0xFF)
    assert bench.read(port) == kept


def test_reset_lowers_the_line_and_keeps_host_input(bench: Bench) -> None:
    """What the host has sent beyond the FIFO is still to come."""
    bench.write(IER, RX)
    bench.uart.receive(b"ab")
    bench.uart.reset()
    assert (bench.line, bench.read(IER), bench.read(RBR)) == (False, 0, ord("b"))


def test_damaged_state_is_refused(bench: Bench) -> None:
    """Hexadecimal digits that are none."""
    with pytest.raises(StateError, match="uart: fifo"):
        bench.uart.load({**bench.uart.state(), "fifo": "zz"})


OPERATIONS = st.one_of(
    st.tuples(st.integers(RBR, SCR), st.integers(0, 255)),
    st.tuples(st.integers(RBR, SCR), st.none()),
    st.tuples(st.just("receive"), st.binary(max_size=40)),
)


def apply(bench: Bench, operations: list) -> list:
    seen = []
    for port, value in operations:
        if port == "receive":
            bench.uart.receive(value)
        elif value is None:
            seen.append(bench.read(port))
        else:
            bench.write(port, value)
        seen.append((bench.line, bench.edges, len(bench.sent)))
    return seen


@given(st.lists(OPERATIONS), st.lists(OPERATIONS))
def test_restored_port_behaves_as_the_one_that_never_stopped(first: list, then: list) -> None:
    """Any history, then saved through JSON, then any future: the same reads, output and interrupts."""
    bench, other = Bench(), Bench()
    apply(bench, first)
    other.uart.load(json.loads(json.dumps(bench.uart.state())))
    other.line, other.edges, other.sent[:] = bench.line, bench.edges, bench.sent
    assert apply(bench, then) == apply(other, then)
