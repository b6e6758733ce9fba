"""The page cache of a Linux guest, for probes in it: how files are read, when a read is over, when pages go.

Rules: the machine's thread; reads guest memory only, and gives addresses of counts for others to change. Sources:
include/linux/fs.h, mm/filemap.c and mm/readahead.c, 5.10 to 6.12; what one kernel calls a page another calls a folio.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from drgn import Object, cast
from drgn.helpers.linux.mm import PageHead, compound_nr, page_index, page_to_pfn
from drgn.helpers.linux.percpu import per_cpu_ptr
from drgn.helpers.linux.xarray import xa_is_value, xa_load

from emu.iface import Machine
from probes.errors import ProbeError
from probes.linux.program import NotAvailable
from probes.linux.system import Linux
from probes.programs import CachedPage, Entry, ProgramFile
from probes.regs import Regs

_PAGE: Final = 4096
_ENTRIES: Final = {
    **dict.fromkeys(("readpage", "read_folio"), Entry.READ),
    "readahead": Entry.READ_MANY,
    **dict.fromkeys(("freepage", "free_folio"), Entry.FREE),
    **dict.fromkeys(("migratepage", "migrate_folio"), Entry.MOVE),
}
_END: Final = "folio_end_read"  # since 6.9: (folio, success), before it unlocks
_UNLOCK: Final = ("folio_unlock", "unlock_page")  # of them the first there is, where reads are over too: (folio)
_COUNT: Final = 4  # bytes of an atomic_t


class InodeFile(ProgramFile, Protocol):
    """What a ProgramFile of this guest has beside."""

    inode: Object


class LinuxPageCache:
    """Implements programs.PageCache. NotAvailable where the kernel's types do not say what is needed."""

    def __init__(self, machine: Machine, linux: Linux) -> None:
        self._machine = machine
        self._linux = linux
        self._table: tuple[int, Mapping[int, Entry]] | None = None

    @property
    def table_size(self) -> int:
        return self._layout()[0]

    @property
    def entries(self) -> Mapping[int, Entry]:
        return self._layout()[1]

    def _layout(self) -> tuple[int, Mapping[int, Entry]]:
        if self._table is None:
            with self._linux.asking("--arm aops is") as program:
                table = program.type("struct address_space_operations")
                offsets = {member.name: member.bit_offset // 8 for member in table.members or ()}
            found = {offsets[name]: entry for name, entry in _ENTRIES.items() if name in offsets}
            if set(found.values()) != set(Entry):
                raise NotAvailable("--arm aops is", "what is known of this kernel's types leaves operations out")
            self._table = table.size, found
        return self._table

    # -------------------------------------------------------------------------------------------------------- a file

    def mapping(self, file: ProgramFile) -> int:
        return int(_inode(file).i_mapping.value_())

    def pointer(self, mapping: int) -> int:
        return int(self._mapping(mapping).a_ops.address_of_().value_())

    def unread(self, file: ProgramFile) -> str | None:
        with self._linux.asking("--arm aops is"):
            inode = _inode(file)
            system, operations = inode.i_sb.s_type.name.string_().decode(), inode.i_mapping.a_ops
            if not inode.i_sb.s_bdev.read_():
                return f"{system} is no file system on a block device, and reads no pages"
            readers = [name for name in ("readpage", "read_folio", "readahead") if _has(operations, name)]
            if not readers or _has(operations, "readpages"):
                return f"{system} reads pages in a way of its own"
        return None

    def hold(self, file: ProgramFile) -> list[tuple[int, int, int]]:
        """i_count, as igrab(), and of the mount the count that makes umount say EBUSY."""
        with self._linux.asking("pinning a file is") as program:
            inode = _inode(file)
            counts = [(_address(inode.i_count), _COUNT, 1)]
            mounts = inode.i_sb.s_mounts
            first = mounts.next.read_()
            if first.value_() != mounts.address_of_().value_():
                offset = program.type("struct mount").member("mnt_instance").bit_offset // 8
                mount = Object(program, "struct mount *", first.value_() - offset)
                counts.append((_address(_mount_count(mount)), _COUNT, 1))
        return counts

    def deny(self, file: ProgramFile) -> tuple[int, int, int]:
        """As deny_write_access(): i_writecount is how many write or, negative, how many deny it."""
        with self._linux.asking("denying writers is"):
            count = _inode(file).i_writecount
            if count.counter.value_() > 0:
                raise ProbeError(errno.ETXTBSY, "the file is open for writing")
            return _address(count), _COUNT, -1

    # --------------------------------------------------------------------------------------------------------- pages

    def page(self, mapping: int, index: int) -> CachedPage | None:
        with self._linux.asking("the page cache is") as program:
            space = self._mapping(mapping)
            entry = xa_load(space.i_pages.address_of_(), index)
            if not entry or xa_is_value(entry):
                return None
            return self._described(cast(program.type("struct page *"), entry), mapping)

    def started(self, entry: Entry, regs: Regs) -> tuple[int, range]:
        """read_folio(file, folio) or readahead(struct readahead_control *)."""
        with self._linux.asking("what is read is"):
            if entry is Entry.READ:
                page = self._page(regs.arg(2))
                mapping = int(page.mapping.value_())
                found = self._described(page, mapping)
                return mapping, range(found.index, found.index + found.count)
            control = self._linux.object("struct readahead_control *", regs.arg(1))
            first, count = control.member_("_index").value_(), control.member_("_nr_pages").value_()
            return control.mapping.value_(), range(first, first + count)

    def subject(self, entry: Entry, regs: Regs) -> CachedPage:
        """free_folio(folio), whose mapping is none any more; migrate_folio(mapping, new, old, mode)."""
        with self._linux.asking("what goes is"):
            if entry is Entry.MOVE:
                return CachedPage(regs.arg(1), 0, 0, uptodate=False)
            return self._described(self._page(regs.arg(1)), 0)

    def completions(self) -> Sequence[str]:
        symbols = self._machine.symbols
        return [name for name in (_END, *_UNLOCK) if symbols.lookup(name)][: 2 if symbols.lookup(_END) else 1]

    def completed(self, function: str, regs: Regs) -> CachedPage | None:
        with self._linux.asking("what was read is"):
            page = self._page(regs.arg(1))
            mapping = page.mapping.value_()
            if not mapping or mapping & 3:
                return None  # anonymous memory, or the kernel's own
            whether = bool(regs.arg(2) & 0xFF) if function == _END else None
            return self._described(page, int(mapping), whether)

    def _mapping(self, address: int) -> Object:
        return self._linux.object("struct address_space *", address)

    def _page(self, address: int) -> Object:
        return self._linux.object("struct page *", address)

    def _described(self, page: Object, mapping: int, uptodate: bool | None = None) -> CachedPage:
        """A page, or the first of a folio. With no disk behind the file nothing is ever yet to be written."""
        flags, bit = page.flags.value_(), self._bit
        count = int(compound_nr(page)) if PageHead(page) else 1
        host = self._mapping(mapping).host if mapping else None
        on_disk = bool(host is not None and host.read_() and host.i_sb.s_bdev.read_())
        settled = not on_disk or not flags & (bit("PG_dirty") | bit("PG_writeback"))
        return CachedPage(
            mapping,
            int(page_index(page)),
            int(page_to_pfn(page)) * _PAGE,
            bool(flags & bit("PG_uptodate")) if uptodate is None else uptodate,
            count,
            settled,
        )

    def _bit(self, name: str) -> int:
        return 1 << int(self._linux.program.constant(name).value_())


def _inode(file: ProgramFile) -> Object:
    return file.inode  # type: ignore[attr-defined]  # a LinuxFile, of the Programs that this cache belongs to


def _address(member: Object) -> int:
    return int(member.address_of_().value_())


def _mount_count(mount: Object) -> Object:
    """Of the one processor there is, which the kernel adds to the others'."""
    if not _member(mount, "mnt_pcp"):
        return mount.mnt_count  # a kernel for one alone
    return per_cpu_ptr(mount.mnt_pcp, 0).mnt_count


def _member(structure: Object, name: str) -> bool:
    return bool(structure.type_.type.has_member(name))


def _has(operations: Object, name: str) -> bool:
    return bool(_member(operations, name) and operations.member_(name).value_())
