"""i386 call frame information says where the return address is at each point of a function with a frame pointer."""

from __future__ import annotations

from io import BytesIO

from elftools.dwarf.callframe import FDE, CallFrameInfo
from elftools.dwarf.structs import DWARFStructs

from emu.images.frames32 import frame_pointer_frames
from emu.images.plan import Segment
from emu.symbols import Symbol

OFFSET = 0xC0000000
ENTRY = 0x100000 + OFFSET
# call __fentry__'s nop; push %ebp; mov %esp,%ebp; push %ebx; pop %ebx; pop %ebp; ret; nop
CODE = bytes.fromhex("0f1f4400005589e5535b5dc390")


def table(code: bytes, name: str = "f") -> dict[int, tuple[int, int, int | None]]:
    """Address -> (register, offset) of the CFA and ebp's place, of the only function."""
    data = frame_pointer_frames([Segment(0x100000, code)], [Symbol(name, ENTRY, 0, "T")], OFFSET)
    structs = DWARFStructs(little_endian=True, dwarf_format=32, address_size=4)
    entries = CallFrameInfo(BytesIO(data), len(data), 0, structs).get_entries()
    found = {}
    for entry in entries:
        if isinstance(entry, FDE):
            for row in entry.get_decoded().table:
                ebp = row.get(5)
                found[row["pc"] - ENTRY] = (row["cfa"].reg, row["cfa"].offset, ebp.arg if ebp else None)
    return found


def test_frame_is_followed_through_prologue_and_epilogue() -> None:
    """At entry and at the ret the return address is at esp; between, at ebp + 4, whatever is pushed."""
    assert table(CODE) == {0: (4, 4, None), 6: (4, 8, -8), 8: (5, 8, -8), 11: (4, 4, None), 12: (5, 8, -8)}


def test_compiler_may_move_instructions_into_the_prologue() -> None:
    """push %ebp; mov %eax,%ecx; mov %esp,%ebp; pop %ebp; jmp elsewhere."""
    rows = table(bytes.fromhex("5589c189e55de900000000"))
    assert rows == {0: (4, 4, None), 1: (4, 8, -8), 5: (5, 8, -8), 6: (4, 4, None), 11: (5, 8, -8)}


def test_function_that_never_moves_the_stack_pointer() -> None:
    """The return address is at esp throughout."""
    assert table(bytes.fromhex("0f1f44000089c8c3")) == {0: (4, 4, None)}


def test_function_without_a_frame_pointer_is_left_to_gdb() -> None:
    """Nothing is claimed of code that moves esp in ways that are not known."""
    assert table(bytes.fromhex("0f1f44000053525a5bc3")) == {}


def test_entry_stub_has_what_the_processor_pushed_for_its_caller() -> None:
    """nop; cld; push $0; push $handler; jmp: three words and what was pushed on top, then the end of the section."""
    stub = bytes.fromhex("8d7600fc6a006800000000e900000000")
    assert table(stub, "asm_exc_int3") == {0: (4, 12, None), 6: (4, 16, None), 11: (4, 20, None)}


def test_entry_code_with_a_whole_pt_regs_has_the_interrupted_registers() -> None:
    """Behind the last push of SAVE_ALL ebp is in pt_regs, 0x30 below its end."""
    rows = table(bytes.fromhex("fc0fa0555756525153e800000000"), "handle_exception")
    assert rows == {0: (4, 4, None), 9: (4, 0x44, -0x30)}
