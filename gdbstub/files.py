"""The files a debugger may read through vFile: virtual ones only, built when first opened.

Rules: nothing here touches the host's file system; a path is a key of a dictionary. Standard library only; used by one
session in the machine's thread. Error numbers and the stat layout are those of the GDB manual, "File-I/O Remote
Protocol Extension" (`struct stat`, `Errno Values`), which are not the host's.
"""

from __future__ import annotations

import enum
import posixpath
import stat as host_stat
import struct
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

MAX_OPEN: Final = 64
"""Open descriptors one session may hold."""

Content: TypeAlias = "bytes | Callable[[], bytes]"


class FileErrno(enum.IntEnum):
    """GDB's own numbers."""

    ENOENT = 2
    EBADF = 9
    EISDIR = 21
    EINVAL = 22
    EMFILE = 24
    EROFS = 30


class FileError(Exception):
    """A vFile operation that failed with `errno`."""

    def __init__(self, errno: FileErrno) -> None:
        super().__init__(errno.name)
        self.errno = errno


_STAT = struct.Struct(">IIIIIIIQQQIII")  # dev ino mode nlink uid gid rdev size blksize blocks atime mtime ctime
_BLOCK = 512
_WRITE_FLAGS = 0x1 | 0x2 | 0x200 | 0x400  # O_WRONLY O_RDWR O_CREAT O_TRUNC, in GDB's numbering


class FileTree:
    """A read-only tree: absolute paths to bytes, or to a callable that makes them when they are first wanted.

    `exec_file` is the path debuggers are told to take symbols from, or None. Shared by all sessions.
    """

    def __init__(self, files: Mapping[str, Content], exec_file: str | None = None) -> None:
        self.exec_file = exec_file
        self._contents: dict[str, Content] = {posixpath.normpath(path): content for path, content in files.items()}

    def content(self, path: str) -> bytes:
        """The bytes of the file at `path`; FileError where there is none."""
        path = posixpath.normpath(path)
        content = self._contents.get(path)
        if content is None:
            raise FileError(FileErrno.EISDIR if self._is_directory(path) else FileErrno.ENOENT)
        if not isinstance(content, bytes):
            content = self._contents[path] = content()
        return content

    def stat(self, path: str) -> bytes:
        """The 64 bytes of GDB's `struct stat` for a file or directory."""
        path = posixpath.normpath(path)
        if self._is_directory(path):
            return _pack_stat(host_stat.S_IFDIR | 0o555, 0)
        return _pack_stat(host_stat.S_IFREG | 0o444, len(self.content(path)))

    def _is_directory(self, path: str) -> bool:
        prefix = path if path.endswith("/") else path + "/"
        return any(name.startswith(prefix) for name in self._contents)


class OpenFiles:
    """The descriptors of one session. Every method raises FileError with the number to answer."""

    def __init__(self, tree: FileTree) -> None:
        self._tree = tree
        self._open: dict[int, bytes] = {}

    def open(self, path: str, flags: int) -> int:
        """A descriptor for reading `path`; any wish to write is EROFS."""
        if flags & _WRITE_FLAGS:
            raise FileError(FileErrno.EROFS)
        content = self._tree.content(path)
        for descriptor in range(MAX_OPEN):
            if descriptor not in self._open:
                self._open[descriptor] = content
                return descriptor
        raise FileError(FileErrno.EMFILE)

    def pread(self, descriptor: int, count: int, offset: int) -> bytes:
        """At most `count` bytes from `offset`; empty at the end."""
        return self._content(descriptor)[offset : offset + count]

    def fstat(self, descriptor: int) -> bytes:
        """GDB's `struct stat` of an open file."""
        return _pack_stat(host_stat.S_IFREG | 0o444, len(self._content(descriptor)))

    def stat(self, path: str) -> bytes:
        """GDB's `struct stat` of a path."""
        return self._tree.stat(path)

    def readlink(self, path: str) -> bytes:
        """Never succeeds: EINVAL for a path that exists, for it is no link."""
        self._tree.stat(path)
        raise FileError(FileErrno.EINVAL)

    def close(self, descriptor: int) -> None:
        """Give the descriptor back."""
        self._content(descriptor)
        del self._open[descriptor]

    def _content(self, descriptor: int) -> bytes:
        try:
            return self._open[descriptor]
        except KeyError as error:
            raise FileError(FileErrno.EBADF) from error


def _pack_stat(mode: int, size: int) -> bytes:
    blocks = -(-size // _BLOCK)
    return _STAT.pack(0, 0, mode, 1, 0, 0, 0, size, _BLOCK, blocks, 0, 0, 0)
