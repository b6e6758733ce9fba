"""Binary layouts the processor and the engine define, written down once with construct.

Rules: layouts only. `offsets()` turns a layout into byte offsets for the hot paths, which read and write through
memoryviews; nothing outside this module knows a number.
"""

from __future__ import annotations

from construct import Array, Bytes, Int8ul, Int16ul, Int32sl, Int32ul, Int64ul, Padding, Struct

# ------------------------------------------------------------------------------------------ the engine's CPU state
# Unicorn 2.1's CPUX86State (QEMU 5.0.1 target/i386/cpu.h) as uc_context_save copies it, up to CR4. The same layout
# serves 16-, 32- and 64-bit modes.

SegmentCache = Struct(
    "selector" / Int32ul,
    Padding(4),
    "base" / Int64ul,
    "limit" / Int32ul,
    "flags" / Int32ul,  # the descriptor's second dword
)

CpuImage = Struct(
    "gpr" / Array(16, Int64ul),
    "pc" / Int64ul,
    "eflags" / Int64ul,
    "cc_dst" / Int64ul,
    "cc_src" / Int64ul,
    "cc_src2" / Int64ul,
    "cc_op" / Int32ul,
    "df" / Int32sl,
    "hflags" / Int32ul,
    "hflags2" / Int32ul,
    "segments" / Array(6, SegmentCache),  # es cs ss ds fs gs
    "ldt" / SegmentCache,
    "tr" / SegmentCache,
    "gdt" / SegmentCache,
    "idt" / SegmentCache,
    "cr" / Array(5, Int64ul),
)

# Around the debug registers, wherever calibration finds them.
ErrorImage = Struct(
    "error_code" / Int32ul,
    "exception_is_int" / Int32ul,
    "exception_next_eip" / Int64ul,
    "dr" / Array(8, Int64ul),
    "breaks" / Bytes(32),  # pointers of the engine's to what it has set up for DR0 to DR3
    "old_exception" / Int32sl,
)

# ------------------------------------------------------------------------------------------------ SDM vol. 3, ch. 6-7

Gate32 = Struct(
    "offset_low" / Int16ul, "selector" / Int16ul, "reserved" / Int8ul, "type" / Int8ul, "offset_high" / Int16ul
)

Gate64 = Struct(
    "offset_low" / Int16ul,
    "selector" / Int16ul,
    "ist" / Int8ul,
    "type" / Int8ul,
    "offset_middle" / Int16ul,
    "offset_high" / Int32ul,
    "reserved" / Int32ul,
)

Tss32 = Struct(
    "link" / Int32ul,
    "stacks" / Array(3, Struct("esp" / Int32ul, "ss" / Int32ul)),
    "cr3" / Int32ul,
    "eip" / Int32ul,
    "eflags" / Int32ul,
    "gpr" / Array(8, Int32ul),
    "segments" / Array(6, Int32ul),
    "ldt" / Int32ul,
    "trap" / Int16ul,
    "io_base" / Int16ul,
)

Tss64 = Struct(
    Padding(4),
    "rsp" / Array(3, Int64ul),
    Padding(8),
    "ist" / Array(7, Int64ul),
    Bytes(10),
    "io_base" / Int16ul,
)


def offsets(layout: Struct) -> dict[str, int]:
    """Byte offset of each named member of a fixed-size layout."""
    found: dict[str, int] = {}
    at = 0
    for member in layout.subcons:
        if member.name:
            found[member.name] = at
        at += member.sizeof()
    return found
