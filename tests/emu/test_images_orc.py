"""ORC rows as DWARF call frame information, read back by pyelftools; stock kernels give a table without holes."""

from __future__ import annotations

import io
import itertools
import struct
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from emu.images.detect import load_kernel
from emu.images.elf import ElfFile
from emu.images.orc import debug_frame, frames_of
from emu.images.plan import Section
from emu.images.symbolelf import symbol_elf
from tests.support.images import build_vmlinux, fetch_real_kernel

TEXT = 0xFFFFFFFF81000000
SP, BP, R10, BP_INDIRECT, SP_INDIRECT = 5, 4, 6, 8, 9  # ORC_REG_*
UNDEFINED, PREV_SP = 0, 1
END, CALL, REGS, PARTIAL = 1, 2, 3, 4  # ORC_TYPE_*, Linux 6.4 and later
RBP, RSP, RIP = 6, 7, 16  # DWARF register numbers of the AMD64 ABI


def row(sp_reg: int, sp_offset: int, bp_reg: int = UNDEFINED, bp_offset: int = 0, kind: int = CALL) -> bytes:
    return struct.pack("<hhH", sp_offset, bp_offset, sp_reg | bp_reg << 4 | kind << 8)


def descriptions(frames: bytes, base: int = TEXT) -> list[Any]:
    """The FDEs of a section, as a debugger's reader decodes them."""
    sections = [Section(".text", base, 0x1000, False, True)]
    file = ELFFile(io.BytesIO(symbol_elf([], bits=64, sections=sections, frames=frames)))
    return [entry for entry in file.get_dwarf_info().CFI_entries() if "initial_location" in entry.header]


def state_at(frames: bytes, address: int) -> dict[Any, Any]:
    """The unwinding rules in force at an address: "cfa", and one for each DWARF register that has one."""
    for entry in descriptions(frames):
        start = entry["initial_location"]
        if start <= address < start + entry["address_range"]:
            return [line for line in entry.get_decoded().table if line["pc"] <= address][-1]
    raise AssertionError(f"no description covers {address:#x}")


def frames(*rows: bytes, new_types: bool = True, step: int = 16) -> bytes:
    """Rows `step` bytes apart from TEXT on; the last one ends the table."""
    places = [TEXT + step * index for index in range(len(rows) + 1)]
    return frames_of(places, b"".join(rows) + row(UNDEFINED, 0, kind=END), new_types=new_types)


def test_a_call_row_gives_stack_pointer_and_return_address() -> None:
    state = state_at(frames(row(SP, 24)), TEXT + 3)
    assert (state["cfa"].reg, state["cfa"].offset) == (RSP, 24)
    assert (state[RIP].type, state[RIP].arg) == ("OFFSET", -8)


def test_each_row_is_in_force_from_its_address_to_the_next() -> None:
    table = frames(row(SP, 8), row(SP, 16), row(SP, 8))
    assert [state_at(table, TEXT + offset)["cfa"].offset for offset in (0, 15, 16, 31, 32, 47)] == [8, 8, 16, 16, 8, 8]


@pytest.mark.parametrize("step", [1, 0x3F, 0x40, 0xFF, 0x100, 0xFFFF, 0x10000])
def test_rows_any_distance_apart_are_told_apart(step: int) -> None:
    table = frames(row(SP, 8), row(SP, 16), step=step)
    assert [state_at(table, TEXT + offset)["cfa"].offset for offset in (step - 1, step, 2 * step - 1)] == [8, 16, 16]


def test_a_saved_rbp_is_found_and_later_left_alone() -> None:
    table = frames(row(SP, 16, PREV_SP, -16), row(SP, 8))
    assert (state_at(table, TEXT)[RBP].type, state_at(table, TEXT)[RBP].arg) == ("OFFSET", -16)
    assert state_at(table, TEXT + 16)[RBP].type == "SAME_VALUE"


@pytest.mark.parametrize(("orc", "dwarf"), [(BP, RBP), (R10, 10)])
def test_the_frame_may_hang_on_another_register(orc: int, dwarf: int) -> None:
    assert state_at(frames(row(orc, 16)), TEXT)["cfa"].reg == dwarf


@pytest.mark.parametrize(
    ("register", "offset", "code"),
    [
        (BP_INDIRECT, -8, [0x76, 0x78, 0x06]),  # breg6 -8, deref
        (SP_INDIRECT, 16, [0x77, 0, 0x06, 0x11, 16, 0x22]),  # breg7 0, deref, consts 16, plus
        (SP, -64, [0x77, 0x40]),  # breg7 -64
    ],
)
def test_a_frame_found_through_memory_is_an_expression(register: int, offset: int, code: list[int]) -> None:
    assert state_at(frames(row(register, offset)), TEXT)["cfa"].expr == code


def test_an_exception_frame_gives_every_register_of_the_interrupted_code() -> None:
    """Offsets in struct pt_regs: r15 first, ip at 128, sp at 152."""
    state = state_at(frames(row(SP, 0, kind=REGS)), TEXT)
    found = {register: state[register].arg for register in state if isinstance(register, int)}
    order = [15, 14, 13, 12, RBP, 3, 11, 10, 9, 8, 0, 2, 1, 4, 5]
    assert found == {register: 8 * index for index, register in enumerate(order)} | {RIP: 128, RSP: 152}


@pytest.mark.parametrize(("kind", "signal"), [(CALL, False), (REGS, True), (PARTIAL, True)])
def test_exception_frames_are_marked_as_such(kind: int, signal: bool) -> None:
    """Without the mark gdb names the function before the interrupted one, where its first instruction was due."""
    (entry,) = descriptions(frames(row(SP, 8, kind=kind)))
    assert (b"S" in entry.cie["augmentation"]) == signal


def test_a_bare_interrupt_frame_gives_ip_and_sp() -> None:
    state = state_at(frames(row(SP, 8, kind=PARTIAL)), TEXT)
    assert (state[RIP].arg, state[RSP].arg) == (0, 24)


@pytest.mark.parametrize("last", [row(UNDEFINED, 0), row(SP, 8, kind=END), row(SP, 8, kind=0), row(3, 0, kind=7)])
def test_where_nothing_is_known_the_stack_ends(last: bytes) -> None:
    assert state_at(frames(last), TEXT)[RIP].type == "UNDEFINED"


def test_older_kernels_number_the_types_differently() -> None:
    table = frames(row(SP, 8, kind=0), row(SP, 0, kind=1), row(SP, 8, kind=2), row(SP, 24, kind=4), new_types=False)
    assert [state_at(table, TEXT + offset)[RIP].arg for offset in (0, 16, 32, 48)] == [-8, 128, 0, -8]


def test_many_rows_are_spread_over_descriptions_without_a_gap() -> None:
    """gdb runs a description from its start at every frame, so none may be long."""
    table = frames(*(row(SP, 8 * (1 + index % 5)) for index in range(500)))
    spans = [(entry["initial_location"], entry["address_range"]) for entry in descriptions(table)]
    assert len(spans) > 5
    assert sum(size for _, size in spans) == 500 * 16
    assert all(start + size == following for (start, size), (following, _) in itertools.pairwise(spans))
    assert state_at(table, TEXT + 16 * 499)["cfa"].offset == 8 * 5


def test_rows_out_of_order_are_left_out() -> None:
    """A damaged table: no description with a length below zero comes of it."""
    table = frames_of([TEXT, TEXT - 64, TEXT + 16, TEXT + 32], row(SP, 8) * 4, new_types=True)
    assert all(entry["address_range"] > 0 for entry in descriptions(table))


def test_an_image_without_orc_has_no_frames() -> None:
    assert debug_frame(ElfFile("x", build_vmlinux(64))) == b""
    assert debug_frame(ElfFile("x", build_vmlinux(32))) == b""


@pytest.mark.parametrize("name", ["amd64 6.1", "amd64 6.12"])
def test_a_stock_kernels_table_covers_its_text_in_order(name: str) -> None:
    image = load_kernel(name, fetch_real_kernel(name).fetched.kernel.read_bytes(), memory=256 << 20)
    assert image.kernel is not None
    table = debug_frame(ElfFile(name, image.kernel.vmlinux))
    position, end, covered = 0, TEXT, 0
    while position < len(table):
        length, identity, start, size = struct.unpack_from("<IIQQ", table, position)
        if identity != 0xFFFFFFFF:
            assert start >= end
            end, covered = start + size, covered + size
        position += 4 + length
    assert position == len(table)
    text = next(section for section in image.kernel.sections if section.name == ".text")
    assert covered > text.size * 0.9
