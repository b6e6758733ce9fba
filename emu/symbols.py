"""Names for addresses: the table that every room asks, and the symbols a stripped kernel carries in its kallsyms.

Rules: standard library, `emu.iface` and `emu.images.cache`; vmlinux-to-elf is imported here and nowhere else. Any
thread; a SymbolTable does not change once built, a machine's GuestSymbols do with its modules.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import logging
import re
import struct
import sys
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from emu.iface import ImageError
from emu.images.cache import Progress, cache_root, quiet, write_atomic

ABSOLUTE = "Aa"
"""Kinds whose value is a number or a per-cpu offset, not a place: they are found by name only."""


class Symbol(NamedTuple):
    """One name. A tuple, because a kernel has 150,000 of them and a table must be there in a fraction of a second."""

    name: str
    address: int
    """Virtual address."""
    size: int = 0
    """Bytes; 0 where the file does not say (SymbolTable then extends it to the next symbol)."""
    kind: str = "?"
    """The letter nm and /proc/kallsyms print: T t text, D d data, B b bss, R r rodata, W w V v weak, A a absolute."""
    module: str = ""
    """The kernel module it is of, empty for the image itself."""


class SymbolTable:
    """Symbols by name and by address; the `SymbolTable` of `emu.iface`. Iterating gives Symbols in address order."""

    def __init__(self, symbols: Iterable[Symbol] = ()) -> None:
        self._symbols = _sized(sorted(symbols, key=itemgetter(1)))
        self._by_name: dict[str, list[int]] = {}
        self._starts: list[int] = []  # distinct addresses, ascending
        self._covering: list[int] = []  # for each of them: index of the symbol that speaks for it
        for index, (name, address, _, kind, _) in enumerate(self._symbols):
            self._by_name.setdefault(name, []).append(index)
            if kind in ABSOLUTE:
                continue
            if not self._starts or self._starts[-1] != address:
                self._starts.append(address)
                self._covering.append(index)
            elif _rank(self._symbols[index]) < _rank(self._symbols[self._covering[-1]]):
                self._covering[-1] = index

    def __len__(self) -> int:
        return len(self._symbols)

    def __iter__(self) -> Iterator[Symbol]:
        return iter(self._symbols)

    def lookup(self, name: str) -> Sequence[Symbol]:
        """Every symbol of exactly that name in address order; empty if none."""
        return [self._symbols[index] for index in self._by_name.get(name, ())]

    def find(self, vaddr: int) -> tuple[Symbol, int] | None:
        """The symbol that covers `vaddr` and the offset into it. A symbol without a size covers its own address."""
        position = bisect_right(self._starts, vaddr) - 1
        if position < 0:
            return None
        symbol = self._symbols[self._covering[position]]
        offset = vaddr - symbol.address
        return (symbol, offset) if offset < max(symbol.size, 1) else None

    def glob(self, pattern: str) -> Sequence[Symbol]:
        """Symbols whose whole name matches a shell pattern (`*`, `?`, `[...]`; case counts), in address order."""
        if not any(character in pattern for character in "*?["):
            return self.lookup(pattern)
        matches = re.compile(fnmatch.translate(pattern)).match
        found = [index for name, indices in self._by_name.items() if matches(name) for index in indices]
        return [self._symbols[index] for index in sorted(found)]

    def suggest(self, name: str) -> Sequence[str]:
        """At most five names a person may have meant, best first: parts of a longer name, and misspellings."""
        wanted = _pairs(name)
        slack = max(2, len(name) // 4)
        # difflib over every name of a kernel takes seconds; length and shared letter pairs leave it those that can win.
        alike = {
            candidate.lower(): candidate
            for candidate in self._by_name
            if abs(len(candidate) - len(name)) <= slack and 2 * len(wanted & _pairs(candidate)) >= len(wanted)
        }
        close = [alike[match] for match in difflib.get_close_matches(name.lower(), alike, n=5, cutoff=0.75)]
        longer = sorted((candidate for candidate in self._by_name if name and name in candidate), key=len)
        return [*dict.fromkeys(close + longer)][:5]


class GuestSymbols:
    """A machine's symbols: those of its image, and of modules as they come and go. Implements iface.SymbolTable.

    A name may say its module, as in "ext4:ext4_readdir". The machine's thread only.
    """

    def __init__(self, image: SymbolTable) -> None:
        self.image = image
        self.version = 0
        """Changes with each module that comes or goes."""
        self._modules: dict[str, SymbolTable] = {}

    @property
    def modules(self) -> Sequence[str]:
        """The names of those whose symbols are here."""
        return list(self._modules)

    def code(self) -> list[tuple[str, int, int]]:
        """(module, start, end) of what is known of each module's code."""
        found = []
        for module, table in self._modules.items():
            text = [symbol for symbol in table if symbol.kind in "TtWw"]
            if text:
                end = max(symbol.address + max(symbol.size, 1) for symbol in text)
                found.append((module, min(symbol.address for symbol in text), end))
        return found

    def load(self, module: str, symbols: Iterable[Symbol]) -> None:
        """A module has come, or has other symbols now."""
        self._modules[module] = SymbolTable(symbol._replace(module=module) for symbol in symbols)
        self.version += 1

    def unload(self, module: str) -> None:
        """No error where it is not there."""
        if self._modules.pop(module, None) is not None:
            self.version += 1

    def __len__(self) -> int:
        return len(self.image) + sum(map(len, self._modules.values()))

    def __iter__(self) -> Iterator[Symbol]:
        yield from self.image
        for table in self._modules.values():
            yield from table

    def lookup(self, name: str) -> Sequence[Symbol]:
        """See SymbolTable.lookup; the image's come first."""
        found = self.image.lookup(name)
        if self._modules:
            module, colon, plain = name.partition(":")
            if colon:
                return self._modules[module].lookup(plain) if module in self._modules else []
            found = [*found, *(symbol for table in self._modules.values() for symbol in table.lookup(name))]
        return found

    def find(self, vaddr: int) -> tuple[Symbol, int] | None:
        """See SymbolTable.find."""
        for table in self._modules.values():
            found = table.find(vaddr)
            if found is not None:
                return found
        return self.image.find(vaddr)

    def glob(self, pattern: str) -> Sequence[Symbol]:
        """See SymbolTable.glob; the image's come first."""
        return [
            *self.image.glob(pattern),
            *(symbol for table in self._modules.values() for symbol in table.glob(pattern)),
        ]

    def suggest(self, name: str) -> Sequence[str]:
        """See SymbolTable.suggest; a module's are better for a name that says one."""
        module, colon, plain = name.partition(":")
        if colon and module in self._modules:
            return [f"{module}:{near}" for near in self._modules[module].suggest(plain)]
        near = [match for table in self._modules.values() for match in table.suggest(name)]
        return [*dict.fromkeys([*self.image.suggest(name), *near])][:5]


def _sized(ordered: Sequence[Symbol]) -> list[Symbol]:
    """`ordered` by address, sizes of 0 extended to the next higher address; absolute ones and the last stay 0."""
    sized: list[Symbol] = []
    following: int | None = None
    current: int | None = None
    for symbol in reversed(ordered):
        name, address, size, kind, module = symbol
        if address != current:
            following, current = current, address
        if not size and following is not None and kind not in ABSOLUTE:
            symbol = Symbol(name, address, following - address, kind, module)
        sized.append(symbol)
    sized.reverse()
    return sized


def _rank(symbol: Symbol) -> tuple[bool, bool, bool, int, str]:
    """Order among symbols at one address, the best name for a person first: functions, global, plain names."""
    name = symbol.name
    return (
        symbol.kind not in "TtWw",
        symbol.kind.islower(),
        "." in name or "$" in name,
        len(name) - len(name.lstrip("_")),
        name,
    )


def _pairs(name: str) -> set[str]:
    folded = name.lower()
    return {folded[index : index + 2] for index in range(len(folded) - 1)}


# ----------------------------------------------------------------------------------------------------------- kallsyms


def kallsyms(
    vmlinux: bytes, *, path: str = "vmlinux", progress: Progress = quiet, cache: Path | None = None
) -> SymbolTable:
    """The symbols a Linux kernel carries inside itself (CONFIG_KALLSYMS), for an ELF image without a symbol table.

    Finding them takes seconds; the result is kept under `cache` (default: `cache_root()`) by the image's SHA-256, and
    read back from there the next time. `path` is for messages. ImageError where there are none.
    """
    kept = (cache or cache_root()) / "symbols" / hashlib.sha256(vmlinux).hexdigest()
    symbols = _read_kept(kept)
    if symbols is None:
        progress(f"{path}: reading the kernel's symbols (kallsyms), once for this image")
        symbols = _search(vmlinux, path)
        progress(f"{path}: {len(symbols):,} symbols")
        try:
            write_atomic(kept, pack_symbols(symbols))
        except OSError as error:
            progress(f"{path}: symbols not kept for next time: {error}")
    return SymbolTable(symbols)


def _search(vmlinux: bytes, path: str) -> list[Symbol]:
    # Imported late: it opens a database as it is imported, which only a first look at a kernel should pay for.
    from vmlinux_to_elf.core import kallsyms as finder

    version = re.search(rb"Linux version (\d+\.[\d.]*\d)", vmlinux)
    if version is None or vmlinux[:4] != b"\x7fELF":
        raise ImageError(path, "no kernel version string: not a Linux kernel, so no kallsyms")
    number = version[1].decode("ascii")

    def known_version(self: object) -> None:
        vars(self).update(version_number=number, version_string=f"Linux version {number}")

    def known_architecture(self: object) -> None:
        vars(self).update(is_big_endian=False)

    def no_database(self: object) -> None:
        return None

    # Its version search, architecture guess and database are two thirds of its time, and the ELF header tells us more.
    known = type(
        "_KnownKernel",
        (finder.KallsymsFinder,),
        {
            "find_linux_kernel_version": known_version,
            "guess_architecture": known_architecture,
            "extract_db_information": no_database,
        },
    )
    # It talks through the root logger, whose first warning installs a handler for the whole process.
    finder.logging = logging.Logger("kallsyms", logging.CRITICAL + 1)
    try:
        found = known(vmlinux, bit_size=64 if vmlinux[4] == 2 else 32)
        rows = list(zip(found.kernel_addresses, found.symbol_names, strict=True))
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
        # The finder indexes and asserts its way through bytes that need not be a kernel: each of these means "none".
        raise ImageError(path, f"no kallsyms found in this kernel ({error or type(error).__name__})") from error
    return [Symbol(name[1:], address, 0, name[0]) for address, name in rows if len(name) > 1]


# A table as bytes, little endian: magic, format, symbols, bytes and CRC-32 of the compressed body. The body is the
# addresses and the sizes (u64 each), the kinds (one ASCII letter each), the names joined by newlines, all of it zlib.
_PACKED = struct.Struct("<8sIIII")
_MAGIC = b"GDBSTUBS"
_FORMAT = 2
_BODY_LIMIT = 256 << 20
"""Bytes a body may unpack to: far above any kernel's, low enough for any machine that runs this."""


def pack_symbols(symbols: Iterable[Symbol]) -> bytes:
    """An image's `symbols` as compact bytes, for the cache and for snapshots. A newline in a name becomes a space."""
    rows = list(symbols)
    addresses = _u64(array("Q", (symbol.address & 0xFFFF_FFFF_FFFF_FFFF for symbol in rows)))
    sizes = _u64(array("Q", (symbol.size & 0xFFFF_FFFF_FFFF_FFFF for symbol in rows)))
    kinds = "".join(symbol.kind[:1] or "?" for symbol in rows).encode("ascii", "replace")
    names = "\n".join(symbol.name.replace("\n", " ") for symbol in rows).encode("utf-8", "replace")
    body = zlib.compress(addresses + sizes + kinds + names, level=1)
    return _PACKED.pack(_MAGIC, _FORMAT, len(rows), len(body), zlib.crc32(body)) + body


def unpack_symbols(data: bytes) -> list[Symbol]:
    """What `pack_symbols` was given; ValueError for anything else."""
    try:
        magic, version, count, size, checksum = _PACKED.unpack_from(data)
        packed = data[_PACKED.size :]
        if (magic, version, size, checksum) != (_MAGIC, _FORMAT, len(packed), zlib.crc32(packed)):
            raise ValueError("not a symbol table, or a damaged one")
        body = zlib.decompressobj().decompress(packed, _BODY_LIMIT)
    except (struct.error, zlib.error) as error:
        raise ValueError(f"a damaged symbol table: {error}") from error
    addresses, sizes = (array("Q", body[8 * count * part : 8 * count * (part + 1)]) for part in (0, 1))
    kinds = body[16 * count : 17 * count].decode("ascii")
    names = body[17 * count :].decode().split("\n") if count else []
    if not len(addresses) == len(sizes) == len(kinds) == len(names) == count:
        raise ValueError("a symbol table that contradicts itself")
    for numbers in (addresses, sizes):
        _u64(numbers)
    return [Symbol(*row) for row in zip(names, addresses, sizes, kinds, strict=True)]


def _u64(numbers: array[int]) -> bytes:
    """Swap in place between the host's byte order and little endian; the bytes after that."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _read_kept(path: Path) -> list[Symbol] | None:
    """The symbols kept there, or None where there is no such file or anything about it is wrong."""
    try:
        return unpack_symbols(path.read_bytes())
    except (OSError, ValueError):
        return None
