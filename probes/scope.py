"""What definitions are read against: a kernel's symbols, text and types, of a running guest or of an image on disk.

Rules: reads only. Implements `spec.KernelScope`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Protocol

from emu.iface import MemoryFault, SymbolTable
from probes.arch import Convention
from probes.btf import Btf, BtfError, parse_btf

ENDBR_SIZE: Final = 4
_ENDBRS: Final = frozenset(
    bytes.fromhex(code)
    for code in (
        *("f30f1efa", "f30f1efb"),  # endbr64, endbr32
        *("660f1f00", "0f1f40d6"),  # gen_endbr_poison(), arch/x86/include/asm/ibt.h: until 6.14 and since
    )
)
NAMES_SINCE: Final = (6, 5)
"""The first release whose definitions know names of arguments."""


def release_of(banner: str) -> tuple[int, int]:
    """(6, 12) of "Linux version 6.12.117 ..."; (0, 0) where that is not said."""
    found = re.match(r"Linux version (\d+)\.(\d+)", banner)
    return (int(found[1]), int(found[2])) if found else (0, 0)


class ReadableMemory(Protocol):
    def read(self, vaddr: int, size: int, /) -> bytes:
        """MemoryFault where nothing is mapped."""
        ...


class KernelText(Protocol):
    """The part of `emu.iface.Machine` that a kernel's image has, too."""

    @property
    def bits(self) -> int: ...

    @property
    def symbols(self) -> SymbolTable: ...

    @property
    def memory(self) -> ReadableMemory: ...


class GuestScope:
    """KernelScope over a kernel's text. `read_types` gives its .BTF section, empty where it has none; it is called
    when a definition first needs types. `names` False: an older kernel's language (see `spec.KernelScope`)."""

    def __init__(
        self, text: KernelText, convention: Convention, read_types: Callable[[], bytes], *, names: bool = True
    ) -> None:
        self._text = text
        self._convention = convention
        self._names = names
        self._read_types = read_types
        self._types: Btf | None = None
        self._no_types: str | None = None

    @property
    def convention(self) -> Convention:
        return self._convention

    @property
    def names(self) -> bool:
        return self._names

    @property
    def types(self) -> Btf | None:
        if self._types is None and self._no_types is None:
            data = self._read_types() if self._names else b""
            try:
                if not self._names:
                    raise BtfError("this kernel's definitions have none (Linux 6.5 and later do)")
                if not data:
                    raise BtfError("the kernel's image has no BTF (CONFIG_DEBUG_INFO_BTF)")
                self._types = parse_btf(data, self._convention.word)
            except BtfError as error:
                self._no_types = f"names of arguments and types are not available because {error}"
        return self._types

    @property
    def no_types(self) -> str | None:
        return None if self.types is not None else self._no_types

    def count(self, symbol: str) -> int:
        return len(self._text.symbols.lookup(symbol))

    def is_entry(self, symbol: str, offset: int) -> bool | None:
        """Linux moves a probe on an ENDBR behind it and still calls that the entry."""
        named = self._text.symbols.lookup(symbol)
        found = self._text.symbols.find(named[0].address + offset) if named else None
        if found is None:
            return None
        return found[1] == 0 or (found[1] == ENDBR_SIZE and starts_with_endbr(self._text, found[0].address))


def older_scope(text: KernelText, convention: Convention, banner: str) -> GuestScope | None:
    """What definitions of the kernel's own know, where that is less than ours."""
    older = (0, 0) < release_of(banner) < NAMES_SINCE
    return GuestScope(text, convention, bytes, names=False) if older else None


def starts_with_endbr(text: KernelText, address: int) -> bool:
    """As the kernel's is_endbr() looks: a sealed one, which nobody may jump to, is an ENDBR all the same."""
    try:
        return text.memory.read(address, ENDBR_SIZE) in _ENDBRS
    except MemoryFault:
        return False


def entry_shift(text: KernelText, address: int) -> int:
    """How far behind `address` Linux puts a probe that is meant for there, and says it is: a function's ENDBR must stay
    (arch_adjust_kprobe_addr(), kernels built for IBT)."""
    found = text.symbols.find(address)
    if found is None or found[1] or not text.symbols.lookup("arch_adjust_kprobe_addr"):
        return 0
    return ENDBR_SIZE if starts_with_endbr(text, address) else 0
