"""Which files a guest has, asked without running it: a folder on the host, or the fetched initramfs.

Rules: looks at names and kinds, never at contents; no link leads out of the folder. Implements `probes.spec.FileScope`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

from emu.hostfile import read_file
from emu.images import initramfs
from emu.images.fetch import Fetched
from probes.arch import Convention
from probes.errors import ProbeError

Lookup: TypeAlias = Callable[[str], "tuple[int, str] | None"]
"""Path without leading slash or dots -> mode and what it points to if it links; None where there is nothing."""

_MAX_LINKS: Final = 40  # MAXSYMLINKS, include/linux/namei.h
_MAX_PATH: Final = 4096


class GuestFiles:
    """FileScope over a `lookup`; None for a guest whose files nobody knows, where every path is taken for a file."""

    def __init__(self, convention: Convention, lookup: Lookup | None) -> None:
        self._convention = convention
        self._lookup = lookup

    @property
    def convention(self) -> Convention:
        return self._convention

    def is_regular(self, path: str) -> bool:
        """As kern_path() goes: links followed, from the guest's root. ProbeError ENOENT, ENOTDIR, ELOOP."""
        if self._lookup is None:
            return True
        mode = _resolve(self._lookup, path)
        if path.endswith("/") and not stat.S_ISDIR(mode):
            raise ProbeError(errno.ENOTDIR, f"{path}: not a directory")
        return stat.S_ISREG(mode)


def host_folder(root: Path) -> Lookup:
    """The guest's files as they lie under a folder of the host's."""

    def lookup(path: str) -> tuple[int, str] | None:
        host = root / path
        try:
            mode = host.lstat().st_mode
            return mode, os.readlink(host) if stat.S_ISLNK(mode) else ""
        except (OSError, ValueError):
            return None

    return lookup


def fetched_initramfs(fetched: Fetched) -> Lookup:
    """The guest that `gdbstub boot` starts, after its /init has linked BusyBox's applets. ImageError."""
    found = initramfs.entries(read_file(fetched.initramfs))
    for name in initramfs.applets(read_file(fetched.busybox)):
        found.setdefault(f"bin/{name}", (stat.S_IFLNK | 0o777, "/bin/busybox"))
    return lambda path: found.get(path) if path else (stat.S_IFDIR | 0o755, "")


def _resolve(lookup: Lookup, path: str) -> int:
    waiting = path.split("/")[::-1]
    at: list[str] = []
    mode, links = stat.S_IFDIR, 0
    while waiting:
        name = waiting.pop()
        if name in ("", "."):
            continue
        if not stat.S_ISDIR(mode):
            raise ProbeError(errno.ENOTDIR, f"{path}: not a directory")
        if name == "..":
            at = at[:-1]
            continue
        found = lookup("/".join([*at, name])) if len(path) < _MAX_PATH else None
        if found is None:
            raise ProbeError(errno.ENOENT, f"{path}: no such file")
        mode, target = found
        if not stat.S_ISLNK(mode):
            at.append(name)
            continue
        links += 1
        if links > _MAX_LINKS:
            raise ProbeError(errno.ELOOP, f"{path}: too many links")
        at = [] if target.startswith("/") else at
        waiting += target.split("/")[::-1]
        mode = stat.S_IFDIR
    return mode
