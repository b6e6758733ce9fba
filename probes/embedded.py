"""Programs in the embedded guest, for uprobes: its files, the mappings of its one ring-3 task, its page cache.

Rules: the machine's thread; reads guest memory by the guest's symbols and the layout that its assembly is written with.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from emu.iface import Cpu, Machine, MemoryFault
from emu.images.embedded import layout
from probes.core import Kprobes
from probes.errors import ProbeError
from probes.kprobe import Kprobe
from probes.programs import CachedPage, Entry, Event, Exited, FileId, Mapped, PageCache, ProgramFile, Region
from probes.regs import Regs

_SPACE: Final = 0  # there is one
_PAGE: Final = 4096
_UPTODATE: Final = 4  # PG_UPTODATE
_NAME: Final = 64  # bytes
_MAX_REGIONS: Final = 16


@dataclass(frozen=True, slots=True)
class EmbeddedFile:
    """Implements ProgramFile for the inode at an address."""

    guest: EmbeddedPrograms
    address: int

    @property
    def id(self) -> FileId:
        return FileId(0, self.guest.field(self.address, "INODE", "ino"))

    @property
    def regular(self) -> bool:
        return True

    @property
    def size(self) -> int:
        return self.guest.field(self.mapping, "MAPPING", "size") * _PAGE

    @property
    def path(self) -> str:
        return self.guest.text(self.guest.field(self.address, "INODE", "name"))

    @property
    def mapping(self) -> int:
        """Address of its address_space."""
        return self.guest.field(self.address, "INODE", "i_mapping")

    def page(self, index: int) -> int | None:
        """Physical address of a page that is up to date in the page cache."""
        page = self.guest.cached(self.mapping, index)
        return page.paddr if page is not None and page.uptodate else None

    def read(self, offset: int, size: int) -> bytes:
        found, end = b"", min(offset + size, self.size)
        while offset < end:
            paddr = self.page(offset // _PAGE)
            if paddr is None:
                raise MemoryFault(offset)
            count = min(end - offset, _PAGE - offset % _PAGE)
            found += self.guest.machine.memory.read_physical(paddr + offset % _PAGE, count)
            offset += count
        return found


class EmbeddedPrograms:
    """Implements Programs."""

    def __init__(self, machine: Machine, kprobes: Kprobes) -> None:
        self.machine = machine
        self.bits = machine.bits
        self._kprobes = kprobes

    def files(self) -> Iterator[EmbeddedFile]:
        for symbol in self.machine.symbols.glob("*_inode"):
            yield EmbeddedFile(self, symbol.address)

    def open(self, path: str) -> ProgramFile | None:
        return next((file for file in self.files() if file.path == path), None)

    def mapped(self, space: int | None = None) -> Iterator[Mapped]:
        (table,) = self.machine.symbols.lookup("user_vmas")
        for index in range(_MAX_REGIONS):
            at = table.address + index * len(layout.STRUCTURES["VMA"]) * self.bits // 8
            start = self.field(at, "VMA", "start")
            if not start:
                return
            opened = self.field(at, "VMA", "file")
            if not opened:
                continue
            file = EmbeddedFile(self, self.field(opened, "FILE", "f_inode"))
            end, offset = start + self.field(at, "VMA", "size"), self.field(at, "VMA", "pgoff") * _PAGE
            yield Mapped(Region(_SPACE, start, end, offset, file.id, file.path.rpartition("/")[2]), file)

    def space(self, cpu: Cpu) -> int:
        return _SPACE

    def cache(self) -> PageCache:
        return EmbeddedPageCache(self)

    def thread(self, cpu: Cpu) -> int:
        (current,) = self.machine.symbols.lookup("current")
        return self.word(current.address)

    def stack(self, space: int, address: int) -> int:
        return 0  # the ring-3 task has one

    def file_at(self, address: int) -> tuple[ProgramFile | None, int] | None:
        for mapped in self.mapped():
            if mapped.region.start <= address < mapped.region.end:
                return mapped.content, address - mapped.region.start + mapped.region.offset
        return None

    def physical(self, space: int, address: int, *, store: bool = False) -> int | None:
        (task,) = self.machine.symbols.lookup("user_task")
        root = self.field(task.address, "TASK", "cr3")
        return None if store else self.machine.memory.translate(address, root)  # no file is mapped writable

    def may_store(self, address: int) -> bool:
        return False

    def resumes(self, space: int) -> Iterable[int]:
        return ()

    def user_stack(self) -> int | None:
        return None

    def watch(self, tell: Callable[[Event], None]) -> Callable[[], None]:
        """The mappings never change."""
        probe = Kprobe(symbol="do_exit", pre_handler=lambda kp, regs: tell(Exited(self.thread(regs.cpu))))
        self._kprobes.register(probe)
        return lambda: self._kprobes.unregister(probe)

    def cached(self, mapping: int, index: int) -> CachedPage | None:
        """What of a file is in the page cache, whatever its state."""
        if not 0 <= index < self.field(mapping, "MAPPING", "size"):
            return None
        pages = mapping + layout.offset(self.bits, "MAPPING", "pages")
        page = self.word(pages + layout.slot(index) * self.bits // 8)
        found = self.described(page) if page else None
        return found if found is not None and found.index == index else None

    def described(self, page: int) -> CachedPage:
        """A struct page."""
        mapping, index, paddr = (self.field(page, "PAGE", name) for name in ("mapping", "index", "frame"))
        return CachedPage(mapping, index, paddr, bool(self.field(page, "PAGE", "flags") & _UPTODATE))

    def field(self, address: int, structure: str, member: str) -> int:
        return self.word(address + layout.offset(self.bits, structure, member))

    def word(self, address: int) -> int:
        return int.from_bytes(self._physical(address, self.bits // 8), "little")

    def text(self, address: int) -> str:
        return self._physical(address, _NAME).partition(b"\0")[0].decode("ascii", "backslashreplace")

    def _physical(self, address: int, size: int) -> bytes:
        """Of the kernel's memory, which is where it is before the guest has switched paging on too."""
        return self.machine.memory.read_physical(address - layout.KERNEL_OFFSET[self.bits], size)


class EmbeddedPageCache:
    """Implements programs.PageCache. The guest keeps its two files for ever."""

    def __init__(self, guest: EmbeddedPrograms) -> None:
        self._guest = guest
        self._word = guest.bits // 8
        self.table_size = len(layout.STRUCTURES["AOPS"]) * self._word
        kinds = {"readpage": Entry.READ, "readpages": Entry.READ_MANY, "freepage": Entry.FREE}
        self.entries = {layout.offset(guest.bits, "AOPS", name): entry for name, entry in kinds.items()}

    def mapping(self, file: ProgramFile) -> int:
        return _ours(file).mapping

    def pointer(self, mapping: int) -> int:
        return mapping + layout.offset(self._guest.bits, "MAPPING", "a_ops")

    def unread(self, file: ProgramFile) -> str | None:
        return None

    def page(self, mapping: int, index: int) -> CachedPage | None:
        return self._guest.cached(mapping, index)

    def started(self, entry: Entry, regs: Regs) -> tuple[int, range]:
        """readpage(file, page) or readpages(file, mapping, pages, nr); those have one index behind the other."""
        if entry is Entry.READ:
            page = self._guest.described(regs.arg(2))
            return page.mapping, range(page.index, page.index + 1)
        first = self._guest.described(self._guest.word(regs.arg(3)))
        return first.mapping, range(first.index, first.index + regs.arg(4))

    def subject(self, entry: Entry, regs: Regs) -> CachedPage:
        return self._guest.described(regs.arg(1))

    def completions(self) -> list[str]:
        return ["wake_up"]

    def completed(self, function: str, regs: Regs) -> CachedPage | None:
        """wake_up(channel): a page is its own wait channel."""
        (pages,) = self._guest.machine.symbols.lookup("mem_map")
        return self._guest.described(regs.arg(1)) if 0 <= regs.arg(1) - pages.address < pages.size else None

    def hold(self, file: ProgramFile) -> list[tuple[int, int, int]]:
        return []

    def deny(self, file: ProgramFile) -> tuple[int, int, int]:
        count = _ours(file).address + layout.offset(self._guest.bits, "INODE", "i_writecount")
        if 0 < self._guest.word(count) < 1 << (self._guest.bits - 1):
            raise ProbeError(errno.ETXTBSY, f"{_ours(file).path} is open for writing")
        return count, self._word, -1


def _ours(file: ProgramFile) -> EmbeddedFile:
    assert isinstance(file, EmbeddedFile)  # of the Programs that this cache belongs to
    return file


def embedded_programs(machine: Machine, kprobes: Kprobes) -> EmbeddedPrograms | None:
    """None where the guest is another one."""
    known = all(machine.symbols.lookup(name) for name in ("user_vmas", "disk_aops", "program_inode", "current"))
    return EmbeddedPrograms(machine, kprobes) if known else None
