"""Names of functions in files that change, and how many are kept."""

from __future__ import annotations

from dataclasses import dataclass

from probes import filesymbols
from probes.filesymbols import FileSymbols
from probes.programs import FileId
from tests.support.images import Load, build_elf


@dataclass
class GuestFile:
    """Implements ProgramFile."""

    id: FileId
    data: bytes
    regular: bool = True

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, size: int) -> bytes:
        return self.data[offset : offset + size]


def program(code: int, *names: str) -> bytes:
    """Of `code` bytes, with a function on each of its first."""
    symbols = [(name, 0x1000 + at, 1) for at, name in enumerate(names)]
    return build_elf(64, [Load(0x1000, 0x1000, b"\x90" * code)], 0x1000, symbols=symbols)


def test_file_that_is_written_over_is_read_again() -> None:
    """The same inode with another program in it has that one's functions; `again` false is what was there before."""
    symbols = FileSymbols()
    file = GuestFile(FileId(1, 2), program(64, "one", "two"))
    before = symbols.names(file)
    assert before.keys() == {"one", "two"}
    file.data = program(80, "zero", "one", "two")
    assert symbols.names(file, again=False) == before
    assert symbols.offset("/file", "two", file) == before["two"] + 1
    assert symbols.names(file, again=False).keys() == {"zero", "one", "two"}


def test_names_kept_are_bounded() -> None:
    """However many files have been mapped; those that were asked for last are known without reading."""
    symbols, data = FileSymbols(), program(64, *(f"function{number}" for number in range(64)))
    known = GuestFile(FileId(0, 0), data)
    count = 3 * filesymbols._MAX_NAMES // (64 + filesymbols._EACH)
    for number in range(1, count):
        symbols.names(GuestFile(FileId(0, number), data), again=False)
        assert len(symbols.names(known, again=False)) == 64
        known.data = b""
    assert sum(len(one.names) for one in symbols._known.values()) <= filesymbols._MAX_NAMES
