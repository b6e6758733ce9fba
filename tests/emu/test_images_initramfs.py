"""Initramfs archives, read back by a reader written from the format's description."""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from emu.iface import ImageError
from emu.images import initramfs

BUSYBOX = b"\x7fELF busybox"


@dataclass(frozen=True)
class Member:
    mode: int
    uid: int
    mtime: int
    device: tuple[int, int]
    data: bytes


def read(archive: bytes) -> dict[str, Member]:
    """Every archive in a row, later entries over earlier ones, as the kernel unpacks them; parents must come first."""
    found: dict[str, Member] = {}
    position = 0
    while position < len(archive):
        if archive[position] == 0:
            position += 4
            continue
        assert position % 4 == 0
        assert archive[position : position + 6] == b"070701"
        fields = [int(archive[position + 6 + 8 * index : position + 14 + 8 * index], 16) for index in range(13)]
        _, mode, uid, _, _, mtime, size, _, _, major, minor, name_size, _ = fields
        name_at = position + 110
        name = archive[name_at : name_at + name_size - 1].decode()
        assert archive[name_at + name_size - 1] == 0
        data_at = -(-(name_at + name_size) // 4) * 4
        position = -(-(data_at + size) // 4) * 4
        if name == "TRAILER!!!":
            continue
        parent = name.rpartition("/")[0]
        assert not parent or stat.S_ISDIR(found[parent].mode)
        found[name] = Member(mode, uid, mtime, (major, minor), archive[data_at : data_at + size])
    return found


def test_an_archive_has_busybox_an_init_and_what_init_needs() -> None:
    members = read(initramfs.build(BUSYBOX))
    assert members["bin/busybox"].data == BUSYBOX
    assert stat.S_IMODE(members["bin/busybox"].mode) == 0o755
    assert members["init"].data.startswith(b"#!/bin/busybox sh\n")
    assert stat.S_IMODE(members["init"].mode) & 0o111
    assert {"proc", "sys", "dev", "tmp"} <= members.keys()
    console = members["dev/console"]
    assert stat.S_ISCHR(console.mode)
    assert console.device == (5, 1)
    assert members["dev/ttyS0"].device == (4, 64)


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    """Times, owners and the order of a folder's entries on the host are not in the archive."""
    for name in ("b", "a", "c"):
        (tmp_path / name).write_text(name)
    first = initramfs.append(initramfs.build(BUSYBOX), [(tmp_path, "/data")])
    os.utime(tmp_path / "a", (1, 1))
    assert initramfs.append(initramfs.build(BUSYBOX), [(tmp_path, "/data")]) == first
    assert all(member.mtime == member.uid == 0 for member in read(first).values())


def test_a_command_is_a_file_that_init_runs() -> None:
    members = read(initramfs.build(BUSYBOX, command="md5sum /bin/busybox"))
    assert members["etc/gdbstub/command"].data == b"md5sum /bin/busybox\n"
    assert b"/etc/gdbstub/command" in members["init"].data
    assert "etc/gdbstub/command" not in read(initramfs.build(BUSYBOX))


def test_a_command_can_be_added_to_an_archive_that_is_there() -> None:
    assert initramfs.build(BUSYBOX) + initramfs.command_archive("ls") == initramfs.build(BUSYBOX, command="ls")


@pytest.mark.parametrize(
    ("command", "status", "output"),
    [
        ("true", 0, ""),
        ("exit 7", 7, ""),
        ("kill -9 $$", 137, ""),
        ("printf 'it'\"'\"'s'", 0, "it's"),
        ("echo a\nfalse", 1, "a"),
    ],
)
def test_a_typed_line_reports_the_status_in_a_line_of_its_own(command: str, status: int, output: str) -> None:
    """Run by a real shell on the host: what comes out is what the host's side of the console looks for."""
    done = subprocess.run(["sh"], input=initramfs.exec_line(command), capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert lines[-1] == f"gdbstub-exec-status: {status}."
    found = initramfs.EXEC_STATUS.findall(done.stdout)
    assert found == [str(status)]
    assert done.stdout.startswith(output)


def test_the_echo_of_a_typed_line_is_no_status() -> None:
    """A terminal shows what is typed before the command has run."""
    assert initramfs.EXEC_STATUS.search(initramfs.exec_line("sleep 1")) is None


def test_a_status_does_not_match_before_its_last_digit() -> None:
    """The console is looked at after each byte; 137 must not be taken for 1."""
    line = "gdbstub-exec-status: 137."
    assert [initramfs.EXEC_STATUS.search(line[:end]) is not None for end in range(len(line) - 3, len(line) + 1)] == [
        *(False, False, False, True)
    ]


def test_init_is_a_script_the_shell_can_read() -> None:
    script = read(initramfs.build(BUSYBOX))["init"].data
    assert subprocess.run(["sh", "-n"], input=script, capture_output=True, check=False).stderr == b""


def test_files_folders_and_links_are_added_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "dir/sub").mkdir(parents=True)
    (tmp_path / "dir/sub/tool").write_bytes(b"tool")
    (tmp_path / "dir/sub/tool").chmod(0o751)
    (tmp_path / "dir/link").symlink_to("/nowhere/at all")
    (tmp_path / "one").write_bytes(b"1")
    archive = initramfs.append(initramfs.build(BUSYBOX), [(tmp_path / "dir", "/opt/deep/dir"), (tmp_path / "one", "")])
    members = read(archive)
    assert members["opt/deep/dir/sub/tool"].data == b"tool"
    assert stat.S_IMODE(members["opt/deep/dir/sub/tool"].mode) == 0o751
    assert stat.S_ISLNK(members["opt/deep/dir/link"].mode)
    assert members["opt/deep/dir/link"].data == b"/nowhere/at all"
    assert members["one"].data == b"1"
    assert members["init"].data


def test_a_guest_folder_takes_the_hosts_name(tmp_path: Path) -> None:
    (tmp_path / "tool").write_bytes(b"x")
    assert "srv/tool" in read(initramfs.append(b"", [(tmp_path / "tool", "/srv/")]))


def test_a_later_path_wins(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    archive = initramfs.append(initramfs.build(BUSYBOX), [(tmp_path / "a", "/init"), (tmp_path / "b", "/init")])
    assert read(archive)["init"].data == b"b"


def test_an_archive_of_odd_length_is_padded_before_the_next(tmp_path: Path) -> None:
    """A compressed archive ends anywhere; the kernel looks for the next on a 4-byte boundary."""
    (tmp_path / "a").write_text("a")
    archive = initramfs.append(b"\x1f\x8b\x08..", [(tmp_path / "a", "/a")])
    assert archive[5:8] == b"\0\0\0"
    assert archive[8:14] == b"070701"


@pytest.mark.parametrize("guest", ["/", "../x", "/a/../../x"])
def test_a_guest_path_that_is_no_place_is_refused(tmp_path: Path, guest: str) -> None:
    host = tmp_path / "a" if guest != "/" else Path("/")
    with pytest.raises(ImageError, match="cannot be put at"):
        initramfs.append(b"", [(host, guest)])


def test_what_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="absent: cannot be read: No such file"):
        initramfs.append(b"", [(tmp_path / "absent", "/x")])


def test_a_pipe_is_not_added(tmp_path: Path) -> None:
    """Reading it would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="neither a file, a folder nor a symbolic link"):
        initramfs.append(b"", [(tmp_path, "/x")])
