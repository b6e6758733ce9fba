"""ELF files and flat binaries as plans: what goes where, what the processor starts with, what is refused."""

from __future__ import annotations

import struct

import pytest

from emu.iface import ImageError
from emu.images.detect import load_image
from emu.images.plan import Gdt, Image, Segment, Start, free_range, identity_tables
from tests.support.images import Load, build_elf, physical

MEMORY = 64 << 20


def load(data: bytes, **options: int) -> Image:
    return load_image("image", data, memory=MEMORY, **options)


@pytest.fixture(params=[32, 64])
def bits(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


def test_segments_go_to_their_physical_addresses_with_zeros_after_them(bits: int) -> None:
    image = load(build_elf(bits, [Load(0x80100000, 0x200000, b"code", 0x2000)], 0x80100000))
    assert physical(image, 0x200000, 8) == b"code\0\0\0\0"
    assert image.segments[0].end == 0x202000


def test_the_word_size_of_the_file_picks_the_start_mode(bits: int) -> None:
    start = load(build_elf(bits, [Load(0x100000, 0x100000, b"\xf4")], 0x100000)).start
    assert start.bits == bits
    assert start.pc == 0x100000
    assert start.registers["eflags"] == 2


def test_bits_override_the_word_size_of_the_file() -> None:
    """A 32-bit image that wants to be entered in long mode, and the other way round."""
    assert load(build_elf(32, [Load(0x100000, 0x100000, b"\xf4")], 0x100000), bits=64).start.mode == "long"
    assert load(build_elf(64, [Load(0x100000, 0x100000, b"\xf4")], 0x100000), bits=32).start.mode == "protected"


@pytest.mark.parametrize("entry", [0x80100004, 0x200004], ids=["virtual", "physical"])
def test_an_entry_point_is_taken_as_virtual_or_physical(bits: int, entry: int) -> None:
    image = load(build_elf(bits, [Load(0x80100000, 0x200000, bytes(16))], entry))
    assert image.start.pc == 0x200004


def test_entry_option_replaces_the_header(bits: int) -> None:
    assert load(build_elf(bits, [Load(0x100000, 0x100000, bytes(16))], 0x100000), entry=0x100008).start.pc == 0x100008


def test_symbols_come_with_their_sizes(bits: int) -> None:
    image = load(build_elf(bits, [Load(0x100000, 0x100000, bytes(16))], 0x100000, symbols=[("main", 0x100000, 8)]))
    assert [tuple(symbol) for symbol in image.symbols] == [("main", 0x100000, 8, "T", "")]


def test_a_broken_symbol_table_does_not_keep_an_image_from_loading(bits: int) -> None:
    data = build_elf(bits, [Load(0x100000, 0x100000, bytes(16))], 0x100000, symbols=[("main", 0x100000, 8)])
    assert load(data[:-20]).symbols == []


def test_long_mode_starts_on_page_tables_that_map_the_first_4_gib_to_themselves() -> None:
    image = load(build_elf(64, [Load(0x100000, 0x100000, b"\xf4")], 0x100000))
    cr3 = image.start.registers["cr3"]

    def entry(table: int, index: int) -> int:
        return int.from_bytes(physical(image, table + 8 * index, 8), "little")

    for address in (0, 0x100000, 0x3FFFFFFF, 0x40000000, 0xFFFFFFFF):
        pointers = entry(cr3, 0) & ~0xFFF
        directory = entry(pointers, address >> 30) & ~0xFFF
        page = entry(directory, address >> 21 & 511)
        assert page & 0x83 == 0x83
        assert page & ~0x1FFFFF == address & ~0x1FFFFF
    assert entry(cr3, 1) == 0


def test_the_descriptor_table_has_flat_code_of_the_start_mode(bits: int) -> None:
    image = load(build_elf(bits, [Load(0x100000, 0x100000, b"\xf4")], 0x100000))
    gdt = image.start.gdt
    assert gdt is not None
    code = int.from_bytes(physical(image, gdt.base + gdt.code, 8), "little")
    assert bool(code >> 53 & 1) == (bits == 64)  # the L bit
    assert code >> 40 & 0x9A == 0x9A  # present, code, readable


def test_boot_tables_keep_clear_of_an_image_in_low_memory(bits: int) -> None:
    """An image over the usual place of the tables moves them; Image itself would refuse an overlap."""
    image = load(build_elf(bits, [Load(0x1000, 0x1000, bytes(0x8000))], 0x1000))
    assert image.start.gdt is not None
    assert image.start.gdt.base >= 0x9000


def test_an_image_that_does_not_fit_says_what_would_do() -> None:
    data = build_elf(32, [Load(0x10000000, 0x10000000, b"x")], 0x10000000)
    with pytest.raises(ImageError, match="needs 257 MiB of memory, the machine has 64 MiB"):
        load(data)


@pytest.mark.parametrize(
    ("loads", "reason"),
    [
        ([Load(0x100000, 0x100000, bytes(0x1000)), Load(0x200000, 0x100800, b"x")], "overlaps"),
        ([Load(0xFFFFF000, 0xFFFFF000, b"x", 0x2000)], "wraps around"),
        ([Load(0x100000, 0x100000, bytes(16), 8)], "0x10 bytes in the file but 0x8 in memory"),
        ([Load(0x100000, 0x100000, b"")], "nothing to load"),
        ([Load(0x200000, 0x200000, b"x")], "entry point 0x100000 is in no load segment"),
    ],
)
def test_segments_that_cannot_be_are_refused(loads: list[Load], reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        load(build_elf(32, loads, 0x100000))


def test_a_segment_past_the_end_of_the_file_names_its_header(bits: int) -> None:
    data = build_elf(bits, [Load(0x100000, 0x100000, bytes(64))], 0x100000)
    with pytest.raises(ImageError, match="runs past the end of the file") as caught:
        load(data[:-1])
    assert caught.value.offset == (64 if bits == 64 else 52)


@pytest.mark.parametrize(("machine", "name"), [(40, "ARM"), (183, "AArch64"), (243, "RISC-V"), (62, "machine 62")])
def test_an_elf_file_for_another_machine_is_named(machine: int, name: str) -> None:
    with pytest.raises(ImageError, match=name) as caught:
        load(build_elf(32, [Load(0x100000, 0x100000, b"x")], 0x100000, machine=machine))
    assert caught.value.offset == 18


def test_an_object_file_is_not_an_executable(bits: int) -> None:
    data = bytearray(build_elf(bits, [Load(0x100000, 0x100000, b"x")], 0x100000))
    struct.pack_into("<H", data, 16, 1)
    with pytest.raises(ImageError, match="relocatable object"):
        load(bytes(data))


@pytest.mark.parametrize(("width", "base"), [(16, 0x7C00), (32, 0x100000), (64, 0x100000)])
def test_a_flat_binary_has_a_default_place_for_each_word_size(width: int, base: int) -> None:
    image = load(b"\xeb\xfe", bits=width)
    assert physical(image, base, 2) == b"\xeb\xfe"
    assert image.start.bits == width
    assert image.start.pc == base


def test_base_and_entry_place_a_flat_binary() -> None:
    image = load(bytes(32), base=0x200000, entry=0x200010)
    assert image.segments[0].paddr == 0x200000
    assert image.start.pc == 0x200010
    assert image.start.bits == 32


def test_real_mode_above_64_kib_is_reached_through_cs() -> None:
    start = load(bytes(0x100), base=0x23450, bits=16).start
    assert (start.registers["cs"] << 4) + start.pc == 0x23450
    assert start.pc < 0x10000


def test_a_boot_sector_is_started_as_the_bios_would() -> None:
    start = load(bytes(510) + b"\x55\xaa").start
    assert (start.mode, start.pc, start.registers["cs"], start.registers["edx"]) == ("real", 0x7C00, 0, 0x80)
    assert start.gdt is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 16, "base": 0x200000}, "above 1 MiB"),
        ({"bits": 32, "base": 0x100000, "entry": 0x100002}, "outside the image"),
        ({"bits": 32, "base": 0x100000, "entry": 0xFFFFF}, "outside the image"),
        ({"bits": 32, "base": 0x4000000}, "needs 65 MiB"),
        ({"bits": 64, "base": 1 << 52}, "4 GiB|address space"),
    ],
)
def test_flat_binaries_out_of_reach_are_refused(options: dict[str, int], reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        load(b"\xeb\xfe", **options)


def test_a_plan_refuses_overlapping_segments() -> None:
    start = Start("protected", 0, {}, Gdt(0, 31))
    with pytest.raises(ImageError, match="0x1800-0x1801 overlaps segment 0x1000-0x2000"):
        Image("x", "flat", (Segment(0x1000, b"", 0x1000), Segment(0x1800, b"a")), start)
    assert Image("x", "flat", (Segment(0x1000, b"", 0x1000), Segment(0x2000, b"a")), start).end == 0x2001


def test_a_segment_cannot_be_smaller_than_its_data() -> None:
    with pytest.raises(ValueError, match="less than its data"):
        Segment(0, b"abc", 2)


def test_free_range_finds_the_lowest_gap_or_says_there_is_none() -> None:
    used = [Segment(0x1000, b"", 0x1000), Segment(0x4000, b"", 0x10)]
    assert free_range("x", used, 0x2000, 0x1000, 0x9000) == 0x2000
    assert free_range("x", used, 0x3000, 0x1000, 0x9000) == 0x5000
    with pytest.raises(ImageError, match="leaves no 0x5000 bytes"):
        free_range("x", used, 0x5000, 0x1000, 0x9000)


def test_identity_tables_stay_inside_their_size() -> None:
    assert identity_tables(0x1000).size == 6 * 4096
