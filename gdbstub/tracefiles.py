"""`monitor trace save`: the trace into a file of the one folder that was allowed, and nowhere else.

Rules: called in the machine's thread. A name is a plain one, no path; a link or anything but a regular file in its
place is refused. Refusals are MachineErrors.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from emu.iface import MachineError
from probes.export import FORMATS, Unfinished, open_export
from probes.trace import Record


class TraceFolder:
    """MachineError where `folder` is none."""

    def __init__(self, folder: Path) -> None:
        self._folder = Path(os.path.realpath(folder))
        if not self._folder.is_dir():
            raise MachineError(f"{folder}: no such folder")

    def save(self, name: str, records: Iterable[Record], unfinished: Iterable[Unfinished]) -> str:
        """Write them in the format of the name's suffix, over a file that is there. -> where it is."""
        suffix = Path(name).suffix.removeprefix(".")
        if suffix not in FORMATS:
            known = ", ".join(f".{one}" for one in FORMATS)
            raise MachineError(f"{name}: the suffix picks the format, write {known}")
        if name != os.path.basename(name) or "\0" in name:
            raise MachineError(f"{name} is no plain name: traces are saved in the folder of --trace-dir itself")
        try:
            descriptor = self._open(name)
        except OSError as error:
            reason = "is a link" if error.errno == errno.ELOOP else (error.strerror or str(error)).lower()
            raise MachineError(f"{name}: {reason}") from error
        with open(descriptor, "wb") as file:
            export = open_export(suffix, file.write)
            for record in records:
                export.add(record)
            export.close(unfinished)
        return str(self._folder / name)

    def _open(self, name: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            descriptor = os.open(name, flags, 0o666, dir_fd=folder)
        finally:
            os.close(folder)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "not a regular file")
        os.ftruncate(descriptor, 0)
        return descriptor
