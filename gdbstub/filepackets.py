"""The packets about files, as a part of `Session`: their syntax; what there is to read is in `files`.

Rules: as in `session`. Source: GDB manual, "Host I/O Packets".
"""

from __future__ import annotations

from collections.abc import Callable

from gdbstub.files import FileTree, OpenFiles
from gdbstub.packets import fields, number, packet, unhex
from gdbstub.rsp import fit
from gdbstub.runpackets import check_process


class FilePackets:
    """What `Session` answers where it was given `files`."""

    _packet_size: int
    _part: Callable[[bytes, bytes], bytes]

    def __init__(self, files: FileTree | None) -> None:
        self.open_files = OpenFiles(files) if files is not None else None
        self.exec_file = files.exec_file if files is not None else None

    @packet("qXfer:exec-file:read", feature="qXfer:exec-file:read+", requires="exec_file")
    def _exec_file(self, rest: bytes) -> bytes:
        assert self.exec_file is not None
        process, _, window = rest.partition(b":")
        check_process(process)
        return self._part(self.exec_file.encode(), window)

    @packet("vFile:setfs", requires="open_files")
    def _file_system(self, _rest: bytes) -> bytes:
        return b"F0"  # every process sees the one tree

    @packet("vFile:open", requires="open_files")
    def _file_open(self, rest: bytes) -> bytes:
        path, flags, _mode = fields(rest, 3)
        return b"F%x" % self._files.open(_path(path), number(flags))

    @packet("vFile:close", requires="open_files")
    def _file_close(self, rest: bytes) -> bytes:
        self._files.close(number(rest))
        return b"F0"

    @packet("vFile:pread", requires="open_files")
    def _file_read(self, rest: bytes) -> bytes:
        descriptor, count, offset = (number(text) for text in fields(rest, 3))
        data = self._files.pread(descriptor, min(count, self._packet_size), offset)
        return _file_data(fit(data, self._packet_size - len("F20000;")))

    @packet("vFile:fstat", requires="open_files")
    def _file_fstat(self, rest: bytes) -> bytes:
        return _file_data(self._files.fstat(number(rest)))

    @packet("vFile:stat", requires="open_files")
    def _file_stat(self, rest: bytes) -> bytes:
        return _file_data(self._files.tree.stat(_path(rest)))

    @packet("vFile:lstat", requires="open_files")
    def _file_link_stat(self, rest: bytes) -> bytes:
        return _file_data(self._files.tree.stat(_path(rest), follow=False))

    @packet("vFile:readlink", requires="open_files")
    def _file_link(self, rest: bytes) -> bytes:
        return _file_data(self._files.tree.readlink(_path(rest)))

    @property
    def _files(self) -> OpenFiles:
        assert self.open_files is not None
        return self.open_files


def _path(text: bytes) -> str:
    return unhex(text).decode("utf-8", "surrogateescape")


def _file_data(data: bytes) -> bytes:
    return b"F%x;%b" % (len(data), data)
