"""Registers by GDB's names on the real engine: every name is read, and what is written is read back."""

from __future__ import annotations

import pytest

from emu import GuestMachine, boot_embedded
from emu.arch import I386, I8086, X86_64
from emu.iface import MachineError
from emu.stops import Halted
from tests.support.tiny import CODE, DATA, IDT, TABLES, Tiny

ONE = 0x3FFF8000000000000000  # 1.0 in the x87's 80 bits


@pytest.fixture(params=[32, 64])
def machine(request: pytest.FixtureRequest) -> GuestMachine:
    return boot_embedded(request.param, "loop")


@pytest.mark.parametrize("bits", [32, 64])
def test_every_register_of_the_description_is_read(bits: int):
    """A `g` packet asks for all of them at once. Each fits its place, also when x87 instructions have run: the engine
    has 64 bits of where the last one was."""
    machine = boot_embedded(bits, "calls=50 loop")
    machine.run(budget=100_000)
    registers = machine.registers
    values = dict(zip(registers.arch.names, registers.read_many(registers.arch.names), strict=True))
    sizes = {register.name: register.size for register in registers.arch.registers}
    assert [name for name, value in values.items() if not 0 <= value < 1 << 8 * sizes[name]] == []
    assert values["fioff"]
    assert values["fooff"]


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


# ----------------------------------------------------------------------------------------- control, system registers


def test_every_register_of_the_description_can_be_written_and_read_back(machine: GuestMachine):
    """With the value it has: what a `G` packet of a debugger does that changes nothing."""
    registers = machine.registers
    values = dict(zip(registers.arch.names, registers.read_many(registers.arch.names), strict=True))
    for name, value in values.items():
        registers.write(name, value)
        assert registers.read(name) == value, name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("idtr_base", 0x12345000),
        ("gdtr_limit", 0x77),
        ("tr", 0x40),
        ("ldtr_base", 0x5000),
        ("dr0", 0x1234),
        ("dr7", 0x400),
        ("sysenter_cs", 0x10),
        ("sysenter_eip", 0x1234567),
        ("gs_base", 0x7000),
        ("cr2", 0xABCDE000),
    ],
)
def test_system_registers_keep_what_is_written(machine: GuestMachine, name: str, value: int):
    """One at a time, and no other changes."""
    registers = machine.registers
    others = [other for other in registers.arch.names if other != name]
    before = registers.read_many(others)
    registers.write(name, value)
    assert registers.read(name) == value
    assert registers.read_many(others) == before


def test_a_new_idtr_is_where_the_next_trap_goes():
    """What is written is the processor's, not a copy."""
    guest = Tiny(64, "ud2")
    guest.machine.memory.write(DATA, guest.machine.memory.read(IDT, 16 * 16))
    guest.machine.registers.write("idtr_base", DATA)
    guest.machine.memory.write(IDT, bytes(16 * 16))
    assert guest.trap().vector == 6


@pytest.mark.parametrize("bits", [32, 64])
def test_writing_cr3_forgets_the_page_walks(bits: int):
    """A word is read through the old tables, then, at the same address, through new ones."""
    guest = Tiny(bits, f"mov eax, [{DATA}]; mov ecx, [{DATA}]; hlt")
    machine = guest.machine
    machine.memory.write(DATA, b"\1\0\0\0")
    machine.memory.write(DATA + 0x1000, b"\2\0\0\0")
    copy = 0x40000
    levels = 4 if bits == 64 else 2
    machine.memory.write(copy, machine.memory.read(TABLES, 0x1000 * levels))
    step = guest.word
    for level in range(levels - 1):
        entry = int.from_bytes(machine.memory.read(copy + 0x1000 * level, step), "little")
        moved = copy + 0x1000 * (level + 1) | entry & 0xFFF
        machine.memory.write(copy + 0x1000 * level, moved.to_bytes(step, "little"))
    leaf = copy + 0x1000 * (levels - 1) + (DATA >> 12) * step
    machine.memory.write(leaf, (DATA + 0x1000 | 7).to_bytes(step, "little"))
    machine.step()
    machine.registers.write("cr3", copy)
    assert isinstance(guest.run(), Halted)
    assert (machine.cpu.gpr[0], machine.cpu.gpr[1]) == (1, 2)


def test_clearing_cr0_pe_brings_real_mode_and_its_description_back():
    """The next instruction is decoded and addressed by the new mode."""
    guest = Tiny(32, "nop; mov eax, 0x90f49090; hlt")  # in 16 bits: mov ax, 0x9090; hlt; nop
    machine = guest.machine
    machine.step()
    assert machine.registers.arch is I386
    machine.registers.write("cr0", 0x10)
    machine.registers.write("cs", 0)
    machine.cpu.set_segment(1, 0, 0, 0xFFFF, 0x9B00)
    machine.cpu.recompute_hflags()
    assert (machine.registers.arch, machine.bits) == (I8086, 16)
    assert isinstance(guest.run(), Halted)
    assert machine.cpu.gpr[0] & 0xFFFF == 0x9090
    assert machine.cpu.pc == CODE + 1 + 4


def test_efer_lma_follows_from_paging_and_lme():
    """As the processor sets it: IA-32e mode begins with CR0.PG and ends without it."""
    registers = Tiny(64, "hlt").machine.registers
    assert registers.arch is X86_64
    registers.write("cr0", 0x33)
    assert (registers.read("efer") & 0x500, registers.arch) == (0x100, I386)
    registers.write("efer", registers.read("efer") | 0x400)
    assert registers.read("efer") & 0x400 == 0, "LMA cannot be written"
    registers.write("cr0", 0x80000033)
    assert (registers.read("efer") & 0x500, registers.arch) == (0x500, X86_64)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cr0", 0x80000000),  # paging without protection
        ("cr0", 0x20000033),  # NW without CD
        ("cr0", 0x1_0000_0033),
        ("cr4", 0),  # long mode without PAE
        ("cr8", 5),
        ("efer", 0),  # leaving long mode while paging
        ("cs", 0x7F8),  # beyond the GDT
    ],
)
def test_what_the_processor_would_not_take_is_refused(name: str, value: int):
    """And nothing has changed."""
    registers = Tiny(64, "hlt").machine.registers
    before = registers.read_many(registers.arch.names)
    with pytest.raises(MachineError):
        registers.write(name, value)
    assert registers.read_many(registers.arch.names) == before


def test_x87_and_sse_begin_as_after_a_reset() -> None:
    """SDM vol. 3, table 9-1: every exception of SSE masked, the x87 as before its first FNINIT."""
    registers = boot_embedded(64).registers
    assert (registers.read("fctrl"), registers.read("ftag"), registers.read("mxcsr")) == (0x40, 0x5555, 0x1F80)
