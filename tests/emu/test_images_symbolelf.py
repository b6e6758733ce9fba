"""The symbol file for stock gdb, as stock gdb and an independent ELF reader see it."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from emu.images.plan import Section
from emu.images.symbolelf import symbol_elf
from emu.symbols import Symbol

BASE = {32: 0xC1000000, 64: 0xFFFFFFFF81000000}
GDBS = sorted({str(path) for path in (Path(sys.executable).with_name("gdb"), shutil.which("gdb")) if path})
"""Stock gdb 18 comes with the test extra; the system's is used too, where there is one."""


@pytest.fixture(params=[32, 64])
def bits(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


@pytest.fixture
def elf(bits: int) -> bytes:
    base = BASE[bits]
    symbols = [
        Symbol("this_cpu_off", 0x100, 0, "A"),
        Symbol("vfs_read", base + 0x100, 0x80, "T"),
        Symbol("local_helper", base + 0x180, 0x20, "t"),
        Symbol("linux_banner", base + 0x2010, 0x10, "R"),
        Symbol("init_task", base + 0x3000, 0x40, "D"),
        Symbol("_end", base + 0x4000, 0, "B"),
        Symbol("outside", base + 0x100000, 4, "d"),
    ]
    sections = [
        Section(".data", base + 0x3000, 0x1000, True, False),
        Section(".text", base, 0x1000, False, True),
        Section(".rodata", base + 0x2000, 0x100, False, False),
    ]
    return symbol_elf(symbols, bits=bits, sections=sections, build_id=bytes(range(20)))


def ask_gdb(gdb: str, path: Path, *commands: str) -> list[str]:
    arguments = [part for command in commands for part in ("-ex", command)]
    done = subprocess.run(
        [gdb, "-nx", "-batch", "-iex", "set debuginfod enabled off", *arguments, str(path)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize("gdb", GDBS)
def test_gdb_has_names_types_and_places(gdb: str, elf: bytes, bits: int, tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(elf)
    base = BASE[bits]
    lines = ask_gdb(
        gdb,
        path,
        "show architecture",
        f"info symbol {base + 0x104:#x}",
        "info address local_helper",
        "print &init_task",
        "break *vfs_read",
    )
    assert ("i386:x86-64" if bits == 64 else '"i386"') in lines[0]
    assert lines[1] == "vfs_read + 4 in section .text"
    assert lines[2] == f'Symbol "local_helper" is at {base + 0x180:#x} in a file compiled without debugging.'
    assert lines[3] == f"$1 = (<data variable, no debug info> *) {base + 0x3000:#x} <init_task>"
    assert lines[4] == f"Breakpoint 1 at {base + 0x100:#x}"


def test_there_are_no_bytes_for_gdb_to_take_for_memory(elf: bytes) -> None:
    """Every allocated section is NOBITS: a debugger must read code from the target, where the kernel has patched it."""
    allocated = [section for section in ELFFile(io.BytesIO(elf)).iter_sections() if section["sh_flags"] & 2]
    assert [section.name for section in allocated] == [".text", ".rodata", ".data"]
    assert {section["sh_type"] for section in allocated} == {"SHT_NOBITS"}


def test_symbols_have_the_type_binding_and_section_of_their_kind(elf: bytes) -> None:
    file = ELFFile(io.BytesIO(elf))
    table = file.get_section_by_name(".symtab")
    rows = {
        symbol.name: (symbol["st_info"]["type"], symbol["st_info"]["bind"], symbol["st_shndx"], symbol["st_size"])
        for symbol in table.iter_symbols()
    }
    index = {section.name: number for number, section in enumerate(file.iter_sections())}
    assert rows["vfs_read"] == ("STT_FUNC", "STB_GLOBAL", index[".text"], 0x80)
    assert rows["local_helper"] == ("STT_FUNC", "STB_LOCAL", index[".text"], 0x20)
    assert rows["linux_banner"] == ("STT_OBJECT", "STB_GLOBAL", index[".rodata"], 0x10)
    assert rows["_end"] == ("STT_OBJECT", "STB_GLOBAL", index[".data"], 0)
    assert rows["this_cpu_off"][2] == rows["outside"][2] == "SHN_ABS"


def test_local_symbols_come_first_as_the_abi_has_it(elf: bytes) -> None:
    table = ELFFile(io.BytesIO(elf)).get_section_by_name(".symtab")
    bindings = [symbol["st_info"]["bind"] for symbol in table.iter_symbols()]
    first_global = table["sh_info"]
    assert set(bindings[:first_global]) == {"STB_LOCAL"}
    assert "STB_LOCAL" not in bindings[first_global:]


def test_the_entry_point_is_in_a_section(elf: bytes) -> None:
    """`info files` has gdb miss one that is in none."""
    file = ELFFile(io.BytesIO(elf))
    assert file["e_entry"] == file.get_section_by_name(".text")["sh_addr"] != 0


def test_the_build_id_is_a_gnu_note(elf: bytes) -> None:
    (note,) = ELFFile(io.BytesIO(elf)).get_section_by_name(".note.gnu.build-id").iter_notes()
    assert (note["n_name"], note["n_type"], note["n_desc"]) == ("GNU", "NT_GNU_BUILD_ID", bytes(range(20)).hex())


def test_without_a_build_id_there_is_no_note(bits: int) -> None:
    file = ELFFile(io.BytesIO(symbol_elf([], bits=bits, sections=[])))
    assert file.get_section_by_name(".note.gnu.build-id") is None
