"""A folder of the host that debuggers may read, `--serve-dir`, or name the symbols of, `--sysroot`.

Rules: the only room that opens host files because a debugger says so; nothing is ever written. Paths are resolved as if
the folder were the root of the file system, one component at a time, each opened beside the one before and never
through a link: a link is read and resolved by hand, inside. What is no regular file or folder (a FIFO, a device) is
refused before it can block.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from emu.iface import MemoryFault
from gdbstub.files import FileErrno, FileError

MAX_LINKS: Final = 40
"""In one path, as Linux has it (include/linux/namei.h, MAXSYMLINKS)."""
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class HostFile:
    """An open file of the folder; implements files.OpenFile."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @property
    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def pread(self, count: int, offset: int) -> bytes:
        try:
            return os.pread(self._descriptor, count, offset)
        except OSError as error:
            raise _as_file_error(error) from error

    def close(self) -> None:
        os.close(self._descriptor)


class ServedFolder:
    """The folder; OSError where it cannot be opened. Every method raises FileError with the number to answer."""

    def __init__(self, path: Path) -> None:
        self._root = os.open(path, _FOLDER & ~os.O_NOFOLLOW)

    def open(self, path: str) -> HostFile:
        """The regular file at `path`, which begins with a slash or not."""
        with ExitStack() as opened:
            folder, name = self._resolve(path, opened, follow=True)
            if name == ".":
                raise FileError(FileErrno.EISDIR)
            try:
                descriptor = os.open(name, _FILE, dir_fd=folder)
            except OSError as error:
                raise _as_file_error(error) from error
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            return HostFile(descriptor)
        os.close(descriptor)
        raise FileError(FileErrno.EISDIR if stat.S_ISDIR(mode) else FileErrno.EACCES)

    def stat(self, path: str, *, follow: bool = True) -> tuple[int, int]:
        """(mode, size) of what is at `path`, of the link itself unless `follow`."""
        with ExitStack() as opened:
            folder, name = self._resolve(path, opened, follow=follow)
            try:
                found = os.stat(name, dir_fd=folder, follow_symlinks=False)
            except OSError as error:
                raise _as_file_error(error) from error
        return stat.S_IFMT(found.st_mode) | found.st_mode & 0o555, found.st_size

    def readlink(self, path: str) -> bytes:
        """What the link at `path` says; EINVAL for what is no link."""
        with ExitStack() as opened:
            folder, name = self._resolve(path, opened, follow=False)
            try:
                return os.fsencode(os.readlink(name, dir_fd=folder))
            except OSError as error:
                raise _as_file_error(error) from error

    def _resolve(self, path: str, opened: ExitStack, *, follow: bool) -> tuple[int, str]:
        """The folder that `path` lies in and its name there; the folders on the way are closed with `opened`."""
        if "\0" in path:
            raise FileError(FileErrno.EINVAL)
        parts = deque(path.split("/"))
        folders = [self._root]
        links = 0
        while parts:
            name = parts.popleft()
            if name in ("", "."):
                continue
            if name == "..":
                folders = folders[:-1] or folders
                continue
            target = _link(folders[-1], name) if parts or follow else None
            if target is not None:
                links += 1
                if links > MAX_LINKS:
                    raise FileError(FileErrno.EINVAL)
                folders = folders[:1] if target.startswith("/") else folders
                parts.extendleft(reversed(target.split("/")))
            elif not any(part not in ("", ".") for part in parts):
                if parts:  # a slash behind the name is for folders
                    _enter(folders[-1], name, opened)
                return folders[-1], name
            else:
                folders.append(_enter(folders[-1], name, opened))
        return folders[-1], "."


class _Copy:
    """A file of the folder as probes read one of the guest's; implements probes.programs.Copy."""

    def __init__(self, file: HostFile) -> None:
        self._file = file

    def read(self, offset: int, size: int) -> bytes:
        try:
            return self._file.pread(size, offset)
        except (FileError, OverflowError) as error:  # an offset that no file has
            raise MemoryFault(offset) from error


@contextmanager
def open_copy(folder: ServedFolder, path: str) -> Iterator[_Copy | None]:
    """The copy in `folder` of the guest's file at `path`, closed at the end; None where there is none to be read."""
    try:
        file = folder.open(path)
    except FileError:
        yield None
        return
    try:
        yield _Copy(file)
    finally:
        file.close()


def _link(folder: int, name: str) -> str | None:
    """What the link `name` says, None where it is none (or is not there: opening it will tell)."""
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError:
        return None


def _enter(folder: int, name: str, opened: ExitStack) -> int:
    try:
        descriptor = os.open(name, _FOLDER, dir_fd=folder)
    except OSError as error:
        raise _as_file_error(error) from error
    opened.callback(os.close, descriptor)
    return descriptor


def _as_file_error(error: OSError) -> FileError:
    """By the errno's name: GDB's numbers are not the host's."""
    name = errno.errorcode.get(error.errno or 0, "")
    return FileError(FileErrno.__members__.get(name, FileErrno.EUNKNOWN))
