"""Linux kernels as plans: what the boot protocol asks of a loader, and every file that is not a kernel."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import struct

import lz4.block
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from emu.iface import ImageError
from emu.images.detect import load_image, load_kernel
from emu.images.linux import DEFAULT_APPEND
from emu.images.plan import Image
from tests.support.images import (
    BANNER,
    Load,
    build_bzimage,
    build_elf,
    build_kernel,
    build_vmlinux,
    multiboot1_header,
    multiboot2_header,
    physical,
)

MEMORY = 64 << 20


def load(data: bytes, *, initrd: bytes = b"", append: str = "", memory: int = MEMORY) -> Image:
    return load_kernel("vmlinuz", data, initrd=initrd, append=append, memory=memory)


def zero_page(image: Image) -> bytes:
    return physical(image, image.start.registers["rsi" if image.start.bits == 64 else "esi"], 4096)


def lz4_legacy(data: bytes) -> bytes:
    """As `lz4 -l` writes it: magic, then blocks of up to 8 MiB, each with its compressed size before it."""
    out = b"\x02\x21\x4c\x18"
    for start in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[start : start + (8 << 20)], store_size=False)
        out += struct.pack("<I", len(block)) + block
    return out


COMPRESSIONS = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "lz4": lz4_legacy,
    "zstd": zstandard.ZstdCompressor(write_content_size=False).compress,
}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_payload_of_each_compression_becomes_the_kernel(name: str) -> None:
    """Followed by the four bytes of size that Linux's build appends, which belong to no format."""
    vmlinux = build_vmlinux(64)
    image = load(build_bzimage(COMPRESSIONS[name](vmlinux) + struct.pack("<I", len(vmlinux))))
    assert image.kernel is not None
    assert bytes(image.kernel.vmlinux) == vmlinux
    assert physical(image, 0x1000040, len(BANNER)) == BANNER


def test_lz4_of_several_blocks_is_put_together() -> None:
    # 9 MiB: one full block and a part of one.
    loads = [Load(0x1000000, 0x1000000, BANNER + bytes(range(256)) * 0x9000)]
    vmlinux = build_elf(64, loads, 0x1000000)
    image = load(build_bzimage(lz4_legacy(vmlinux) + bytes(4), init_size=16 << 20))
    assert bytes(image.segments[0].data) == loads[0].data


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("packed", [True, False], ids=["bzImage", "vmlinux"])
def test_a_kernel_starts_at_its_physical_entry_in_its_word_size(bits: int, packed: bool) -> None:
    image = load(build_kernel(bits) if packed else build_vmlinux(bits))
    assert image.kind == "linux"
    assert image.start.pc == 0x1000020
    assert image.start.bits == bits
    assert image.start.gdt is not None
    assert (image.start.gdt.code, image.start.gdt.data) == (0x10, 0x18)  # __BOOT_CS, __BOOT_DS


@pytest.mark.parametrize(("bits", "offset"), [(32, 0xC0000000), (64, 0xFFFFFFFF80000000)])
def test_what_is_known_of_a_kernel(bits: int, offset: int) -> None:
    kernel = load(build_kernel(bits)).kernel
    assert kernel is not None
    assert (kernel.bits, kernel.virtual_offset) == (bits, offset)
    assert kernel.banner == BANNER[:-1].decode()
    assert kernel.build_id == b"\xde\xad\xbe\xef"


@pytest.mark.parametrize("packed", [True, False], ids=["bzImage", "vmlinux"])
def test_the_zero_page_tells_the_kernel_what_it_must_know(packed: bool) -> None:
    """Loader type, setup header, command line, initrd and memory map, at zero-page.rst's offsets."""
    image = load(build_kernel() if packed else build_vmlinux(64), initrd=b"initrd", append="quiet")
    page = zero_page(image)
    assert page[0x202:0x206] == b"HdrS"
    assert struct.unpack_from("<H", page, 0x206) == (0x20F,)
    assert page[0x210] == 0xFF
    assert page[0x211] & 1
    (command,) = struct.unpack_from("<I", page, 0x228)
    text = f"{DEFAULT_APPEND} quiet".encode() + b"\0"
    assert physical(image, command, len(text)) == text
    paddr, size = struct.unpack_from("<II", page, 0x218)
    assert physical(image, paddr, size) == b"initrd"
    table = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * index) for index in range(page[0x1E8])]
    assert (0x100000, MEMORY - 0x100000, 1) in table
    assert sum(row[1] for row in table if row[2] == 1) == MEMORY - 0x100000 + 0x9FC00


def test_a_kernel_s_title_has_the_number_of_its_build() -> None:
    """A packaged vmlinux has the banner twice, first as it was before the last link."""
    image = load(build_vmlinux(64) + b"Linux version 6.1.0-test #1 (built in a test)\n\0")
    assert image.kernel is not None
    assert image.kernel.banner == "Linux version 6.1.0-test #1 (built in a test)"


def test_the_kernel_is_given_the_same_random_seed_each_time() -> None:
    """One entry of type SETUP_RNG_SEED, 32 bytes, not all alike, at the end of a list of one."""
    seeds = []
    for image in (load(build_kernel()), load(build_kernel(), append="quiet")):
        (at,) = struct.unpack_from("<Q", zero_page(image), 0x250)
        following, kind, size = struct.unpack("<QII", physical(image, at, 16))
        assert (following, kind, size) == (0, 9, 32)
        seeds.append(physical(image, at + 16, size))
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) > 16


def test_no_initrd_is_no_ramdisk() -> None:
    assert struct.unpack_from("<II", zero_page(load(build_kernel())), 0x218) == (0, 0)


@pytest.mark.parametrize(("limit", "top"), [(0x7FFFFFFF, MEMORY), (0x2FFFFFF, 0x3000000)])
def test_an_initrd_lies_as_high_as_memory_and_the_kernel_allow(limit: int, top: int) -> None:
    data = build_bzimage(gzip.compress(build_vmlinux(64)), initrd_addr_max=limit)
    paddr, size = struct.unpack_from("<II", zero_page(load(data, initrd=bytes(5000))), 0x218)
    assert paddr % 4096 == 0
    assert top - 2 * 4096 <= paddr + size <= top


def test_an_initrd_does_not_lie_in_what_the_kernel_clears_for_itself() -> None:
    """init_size reaches past the ELF segments: the kernel uses that memory before it looks at the memory map."""
    data = build_bzimage(gzip.compress(build_vmlinux(64)), init_size=0x2FF0000)
    assert load(data, initrd=bytes(0x8000)).kind == "linux"
    with pytest.raises(ImageError, match=r"needs 65 MiB of memory, not 64$"):
        load(data, initrd=bytes(0x18000))


def test_an_initrd_without_room_below_the_kernels_limit_is_refused() -> None:
    """More memory would not help there, so it is not asked for."""
    data = build_bzimage(gzip.compress(build_vmlinux(64)), initrd_addr_max=0x3FF)
    with pytest.raises(ImageError, match=r"no room for an initrd of 5000 bytes: .* and below 0x400$"):
        load(data, initrd=bytes(5000))


def test_a_command_line_longer_than_the_kernel_takes_is_refused() -> None:
    room = 400 - len(DEFAULT_APPEND) - 1
    data = build_bzimage(gzip.compress(build_vmlinux(64)), cmdline_size=400)
    assert load(data, append="x" * room).kind == "linux"
    with pytest.raises(ImageError, match="401 bytes: this kernel takes at most 400"):
        load(data, append="x" * (room + 1))


def test_a_kernel_larger_than_memory_says_what_would_do() -> None:
    with pytest.raises(ImageError, match="needs 18 MiB of memory, the machine has 16 MiB"):
        load(build_kernel(), memory=16 << 20)


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_payload_that_grows_without_end_is_stopped(name: str) -> None:
    """24 MiB of zeros in a small file, under a header that promises 2 MiB."""
    payload = COMPRESSIONS[name](bytes(24 << 20))
    with pytest.raises(ImageError, match="grows past the 0x200000 bytes") as caught:
        load(build_bzimage(payload))
    assert caught.value.offset == 1024 + 16


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_payload_cut_in_the_middle_is_refused(name: str) -> None:
    payload = COMPRESSIONS[name](build_vmlinux(64))
    with pytest.raises(ImageError, match=rf"{name} payload|not an ELF|lies outside|past the end"):
        load(build_bzimage(payload[: len(payload) // 2]))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (build_bzimage(b"\x89LZO\0"), "lzo is not supported"),
        (build_bzimage(b"junk"), "no known format"),
        (build_bzimage(gzip.compress(b"no kernel")), "payload is not an ELF file"),
        (build_bzimage(gzip.compress(b"")), "gzip payload is empty"),
        (build_bzimage(b""), "payload of 0x0 bytes"),
        (build_bzimage(b"x", version=0x207), "boot protocol 2.07 is too old"),
        (build_kernel()[:-1], "is not in the file"),
        (build_kernel()[:0x250], "cut short in its setup header"),
        (build_bzimage(gzip.compress(build_elf(64, [Load(0, 0x100000, b"x")], 0, machine=183))), "AArch64"),
    ],
)
def test_a_broken_bzimage_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        load(data)


@pytest.mark.parametrize(
    "loads", [[Load(0x400000, 0x400000, b"\xf4")], [Load(0, 0, BANNER)]], ids=["no banner", "low memory"]
)
def test_an_ordinary_program_is_not_taken_for_a_kernel(loads: list[Load]) -> None:
    with pytest.raises(ImageError, match="an ELF file, but not a Linux kernel"):
        load(build_elf(64, loads, loads[0].vaddr))


FOREIGN = {
    "empty": (b"", "the file is empty"),
    "script": (b"#!/bin/sh\n", "a script"),
    "windows": (b"MZ\x90" + bytes(200), "a PE"),
    "gzip of nothing": (gzip.compress(b""), "a gzip file"),
    "arm64": (b"MZ" + bytes(0x36) + b"ARM\x64" + bytes(64), "a Linux kernel for AArch64"),
    "arm elf": (build_elf(32, [Load(0, 0, b"x")], 0, machine=40), "ELF file for ARM"),
    "package": (b"!<arch>\ndebian-binary   ", "an archive"),
    "cpio": (b"070701" + bytes(100), "a cpio archive"),
    "noise": (bytes(range(256)) * 40, "not a Linux kernel|neither ELF nor multiboot"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_named_in_one_line(name: str) -> None:
    data, reason = FOREIGN[name]
    for loader in (load, lambda data: load_image("file", data, memory=MEMORY)):
        with pytest.raises(ImageError, match=reason) as caught:
            loader(data)
        assert "\n" not in str(caught.value)
        assert "offset 0x0" not in str(caught.value)  # it is the whole file that is wrong


def test_load_of_a_linux_kernel_points_to_boot() -> None:
    with pytest.raises(ImageError, match="gdbstub boot"):
        load_image("vmlinuz", build_kernel(), memory=MEMORY)


HEADERS = {
    "bzimage": build_kernel(64),
    "bzimage xz": build_bzimage(lzma.compress(build_vmlinux(32))),
    "bzimage lz4": build_bzimage(lz4_legacy(build_vmlinux(64))),
    "bzimage zstd": build_bzimage(COMPRESSIONS["zstd"](build_vmlinux(64))),
    "vmlinux 64": build_vmlinux(64),
    "elf 32": build_elf(32, [Load(0x100000, 0x100000, bytes(16))], 0x100000, symbols=[("a", 0x100000, 4)]),
    "elf 64": build_elf(64, [Load(0x100000, 0x100000, bytes(16))], 0x100000, symbols=[("a", 0x100000, 4)]),
    "multiboot 1": multiboot1_header(0x10003, 0x100000, 0x100000, 0, 0, 0x100020) + bytes(64),
    "multiboot 2": multiboot2_header((2, 0, struct.pack("<4I", *[0x100000] * 2, 0, 0)), (3, 0, b"\0\0\x10\0"))
    + bytes(64),
}


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(HEADERS)),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=8)), max_size=4),
    st.one_of(st.none(), st.integers(0, 2000)),
)
def test_damaged_images_load_or_are_refused_and_nothing_else(
    name: str, changes: list[tuple[int, bytes]], cut: int | None
) -> None:
    """Any bytes changed, any length: a plan that fits comes back, or ImageError."""
    data = bytearray(HEADERS[name])
    for position, value in changes:
        position %= len(data)
        data[position : position + len(value)] = value
    damaged = bytes(data[:cut])
    for loader in (load, lambda data: load_image("file", data, memory=MEMORY)):
        with contextlib.suppress(ImageError):
            assert loader(damaged).end <= MEMORY


@given(st.binary(max_size=400))
def test_random_bytes_are_refused(data: bytes) -> None:
    for loader in (load, lambda data: load_image("file", data, memory=MEMORY)):
        with pytest.raises(ImageError):
            loader(data)


def test_bzimage_without_its_last_bytes_is_refused_though_the_payload_is_whole() -> None:
    """The header says how long the file is; what a broken download lost may be needed."""
    whole = bytearray(build_kernel() + bytes(-len(build_kernel()) % 16))
    struct.pack_into("<I", whole, 0x1F4, (len(whole) - (whole[0x1F1] + 1) * 512) // 16)
    load(bytes(whole))
    with pytest.raises(ImageError, match="cut short"):
        load(bytes(whole[:-1]))
