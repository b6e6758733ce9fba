"""vFile and the executable's name, packet by packet."""

from __future__ import annotations

import struct

import pytest

from gdbstub.session import Session
from tests.support.asking import KERNEL, ask


def path(name: str) -> bytes:
    return name.encode().hex().encode()


def test_exec_file_is_named(session: Session):
    """With or without a process id as annex."""
    assert ask(session, b"qXfer:exec-file:read:1:0,fff") == b"l/vmlinux"
    assert ask(session, b"qXfer:exec-file:read::0,4") == b"m/vml"


def test_a_file_is_read_whole(session: Session):
    """open, fstat, pread to the end, close: escapes never make a reply too long."""
    assert ask(session, b"vFile:setfs:0") == b"F0"
    assert ask(session, b"vFile:open:" + path("/vmlinux") + b",0,1c0") == b"F0"
    result, _, attachment = ask(session, b"vFile:fstat:0").partition(b";")
    assert result == b"F40"
    assert struct.unpack(">7I3Q3I", attachment)[7] == len(KERNEL)
    content = b""
    while True:
        result, _, attachment = ask(session, b"vFile:pread:0,1000,%x" % len(content)).partition(b";")
        assert result == b"F%x" % len(attachment)
        if not attachment:
            break
        content += attachment
    assert content == KERNEL
    assert ask(session, b"vFile:close:0") == b"F0"
    assert ask(session, b"vFile:pread:0,1,0") == b"F-1,9"


@pytest.mark.parametrize(
    ("payload", "errno"),
    [
        (b"vFile:open:" + path("/etc/passwd") + b",0,0", 2),
        (b"vFile:open:" + path("/vmlinux/../etc/passwd") + b",0,0", 2),
        (b"vFile:open:" + path("/vmlinux") + b",1,0", 30),
        (b"vFile:open:" + path("/vmlinux") + b",601,1b6", 30),
        (b"vFile:open:" + path("/sys") + b",0,0", 21),
        (b"vFile:close:7", 9),
        (b"vFile:fstat:7", 9),
        (b"vFile:readlink:" + path("/vmlinux"), 22),
        (b"vFile:readlink:" + path("/nosuch"), 2),
        (b"vFile:stat:" + path("/nosuch"), 2),
    ],
)
def test_file_errors_are_numbers_of_gdb(session: Session, payload: bytes, errno: int):
    """Nothing of the host's file system is there, and nothing can be written."""
    assert ask(session, payload) == b"F-1,%x" % errno


def test_open_files_are_bounded(session: Session):
    """EMFILE, and a closed number is used again."""
    opened = [ask(session, b"vFile:open:" + path("/vmlinux") + b",0,0") for _ in range(65)]
    assert opened[-1] == b"F-1,18"
    ask(session, b"vFile:close:3")
    assert ask(session, b"vFile:open:" + path("/vmlinux") + b",0,0") == b"F3"


def test_stat_knows_files_and_folders(session: Session):
    """The mode's type bits."""
    for name, kind in (("/vmlinux", 0o100000), ("/sys", 0o040000), ("/", 0o040000)):
        attachment = ask(session, b"vFile:stat:" + path(name)).partition(b";")[2]
        assert struct.unpack(">7I3Q3I", attachment)[2] & 0o170000 == kind
