"""Stock Debian kernels through fetch and the loaders; from Debian's mirrors once, then from the cache."""

from __future__ import annotations

import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from emu.images.detect import load_kernel
from emu.images.elf import ElfFile
from emu.images.initramfs import EXEC_STATUS
from emu.images.plan import Image
from emu.images.symbolelf import symbol_elf
from emu.symbols import SymbolTable, kallsyms
from tests.support.images import RealKernel, physical, real_kernel

__all__ = ["real_kernel"]
MEMORY = 256 << 20


@pytest.fixture(scope="module")
def image(real_kernel: RealKernel) -> Image:
    files = real_kernel.fetched
    return load_kernel("vmlinuz", files.kernel.read_bytes(), initrd=files.initramfs.read_bytes(), memory=MEMORY)


@pytest.fixture(scope="module")
def symbols(image: Image) -> SymbolTable:
    assert image.kernel is not None
    return kallsyms(bytes(image.kernel.vmlinux), progress=print)


def test_a_stock_kernel_becomes_a_plan_of_its_word_size(real_kernel: RealKernel, image: Image) -> None:
    kernel = image.kernel
    assert kernel is not None
    release = real_kernel.fetched.package.removeprefix("linux-image-").removesuffix("-unsigned")
    assert kernel.banner.startswith(f"Linux version {release} ")
    assert kernel.bits == image.start.bits == real_kernel.bits
    assert kernel.virtual_offset == (0xFFFFFFFF80000000 if kernel.bits == 64 else 0xC0000000)
    assert kernel.build_id is not None
    assert len(kernel.build_id) == 20


def test_the_entry_point_is_code_in_the_first_segment(image: Image) -> None:
    """startup_64 of 6.1 and startup_32 begin the text; 6.12's entry lies further in."""
    assert image.segments[0].paddr == 0x1000000
    assert image.segments[0].paddr <= image.start.pc < image.segments[0].paddr + 0x1000
    assert any(physical(image, image.start.pc, 16))


def test_the_initramfs_is_where_the_zero_page_says(real_kernel: RealKernel, image: Image) -> None:
    page = physical(image, image.start.registers["rsi" if image.start.bits == 64 else "esi"], 4096)
    paddr, size = struct.unpack_from("<II", page, 0x218)
    assert physical(image, paddr, size) == real_kernel.fetched.initramfs.read_bytes()


def test_busybox_is_a_static_program_of_the_kernels_word_size(real_kernel: RealKernel) -> None:
    elf = ElfFile("busybox", real_kernel.fetched.busybox.read_bytes())
    assert elf.bits == real_kernel.bits
    assert all(program.kind != 3 for program in elf.programs)  # PT_INTERP: no loader is asked for


def test_kallsyms_name_the_functions_that_people_probe(image: Image, symbols: SymbolTable) -> None:
    assert len(symbols) > 40_000
    for name in ("do_sys_openat2", "start_kernel", "panic", "vfs_read"):
        (symbol,) = symbols.lookup(name)
        assert symbol.kind in "tT"
        assert symbols.find(symbol.address + 3) == (symbol, 3)


def test_kallsyms_addresses_are_where_the_functions_begin(image: Image, symbols: SymbolTable) -> None:
    """A traced function begins with the call of ftrace's entry (endbr64 may come first), as it was compiled."""
    assert image.kernel is not None
    for name in ("do_sys_openat2", "vfs_read", "vfs_write"):
        code = physical(image, symbols.lookup(name)[0].address - image.kernel.virtual_offset, 9)
        assert code.removeprefix(b"\xf3\x0f\x1e\xfa")[0] in (0xE8, 0x0F)


def test_kallsyms_are_read_back_without_a_second_search(image: Image, symbols: SymbolTable) -> None:
    assert image.kernel is not None
    lines: list[str] = []
    again = kallsyms(bytes(image.kernel.vmlinux), progress=lines.append)
    assert lines == []
    assert list(again) == list(symbols)


def test_gdb_finds_the_kernels_functions_in_the_symbol_file(image: Image, symbols: SymbolTable, tmp_path: Path) -> None:
    kernel = image.kernel
    assert kernel is not None
    path = tmp_path / "kernel"
    path.write_bytes(symbol_elf(symbols, bits=kernel.bits, sections=kernel.sections, build_id=kernel.build_id))
    address = symbols.lookup("vfs_read")[0].address
    commands = ["-ex", f"info symbol {address + 5:#x}", "-ex", "break start_kernel"]
    gdb = [str(Path(sys.executable).with_name("gdb")), "-nx", "-batch", "-iex", "set debuginfod enabled off"]
    done = subprocess.run(
        [*gdb, *commands, str(path)], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True
    )
    start = symbols.lookup("start_kernel")[0].address
    assert done.stdout.splitlines() == ["vfs_read + 5 in section .text", f"Breakpoint 1 at {start:#x}"]


def test_fetched_files_are_plain_files_in_the_cache(real_kernel: RealKernel) -> None:
    files = real_kernel.fetched
    for path in (files.kernel, files.initramfs, files.busybox):
        assert stat.S_ISREG(path.lstat().st_mode)
        assert path.parent == files.kernel.parent
    assert EXEC_STATUS.search(files.initramfs.read_bytes().decode("latin-1")) is None
