"""Fetching with a false apt: what is asked for, what is kept, what is said where it cannot be done.

The real apt and the real archive are in test_images_real.py.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.iface import ImageError
from emu.images import deb, initramfs
from emu.images.cache import cache_root, write_atomic
from emu.images.fetch import FetchError, fetch
from tests.support.images import build_deb

KERNEL, BUSYBOX = b"a kernel", b"a busybox"

APT_CACHE = """#!/bin/sh
# pkgnames PREFIX, madison NAME...: after the options, which come in pairs.
while [ "${1#-}" != "$1" ]; do shift 2; done
verb=$1; shift
case $verb in
pkgnames) cut -d' ' -f1 "$ARCHIVE/index" ;;
madison) for name; do
    grep "^$name " "$ARCHIVE/index" | while read -r n v; do echo " $n | $v | http://mirror bookworm/main Packages"; done
done ;;
esac
"""
APT_GET = """#!/bin/sh
echo "$@" >>"$ARCHIVE/log"
while [ "${1#-}" != "$1" ]; do shift 2; done
verb=$1
for last; do :; done
case $verb in
update) echo "E: Some index files failed to download." >&2; exit "$(cat "$ARCHIVE/update-status")" ;;
download) cp "$ARCHIVE/${last%%=*}.deb" "$(echo "$last" | sed 's/=/_/')_any.deb" ;;
esac
"""


class Archive:
    """A false apt-get and apt-cache on PATH over a folder of packages; `log` is every apt-get command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in (("apt-cache", APT_CACHE), ("apt-get", APT_GET)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "index").touch()
        (folder / "log").touch()
        (folder / "update-status").write_text("0")
        self.add("busybox-static", "1:1.35.0-4", build_deb([("./bin/busybox", BUSYBOX)]))

    def add(self, name: str, version: str, package: bytes | None) -> None:
        """`package` None: the indexes mention the name, but no version of it."""
        with (self.folder / "index").open("a") as stream:
            stream.write(f"{name} {version}\n" if package is not None else f"{name}\n")
        if package is not None:
            (self.folder / f"{name}.deb").write_bytes(package)

    def add_kernel(self, name: str, contents: bytes = KERNEL) -> None:
        self.add(name, "6.1.0-1", build_deb([("./boot/System.map-6", b"odd"), ("./boot/vmlinuz-6", contents)]))

    @property
    def log(self) -> list[str]:
        return (self.folder / "log").read_text().splitlines()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    folder = tmp_path / "archive"
    folder.mkdir()
    monkeypatch.setenv("ARCHIVE", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return Archive(folder)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_kernel_and_its_initramfs_come_from_two_packages(archive: Archive, cache: Path) -> None:
    archive.add_kernel("linux-image-6.1.0-50-cloud-amd64-unsigned")
    fetched = fetch("amd64", cache=cache)
    assert fetched.kernel.read_bytes() == KERNEL
    assert fetched.initramfs.read_bytes() == initramfs.build(BUSYBOX)
    assert fetched.busybox.read_bytes() == BUSYBOX
    assert (fetched.package, fetched.version) == ("linux-image-6.1.0-50-cloud-amd64-unsigned", "6.1.0-1")


def test_the_newest_version_is_chosen_by_number(archive: Archive, cache: Path) -> None:
    """9 is before 50, which a sort of the names would have the other way round."""
    for number in (9, 50, 8):
        archive.add_kernel(f"linux-image-6.1.0-{number}-cloud-amd64-unsigned", b"kernel %d" % number)
    assert fetch("amd64", cache=cache).kernel.read_bytes() == b"kernel 50"


def test_a_name_that_is_only_mentioned_is_not_chosen(archive: Archive, cache: Path) -> None:
    archive.add_kernel("linux-image-6.1.0-50-cloud-amd64-unsigned")
    archive.add("linux-image-6.1.0-51-cloud-amd64-unsigned", "", None)
    assert fetch("amd64", cache=cache).package == "linux-image-6.1.0-50-cloud-amd64-unsigned"


def test_a_package_that_the_mirror_does_not_have_is_passed_over(archive: Archive, cache: Path) -> None:
    """Its index names a newer version than its pool holds: the next older one is taken."""
    for number in (43, 45, 46):
        archive.add_kernel(f"linux-image-6.1.0-{number}-cloud-amd64-unsigned")
        if number > 43:
            (archive.folder / f"linux-image-6.1.0-{number}-cloud-amd64-unsigned.deb").unlink()
    lines: list[str] = []
    assert fetch("amd64", cache=cache, progress=lines.append).package == "linux-image-6.1.0-43-cloud-amd64-unsigned"
    assert sum("could not download" in line for line in lines) == 2
    with pytest.raises(FetchError, match=r"could not download linux-image-6\.1\.0-46"):
        fetch("amd64", "linux-image-6.1.0-46*", cache=cache)


@pytest.mark.parametrize(
    "wanted", ["linux-image-6.12.1-cloud-amd64-unsigned", "linux-image-6.12*-cloud-amd64-unsigned"]
)
def test_another_kernel_is_named_or_matched(archive: Archive, cache: Path, wanted: str) -> None:
    archive.add_kernel("linux-image-6.1.0-50-cloud-amd64-unsigned")
    archive.add_kernel("linux-image-6.12.1-cloud-amd64-unsigned", b"twelve")
    assert fetch("amd64", wanted, cache=cache).kernel.read_bytes() == b"twelve"


def test_a_second_call_asks_no_one(archive: Archive, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive.add_kernel("linux-image-6.1.0-50-686-unsigned")
    first = fetch("i386", cache=cache)
    commands = len(archive.log)
    lines: list[str] = []
    assert fetch("i386", cache=cache, progress=lines.append) == first
    assert len(archive.log) == commands
    assert re.match("using linux-image-6.1.0-50-686-unsigned 6.1.0-1 from", lines[0])


def test_a_cache_with_a_file_gone_is_filled_again(archive: Archive, cache: Path) -> None:
    archive.add_kernel("linux-image-6.1.0-50-686-unsigned")
    fetch("i386", cache=cache).kernel.unlink()
    assert fetch("i386", cache=cache).kernel.read_bytes() == KERNEL


def test_an_initramfs_of_an_older_version_is_made_anew(archive: Archive, cache: Path) -> None:
    archive.add_kernel("linux-image-6.1.0-50-686-unsigned")
    fetch("i386", cache=cache).initramfs.write_bytes(b"from an older version of this program")
    assert fetch("i386", cache=cache).initramfs.read_bytes() == initramfs.build(BUSYBOX)


def test_a_failed_index_does_not_stop_what_the_others_offer(archive: Archive, cache: Path) -> None:
    archive.add_kernel("linux-image-6.1.0-50-686-unsigned")
    (archive.folder / "update-status").write_text("100")
    lines: list[str] = []
    assert fetch("i386", cache=cache, progress=lines.append).kernel.read_bytes() == KERNEL
    assert any("Some index files failed to download" in line for line in lines)


def test_each_architecture_has_its_own_folders(archive: Archive, cache: Path) -> None:
    archive.add_kernel("linux-image-6.1.0-50-686-unsigned")
    archive.add_kernel("linux-image-6.1.0-50-cloud-amd64-unsigned")
    fetch("i386", cache=cache)
    fetch("amd64", cache=cache)
    lists = {
        re.search(r"APT::Architecture=(\S+)", line)[1]: re.search(r"Dir::State::lists=(\S+)", line)[1]
        for line in archive.log
    }
    assert len(set(lists.values())) == 2


def test_apt_is_never_told_to_trust_what_it_cannot_verify(archive: Archive, cache: Path) -> None:
    archive.add_kernel("linux-image-6.1.0-50-686-unsigned")
    fetch("i386", cache=cache)
    for line in archive.log:
        assert "--allow" not in line
        assert "APT::Get::AllowUnauthenticated=false" in line
        assert "Acquire::AllowInsecureRepositories=false" in line


def test_without_apt_the_two_packages_and_their_place_are_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FetchError) as caught:
        fetch("i386", cache=cache)
    for part in ("no apt-get", "linux-image-6.1.0-*-686-unsigned", "busybox-static", "gdbstub boot FILE --initrd"):
        assert part in str(caught.value)
    assert str(cache / "kernels/i386/packages") in str(caught.value)


def test_packages_put_in_place_by_hand_are_used_without_apt(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    folder = cache / "kernels/i386/packages"
    folder.mkdir(parents=True)
    for number in (9, 10):
        package = build_deb([("./boot/vmlinuz-6", b"kernel %d" % number)])
        (folder / f"linux-image-6.1.0-{number}-686-unsigned_6.1-1_i386.deb").write_bytes(package)
    package = build_deb([("./bin/busybox", BUSYBOX)])
    (folder / "busybox-static_1%3a1.35.0-4_i386.deb").write_bytes(package)
    assert fetch("i386", cache=cache).kernel.read_bytes() == b"kernel 10"


def test_a_kernel_no_one_has_is_an_error_that_says_so(archive: Archive, cache: Path) -> None:
    with pytest.raises(
        FetchError, match=r"no linux-image-9\* or no busybox-static for amd64|no Debian archive keyring"
    ):
        fetch("amd64", "linux-image-9*", cache=cache)


@pytest.mark.parametrize(
    ("architecture", "package"), [("arm64", None), ("amd64", "bash"), ("amd64", "linux-image-x;rm")]
)
def test_requests_that_make_no_sense_are_refused_before_anything_runs(
    archive: Archive, cache: Path, architecture: str, package: str | None
) -> None:
    with pytest.raises(FetchError):
        fetch(architecture, package, cache=cache)
    assert archive.log == []


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FetchError, match="cannot keep kernels in"):
        fetch("amd64", cache=tmp_path / "file")


@pytest.mark.parametrize("compression", ["xz", "gz", "zst", ""])
def test_a_package_of_each_compression_is_read(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "x.deb"
    path.write_bytes(build_deb([("./other", b"no"), ("./boot/vmlinuz-6", KERNEL)], compression))
    assert deb.extract(path, lambda name: name.startswith("boot/")) == KERNEL


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a Debian package"),
        (b"!<arch>\n", "without a data member"),
        (build_deb([("./x", b"")]), "does not have the file"),
        (build_deb([("./boot/vmlinuz", bytes(1000))])[:-60], "not a readable Debian package"),
        (b"!<arch>\n" + f"{'x':<16}{0:<32}{'-70':<10}`\n".encode() * 2, "negative size"),
        (b"!<arch>\n" + f"{'x':<16}{0:<32}{'big':<10}`\n".encode(), "not a readable Debian package"),
    ],
)
def test_a_broken_package_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "x.deb"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=reason):
        deb.extract(path, lambda name: name.startswith("boot/"))


@given(st.data())
def test_a_damaged_package_gives_the_file_or_an_image_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("deb") / "x.deb"
    damaged = bytearray(build_deb([("./boot/vmlinuz", KERNEL)], data.draw(st.sampled_from(["xz", "gz", "zst", ""]))))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    try:
        found = deb.extract(path, lambda name: name == "boot/vmlinuz")
    except ImageError:
        found = None
    assert found is None or len(found) <= len(damaged)


def test_the_cache_follows_the_xdg_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "gdbstub"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_root() == Path("/home/someone/.cache/gdbstub")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path("/home/someone/.cache/gdbstub")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "file"
    write_atomic(path, b"old")

    def fail(source: str, target: Path) -> None:
        raise OSError("full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
