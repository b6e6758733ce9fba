"""Symbol tables: what a name or an address finds, and what is kept of a kernel's kallsyms."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.iface import ImageError
from emu.symbols import GuestSymbols, Symbol, SymbolTable, kallsyms, pack_symbols, unpack_symbols


def table(*rows: tuple[str, int, int, str]) -> SymbolTable:
    return SymbolTable(Symbol(*row) for row in rows)


def test_lookup_gives_every_symbol_of_a_name_in_address_order() -> None:
    """Static functions of one name exist several times; a caller must be able to see that."""
    symbols = table(("init", 0x2000, 8, "t"), ("init", 0x1000, 8, "t"), ("other", 0x1800, 8, "T"))
    assert [symbol.address for symbol in symbols.lookup("init")] == [0x1000, 0x2000]
    assert symbols.lookup("absent") == []


def test_find_covers_a_symbol_and_nothing_after_its_size() -> None:
    symbols = table(("f", 0x1000, 0x10, "T"), ("g", 0x1100, 0x10, "T"))
    found = symbols.find(0x100F)
    assert found is not None
    assert (found[0].name, found[1]) == ("f", 15)
    assert symbols.find(0x1010) is None
    assert symbols.find(0xFFF) is None


def test_a_symbol_without_a_size_reaches_to_the_next_address() -> None:
    """kallsyms has no sizes; two names at one address both get the distance to the next other address."""
    symbols = table(("f", 0x1000, 0, "T"), ("alias", 0x1000, 0, "t"), ("g", 0x1040, 0, "T"))
    assert [symbols.lookup(name)[0].size for name in ("f", "alias", "g")] == [0x40, 0x40, 0]


def test_an_absolute_symbol_covers_no_address() -> None:
    """Per-cpu offsets lie at low addresses; without this every user-space address would be named after one."""
    symbols = table(("this_cpu_off", 0x100, 0, "A"), ("_stext", 0xFFFFFFFF81000000, 0, "T"))
    assert symbols.find(0x100) is None
    assert symbols.find(0x401000) is None
    assert symbols.lookup("this_cpu_off")[0].address == 0x100


@pytest.mark.parametrize(
    ("names", "best"),
    [
        ((("label", "d"), ("function", "t")), "function"),
        ((("local", "t"), ("exported", "T")), "exported"),
        ((("ksys.part.0", "t"), ("ksys", "t")), "ksys"),
        ((("__vfs", "T"), ("vfs", "T")), "vfs"),
    ],
)
def test_find_prefers_the_name_a_person_would_use(names: tuple[tuple[str, str], ...], best: str) -> None:
    for order in (names, names[::-1]):
        found = table(*((name, 0x1000, 16, kind) for name, kind in order)).find(0x1004)
        assert found is not None
        assert found[0].name == best


def test_glob_matches_whole_names_with_case() -> None:
    symbols = table(("vfs_read", 1, 1, "T"), ("vfs_write", 2, 1, "T"), ("VFS_x", 3, 1, "T"), ("do_vfs_read", 4, 1, "T"))
    assert [symbol.name for symbol in symbols.glob("vfs_*")] == ["vfs_read", "vfs_write"]
    assert [symbol.name for symbol in symbols.glob("vfs_read")] == ["vfs_read"]


@pytest.mark.parametrize(
    ("typed", "meant"), [("vfs_raed", "vfs_read"), ("openat2", "do_sys_openat2"), ("VFS_READ", "vfs_read")]
)
def test_suggest_puts_the_likely_name_first(typed: str, meant: str) -> None:
    symbols = table(("vfs_read", 1, 1, "T"), ("do_sys_openat2", 2, 1, "t"), ("start_kernel", 3, 1, "T"))
    assert symbols.suggest(typed)[0] == meant


def test_suggest_has_nothing_for_nonsense() -> None:
    assert table(("vfs_read", 1, 1, "T")).suggest("") == []
    assert table(("vfs_read", 1, 1, "T")).suggest("qqqqqq") == []


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 30)), max_size=20), st.integers(0, 260))
def test_find_agrees_with_a_search_of_every_symbol(rows: list[tuple[int, int]], vaddr: int) -> None:
    """The answer is a symbol at the nearest address at or below, and only if one there reaches that far."""
    symbols = table(*((f"s{index}", address, size, "T") for index, (address, size) in enumerate(rows)))
    found = symbols.find(vaddr)
    below = [symbol for symbol in symbols if symbol.address <= vaddr]
    nearest = [symbol for symbol in below if symbol.address == max(other.address for other in below)]
    if found is None:
        assert any(symbol.address + max(symbol.size, 1) <= vaddr for symbol in nearest) or not nearest
    else:
        assert found[0] in nearest
        assert found[1] == vaddr - found[0].address < max(found[0].size, 1)


def test_kallsyms_of_a_file_that_is_no_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="not a Linux kernel"):
        kallsyms(b"\x7fELF" + bytes(500), cache=tmp_path)


def test_kallsyms_of_a_kernel_without_them_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no kallsyms found"):
        kallsyms(b"\x7fELF\x02\x01" + bytes(100) + b"Linux version 6.1.0 (x)" + bytes(500), cache=tmp_path)
    assert list(tmp_path.rglob("*")) == []


def kept_file(cache: Path, vmlinux: bytes, symbols: list[Symbol]) -> Path:
    path = cache / "symbols" / hashlib.sha256(vmlinux).hexdigest()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack_symbols(symbols))
    return path


def test_kept_symbols_are_read_back_without_a_search(tmp_path: Path) -> None:
    """The file is no kernel at all: only what was kept under its hash can answer."""
    kept_file(
        tmp_path, b"image", [Symbol("f", 0xFFFFFFFF81000000, 0, "t"), Symbol("g\xe9", 0xFFFFFFFF81000010, 0, "D")]
    )
    lines: list[str] = []
    symbols = kallsyms(b"image", cache=tmp_path, progress=lines.append)
    assert list(symbols) == [Symbol("f", 0xFFFFFFFF81000000, 16, "t"), Symbol("g\xe9", 0xFFFFFFFF81000010, 0, "D")]
    assert lines == []


@given(st.data())
def test_a_damaged_kept_file_is_ignored(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any byte changed or cut: the table is searched for again, which here fails, rather than half a table returned."""
    cache = tmp_path_factory.mktemp("cache")
    path = kept_file(cache, b"image", [Symbol(f"f{index}", index * 16, 0, "t") for index in range(20)])
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        damaged = whole[:position]
    else:
        damaged = whole[:position] + bytes([whole[position] ^ data.draw(st.integers(1, 255))]) + whole[position + 1 :]
    path.write_bytes(damaged)
    with pytest.raises(ImageError):
        kallsyms(b"image", cache=cache)


SYMBOLS = st.builds(
    Symbol,
    name=st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=8),
    address=st.integers(0, (1 << 64) - 1),
    size=st.integers(0, (1 << 64) - 1),
    kind=st.sampled_from("tTdDbBrRaAwWvV?"),
    module=st.just(""),
)


@given(st.lists(SYMBOLS, max_size=8))
def test_packed_symbols_come_back_as_they_were(symbols: list[Symbol]) -> None:
    assert unpack_symbols(pack_symbols(symbols)) == symbols


def test_a_name_with_a_newline_does_not_spoil_the_others() -> None:
    """Such a name can only come from a hostile file; it must not make a snapshot unreadable."""
    assert [one.name for one in unpack_symbols(pack_symbols([Symbol("a\nb", 1), Symbol("c", 2)]))] == ["a b", "c"]


@given(st.binary(max_size=60))
def test_bytes_that_are_no_symbol_table_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="symbol table"):
        unpack_symbols(data)


def test_symbols_of_modules_come_and_go() -> None:
    """Beside the image's, which go first; by name, with the module's name before it, by address and by pattern."""
    symbols = GuestSymbols(SymbolTable([Symbol("shared", 0x1000, 16, "T"), Symbol("image_only", 0x2000, 16, "T")]))
    symbols.load("mod", [Symbol("shared", 0x9000, 16, "t"), Symbol("inner", 0x9010, 16, "t")])
    assert [(one.address, one.module) for one in symbols.lookup("shared")] == [(0x1000, ""), (0x9000, "mod")]
    assert [one.address for one in symbols.lookup("mod:shared")] == [0x9000]
    assert symbols.lookup("mod:image_only") == symbols.lookup("other:shared") == []
    found = symbols.find(0x9012)
    assert found is not None
    assert (found[0].name, found[1]) == ("inner", 2)
    assert [one.name for one in symbols.glob("*n*")] == ["image_only", "inner"]
    assert symbols.suggest("mod:iner") == ["mod:inner"]
    assert (len(symbols), [one.name for one in symbols]) == (4, ["shared", "image_only", "shared", "inner"])
    assert symbols.code() == [("mod", 0x9000, 0x9020)]
    version = symbols.version
    symbols.unload("mod")
    symbols.unload("mod")
    assert (symbols.modules, symbols.version) == ([], version + 1)
    assert symbols.lookup("inner") == []
