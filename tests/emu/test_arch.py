"""The architectures as data: order and sizes as gdb has them, and the description generated from the same table."""

from __future__ import annotations

import dataclasses
from xml.etree import ElementTree

import pytest

from emu.arch import I386, X86_64, Arch, target_xml

both = pytest.mark.parametrize("arch", [I386, X86_64], ids=lambda arch: arch.name)


def test_amd64_numbers_are_those_gdb_knows():
    """The numbers in stop replies and `p` packets are fixed by amd64_register_names of gdb's amd64-tdep.c."""
    wanted = {"rax": 0, "rbx": 1, "rbp": 6, "rsp": 7, "r8": 8, "rip": 16, "eflags": 17, "cs": 18, "st0": 24, "fop": 39}
    wanted |= {"xmm0": 40, "xmm15": 55, "mxcsr": 56}
    assert {name: X86_64.numbers[name] for name in wanted} == wanted


def test_i386_numbers_are_those_gdb_knows():
    """The same for i386_register_names of gdb's i386-tdep.c."""
    wanted = {"eax": 0, "ecx": 1, "esp": 4, "ebp": 5, "eip": 8, "eflags": 9, "cs": 10, "st0": 16, "fctrl": 24}
    wanted |= {"xmm0": 32, "xmm7": 39, "mxcsr": 40}
    assert {name: I386.numbers[name] for name in wanted} == wanted


def test_the_segments_feature_belongs_to_amd64_only():
    """gdb refuses a description whose i386 processor has org.gnu.gdb.i386.segments."""
    name = "org.gnu.gdb.i386.segments"
    assert name in [feature.name for feature in X86_64.features]
    assert name not in [feature.name for feature in I386.features]


@both
def test_system_registers_stand_behind_those_of_programs(arch: Arch):
    """In a feature of their own, so that the numbers which gdb has for the others hold."""
    system = arch.features[-1]
    assert system.name == "org.gnu.gdb.i386.sys"
    assert {"cr0", "cr2", "cr3", "cr4", "gdtr_base", "idtr_limit", "tr", "dr7"} <= {r.name for r in system.registers}


@both
def test_description_lists_every_register_at_its_packet_place(arch: Arch):
    """Walking the XML gives names, sizes and numbers of the `g` packet: both come from one table."""
    root = ElementTree.fromstring(target_xml(arch))
    registers = [(reg.get("name"), int(reg.get("bitsize", "0"))) for reg in root.iter("reg")]
    assert registers == [(register.name, register.bits) for register in arch.registers]
    assert [int(reg.get("regnum", "-1")) for reg in root.iter("reg")] == list(range(len(registers)))


@both
def test_description_defines_the_types_it_uses(arch: Arch):
    """gdb drops the whole description at the first type it does not know."""
    root = ElementTree.fromstring(target_xml(arch))
    predefined = {"int", "int8", "int16", "int32", "int64", "uint128", "code_ptr", "data_ptr", "i387_ext"}
    predefined |= {"bfloat16", "ieee_single", "ieee_double"}
    defined = {element.get("id") for element in root.iter() if element.get("id")}
    used = {element.get("type") for element in root.iter() if element.get("type")}
    assert used <= predefined | defined


@both
def test_pack_and_unpack_are_inverse(arch: Arch):
    """Distinct values, each as wide as its register, come back under their names."""
    values = [((index + 1) << (register.bits - 8)) | index for index, register in enumerate(arch.registers)]
    data = arch.pack(values)
    assert len(data) == arch.packet_size
    assert arch.unpack(data) == dict(zip(arch.names, values, strict=True))


@both
def test_unpack_refuses_another_length(arch: Arch):
    """A `G` packet cut short must not write half of the registers."""
    with pytest.raises(ValueError, match="bytes of registers expected"):
        arch.unpack(bytes(arch.packet_size - 1))


@both
def test_an_architecture_cannot_be_changed(arch: Arch):
    """Sessions share it."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        arch.word_size = 2  # type: ignore[misc]
