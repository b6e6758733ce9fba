"""Functions of the guest's files by name, as far as they are known: from what is in memory of a file, or from a copy.

Rules: the machine's thread; reads files only, and keeps a bounded number of names. A file may be written over while
nobody looks: what was read of it counts for as long as its headers and notes are what they were.
"""

from __future__ import annotations

import difflib
import errno
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final

from emu.iface import MemoryFault
from probes.errors import ProbeError
from probes.programs import Copies, FileId, ProgramFile
from probes.programsymbols import functions, identity

_MAX_NAMES: Final = 1 << 18  # kept of all files together; a C library has 3,000
_NO_SYMBOLS: Final = "the file has no symbols (stripped): give an offset, PATH:0xOFFSET, or --sysroot with a copy"
_EACH: Final = 64  # what a file counts for without a name


@dataclass(frozen=True, slots=True)
class _Known:
    """`program` is the identity of what was read, None where that was not in memory."""

    program: bytes | None
    names: dict[str, int]


class FileSymbols:
    """The functions of one guest's files. `copies` have those that are not in the guest's memory."""

    def __init__(self, copies: Copies | None = None) -> None:
        self._copies: Copies = copies or (lambda path: nullcontext())
        self._known: OrderedDict[tuple[FileId, bool], _Known] = OrderedDict()  # by file, and whether of its copy

    def names(self, file: ProgramFile, *, again: bool = True) -> dict[str, int]:
        """Name -> offset in the file, from the guest's memory. `again` false: as when it was last looked at."""
        known = self._get(file, copied=False, current=again)
        if known is None or (again and not known.names):  # what could not be read then may be there now
            known = self._keep(file, False, _Known(identity(file.read), functions(file.read)))
        return known.names

    def offset(self, path: str, name: str, file: ProgramFile, *, strict: bool = False) -> int | None:
        """Of a function, from either source; None where it is not to be found now. `strict`: see `_copied`."""
        found = self.names(file).get(name)
        return found if found is not None else self._copied(path, file, strict=strict).get(name)

    def name(self, path: str, file: ProgramFile, offset: int) -> str | None:
        """What begins at an offset of the file."""
        names = {**self.names(file), **self._copied(path, file)}
        return next((name for name, at in names.items() if at == offset), None)

    def program(self, file: ProgramFile) -> bytes | None:
        """What tells the program that the file holds now from others; None where that is not in memory."""
        return identity(file.read)

    def check_absence(self, path: str, name: str, file: ProgramFile) -> None:
        """ProbeError ENOENT where all symbols were seen: the whole file is in memory, or a copy is here."""
        copied = self._copied(path, file)
        try:
            if not copied:
                file.read(0, file.size)
        except MemoryFault:
            return
        known = {**self.names(file), **copied}
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else None if known else _NO_SYMBOLS
        raise ProbeError(errno.ENOENT, f"{path} has no function {name}", hint=hint)

    def clear(self) -> None:
        self._known.clear()

    def _copied(self, path: str, file: ProgramFile, *, strict: bool = False) -> dict[str, int]:
        """From the copy of it, if one is here. `strict`: ProbeError where that is of another program."""
        known = self._get(file, copied=True, current=True)
        if known is None:
            with self._copies(path) as copy:
                if copy is None:
                    return {}
                own = identity(file.read)
                if own is not None and own != identity(copy.read):
                    if strict:
                        raise ProbeError(errno.EINVAL, f"the copy of {path} is of another program: its headers differ")
                    return {}
                known = self._keep(file, True, _Known(own, functions(copy.read)))
        return known.names

    def _get(self, file: ProgramFile, *, copied: bool, current: bool) -> _Known | None:
        """What is known; None too where it is to be `current` and the file holds another program now."""
        known = self._known.get((file.id, copied))
        if known is None:
            return None
        program = identity(file.read) if current and known.program is not None else None
        if program not in (None, known.program):
            return None
        self._known.move_to_end((file.id, copied))
        return known

    def _keep(self, file: ProgramFile, copied: bool, known: _Known) -> _Known:
        self._known[file.id, copied] = known
        self._known.move_to_end((file.id, copied))
        count = sum(len(one.names) + _EACH for one in self._known.values())
        while count > _MAX_NAMES and len(self._known) > 1:
            count -= len(self._known.popitem(last=False)[1].names) + _EACH
        return known
