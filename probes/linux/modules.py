"""The modules a guest has loaded: where they lie, who uses them, their symbols.

Rules: readers over drgn objects; they raise what drgn raises (see program.question). Nothing is kept.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from drgn import Object, Program
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.module import for_each_module, module_address_regions

from emu.symbols import Symbol

_MAX_SYMBOLS: Final = 1 << 17  # of one module; the largest there are have a tenth
_MAX_STRINGS: Final = 16 << 20  # bytes of their names
_SYMBOL: Final = {8: struct.Struct("<IBBHQQ"), 4: struct.Struct("<IIIBBH")}  # elf64_sym, elf32_sym
_UNDEFINED: Final = 0
_LIVE, _UNFORMED = 0, 3  # enum module_state, include/linux/module.h
_STATES: Final = {0: "Live", 1: "Loading", 2: "Unloading"}  # as m_show() names them
_REFERENCE_BASE: Final = 1  # MODULE_REF_BASE, kernel/module


@dataclass(frozen=True, slots=True)
class LoadedModule:
    """`regions`: (address, bytes) of each of its parts, the one with its code first. `users`: modules that need it."""

    name: str
    state: str
    regions: tuple[tuple[int, int], ...]
    references: int
    users: tuple[str, ...]
    address: int
    """Of its struct module."""

    @property
    def size(self) -> int:
        return sum(size for _, size in self.regions)

    def contains(self, address: int) -> bool:
        return any(start <= address < start + size for start, size in self.regions)


def loaded_modules(program: Program) -> list[LoadedModule]:
    """As /proc/modules lists them, the newest first."""
    modules = [module for module in for_each_module(program) if module.state.value_() != _UNFORMED]
    return [describe(module) for module in modules]


def describe(module: Object) -> LoadedModule:
    """A `struct module *`."""
    uses = list_for_each_entry("struct module_use", module.source_list.address_of_(), "source_list")
    return LoadedModule(
        _text(module.name.string_()),
        _STATES.get(module.state.value_(), "Unknown"),
        tuple((start, size) for start, size in module_address_regions(module) if size),
        module.refcnt.counter.value_() - _REFERENCE_BASE,
        tuple(_text(use.source.name.string_()) for use in uses),
        module.value_(),
    )


def module_symbols(module: Object) -> list[Symbol]:
    """What the kernel's kallsyms keep of a `struct module *`: of its own symbols those with a name and a place."""
    table = module.kallsyms.read_()
    count = table.num_symtab.value_()
    if not table or not 0 < count <= _MAX_SYMBOLS:
        return []
    word = 8 if module.prog_.type("unsigned long").size == 8 else 4
    layout = _SYMBOL[word]
    program = module.prog_
    rows = program.read(table.symtab.value_(), count * layout.size)
    kinds = program.read(table.typetab.value_(), count)
    fields = [_fields(row, word) for row in layout.iter_unpack(rows)]
    strings = _strings(program, table.strtab.value_(), max(name_at for name_at, *_ in fields))
    found = []
    for index, ((name_at, value, size, section), kind) in enumerate(zip(fields, kinds, strict=True)):
        if index == 0 or section == _UNDEFINED or not name_at:
            continue
        name = _text(strings[name_at : strings.index(b"\0", name_at)])
        if name:
            found.append(Symbol(name, value, size, chr(kind)))
    return found


def _strings(program: Program, address: int, last: int) -> bytes:
    """A string table as far as its string at offset `last` goes, in one piece: each read costs a walk of the tables."""
    if last > _MAX_STRINGS:
        raise ValueError(f"a name lies {last:#x} bytes into the strings")
    return b"".join((program.read(address, last), Object(program, "char *", address + last).string_(), b"\0"))


def _fields(row: tuple[int, ...], word: int) -> tuple[int, int, int, int]:
    """(name, value, size, section) of an ELF symbol."""
    if word == 8:
        name, _, _, section, value, size = row
    else:
        name, value, size, _, _, section = row
    return name, value, size, section


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
