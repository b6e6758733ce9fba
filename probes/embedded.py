"""Programs in the embedded guest, for uprobes: its two files, the mappings of its one ring-3 task, its page cache.

Rules: the machine's thread; reads guest memory by the guest's symbols and the layout that its assembly is written with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from emu.iface import Cpu, Machine, MemoryFault
from emu.images.embedded import layout
from probes.core import Kprobes
from probes.kprobe import Kprobe
from probes.programs import Event, Exited, FileId, Mapped, ProgramFile, Region

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
    def size(self) -> int:
        return self.guest.field(self.address, "INODE", "size")

    @property
    def path(self) -> str:
        return self.guest.text(self.guest.field(self.address, "INODE", "name"))

    @property
    def mapping(self) -> int:
        """Address of its address_space."""
        return self.guest.field(self.address, "INODE", "i_mapping")

    def page(self, index: int) -> int | None:
        """Physical address of a page that is up to date in the page cache."""
        if not 0 <= index < self.guest.field(self.mapping, "MAPPING", "size"):
            return None
        page = self.guest.word(
            self.mapping + layout.offset(self.guest.bits, "MAPPING", "pages") + index * self.guest.bits // 8
        )
        if not page or not self.guest.field(page, "PAGE", "flags") & _UPTODATE:
            return None
        return self.guest.field(page, "PAGE", "frame")

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

    def mapped(self) -> Iterator[Mapped]:
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
            end = start + self.field(at, "VMA", "size")
            yield Mapped(Region(_SPACE, start, end, 0, file.id, file.path.rpartition("/")[2]), file)

    def space(self, cpu: Cpu) -> int:
        return _SPACE

    def thread(self, cpu: Cpu) -> int:
        (current,) = self.machine.symbols.lookup("current")
        return self.word(current.address)

    def stack(self, space: int, address: int) -> int:
        return 0  # the ring-3 task has one

    def file_at(self, address: int) -> tuple[ProgramFile | None, int] | None:
        for mapped in self.mapped():
            if mapped.region.start <= address < mapped.region.end:
                return mapped.content, address - mapped.region.start
        return None

    def physical(self, space: int, address: int, *, store: bool = False) -> int | None:
        return None  # no file is mapped writable

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

    def field(self, address: int, structure: str, member: str) -> int:
        return self.word(address + layout.offset(self.bits, structure, member))

    def word(self, address: int) -> int:
        return int.from_bytes(self._physical(address, self.bits // 8), "little")

    def text(self, address: int) -> str:
        return self._physical(address, _NAME).partition(b"\0")[0].decode("ascii", "backslashreplace")

    def _physical(self, address: int, size: int) -> bytes:
        """Of the kernel's memory, which is where it is before the guest has switched paging on too."""
        return self.machine.memory.read_physical(address - layout.KERNEL_OFFSET[self.bits], size)


def embedded_programs(machine: Machine, kprobes: Kprobes) -> EmbeddedPrograms | None:
    """None where the guest is another one."""
    known = all(machine.symbols.lookup(name) for name in ("user_vmas", "disk_aops", "program_inode", "current"))
    return EmbeddedPrograms(machine, kprobes) if known else None
