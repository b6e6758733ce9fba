"""Instructions as values: what `emu.insn` tells of bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.insn import Encoding, InvalidInstruction, boundaries, decode


@pytest.mark.parametrize(
    ("code", "encoding", "opcode_map", "opcode"),
    [
        ("eb00", Encoding.LEGACY, 0, 0xEB),  # jmp +0
        ("c5f1ebc0", Encoding.VEX, 1, 0xEB),  # vpor xmm0, xmm1, xmm0
        ("c4e263f60d00000000", Encoding.VEX, 2, 0xF6),  # mulx ecx, ebx, [rip]
        ("62f17508ebc0", Encoding.EVEX, 1, 0xEB),  # vpord xmm0, xmm1, xmm0
        ("0f8400000000", Encoding.LEGACY, 1, 0x84),  # je +0
        ("f20f38f0c0", Encoding.LEGACY, 2, 0xF0),  # crc32 eax, al
        ("660f3a0fc101", Encoding.LEGACY, 3, 0x0F),  # palignr xmm0, xmm1, 1
        ("66464bf4", Encoding.LEGACY, 0, 0xF4),  # hlt behind two REX
    ],
)
def test_opcode_is_told_with_its_encoding_and_map(code: str, encoding: Encoding, opcode_map: int, opcode: int) -> None:
    """The same byte 0xeb is a jump or a vector OR: only encoding and map tell which."""
    insn = decode(bytes.fromhex(code), 0x1000, 64)
    assert (insn.encoding, insn.map, insn.opcode) == (encoding, opcode_map, opcode)


@pytest.mark.parametrize(
    ("code", "disp_offset", "imm_offset", "imm_size"),
    [
        ("488b0544332211", 3, 0, 0),  # mov rax, [rip+0x11223344]
        ("81054433221155667788", 2, 6, 4),  # add dword [rip+0x11223344], 0x88776655
        ("c5fe6f0544332211", 4, 0, 0),  # vmovdqu ymm0, [rip+0x11223344]
    ],
)
def test_rip_relative_displacement_is_located(code: str, disp_offset: int, imm_offset: int, imm_size: int) -> None:
    """A RIP-relative operand's displacement is found although an immediate may follow it."""
    insn = decode(bytes.fromhex(code), 0x1000, 64)
    assert insn.rip_relative
    assert (insn.disp_offset, insn.disp_size, insn.displacement) == (disp_offset, 4, 0x11223344)
    assert (insn.imm_offset, insn.imm_size) == (imm_offset, imm_size)


def test_c4_outside_64_bit_mode_is_les_unless_modrm_says_register() -> None:
    """LES keeps its opcode in 32-bit code; the VEX reading needs a register ModRM."""
    assert decode(bytes.fromhex("c400"), 0, 32).encoding is Encoding.LEGACY
    assert decode(bytes.fromhex("c5f877"), 0, 32).encoding is Encoding.VEX


@pytest.mark.parametrize(
    ("code", "bits", "operand", "address"),
    [
        ("4801c0", 64, 64, 64),
        ("6601c0", 64, 16, 64),
        ("4866ffc0", 64, 16, 64),  # a REX that a prefix follows is none
        ("67e300", 64, 32, 32),
        ("6690", 16, 32, 16),
        ("67a4", 32, 32, 16),
    ],
)
def test_effective_sizes_follow_prefixes(code: str, bits: int, operand: int, address: int) -> None:
    """Operand and address size are those after 66, 67 and REX.W."""
    insn = decode(bytes.fromhex(code), 0, bits)
    assert (insn.operand_bits, insn.address_bits) == (operand, address)


def test_branch_distance_is_signed() -> None:
    """A backward jump's immediate is negative."""
    assert decode(bytes.fromhex("ebfe"), 0x1000, 64).immediate == -2


def test_register_operand_includes_rex_b() -> None:
    """`call *%r11` names register 11, `call *(%rax)` names none."""
    assert decode(bytes.fromhex("41ffd3"), 0, 64).register_operand == 11
    assert decode(bytes.fromhex("ff10"), 0, 64).register_operand is None


def test_bytes_that_are_no_instruction_are_refused_with_their_address() -> None:
    """06 (push es) does not exist in 64-bit mode."""
    with pytest.raises(InvalidInstruction) as refused:
        decode(b"\x06", 0x1234, 64)
    assert refused.value.address == 0x1234


def test_boundaries_walk_from_a_function_start() -> None:
    """endbr64; nopl 0(%rax,%rax,1); push %rbp: the walk yields their starts and stops at the end asked for."""
    code = bytes.fromhex("f30f1efa0f1f44000055")
    starts = boundaries(lambda vaddr, size: code[vaddr - 0x1000 :][:size], 0x1000, 0x100A, 64)
    assert list(starts) == [0x1000, 0x1004, 0x1009]


@given(data=st.binary(max_size=20), bits=st.sampled_from([16, 32, 64]))
def test_decoding_any_bytes_gives_an_instruction_or_the_one_error(data: bytes, bits: int) -> None:
    """Hostile bytes never raise anything but InvalidInstruction, and sizes stay within the bytes given."""
    try:
        insn = decode(data, 0x1000, bits)
    except InvalidInstruction:
        return
    assert 0 < insn.size <= min(15, len(data))
    assert insn.data == data[: insn.size]
