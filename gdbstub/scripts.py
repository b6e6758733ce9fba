"""`monitor script` and `monitor object load`: files of the host's, from the one folder that was allowed.

Rules: called in the machine's thread. Whoever may attach a debugger may run what lies in that folder, as the user who
started the server, and nothing else: a path is resolved, must lie inside, and is then opened step by step without
following a link, so that nothing can be put in its way. Refusals are MachineErrors.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Final

from emu.boot import GuestMachine
from emu.iface import MachineError
from probes.manager import Manager
from probes.objects import MAX_SIZE

_MAX_SCRIPT: Final = 1 << 20  # bytes
_MAX_OUTPUT: Final = 1 << 16  # characters of one reply


class ScriptFolder:
    """A folder whose files may be read; MachineError where it is none."""

    def __init__(self, folder: Path) -> None:
        self._folder = Path(os.path.realpath(folder))
        if not self._folder.is_dir():
            raise MachineError(f"{folder}: no such folder")

    def read(self, name: str, limit: int) -> bytes:
        """A regular file in the folder or below it, by a path from there or an absolute one."""
        if "\0" in name:
            raise MachineError("a file's name has no NUL")
        path = Path(os.path.realpath(self._folder / name))
        if not path.is_relative_to(self._folder) or path == self._folder:
            raise MachineError(f"{name} is outside the folder of --allow-scripts")
        try:
            with self._open(path.relative_to(self._folder).parts) as file:
                data = file.read(limit + 1)
        except OSError as error:
            reason = "is a link" if error.errno == errno.ELOOP else (error.strerror or str(error)).lower()
            raise MachineError(f"{name}: {reason}") from error
        if len(data) > limit:
            raise MachineError(f"{name}: more than {limit >> 20} MiB")
        return data

    @contextlib.contextmanager
    def _open(self, parts: Sequence[str]) -> Iterator[io.FileIO]:
        """Down from the folder, each name opened in the one before; a link put there meanwhile is an error."""
        with contextlib.ExitStack() as opened:
            at = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            opened.callback(os.close, at)
            for part in parts[:-1]:
                at = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
                opened.callback(os.close, at)
            # not waiting for the other end, where it is a pipe
            last = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
            file = opened.enter_context(io.FileIO(last))
            if not stat.S_ISREG(os.fstat(last).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            yield file


class _Output(io.StringIO):
    """What a script prints, as much of it as a reply can hold."""

    def write(self, text: str) -> int:
        room = _MAX_OUTPUT - self.tell()
        if room >= 0:
            super().write(text[:room] if len(text) <= room else f"{text[:room]}\n... cut")
        return len(text)


class HostScripts:
    """Implements monitorservices.Scripts over one folder."""

    def __init__(self, folder: ScriptFolder, machine: GuestMachine, probes: Manager) -> None:
        self._folder = folder
        self._machine = machine
        self._probes = probes

    def run(self, name: str, /) -> Sequence[str]:
        """Execute a Python file with `machine` and `probes` bound. -> what it printed.

        What it raises becomes a MachineError that names its line; what it printed before comes first.
        """
        source = self._folder.read(name, _MAX_SCRIPT)
        output = _Output()
        try:
            code = compile(source, name, "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None)
            raise MachineError(f"{name}{f':{line}' if line else ''}: {getattr(error, 'msg', error)}") from error
        self._execute(code, name, output)
        return output.getvalue().splitlines()

    def _execute(self, code: CodeType, name: str, output: _Output) -> None:
        names = {
            "__name__": "__main__",
            "__file__": name,
            "machine": self._machine,
            "probes": self._probes,
            "print": partial(print, file=output),
        }
        try:
            exec(code, names)
        except SystemExit as end:
            if end.code:
                raise MachineError(_told(output, f"{name}: {end.code}")) from end
        except Exception as error:  # the boundary to a user's program: whatever it is, they are told
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
            where = f"{name}:{lines[-1]}" if lines else name
            reason = f"{type(error).__name__}: {error}"
            raise MachineError(_told(output, f"{where}: {reason}")) from error

    def load_object(self, name: str, /) -> Sequence[str]:
        """A relocatable object into monitor RAM. -> what it offers; MachineError or ProbeError."""
        data = self._folder.read(name, MAX_SIZE)
        offered = self._probes.load_object(data, name)
        return [f"{name}: {', '.join(offered)}"]


def _told(output: _Output, reason: str) -> str:
    return "\n".join([*output.getvalue().splitlines(), reason])
