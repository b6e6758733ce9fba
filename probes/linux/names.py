"""The kernel's cache of names: which inode a path leads to, by the dentries that are in memory.

Rules: the machine's thread; raises what drgn raises (see program.question). Dentries are read as bytes, each in one
piece: a folder may have thousands, and uprobes ask at every mapping. What was found once is only looked at again: the
dentry of that name, in that folder, is still in the kernel's hash. One that is in no hash is of a file that was
removed. Sources: include/linux/dcache.h and fs/namei.c, 5.10 to 6.12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import drgn
from drgn.helpers.linux.list import list_for_each_entry

_MOUNTED: Final = 1 << 16  # DCACHE_MOUNTED, until 6.14
_MAX_KNOWN: Final = 4096

Read = Callable[[int, int], bytes]
"""(address, size) -> bytes of the kernel's memory. drgn.FaultError."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Offsets in a `struct dentry`, and its size. `first` is where a folder's list of children begins, `next` the link
    in a child; `ring`: the list ends at its head, not with NULL."""

    word: int
    size: int
    flags: int
    hashed: int
    parent: int
    length: int
    name: int
    inode: int
    first: int
    next: int
    ring: bool


class _Dentry(NamedTuple):
    """One, and its bytes."""

    address: int
    data: bytes


class _Place(NamedTuple):
    """A `struct path`: `mount` is the address of the `struct mount`."""

    mount: int
    dentry: int


class Names:
    """The names of one machine."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._layout: _Layout | None = None
        self._known: dict[tuple[int, bytes], int] = {}  # (folder, name) -> dentry

    def inode(self, program: drgn.Program, path: str) -> int | None:
        """Address of the inode of a path, from the root that the first process began with; links are not followed.

        None where it is not in memory, or known not to exist.
        """
        if self._layout is None:
            self._layout = _layout(program)
        way = [self._root(program)]
        for name in path.encode("utf-8", "surrogateescape").split(b"/"):
            if name == b"..":
                del way[max(1, len(way) - 1) :]
            elif name not in (b"", b"."):
                child = self._child(way[-1].dentry, name)
                if child is None:
                    return None
                place = _Place(way[-1].mount, child.address)
                flags = self._word(child, self._layout.flags, 4)
                way.append(self._mounted(program, place) if flags & _MOUNTED else place)
        return self._word(self._dentry(way[-1].dentry), self._layout.inode) or None

    def _root(self, program: drgn.Program) -> _Place:
        root = program["init_task"].fs.root
        return _Place(root.mnt.value_() - _offset(program.type("struct mount"), "mnt"), root.dentry.value_())

    def _mounted(self, program: drgn.Program, place: _Place) -> _Place:
        """What is mounted there, the last above others."""
        while True:
            mounts = drgn.Object(program, "struct mount *", place.mount).mnt_mounts.address_of_()
            for mount in list_for_each_entry("struct mount", mounts, "mnt_child"):
                if mount.mnt_mountpoint.value_() == place.dentry:
                    place = _Place(mount.value_(), mount.mnt.mnt_root.value_())
                    break
            else:
                return place

    def _child(self, folder: int, name: bytes) -> _Dentry | None:
        known = self._known.get((folder, name))
        if known is not None:
            try:
                dentry = self._dentry(known)
                if self._is(dentry, folder, name):
                    return dentry
            except drgn.FaultError:
                pass  # its memory is used for something else now
        for dentry in self._children(folder):
            if self._is(dentry, folder, name):
                if len(self._known) >= _MAX_KNOWN:
                    self._known.clear()
                self._known[folder, name] = dentry.address
                return dentry
        return None

    def _is(self, dentry: _Dentry, folder: int, name: bytes) -> bool:
        assert self._layout is not None  # made by `inode`
        layout = self._layout
        return (
            self._word(dentry, layout.length, 4) == len(name)
            and self._word(dentry, layout.parent) == folder
            and self._word(dentry, layout.hashed) != 0
            and self._read(self._word(dentry, layout.name), len(name)) == name
        )

    def _children(self, folder: int) -> Iterator[_Dentry]:
        assert self._layout is not None
        layout = self._layout
        head = folder + layout.first
        end = head if layout.ring else 0
        at = int.from_bytes(self._read(head, layout.word), "little")
        while at != end:
            dentry = self._dentry(at - layout.next)
            yield dentry
            at = self._word(dentry, layout.next)

    def _dentry(self, address: int) -> _Dentry:
        assert self._layout is not None
        return _Dentry(address, self._read(address, self._layout.size))

    def _word(self, dentry: _Dentry, at: int, size: int = 0) -> int:
        """At an offset; a pointer, or of `size` bytes."""
        assert self._layout is not None
        return int.from_bytes(dentry.data[at : at + (size or self._layout.word)], "little")


def _layout(program: drgn.Program) -> _Layout:
    dentry, name = program.type("struct dentry"), program.type("struct qstr")
    children, link = ("d_children", "d_sib") if dentry.has_member("d_children") else ("d_subdirs", "d_child")  # 6.8
    return _Layout(
        word=drgn.sizeof(program.type("void *")),
        size=drgn.sizeof(dentry),
        flags=_offset(dentry, "d_flags"),
        hashed=_offset(dentry, "d_hash") + _offset(program.type("struct hlist_bl_node"), "pprev"),
        parent=_offset(dentry, "d_parent"),
        length=_offset(dentry, "d_name") + _offset(name, "len"),
        name=_offset(dentry, "d_name") + _offset(name, "name"),
        inode=_offset(dentry, "d_inode"),
        first=_offset(dentry, children),
        next=_offset(dentry, link),
        ring=children == "d_subdirs",
    )


def _offset(structure: drgn.Type, member: str) -> int:
    return int(structure.member(member).bit_offset) // 8
