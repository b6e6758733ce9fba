"""An initramfs made in Python: BusyBox, a shell on the serial line, and what the user adds. No tool on the host is run.

Rules: standard library and `emu.iface`; reads host files only where the user names them. The same inputs give the same
bytes: entries are sorted, times 0, everything belongs to root. Format: cpio "newc", Linux 6.12
Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import os
import posixpath
import re
import shlex
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from emu.iface import ImageError
from emu.images.plan import Bytes

READY = "gdbstub-ready"
"""The line /init prints on the console when the guest is set up and before it runs anything of the user's."""
EXEC_STATUS = re.compile(r"gdbstub-exec-status: (\d+)\.")
"""Matches the console line that gives a command's exit status, 0 to 255 (above 128: killed by a signal), as group 1.

It starts in column 1 and ends in a full stop, so that who looks at the line as it grows never takes the first digit for
all of them. The echo of a typed `exec_line` does not match, for it has `$?` in the number's place.
"""

_COMMAND_FILE = "etc/gdbstub/command"
_INIT = f"""#!/bin/busybox sh
# The first process: set up, run the command that came with the image, then a shell on the serial line.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mount -t tmpfs tmpfs /tmp
/bin/busybox --install -s /bin
export PATH=/bin HOME=/ TERM=vt100 PS1='\\w # '
cd /
echo {READY}
if [ -f /{_COMMAND_FILE} ]; then
    setsid cttyhack sh /{_COMMAND_FILE}
    status=$?
    # Kernel messages share the line: none may come between our text and its number.
    echo 1 >/proc/sys/kernel/printk
    printf '\\n%s: %d.\\n' gdbstub-exec-status $status
fi
setsid cttyhack sh
poweroff -f
"""

_DIRECTORIES = ("bin", "dev", "etc", "proc", "root", "sys", "tmp")
_DEVICES = {"console": (0o600, 5, 1), "null": (0o666, 1, 3), "zero": (0o666, 1, 5), "tty": (0o666, 5, 0)}
_DEVICES |= {"kmsg": (0o644, 1, 11), "random": (0o666, 1, 8), "urandom": (0o666, 1, 9), "ttyS0": (0o600, 4, 64)}
"""Name in /dev -> permissions, major, minor (Documentation/admin-guide/devices.txt): for kernels without devtmpfs."""
_HEADER_SIZE = 110
_LONGEST_APPLET = 32
_SIZE_LIMIT = 0xFFFF_FFFF
"""Bytes of one file: the format has eight hexadecimal digits for it."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One file. `mode` with its type bits; `data` is a file's contents or a link's target; `device` major and minor."""

    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def build(busybox: bytes, *, command: str | None = None) -> bytes:
    """An initramfs around a static BusyBox. With `command`, /init runs it in a shell, prints its status and goes on.

    Ready to append to; `--exec` on a machine that is already up types `exec_line` instead.
    """
    entries = {name: _Entry(stat.S_IFDIR | 0o755) for name in _DIRECTORIES}
    entries["tmp"] = _Entry(stat.S_IFDIR | 0o1777)
    entries["bin/busybox"] = _Entry(stat.S_IFREG | 0o755, busybox)
    entries["init"] = _Entry(stat.S_IFREG | 0o755, _INIT.encode())
    for name, (mode, major, minor) in _DEVICES.items():
        entries[f"dev/{name}"] = _Entry(stat.S_IFCHR | mode, device=(major, minor))
    return _cpio(entries) + (command_archive(command) if command is not None else b"")


def command_archive(command: str) -> bytes:
    """What to put after an archive of `build` so that it runs `command`, a line or a script of the guest's shell."""
    entries = {parent: _Entry(stat.S_IFDIR | 0o755) for parent in _parents(_COMMAND_FILE)}
    entries[_COMMAND_FILE] = _Entry(stat.S_IFREG | 0o644, command.encode("utf-8", "surrogateescape") + b"\n")
    return _cpio(entries)


def exec_line(command: str) -> str:
    """What to type into the guest's shell to run `command` and get a line matching EXEC_STATUS; ends in a newline."""
    return f"sh -c {shlex.quote(command)}; printf '\\n%s: %d.\\n' gdbstub-exec-status $?\n"


def append(archive: Bytes, paths: Sequence[tuple[Path, str]]) -> bytes:
    """`archive`, which may be compressed, with host files and folders put in at guest paths.

    Folders go in whole; modes are kept, symbolic links stay links, whatever they point to. A guest path that is empty
    or ends in `/` gets the host's name. A later path wins over an earlier one and over the archive. ImageError for a
    file that cannot be read or is none of these.
    """
    entries: dict[str, _Entry] = {}
    for host, guest in paths:
        target = _guest_path(host, guest)
        for parent in _parents(target):
            entries.setdefault(parent, _Entry(stat.S_IFDIR | 0o755))
        _collect(host, target, entries)
    # The kernel takes archives one after another, compressed or not, each on a 4-byte boundary.
    return bytes(archive) + bytes(-len(archive) % 4) + _cpio(entries)


def entries(archive: Bytes) -> dict[str, tuple[int, str]]:
    """What an uncompressed archive holds: path without the leading slash -> mode, and what it points to if it links.

    ImageError where it is no newc archive or is cut short.
    """
    found: dict[str, tuple[int, str]] = {}
    view, at = memoryview(archive), 0
    while at + _HEADER_SIZE <= len(view):
        if bytes(view[at : at + 6]) != b"070701":
            raise ImageError("initramfs", "not an uncompressed cpio archive", at)
        try:
            fields = [int(bytes(view[at + 6 + 8 * index :][:8]), 16) for index in range(13)]
        except ValueError:
            raise ImageError("initramfs", "a header that is no number", at) from None
        mode, size, name_size = fields[1], fields[6], fields[11]
        start = at + _HEADER_SIZE + name_size
        data_at = start + -start % 4
        if data_at + size > len(view):
            raise ImageError("initramfs", "cut short", at)
        name = os.fsdecode(bytes(view[at + _HEADER_SIZE : start - 1]))
        if name != os.fsdecode(_TRAILER[0]):
            link = os.fsdecode(bytes(view[data_at : data_at + size])) if stat.S_ISLNK(mode) else ""
            found[posixpath.normpath(name).lstrip("/")] = mode, link
        at = data_at + size
        at += -at % 4
    return found


def applets(busybox: bytes) -> frozenset[str]:
    """The names /init links to BusyBox in /bin: its own list of them, which begins with `[`; empty if none is found."""
    start = busybox.find(b"\0[\0[[\0")
    names = set()
    at = start + 1
    while start >= 0 and 0 < (end := busybox.find(b"\0", at)) - at < _LONGEST_APPLET:
        names.add(busybox[at:end].decode("ascii", "replace"))
        at = end + 1
    return frozenset(names)


def _guest_path(host: Path, guest: str) -> str:
    if not guest or guest.endswith("/"):
        guest += host.resolve().name if host.name in ("", "..") else host.name
    clean = posixpath.normpath("/" + guest).lstrip("/")
    if not clean or ".." in guest.split("/"):
        raise ImageError(str(host), f"cannot be put at {guest!r} in the guest")
    return clean


def _parents(path: str) -> Iterable[str]:
    parts = path.split("/")[:-1]
    return ("/".join(parts[: count + 1]) for count in range(len(parts)))


def _collect(host: Path, guest: str, entries: dict[str, _Entry]) -> None:
    try:
        status = host.lstat()
        if stat.S_ISLNK(status.st_mode):
            entries[guest] = _Entry(stat.S_IFLNK | 0o777, os.fsencode(os.readlink(host)))
        elif stat.S_ISREG(status.st_mode):
            if status.st_size > _SIZE_LIMIT:
                raise ImageError(str(host), "larger than the 4 GiB an initramfs takes")
            entries[guest] = _Entry(status.st_mode, host.read_bytes())
        elif stat.S_ISDIR(status.st_mode):
            entries[guest] = _Entry(status.st_mode)
            for child in sorted(host.iterdir()):
                _collect(child, f"{guest}/{child.name}", entries)
        else:
            raise ImageError(str(host), "neither a file, a folder nor a symbolic link")
    except OSError as error:
        raise ImageError(str(host), f"cannot be read: {error.strerror or error}") from error


def _cpio(entries: Mapping[str, _Entry]) -> bytes:
    # Sorted, a folder comes before what is in it, as the kernel needs.
    rows = [(os.fsencode(name), entry) for name, entry in entries.items()]
    out = bytearray()
    for inode, (name, entry) in enumerate([*sorted(rows, key=lambda row: row[0].split(b"/")), _TRAILER], start=1):
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08x" % value for value in fields) + name + b"\0"
        out += bytes(-len(out) % 4) + entry.data
        out += bytes(-len(out) % 4)
    return bytes(out)


_TRAILER = (b"TRAILER!!!", _Entry(0))
