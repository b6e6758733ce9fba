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


def test_function_without_a_frame_pointer_is_left_to_gdb() -> None:
    """Nothing is claimed of code whose prologue is not known."""
    assert table(bytes.fromhex("0f1f44000089c8c3")) == {}
