"""Programs in the guest as uprobes see them: files, and where they are mapped in which address space.

Rules: types only, for the machine's thread. Who knows a guest's operating system implements `Programs` (`embedded`,
`linux.programs`); `uprobes` knows no other. Addresses are the guest's, offsets bytes of a file.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

from emu.iface import Cpu, Memory, MemoryFault
from probes import rawtext
from probes.regs import PATH_MAX, Regs

_PIECE: Final = 4096  # read at a time of a string in a file


@dataclass(frozen=True, slots=True)
class FileId:
    """A file, whatever it is called: its file system's device number, its inode's number and generation."""

    device: int
    inode: int
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Region:
    """A mapping of a file: byte `offset` of it is at `start`. `space` is the number of the address space.

    `name` is the last component of a path of the file. What is stored into a `writable` one that is not `shared` stays
    the process's own.
    """

    space: int
    start: int
    end: int
    offset: int
    file: FileId
    name: str
    writable: bool = False
    shared: bool = False

    def address(self, offset: int) -> int | None:
        """Where byte `offset` of the file is mapped."""
        at = self.start + offset - self.offset
        return at if self.start <= at < self.end else None


class ProgramFile(Protocol):
    """A file that the guest knows by name at this moment."""

    @property
    def id(self) -> FileId: ...

    @property
    def regular(self) -> bool:
        """It has contents to be mapped: no directory, device or pipe."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def read(self, offset: int, size: int) -> bytes:
        """From the page cache; less than `size` at the file's end. MemoryFault where a page is not in it."""
        ...


@dataclass(frozen=True, slots=True)
class Mapped:
    """A mapping of `content` is complete; nothing in it has run."""

    region: Region
    content: ProgramFile


@dataclass(frozen=True, slots=True)
class Unmapped:
    """The pages of this range are about to be taken from the process, and nothing of it will run any more.

    Unless `kept()`: then it is mapped still, and new pages will come (madvise(MADV_DONTNEED), a truncated file), or
    another mapping takes its place in this very call of the kernel's. Asked at most once, at once: it takes time.
    """

    space: int
    start: int
    end: int
    kept: Callable[[], bool] = field(default=lambda: False, compare=False)


@dataclass(frozen=True, slots=True)
class Forked:
    """Space `child` is about to get all of `parent`'s mappings; the current thread will run in both."""

    parent: int
    child: int


@dataclass(frozen=True, slots=True)
class Ended:
    """Nobody runs in this space any more."""

    space: int


@dataclass(frozen=True, slots=True)
class Exited:
    """This thread runs no more in user mode."""

    thread: int


class Copy(Protocol):
    """An open copy of a guest's file, with symbols that the guest's own may lack."""

    def read(self, offset: int, size: int) -> bytes:
        """Less than `size` at its end; MemoryFault where it cannot be read."""
        ...


class NotPresent(str):
    """What is shown of a string at `address` whose page is not in memory."""

    __slots__ = ("address",)

    address: int

    def __new__(cls, address: int) -> NotPresent:
        made = super().__new__(cls, "(not present)")
        made.address = address
        return made


Copies: TypeAlias = Callable[[str], "AbstractContextManager[Copy | None]"]
"""Opens the copy of the guest's file at a path; None where there is none."""


@dataclass(frozen=True, slots=True)
class CachedPage:
    """`count` pages of a file from page `index` on, in the page cache: at `paddr`, one behind the other.

    `mapping` is the address of the file's address_space. Not `uptodate`: a read is under way, or has failed.
    `settled` is false while the kernel has yet to write the page to its disk.
    """

    mapping: int
    index: int
    paddr: int
    uptodate: bool
    count: int = 1
    settled: bool = True


class Entry(enum.Enum):
    """What an entry of a table of address_space_operations is for, as far as it matters to who is probing pages."""

    READ = "reads a page"
    READ_MANY = "reads several pages"
    FREE = "is told of a page that has left the cache"
    MOVE = "moves a page to another frame"


class PageCache(Protocol):
    """What the mechanism of `aops` asks of the guest's kernel about the files and pages it reads."""

    @property
    def table_size(self) -> int:
        """Bytes of a struct address_space_operations."""
        ...

    @property
    def entries(self) -> Mapping[int, Entry]:
        """By byte offset."""
        ...

    def mapping(self, file: ProgramFile) -> int:
        """The address of its address_space."""
        ...

    def pointer(self, mapping: int) -> int:
        """The address of an address_space's pointer to its operations."""
        ...

    def unread(self, file: ProgramFile) -> str | None:
        """Why pages of the file do not come by its operations; None where they do."""
        ...

    def page(self, mapping: int, index: int) -> CachedPage | None:
        """What is in the cache now, complete or not."""
        ...

    def started(self, entry: Entry, regs: Regs) -> tuple[int, range]:
        """At an entry that reads: the address_space, and the pages that are about to be read."""
        ...

    def subject(self, entry: Entry, regs: Regs) -> CachedPage:
        """At a FREE or MOVE entry: the page."""
        ...

    def completions(self) -> Sequence[str]:
        """Functions of the kernel that every page passes when its read is over and before anybody can map it."""
        ...

    def completed(self, function: str, regs: Regs) -> CachedPage | None:
        """At one of these: the page; None where it is something else."""
        ...

    def hold(self, file: ProgramFile) -> Sequence[tuple[int, int, int]]:
        """(address, size, change) of counts that keep the kernel from forgetting the file."""
        ...

    def deny(self, file: ProgramFile) -> tuple[int, int, int]:
        """The same of the count that denies writers. ProbeError ETXTBSY while somebody writes."""
        ...


Event: TypeAlias = Mapped | Unmapped | Forked | Ended | Exited


class Programs(Protocol):
    """What uprobes ask of the guest's operating system."""

    def open(self, path: str) -> ProgramFile | None:
        """The file of that absolute path, links followed; None where the guest's kernel has no such name now."""
        ...

    def mapped(self, space: int | None = None) -> Iterable[Mapped]:
        """Every mapping of a file there is now, in one address space or in all."""
        ...

    def space(self, cpu: Cpu) -> int:
        """The number of the address space in force: cheap, it is asked at every translation and hit."""
        ...

    def thread(self, cpu: Cpu) -> int:
        """The number of the thread that runs: its alone while it lives."""
        ...

    def stack(self, space: int, address: int) -> int:
        """A number for the mapping that `address` lies in: two stacks in one mapping cannot be told apart."""
        ...

    def file_at(self, address: int) -> tuple[ProgramFile | None, int] | None:
        """The file, and the offset in it, that the current process has mapped at `address`. (None, 0) for memory
        without a file, None where nothing is mapped."""
        ...

    def physical(self, space: int, address: int, *, store: bool = False) -> int | None:
        """Where a program's byte is in RAM; None where it is not, or where a `store` to it would fault."""
        ...

    def may_store(self, address: int) -> bool:
        """A store of the current program to `address` is allowed, and stays its own: at most a page is made for it."""
        ...

    def resumes(self, space: int) -> Iterable[int]:
        """Where the threads of a space will go on in user mode, unless a signal sends them elsewhere."""
        ...

    def user_stack(self) -> int | None:
        """The stack pointer with which the current thread has entered the kernel, where that is known."""
        ...

    def cache(self) -> PageCache:
        """ProbeError where this kernel's is not known."""
        ...

    def watch(self, tell: Callable[[Event], None]) -> Callable[[], None]:
        """Have `tell` called with what happens to mappings and threads, as it happens. -> a call that ends it."""
        ...


def read_program(programs: Programs, memory: Memory, address: int, size: int) -> bytes:
    """The running program's memory, and of a page that it has not touched yet what its file has there.

    MemoryFault where that is not in memory either.
    """
    found = b""
    while len(found) < size:
        at = address + len(found)
        count = min(size - len(found), _PIECE - at % _PIECE)
        try:
            found += memory.read(at, count)
        except MemoryFault:
            file, offset = programs.file_at(at) or (None, 0)
            if file is None:
                raise
            found += file.read(offset, count).ljust(count, b"\0")  # zeros behind the file's end
    return found


def absent_text(programs: Programs, address: int) -> str | None:
    """The string at an address of the running program whose page is not present, as far as the file's own pages are in
    memory; None where no page can come, as nothing is mapped."""
    found = programs.file_at(address)
    if found is None:
        return None
    file, offset = found
    try:
        if file is None:
            raise MemoryFault(address)
        text = bytearray()
        while len(text) < PATH_MAX and b"\0" not in text:
            piece = file.read(offset + len(text), _PIECE - (offset + len(text)) % _PIECE)
            text += piece or b"\0"
    except MemoryFault:
        return NotPresent(address)
    return rawtext.decode(bytes(text[:PATH_MAX]).partition(b"\0")[0])
