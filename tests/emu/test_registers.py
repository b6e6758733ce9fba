"""Registers by GDB's names on the real engine: every name is read, and what is written is read back."""

from __future__ import annotations

import pytest

from emu import GuestMachine, boot_embedded

ONE = 0x3FFF8000000000000000  # 1.0 in the x87's 80 bits


@pytest.fixture(params=[32, 64])
def machine(request: pytest.FixtureRequest) -> GuestMachine:
    return boot_embedded(request.param, "loop")


def test_every_register_of_the_description_is_read(machine: GuestMachine):
    """A `g` packet asks for all of them at once."""
    registers = machine.registers
    values = dict(zip(registers.arch.names, registers.read_many(registers.arch.names), strict=True))
    sizes = {register.name: register.size for register in registers.arch.registers}
    assert [name for name, value in values.items() if not 0 <= value < 1 << 8 * sizes[name]] == []


@pytest.mark.parametrize("top", [0, 3, 7])
def test_st_registers_are_counted_from_the_top_of_the_stack(machine: GuestMachine, top: int):
    """st(i) is another place for each TOP, and keeps all 80 bits."""
    registers = machine.registers
    registers.write("fstat", top << 11)
    registers.write("st1", ONE)
    registers.write("st7", ONE + 7)
    assert (registers.read("st1"), registers.read("st7")) == (ONE, ONE + 7)
    registers.write("fstat", (top + 1) % 8 << 11)
    assert (registers.read("st0"), registers.read("st6")) == (ONE, ONE + 7)


@pytest.mark.parametrize(
    ("name", "value"), [("fctrl", 0x37F), ("xmm3", 1 << 127 | 5), ("mxcsr", 0x1F80), ("fop", 0x123), ("fioff", 0x1234)]
)
def test_x87_and_sse_registers_keep_what_is_written(machine: GuestMachine, name: str, value: int):
    """And a run in between does not change them: the guest uses none."""
    machine.registers.write(name, value)
    machine.run(budget=1000)
    assert machine.registers.read(name) == value
