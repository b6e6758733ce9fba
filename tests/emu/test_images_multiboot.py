"""Multiboot kernels as plans, read back as the specifications say a kernel reads them."""

from __future__ import annotations

import struct

import pytest

from emu.iface import ImageError
from emu.images.detect import load_image
from emu.images.plan import Image
from tests.support.images import Load, build_elf, multiboot1_header, multiboot2_header, physical

MEMORY = 64 << 20


def load(data: bytes, *, initrd: bytes = b"", append: str = "", bits: int | None = None) -> Image:
    return load_image("/host/kernel", data, memory=MEMORY, initrd=initrd, append=append, bits=bits)


def text(image: Image, paddr: int) -> bytes:
    """The string at `paddr`, up to its NUL."""
    length = 0
    while physical(image, paddr + length, 1) != b"\0":
        length += 1
    return physical(image, paddr, length)


def elf_with(header: bytes, bits: int = 32) -> bytes:
    """`header` at the next 8-byte boundary of the file, then hlt instructions, the first of them the entry."""
    lead = bytes(-(64 + 56 if bits == 64 else 52 + 32) % 8) + header
    return build_elf(bits, [Load(0x100000, 0x100000, lead + b"\xf4" * 64)], 0x100000 + len(lead))


ONE = elf_with(multiboot1_header())
TWO = elf_with(multiboot2_header())


@pytest.mark.parametrize(("data", "kind", "magic"), [(ONE, "multiboot", 0x2BADB002), (TWO, "multiboot2", 0x36D76289)])
def test_a_kernel_is_entered_in_protected_mode_with_magic_and_information(data: bytes, kind: str, magic: int) -> None:
    image = load(data)
    assert (image.kind, image.start.mode, image.start.registers["eax"]) == (kind, "protected", magic)
    assert image.start.registers["cr0"] & 0x80000001 == 1
    assert image.start.registers["eflags"] & 0x200 == 0
    assert physical(image, image.start.pc, 1) == b"\xf4"


def test_a_64_bit_elf_file_is_entered_in_32_bits_too() -> None:
    """The header asks for the multiboot machine state whatever the file's class; the kernel enters long mode itself."""
    assert load(elf_with(multiboot1_header(), bits=64)).start.mode == "protected"


def test_bits_ask_for_plain_elf_in_spite_of_a_header() -> None:
    assert load(elf_with(multiboot1_header(), bits=64), bits=64).kind == "elf"


def test_version_1_information_has_memory_command_line_module_and_map() -> None:
    image = load(ONE, append="debug=1", initrd=b"module")
    base = image.start.registers["ebx"]
    info = physical(image, base, 120)
    flags, lower, upper, _, command, modules, table = struct.unpack_from("<7I", info)
    assert flags & 0x4D == 0x4D
    assert (lower, upper) == (639, (MEMORY >> 10) - 1024)
    assert text(image, command) == b"kernel debug=1"
    assert modules == 1
    start, end, string, _ = struct.unpack("<4I", physical(image, table, 16))
    assert start % 4096 == 0
    assert physical(image, start, end - start) == b"module"
    assert text(image, string) == b"kernel debug=1"
    length, at = struct.unpack_from("<2I", info, 44)
    rows = [struct.unpack("<IQQI", physical(image, at + offset, 24)) for offset in range(0, length, 24)]
    assert (20, 0x100000, MEMORY - 0x100000, 1) in rows
    (name,) = struct.unpack_from("<I", info, 64)
    assert text(image, name) == b"gdbstub"


def test_without_a_module_version_1_does_not_claim_one() -> None:
    image = load(ONE)
    assert struct.unpack("<I", physical(image, image.start.registers["ebx"], 4))[0] & 0x8 == 0


def tags_of(image: Image) -> dict[int, bytes]:
    base = image.start.registers["ebx"]
    (total,) = struct.unpack("<I", physical(image, base, 4))
    block = physical(image, base, total)
    assert len(block) == total
    found, position = {}, 8
    while True:
        kind, size = struct.unpack_from("<II", block, position)
        found[kind] = block[position + 8 : position + size]
        position += -(-size // 8) * 8
        if kind == 0:
            assert position == total
            return found


def test_version_2_information_has_memory_command_line_module_and_map() -> None:
    image = load(TWO, append="debug=1", initrd=b"module")
    tags = tags_of(image)
    assert tags[1] == b"kernel debug=1\0"
    assert tags[2] == b"gdbstub\0"
    start, end = struct.unpack_from("<II", tags[3])
    assert physical(image, start, end - start) == b"module"
    assert struct.unpack("<II", tags[4]) == (639, (MEMORY >> 10) - 1024)
    assert struct.unpack_from("<II", tags[6]) == (24, 0)
    rows = list(struct.iter_unpack("<QQII", tags[6][8:]))
    assert (0x100000, MEMORY - 0x100000, 1, 0) in rows


def test_version_2_entry_tag_replaces_the_elf_entry() -> None:
    header = multiboot2_header((3, 0, struct.pack("<I", 0x100008)))
    assert load(elf_with(header)).start.pc == 0x100008


@pytest.mark.parametrize(
    "header",
    [
        multiboot1_header(0x10003, 0x200010, 0x200000, 0x200060, 0x201000, 0x200040),
        multiboot2_header(
            (2, 0, struct.pack("<4I", 0x200010, 0x200000, 0x200060, 0x201000)), (3, 0, struct.pack("<I", 0x200040))
        ),
    ],
)
def test_a_header_with_addresses_loads_a_file_that_is_not_elf(header: bytes) -> None:
    """The file's first byte goes 16 bytes before the header; data ends at load end, bss at bss end."""
    data = (bytes(range(16)) + header).ljust(0x60, b"\x90") + b"not loaded"
    image = load(data)
    assert physical(image, 0x200000, 0x60) == data[:0x60]
    assert image.segments[0].end == 0x201000
    assert len(image.segments[0].data) == 0x60
    assert image.start.pc == 0x200040


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (elf_with(multiboot1_header(0x8)), "flags 0x8 ask for something unknown"),
        (multiboot1_header() + bytes(64), "without addresses in a file that is not ELF"),
        (multiboot1_header(0x10000), "cut short"),
        (multiboot1_header(0x10003, 0x100000, 0x100000, 0x200000, 0, 0x100020), "load end 0x200000 lies outside"),
        (multiboot1_header(0x10003, 0x100000, 0x100000, 0, 0x100004, 0x100020), "bss end 0x100004"),
        (multiboot1_header(0x10003, 0x100000, 0x100000, 0, 0, 0x90000), "entry point 0x90000 is outside"),
        (multiboot1_header(0x10003, 0x100000, 0x100010, 0, 0, 0x100020), "does not fit its header address"),
        (elf_with(multiboot2_header((77, 0, b""))), "tag 77 is unknown and not optional"),
        (elf_with(multiboot2_header((1, 0, struct.pack("<I", 14)))), "information this machine has not: tag 14"),
        (multiboot2_header((3, 0, b"1234"))[:-9], "header of 0x28 bytes does not fit"),
    ],
)
def test_headers_that_ask_for_the_impossible_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        load(data)


def test_optional_tags_that_are_not_known_are_passed_over() -> None:
    assert load(elf_with(multiboot2_header((77, 1, b""), (1, 1, struct.pack("<I", 14))))).kind == "multiboot2"


def test_a_header_with_a_wrong_checksum_is_none() -> None:
    data = bytearray(ONE)
    data[data.index(b"\x02\xb0\xad\x1b") + 8] ^= 1
    assert load(bytes(data)).kind == "elf"


def test_a_header_beyond_the_searched_part_is_none() -> None:
    data = build_elf(32, [Load(0x100000, 0x100000, bytes(9000) + multiboot1_header())], 0x100000)
    assert load(data).kind == "elf"


def test_a_module_that_does_not_fit_says_what_would_do() -> None:
    with pytest.raises(ImageError, match="needs 66 MiB of memory"):
        load(ONE, initrd=bytes(64 << 20))


def test_the_same_kernel_from_another_folder_is_the_same_plan() -> None:
    """The host's path is in no byte of guest memory."""
    here = load_image("/a/kernel", ONE, memory=MEMORY)
    there = load_image("/b/c/kernel", ONE, memory=MEMORY)
    assert [bytes(one.data) for one in here.segments] == [bytes(one.data) for one in there.segments]


def test_command_lines_and_modules_are_for_multiboot_only() -> None:
    with pytest.raises(ImageError, match="only a multiboot kernel"):
        load(build_elf(32, [Load(0x100000, 0x100000, b"\xf4")], 0x100000), append="x")
