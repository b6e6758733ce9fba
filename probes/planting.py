"""Probes that stand as int3s in the guest's pages: which byte of which page is whose, and when it goes in and out.

Rules: the machine's thread; a part of `uprobes`, which says where programs map a probed byte. Two ways. `int3`: a byte
is planted where a mapping of it is first executed. `aops`: it is planted in the page cache as soon as its page has been
read (`aops`), so that every mapping has it, known or not.

While a file has such a probe, nobody can open it for writing, as in the 2006 patch. Some bytes are left as they are and
probed in translated code: on pages that the kernel has yet to write to its disk, on private copies that a program has
made before, and string instructions under rep, which the engine would count otherwise.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, TypeAlias

from emu.codebreaks import REPEATED
from emu.iface import Machine, MemoryFault
from emu.insn import MAX_INSN_SIZE
from probes.aops import PageReads
from probes.arch import ProbeArch
from probes.core import Kprobes
from probes.errors import ProbeError
from probes.programs import CachedPage, FileId, PageCache, ProgramFile, Programs
from probes.room import Room

UserArm: TypeAlias = Literal["auto", "hook", "int3", "aops"]

PLANTED: Final = frozenset(("int3", "aops"))
_PAGE: Final = 4096
_INT3: Final = 0xCC
_PREFIXES: Final = bytes((0x66, 0x67, 0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0xF2, 0xF3))


def user_arm(value: str | bool | int) -> UserArm:
    """What --arm gave for a uprobe."""
    match value:
        case "auto" | "hook" | "int3" | "aops":
            return value
    raise ProbeError(errno.EINVAL, "--arm takes auto, hook, int3 or aops for a uprobe")


class Probed(Protocol):
    """A probed byte of a file."""

    file: FileId
    offset: int
    arm: UserArm

    @property
    def armed(self) -> bool: ...


@dataclass(slots=True)
class _File:
    """A file with bytes of ours: what to undo when the last of them goes."""

    file: ProgramFile
    mapping: int
    places: list[Probed] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)


class Planting:
    """The planted int3s of a machine."""

    reads: type[PageReads] = PageReads  # the mechanism of `aops`

    def __init__(self, machine: Machine, arch: ProbeArch, kprobes: Kprobes, room: Room, programs: Programs) -> None:
        self._machine = machine
        self._arch = arch
        self._kprobes = kprobes
        self._room = room
        self._programs = programs
        self._cache: PageCache | None = None
        self._reads: PageReads | None = None
        self._files: dict[FileId, _File] = {}
        self._at: dict[int, Probed] = {}  # by physical address
        self._originals: dict[Probed, int] = {}  # the guest's byte, once it was seen
        self._exempt: set[int] = set()  # physical addresses of bytes that are probed in translated code instead

    # ------------------------------------------------------------------------------------------------ which files

    def add(self, place: Probed, file: ProgramFile) -> None:
        """ProbeError where it cannot be had, and nothing has changed."""
        known = self._files.get(file.id) or self._take(file)
        if place.arm == "aops" and not any(other.arm == "aops" for other in known.places):
            try:
                self._follow(known, file)
            except ProbeError:
                if not known.places:
                    self._let_go(known)
                raise
        known.places.append(place)
        self.refresh(place)

    def remove(self, place: Probed, mapped: Iterable[tuple[int, int]] = ()) -> None:
        """No error where it was never added. The file's last takes everything of ours from the guest.

        `mapped`: (address space, address) of every mapping of it; programs may have copied a page with our byte there.
        """
        known = self._files.get(place.file)
        if known is None or place not in known.places:
            return
        self._take_out(place, mapped)
        self._originals.pop(place, None)
        known.places.remove(place)
        if not known.places:
            self._let_go(known)

    def has(self, place: Probed) -> bool:
        """It was added, and neither removed nor forgotten with another moment of the machine's."""
        known = self._files.get(place.file)
        return known is not None and place in known.places

    def restored(self) -> None:
        """The machine has gone to another moment, where nothing of this is; `add` follows for what is to be again."""
        self._files.clear()
        self._at.clear()
        self._originals.clear()
        self._exempt.clear()
        if self._reads is not None:
            self._reads.restored()

    def _take(self, file: ProgramFile) -> _File:
        cache = self.cache
        known = _File(file, cache.mapping(file))
        counts = [*cache.hold(file), cache.deny(file)]
        for count in counts:
            try:
                known.undo.append(self._share(count))
            except ProbeError:
                self._undo(known)
                raise
        self._files[file.id] = known
        return known

    def _follow(self, known: _File, file: ProgramFile) -> None:
        if self._reads is None:
            self._reads = self.reads(
                self._machine, self._arch, self._kprobes, self._room, self.cache, self._arrived, self._left
            )
        reads = self._reads
        reads.hook(file)
        known.undo.append(lambda: reads.unhook(file))

    def _let_go(self, known: _File) -> None:
        del self._files[known.file.id]
        self._undo(known)
        if not self._files:
            self._exempt.clear()

    @staticmethod
    def _undo(known: _File) -> None:
        for undo in reversed(known.undo):
            undo()

    def _share(self, count: tuple[int, int, int]) -> Callable[[], None]:
        try:
            return self._machine.words.share(*count)
        except MemoryFault as error:
            raise ProbeError(errno.EAGAIN, "the guest is in a program: stop it in its kernel for this") from error

    @property
    def cache(self) -> PageCache:
        if self._cache is None:
            self._cache = self._programs.cache()
        return self._cache

    # ------------------------------------------------------------------------------------------------ which bytes

    def at(self, vaddr: int) -> Probed | None:
        """Whose int3 stands at an address of the running program."""
        paddr = self._machine.memory.translate(vaddr) if self._at else None
        return self._at.get(paddr) if paddr is not None and self._machine.planted.stands(paddr) else None

    def covers(self, place: Probed, vaddr: int) -> bool:
        """Where the running program has the place, at `vaddr`: only an int3 in memory is to stop it there."""
        paddr = self._machine.memory.translate(vaddr)
        if paddr is None or paddr in self._exempt:
            return False
        if self._at.get(paddr) is place and self._machine.planted.stands(paddr):
            return True
        original = self._originals.get(place, _INT3)
        if original != _INT3 and self._machine.memory.read_physical(paddr, 1)[0] == _INT3:
            self._machine.planted.adopt(paddr, original)  # a copy of a page with ours
            self._at[paddr] = place
            return True
        return place.arm == "aops" and self._is_cached(place, paddr)

    def reached(self, place: Probed, vaddr: int) -> None:
        """The running program is about to execute the place at `vaddr`, by a break in its translation."""
        paddr = self._machine.memory.translate(vaddr)
        if place.arm != "int3" or paddr is None or paddr in self._exempt or not self.has(place):
            return
        cached = self.cache.page(self._files[place.file].mapping, place.offset // _PAGE)
        ours = cached is not None and self._paddr(place, cached) == paddr
        if cached is not None and ours and not cached.settled:
            self._exempt.add(paddr)
        else:
            self._plant(place, paddr, fresh=True)

    def left(self, place: Probed, space: int, vaddr: int) -> None:
        """The program in `space` is about to lose its mapping at `vaddr`: a private page goes with it."""
        paddr = self._programs.physical(space, vaddr)
        if paddr is not None and self._at.get(paddr) is place and not self._is_cached(place, paddr):
            self._machine.planted.remove(paddr)
            del self._at[paddr]

    def refresh(self, place: Probed, mapped: Iterable[tuple[int, int]] = ()) -> None:
        """Its probes have been switched on or off, or it is new: its page may be in memory. `mapped`: see `remove`."""
        known = self._files.get(place.file)
        if known is None:
            return
        if not place.armed:
            self._take_out(place, mapped)
        if not place.armed or place.arm != "aops":
            return
        page = self.cache.page(known.mapping, place.offset // _PAGE)
        if page is not None and page.uptodate:
            self._insert(place, page, fresh=False)
        elif page is not None and self._reads is not None:
            self._reads.expect(known.mapping, range(page.index, page.index + page.count))

    def describe(self, place: Probed) -> str:
        count = sum(1 for paddr, known in self._at.items() if known is place and self._machine.planted.stands(paddr))
        return f"by {place.arm}: an int3 in {count} pages" if count != 1 else f"by {place.arm}: an int3 in 1 page"

    def _arrived(self, page: CachedPage) -> None:
        for place in self._on(page):
            if place.arm == "aops" and place.armed:
                self._insert(place, page, fresh=True)

    def _left(self, page: CachedPage) -> None:
        last = page.paddr + page.count * _PAGE
        for paddr in [paddr for paddr in self._at if page.paddr <= paddr < last]:
            self._machine.planted.remove(paddr)
            del self._at[paddr]
        self._exempt = {paddr for paddr in self._exempt if not page.paddr <= paddr < last}

    def _on(self, page: CachedPage) -> Iterable[Probed]:
        known = next((known for known in self._files.values() if known.mapping == page.mapping), None)
        pages = range(page.index, page.index + page.count)
        return [place for place in known.places if place.offset // _PAGE in pages] if known is not None else []

    def _insert(self, place: Probed, page: CachedPage, *, fresh: bool) -> None:
        paddr = self._paddr(place, page)
        if page.settled:
            self._plant(place, paddr, fresh=fresh)
        else:
            self._exempt.add(paddr)

    def _plant(self, place: Probed, paddr: int, *, fresh: bool) -> None:
        code = self._machine.memory.read_physical(paddr, min(MAX_INSN_SIZE, _PAGE - paddr % _PAGE))
        if REPEATED.match(code) or not code.strip(_PREFIXES):
            self._exempt.add(paddr)
            return
        self._exempt.discard(paddr)
        self._machine.planted.plant(paddr, fresh=fresh)
        self._originals[place] = code[0]
        self._at[paddr] = place

    def _take_out(self, place: Probed, mapped: Iterable[tuple[int, int]]) -> None:
        for space, vaddr in mapped:
            self._take_copy_out(place, self._programs.physical(space, vaddr))
        for paddr in [paddr for paddr, known in self._at.items() if known is place]:
            if self._is_cached(place, paddr):
                self._machine.planted.remove(paddr)
            else:
                self._machine.planted.forget_one(paddr)
            del self._at[paddr]

    def _take_copy_out(self, place: Probed, paddr: int | None) -> None:
        """A process may have our byte in a page of its own, whether it has come to it there or not."""
        original = self._originals.get(place, _INT3)
        if paddr is None or original == _INT3 or self._is_cached(place, paddr):
            return
        if self._machine.memory.read_physical(paddr, 1)[0] == _INT3:
            self._machine.planted.adopt(paddr, original)
        if self._machine.planted.original(paddr) is not None:
            self._machine.planted.remove(paddr)
            self._at.pop(paddr, None)

    def _is_cached(self, place: Probed, paddr: int) -> bool:
        """That byte of memory is the place's in the page cache."""
        known = self._files.get(place.file)
        page = None if known is None else self.cache.page(known.mapping, place.offset // _PAGE)
        return page is not None and self._paddr(place, page) == paddr

    @staticmethod
    def _paddr(place: Probed, page: CachedPage) -> int:
        return page.paddr + place.offset - page.index * _PAGE
