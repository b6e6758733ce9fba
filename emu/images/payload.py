"""Decompression of what a bzImage carries, with a bound: a small file cannot make this process large.

Rules: pure, bytes in and bytes out; the decompressors of the standard library, lz4 and zstandard. The formats are those
of Linux 6.12's lib/decompress.c; each is known by its first bytes.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable
from typing import TypeAlias

import lz4.block
import zstandard

from emu.iface import ImageError

_Unpack: TypeAlias = Callable[[memoryview, int], bytes]
"""(compressed bytes, most bytes to return plus one) -> what came out, at most that much. Bytes after the end of the
compressed stream are left alone: Linux appends the uncompressed size to it. Raises one of _REFUSALS."""

_REFUSALS = (ValueError, EOFError, OSError, zlib.error, lzma.LZMAError, lz4.block.LZ4BlockError, zstandard.ZstdError)

_LZ4_BLOCK = 8 << 20
"""Uncompressed bytes in a block of lz4's legacy format (LZ4_LEGACY blocks; lib/decompress_unlz4.c)."""
_MEMORY_LIMIT = 256 << 20
"""Bytes a decompressor may need for its window; kernels are packed with windows of up to 128 MiB (zstd -22 --ultra)."""


def _gzip(data: memoryview, limit: int) -> bytes:
    stream = zlib.decompressobj(31)  # 31: a gzip header around a 32 KiB window (zlib manual, inflateInit2)
    return _complete(stream.decompress(data, limit), stream.eof, limit)


def _xz(data: memoryview, limit: int) -> bytes:
    stream = lzma.LZMADecompressor(memlimit=_MEMORY_LIMIT)
    return _complete(stream.decompress(data, limit), stream.eof, limit)


def _lzma(data: memoryview, limit: int) -> bytes:
    stream = lzma.LZMADecompressor(format=lzma.FORMAT_ALONE, memlimit=_MEMORY_LIMIT)
    return _complete(stream.decompress(data, limit), stream.eof, limit)


def _bzip2(data: memoryview, limit: int) -> bytes:
    stream = bz2.BZ2Decompressor()
    return _complete(stream.decompress(data, limit), stream.eof, limit)


def _lz4_legacy(data: memoryview, limit: int) -> bytes:
    blocks: list[bytes] = []
    position, total = 4, 0
    # Four bytes or fewer after the last block are the appended size, not a block.
    while position + 4 < len(data) and total < limit:
        (size,) = struct.unpack_from("<I", data, position)
        position += 4
        if size == 0 or position + size > len(data):
            raise ValueError(f"an lz4 block of {size:#x} bytes does not fit")
        block = lz4.block.decompress(data[position : position + size], uncompressed_size=_LZ4_BLOCK)
        blocks.append(block)
        total += len(block)
        position += size
        if len(block) < _LZ4_BLOCK:
            break
    return b"".join(blocks)


def _zstd(data: memoryview, limit: int) -> bytes:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MEMORY_LIMIT)
    with decompressor.stream_reader(data) as stream:
        return stream.read(limit)


def _complete(out: bytes, ended: bool, limit: int) -> bytes:
    if not ended and len(out) < limit:
        raise EOFError("it ends in the middle")
    return out


_FORMATS: tuple[tuple[bytes, str, _Unpack], ...] = (
    (b"\x1f\x8b\x08", "gzip", _gzip),
    (b"\xfd7zXZ\x00", "xz", _xz),
    (b"\x5d\x00\x00", "lzma", _lzma),
    (b"BZh", "bzip2", _bzip2),
    (b"\x02\x21\x4c\x18", "lz4", _lz4_legacy),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
)


def unpack(path: str, data: memoryview, offset: int, limit: int) -> bytes:
    """What `data` decompresses to, at most `limit` bytes; `offset` is where `data` lies in the file, for messages.

    ImageError for a format Linux does not use, a stream that is broken or cut short, and one that grows past `limit`.
    """
    head = bytes(data[:8])
    known = next(((name, unpacker) for magic, name, unpacker in _FORMATS if head.startswith(magic)), None)
    if known is None:
        hint = " (lzo is not supported)" if head.startswith(b"\x89LZO") else ""
        raise ImageError(
            path, f"kernel payload starts with {head.hex(' ') or 'nothing'}: no known format{hint}", offset
        )
    name, unpacker = known
    try:
        out = unpacker(data, limit + 1)
    except _REFUSALS as error:
        raise ImageError(path, f"{name} payload does not decompress ({error})", offset) from error
    except MemoryError as error:
        raise ImageError(path, f"{name} payload asks for more memory than there is", offset) from error
    if len(out) > limit:
        raise ImageError(path, f"{name} payload grows past the {limit:#x} bytes it may have", offset)
    if not out:
        raise ImageError(path, f"{name} payload is empty", offset)
    return out
