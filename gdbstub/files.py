"""The files a debugger may read through vFile: virtual ones, built when first opened, and a folder where one is given.

Rules: nothing here touches the host's file system; a path is a key of a dictionary, and what is not in it is asked of
the folder (`servedir`). Standard library only; used by one session in the machine's thread. Error numbers and the stat
layout are those of the GDB manual, "File-I/O Remote Protocol Extension" (`struct stat`, `Errno Values`), which are not
the host's.
"""

from __future__ import annotations

import enum
import posixpath
import stat as host_stat
import struct
from collections.abc import Callable, Mapping
from typing import Final, Protocol, TypeAlias

MAX_OPEN: Final = 64
"""Open descriptors one session may hold."""

Content: TypeAlias = "bytes | Callable[[], bytes]"


class FileErrno(enum.IntEnum):
    """GDB's own numbers."""

    EPERM = 1
    ENOENT = 2
    EBADF = 9
    EACCES = 13
    ENOTDIR = 20
    EISDIR = 21
    EINVAL = 22
    EMFILE = 24
    EROFS = 30
    ENAMETOOLONG = 91
    EUNKNOWN = 9999


class FileError(Exception):
    """A vFile operation that failed with `errno`."""

    def __init__(self, errno: FileErrno) -> None:
        super().__init__(errno.name)
        self.errno = errno


class OpenFile(Protocol):
    """A file that is being read; FileError where that fails."""

    @property
    def size(self) -> int:
        """Bytes, as of now."""
        ...

    def pread(self, count: int, offset: int) -> bytes: ...

    def close(self) -> None: ...


class Folder(Protocol):
    """What stands behind the virtual files: see `servedir.ServedFolder`."""

    def open(self, path: str) -> OpenFile: ...

    def stat(self, path: str, *, follow: bool = True) -> tuple[int, int]: ...

    def readlink(self, path: str) -> bytes: ...


class _Content:
    """An open virtual file."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def pread(self, count: int, offset: int) -> bytes:
        return self._data[offset : offset + count]

    def close(self) -> None: ...


_STAT = struct.Struct(">IIIIIIIQQQIII")  # dev ino mode nlink uid gid rdev size blksize blocks atime mtime ctime
_BLOCK = 512
_WRITE_FLAGS = 0x1 | 0x2 | 0x200 | 0x400  # O_WRONLY O_RDWR O_CREAT O_TRUNC, in GDB's numbering


class FileTree:
    """A read-only tree: absolute paths to bytes, or to a callable that is asked for them at each open.

    `exec_file` is the path debuggers are told to take symbols from, or None. Paths that are not in `files` are looked
    for in `folder`. Shared by all sessions. Every method raises FileError.
    """

    def __init__(
        self, files: Mapping[str, Content], exec_file: str | None = None, folder: Folder | None = None
    ) -> None:
        self.exec_file = exec_file
        self._folder = folder
        self._contents: dict[str, Content] = {posixpath.normpath(path): content for path, content in files.items()}

    def open(self, path: str) -> OpenFile:
        """The file at `path`, to be closed."""
        plain = posixpath.normpath(path)
        content = self._contents.get(plain)
        if content is None:
            if self._folder is not None:
                return self._folder.open(path)
            raise FileError(FileErrno.EISDIR if self._is_directory(plain) else FileErrno.ENOENT)
        if not isinstance(content, bytes):
            content = content()
        return _Content(content)

    def stat(self, path: str, *, follow: bool = True) -> bytes:
        """The 64 bytes of GDB's `struct stat` for a file or directory, or for a link unless `follow`."""
        plain = posixpath.normpath(path)
        if self._is_directory(plain):
            return _pack_stat(host_stat.S_IFDIR | 0o555, 0)
        if plain not in self._contents and self._folder is not None:
            return _pack_stat(*self._folder.stat(path, follow=follow))
        return _pack_stat(host_stat.S_IFREG | 0o444, self.open(path).size)

    def readlink(self, path: str) -> bytes:
        """What a link of the folder says; EINVAL for a path that exists and is none."""
        if self._folder is not None and posixpath.normpath(path) not in self._contents:
            return self._folder.readlink(path)
        self.stat(path)
        raise FileError(FileErrno.EINVAL)

    def _is_directory(self, path: str) -> bool:
        prefix = path if path.endswith("/") else path + "/"
        return any(name.startswith(prefix) for name in self._contents)


class OpenFiles:
    """The descriptors of one session. Every method raises FileError with the number to answer."""

    def __init__(self, tree: FileTree) -> None:
        self.tree = tree
        self._open: dict[int, OpenFile] = {}

    def open(self, path: str, flags: int) -> int:
        """A descriptor for reading `path`; any wish to write is EROFS."""
        if flags & _WRITE_FLAGS:
            raise FileError(FileErrno.EROFS)
        descriptor = next((number for number in range(MAX_OPEN) if number not in self._open), None)
        if descriptor is None:
            raise FileError(FileErrno.EMFILE)
        self._open[descriptor] = self.tree.open(path)
        return descriptor

    def pread(self, descriptor: int, count: int, offset: int) -> bytes:
        """At most `count` bytes from `offset`; empty at the end."""
        return self._file(descriptor).pread(count, offset)

    def fstat(self, descriptor: int) -> bytes:
        """GDB's `struct stat` of an open file."""
        return _pack_stat(host_stat.S_IFREG | 0o444, self._file(descriptor).size)

    def close(self, descriptor: int) -> None:
        """Give the descriptor back."""
        self._file(descriptor).close()
        del self._open[descriptor]

    def close_all(self) -> None:
        """The session has ended."""
        for descriptor in list(self._open):
            self.close(descriptor)

    def _file(self, descriptor: int) -> OpenFile:
        try:
            return self._open[descriptor]
        except KeyError as error:
            raise FileError(FileErrno.EBADF) from error


def _pack_stat(mode: int, size: int) -> bytes:
    blocks = -(-size // _BLOCK)
    return _STAT.pack(0, 0, mode, 1, 0, 0, 0, size, _BLOCK, blocks, 0, 0, 0)
