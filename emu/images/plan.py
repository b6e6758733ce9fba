"""The plan a loader hands to the machine: what goes where in physical memory, and the state the processor starts in.

Rules: pure data and arithmetic; standard library, `emu.iface` and `emu.symbols` only; any thread. Loaders never touch a
machine: boot descriptor tables, page tables and parameter blocks are segments like any other, so a plan can be looked
at, tested and applied by whoever holds memory and registers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, TypeAlias

from emu.iface import ImageError
from emu.symbols import Symbol

PAGE = 0x1000
PHYSICAL_LIMIT = 1 << 52
"""First address no x86 processor can have (SDM vol. 3, 4.1.4: MAXPHYADDR is at most 52)."""

Mode: TypeAlias = Literal["real", "protected", "long"]
Bytes: TypeAlias = bytes | memoryview

CR0_PROTECTED = 0x0000_0033
"""PE, MP, ET, NE: protected mode, x87 errors as exceptions (SDM vol. 3, 2.5)."""
CR0_PAGED = 0x8005_0033
"""The same with AM, WP and PG, as Linux's boot code leaves it."""
CR4_LONG = 0x0000_0220
"""PAE, which long mode needs, and OSFXSR, for code that uses SSE at once."""
EFLAGS_RESET = 0x2
"""Interrupts off; bit 1 is always set."""

BOOT_CODE = 0x10
BOOT_DATA = 0x18
"""Selectors in `boot_gdt`; the numbers are Linux's __BOOT_CS and __BOOT_DS (Documentation/arch/x86/boot.rst)."""
_CODE32, _CODE64, _DATA = 0x00CF_9B00_0000_FFFF, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF


def align_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


@dataclass(frozen=True, slots=True)
class Segment:
    """`data` at physical address `paddr`, zeros after it up to `size` bytes in all."""

    paddr: int
    data: Bytes
    size: int = -1
    """Bytes; left out, the length of `data`."""

    def __post_init__(self) -> None:
        if self.size < 0:
            object.__setattr__(self, "size", len(self.data))
        if self.size < len(self.data):
            raise ValueError("a segment's size is less than its data")

    @property
    def end(self) -> int:
        """First physical address after the segment."""
        return self.paddr + self.size


@dataclass(frozen=True, slots=True)
class Gdt:
    """What GDTR holds at the start, and the flat selectors the segment registers get. The table itself is a segment."""

    base: int
    limit: int
    code: int = BOOT_CODE
    data: int = BOOT_DATA


@dataclass(frozen=True, slots=True)
class Start:
    """The processor's state at the first instruction, where it is not the reset state.

    `mode` "real": 16-bit, `gdt` is None and `registers` has the segment values. "protected": flat 32-bit segments from
    `gdt`, paging off. "long": 64-bit code from `gdt`, EFER.LME and EFER.LMA set, paging on through `registers["cr3"]`.
    """

    mode: Mode
    pc: int
    """The instruction pointer: in real mode an offset into `registers["cs"] << 4`, elsewhere the address itself."""
    registers: Mapping[str, int] = field(default_factory=dict)
    """By gdb's names; a register that is not named is 0 (eflags: 2)."""
    gdt: Gdt | None = None

    @property
    def bits(self) -> int:
        return {"real": 16, "protected": 32, "long": 64}[self.mode]


@dataclass(frozen=True, slots=True)
class Section:
    """An allocated ELF section: a range of virtual addresses with its access."""

    name: str
    address: int
    size: int
    writable: bool
    executable: bool


@dataclass(frozen=True, slots=True)
class Kernel:
    """What is known of a Linux kernel beside its memory."""

    vmlinux: Bytes
    """The decompressed ELF file: what `emu.symbols.kallsyms` reads."""
    bits: int
    """32 or 64."""
    banner: str
    """ "Linux version 6.1.0-..." as far as its text goes; empty where there is none."""
    virtual_offset: int
    """Virtual minus physical address of the kernel's text."""
    build_id: bytes | None
    sections: tuple[Section, ...] = ()


@dataclass(frozen=True, slots=True)
class Image:
    """A file made ready to start. `kind`: "linux", "elf", "multiboot", "multiboot2" or "flat"."""

    path: str
    kind: str
    segments: tuple[Segment, ...]
    start: Start
    symbols: Sequence[Symbol] = ()
    """From the file's own symbol table; empty for a stripped kernel, whose kallsyms take longer to find."""
    kernel: Kernel | None = None

    def __post_init__(self) -> None:
        """ImageError where a segment leaves the physical address space or overlaps another."""
        ordered = sorted((segment for segment in self.segments if segment.size), key=lambda segment: segment.paddr)
        for segment in ordered:
            if segment.paddr < 0 or segment.end > PHYSICAL_LIMIT:
                raise ImageError(self.path, f"segment {_span(segment)} is outside the physical address space")
        for lower, upper in pairwise(ordered):
            if lower.end > upper.paddr:
                raise ImageError(self.path, f"segment {_span(upper)} overlaps segment {_span(lower)}")

    @property
    def end(self) -> int:
        """First physical address after every segment: the least RAM the image fits in."""
        return max((segment.end for segment in self.segments), default=0)

    def check_fits(self, memory: int) -> None:
        """ImageError, saying what would do, where `memory` bytes of RAM from address 0 do not hold every segment."""
        if self.end > memory:
            needed = align_up(self.end, 1 << 20) >> 20
            raise ImageError(self.path, f"needs {needed} MiB of memory, the machine has {memory >> 20} MiB")


def _span(segment: Segment) -> str:
    return f"{segment.paddr:#x}-{segment.end:#x}"


# ------------------------------------------------------------------------------------------------- what loaders share


def boot_gdt(paddr: int, bits: int) -> tuple[Segment, Gdt]:
    """A descriptor table with flat segments: null, null, code of `bits` (32 or 64), data."""
    table = struct.pack("<4Q", 0, 0, _CODE64 if bits == 64 else _CODE32, _DATA)
    return Segment(paddr, table), Gdt(base=paddr, limit=len(table) - 1)


IDENTITY_TABLES_SIZE = 6 * PAGE


def identity_tables(paddr: int) -> Segment:
    """Four-level page tables mapping the first 4 GiB to themselves in 2 MiB pages; `paddr`, a page boundary, is CR3."""
    present_writable, large = 0x3, 0x80
    tables = bytearray(IDENTITY_TABLES_SIZE)
    struct.pack_into("<Q", tables, 0, (paddr + PAGE) | present_writable)
    for index in range(4):
        struct.pack_into("<Q", tables, PAGE + 8 * index, (paddr + (2 + index) * PAGE) | present_writable)
    pages = (number << 21 | large | present_writable for number in range(4 * 512))
    struct.pack_into("<2048Q", tables, 2 * PAGE, *pages)
    return Segment(paddr, bytes(tables))


def free_range(path: str, segments: Iterable[Segment], size: int, start: int, end: int) -> int:
    """The lowest page boundary in `start..end` with `size` bytes that no segment uses; ImageError if there is none."""
    candidate = align_up(start, PAGE)
    for segment in sorted(segments, key=lambda segment: segment.paddr):
        if segment.size and segment.paddr < candidate + size and candidate < segment.end:
            candidate = align_up(segment.end, PAGE)
    if candidate + size > end:
        raise ImageError(path, f"leaves no {size:#x} bytes free between {start:#x} and {end:#x} for the boot tables")
    return candidate


LOW_START = 0x1000
LOW_END = 0x9_F000
"""Conventional memory a loader may put its own tables in: above the real-mode vectors, below the BIOS data area."""


def memory_map(memory: int) -> list[tuple[int, int, int]]:
    """(base, size, type) of each range as the BIOS call e820 gives them: type 1 is RAM, 2 is reserved.

    A PC's map: 639 KiB, the extended BIOS data area, the BIOS itself, then all RAM from 1 MiB on (ACPI 6.5, 15.3).
    """
    table = [(0, 0x9_FC00, 1), (0x9_FC00, 0x400, 2), (0xF_0000, 0x1_0000, 2)]
    if memory > 1 << 20:
        table.append((1 << 20, memory - (1 << 20), 1))
    return table


def flat_start(path: str, segments: Iterable[Segment], entry: int, bits: int) -> tuple[list[Segment], Start]:
    """Boot tables beside `segments` and the start state for code that expects nothing but a processor mode.

    32 bits: protected mode, flat. 64 bits: long mode, first 4 GiB mapped to themselves. Both get a stack of one page.
    """
    mode: Mode = "long" if bits == 64 else "protected"
    tables = IDENTITY_TABLES_SIZE if bits == 64 else 0
    base = free_range(path, segments, tables + 2 * PAGE, LOW_START, LOW_END)
    gdt_segment, gdt = boot_gdt(base + tables, bits)
    stack_top = base + tables + 2 * PAGE
    own = [gdt_segment]
    registers = {"eflags": EFLAGS_RESET}
    if bits == 64:
        own.append(identity_tables(base))
        registers |= {"rsp": stack_top, "cr0": CR0_PAGED, "cr3": base, "cr4": CR4_LONG}
    else:
        registers |= {"esp": stack_top, "cr0": CR0_PROTECTED}
    return own, Start(mode, entry, registers, gdt)
