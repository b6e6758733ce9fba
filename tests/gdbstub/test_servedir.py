"""`--serve-dir`: a debugger reads what is in the folder and nothing else, whatever links and names there are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emu.arch import X86_64
from gdbstub.files import FileErrno, FileError, FileTree
from gdbstub.servedir import MAX_LINKS, ServedFolder
from gdbstub.session import Send, Session
from tests.support.fake_machine import FakeMachine


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(b"secret")
    return path


@pytest.fixture
def root(tmp_path: Path, outside: Path) -> Path:
    """A small tree with every kind of link."""
    root = tmp_path / "served"
    (root / "usr/lib").mkdir(parents=True)
    (root / "usr/lib/libc.so").write_bytes(b"a library")
    (root / "lib").symlink_to("usr/lib")
    (root / "absolute").symlink_to("/usr/lib/libc.so")
    (root / "up").symlink_to("../../../../../../usr/lib/libc.so")
    (root / "out").symlink_to(outside)
    (root / "out-folder").symlink_to(outside.parent)
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "fifo")
    return root


@pytest.fixture
def folder(root: Path) -> ServedFolder:
    return ServedFolder(root)


def content(folder: ServedFolder, path: str) -> bytes:
    file = folder.open(path)
    try:
        return file.pread(100, 0)
    finally:
        file.close()


@pytest.mark.parametrize(
    "path",
    [
        "/usr/lib/libc.so",
        "usr//lib/./libc.so",
        "/lib/libc.so",
        "/absolute",
        "/up",
        "/../../usr/lib/libc.so",
        "/lib/../lib/libc.so",
    ],
)
def test_a_file_is_read_by_every_path_to_it(folder: ServedFolder, path: str):
    """Links inside are resolved as if the folder were the root, `..` at the root stays there."""
    assert content(folder, path) == b"a library"


@pytest.mark.parametrize(
    ("path", "errno"),
    [
        ("/out", FileErrno.ENOENT),
        ("/out-folder/secret", FileErrno.ENOENT),
        ("/../secret", FileErrno.ENOENT),
        ("/usr/../../secret", FileErrno.ENOENT),
        ("/loop", FileErrno.EINVAL),
        ("/fifo", FileErrno.EACCES),
        ("/usr", FileErrno.EISDIR),
        ("/", FileErrno.EISDIR),
        ("/usr/lib/libc.so/x", FileErrno.ENOTDIR),
        ("/usr/lib/libc.so/", FileErrno.ENOTDIR),
        ("/usr/lib/", FileErrno.EISDIR),
        ("/nothing", FileErrno.ENOENT),
        ("/" + "x" * 300, FileErrno.ENAMETOOLONG),
        ("/a\0b", FileErrno.EINVAL),
    ],
)
def test_nothing_else_can_be_opened(folder: ServedFolder, path: str, errno: FileErrno):
    """In particular nothing outside, and nothing that would block; by gdb's numbers."""
    with pytest.raises(FileError) as error:
        folder.open(path)
    assert error.value.errno is errno


def test_a_folder_replaced_by_a_link_is_not_followed(folder: ServedFolder, root: Path, outside: Path):
    """Between looking and opening: no component is opened through a link, so the race cannot be won."""
    real = os.open

    def swap(path: str, flags: int, *, dir_fd: int) -> int:
        if path == "lib" and (root / "usr/lib").is_dir():
            (root / "usr/lib").rename(root / "usr/moved")
            (root / "usr/lib").symlink_to(outside.parent)
        return real(path, flags, dir_fd=dir_fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", swap)
        with pytest.raises(FileError):
            folder.open("/usr/lib/secret")


def test_a_chain_of_links_is_bounded(folder: ServedFolder, root: Path):
    """As Linux bounds it; one less is read."""
    previous = "usr/lib/libc.so"
    for number in range(MAX_LINKS + 1):
        (root / f"link{number}").symlink_to(previous)
        previous = f"link{number}"
    assert content(folder, f"/link{MAX_LINKS - 1}") == b"a library"
    with pytest.raises(FileError):
        folder.open(f"/link{MAX_LINKS}")


def test_stat_and_readlink_know_links(folder: ServedFolder):
    """stat follows, lstat and readlink do not; nothing is writable."""
    assert folder.stat("/lib/libc.so") == (0o100444, 9)
    mode, _ = folder.stat("/lib")
    assert mode & 0o170222 == 0o040000
    assert folder.stat("/lib", follow=False)[0] & 0o170000 == 0o120000
    assert folder.readlink("/lib") == b"usr/lib"
    with pytest.raises(FileError):
        folder.readlink("/usr")


def test_a_session_reads_virtual_files_first_and_writes_nothing(folder: ServedFolder, root: Path):
    """Through the packets; closing the session gives the host's descriptors back."""
    (root / "vmlinux").write_bytes(b"not this one")
    machine = FakeMachine(X86_64)
    session = Session(machine, X86_64, files=FileTree({"/vmlinux": b"virtual"}, folder=folder))

    def ask(payload: bytes) -> bytes:
        action = session.handle(payload)
        assert isinstance(action, Send)
        return action.payloads[0]

    def opened(path: bytes, flags: int = 0) -> bytes:
        return ask(b"vFile:open:%b,%x,0" % (path.hex().encode(), flags))

    before = len(os.listdir("/proc/self/fd"))
    assert opened(b"/vmlinux") == b"F0"
    assert ask(b"vFile:pread:0,64,0") == b"F7;virtual"
    assert opened(b"/lib/libc.so") == b"F1"
    assert ask(b"vFile:pread:1,4,2") == b"F4;libr"
    assert ask(b"vFile:fstat:1").startswith(b"F40;")
    assert ask(b"vFile:lstat:%b" % b"/lib".hex().encode()).startswith(b"F40;")
    assert ask(b"vFile:readlink:%b" % b"/lib".hex().encode()) == b"F7;usr/lib"
    for flags in (1, 2, 0x200, 0x400):
        assert opened(b"/lib/libc.so", flags) == b"F-1,1e"
    assert opened(b"/out") == b"F-1,2"
    session.close()
    assert len(os.listdir("/proc/self/fd")) == before
