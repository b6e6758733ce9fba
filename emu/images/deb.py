"""Files out of a Debian package, without dpkg.

Rules: pure but for reading the one file it is given; standard library, zstandard and `emu.iface`. Nothing is ever
written by a name from the archive: a caller gets bytes. Source: deb(5), ar(5).
"""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

import zstandard

from emu.iface import ImageError

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60
_MEMBER_LIMIT = 256 << 20
"""Most bytes of one file: a kernel image is 15 MB, unpacked BusyBox 2 MB."""
_MEMORY_LIMIT = 256 << 20

_Wrap = Callable[[IO[bytes]], IO[bytes]]
_BROKEN = (EOFError, OSError, tarfile.TarError, lzma.LZMAError, zlib.error, zstandard.ZstdError, ValueError)


def _xz(stream: IO[bytes]) -> IO[bytes]:
    return cast(IO[bytes], lzma.LZMAFile(stream))


def _gz(stream: IO[bytes]) -> IO[bytes]:
    return cast(IO[bytes], gzip.GzipFile(fileobj=stream))


def _zst(stream: IO[bytes]) -> IO[bytes]:
    return cast(IO[bytes], zstandard.ZstdDecompressor(max_window_size=_MEMORY_LIMIT).stream_reader(stream))


_COMPRESSIONS: dict[str, _Wrap] = {
    "data.tar.xz": _xz,
    "data.tar.gz": _gz,
    "data.tar.zst": _zst,
    "data.tar": lambda stream: stream,
}


def extract(package: Path, wanted: Callable[[str], bool], limit: int = _MEMBER_LIMIT) -> bytes:
    """The first regular file of the package whose path, without a leading `./`, satisfies `wanted`. ImageError."""
    name = str(package)
    try:
        with package.open("rb") as stream:
            wrap = _find_data(name, stream)
            # Streamed, and left at the wanted file: a kernel's package unpacks to 300 MB, and most of it is modules.
            with wrap(stream) as data, tarfile.open(fileobj=data, mode="r|") as archive:
                for member in archive:
                    if member.isreg() and wanted(member.name.removeprefix("./")):
                        return _contents(name, archive, member, limit)
    except _BROKEN as error:
        raise ImageError(name, f"not a readable Debian package ({error})") from error
    raise ImageError(name, "the package does not have the file that was looked for")


def _find_data(name: str, stream: IO[bytes]) -> _Wrap:
    """Leave `stream` at the start of the data member's contents; how to decompress it."""
    if stream.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise ImageError(name, "not a Debian package")
    while True:
        offset = stream.tell()
        header = stream.read(_AR_HEADER)
        if len(header) < _AR_HEADER or header[58:60] != b"`\n":
            raise ImageError(name, "Debian package without a data member", offset)
        member = header[:16].decode("ascii", "replace").rstrip().rstrip("/")
        if member in _COMPRESSIONS:
            return _COMPRESSIONS[member]
        size = int(header[48:58])
        if size < 0:
            raise ImageError(name, "Debian package with a member of negative size", offset)
        stream.seek(size + size % 2, io.SEEK_CUR)


def _contents(name: str, archive: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    stream = archive.extractfile(member)
    data = b"" if stream is None else stream.read(limit + 1)
    if len(data) > limit:
        raise ImageError(name, f"{member.name} is larger than any kernel")
    return data
