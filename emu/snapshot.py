"""The whole state of a machine as a value, and as a file.

Rules: what is saved is the guest's alone: armed int3 bytes and the slot window are taken out first, so that the same
moment gives the same snapshot with and without probes. RAM is kept by chunks, and only those that are not zero. The
file is a fixed header, a JSON description and zstd frames; a damaged or foreign one is an ImageError.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import zstandard
from construct import Bytes, Const, ConstructError, Int32ul, Struct

from emu.hostfile import read_file
from emu.iface import ImageError
from emu.ram import MAX_SIZE, MIN_SIZE, Ram

CHUNK = 64 << 10
_ZERO = bytes(CHUNK)
_LIMIT = 64 << 20  # bytes of the JSON description a file may claim
_FILE_LIMIT = MAX_SIZE + 2 * _LIMIT
_PIECE = 1024  # bytes of a file's memory unpacked at once: 4 of them can make 128 KiB (RFC 8878, 3.1.1.2.3)
FORMAT = 1

Header = Struct(
    "magic" / Const(b"gdbstub\0"), "format" / Int32ul, "description_size" / Int32ul, "description_sha256" / Bytes(32)
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A machine between two instructions. `ram` maps chunk number to CHUNK bytes; what is missing is zero."""

    memory: int
    long_mode: bool
    ram: Mapping[int, bytes]
    cpu: bytes
    state: Mapping[str, Any]
    """Plain values: instructions, clock, devices, pending poll, halted, console text, what the image is; `held`: an
    exception that a debugger has caught and the guest has not got yet, None or [vector, code, software, length, pc, sp]
    with -1 for no code."""

    def save(self, path: Path) -> None:
        """Write atomically; OSError as the file system gives it."""
        description = json.dumps(
            {
                "memory": self.memory,
                "long_mode": self.long_mode,
                "cpu": self.cpu.hex(),
                "chunks": sorted(self.ram),
                "state": self.state,
            },
            sort_keys=True,
        ).encode()
        packer = zstandard.ZstdCompressor(level=1, threads=2, write_checksum=True)
        small = zstandard.ZstdCompressor(level=3).compress(description)
        header = Header.build(
            {
                "format": FORMAT,
                "description_size": len(small),
                "description_sha256": hashlib.sha256(small).digest(),
            }
        )
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("wb") as file:
                file.write(header)
                file.write(small)
                with packer.stream_writer(file, closefd=False) as stream:
                    for index in sorted(self.ram):
                        stream.write(self.ram[index])
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    @classmethod
    def open(cls, path: Path) -> Snapshot:
        """Read a file that `save` wrote; ImageError says what is wrong with any other."""
        name = str(path)
        data = read_file(path, _FILE_LIMIT)
        try:
            header = Header.parse(data)
        except ConstructError:
            raise ImageError(name, "is not a snapshot of a machine") from None
        if header.format != FORMAT:
            raise ImageError(name, f"snapshot format {header.format}, this program reads {FORMAT}", 8)
        at = Header.sizeof()
        small = data[at : at + header.description_size]
        if hashlib.sha256(small).digest() != header.description_sha256:
            raise ImageError(name, "the description is damaged", at)
        try:
            text = zstandard.ZstdDecompressor().stream_reader(small).read(_LIMIT + 1)
            if len(text) > _LIMIT:
                raise ValueError(f"longer than {_LIMIT >> 20} MiB")
            described = json.loads(text)
            cpu = _check_description(described)
        except (zstandard.ZstdError, ValueError, RecursionError) as error:
            raise ImageError(name, f"the description is wrong: {error}", at) from error
        at += header.description_size
        try:
            ram = _unpack_chunks(memoryview(data)[at:], described["chunks"])
        except (zstandard.ZstdError, ValueError) as error:
            raise ImageError(name, f"the memory is damaged: {error}", at) from error
        return cls(described["memory"], described["long_mode"], ram, cpu, described["state"])


_DESCRIPTION = {"memory": int, "long_mode": bool, "cpu": str, "chunks": list, "state": dict}
_STATE = {"instructions": int, "halted": bool, "clock": dict, "devices": dict, "console": str, "about": dict}
_COUNT_LIMIT = 1 << 62  # instructions: a century of them


def _check_description(described: object) -> bytes:
    """ValueError where a file's JSON is not what `save` writes; -> the CPU state image it has.

    What the clock, the devices and `about` hold is for those who load it to check.
    """
    members = check_members("the description", described, _DESCRIPTION)
    memory, chunks = members["memory"], members["chunks"]
    if not MIN_SIZE <= memory <= MAX_SIZE or memory % (2 << 20):
        raise ValueError(f"memory size {memory}")
    if any(type(index) is not int for index in chunks):
        raise ValueError("a chunk's number is no integer")
    if chunks and (chunks[0] < 0 or chunks[-1] >= memory // CHUNK or any(a >= b for a, b in pairwise(chunks))):
        raise ValueError("the chunks' numbers are not rising or beyond memory")
    state = check_members("the state", members["state"], _STATE)
    counts = [state["instructions"]] + ([] if state.get("poll_at") is None else [state["poll_at"]])
    if any(type(count) is not int or not 0 <= count < _COUNT_LIMIT for count in counts):
        raise ValueError(f"instruction counts {counts}")
    state.setdefault("poll_at", None)
    if state.setdefault("held", None) is not None:  # not in the files of earlier versions
        vector, code, _, length, pc, sp = check_row("held", state["held"], (int, int, bool, int, int, int))
        if not (
            0 <= vector < 256
            and -1 <= code < 1 << 32
            and 0 <= length < 16
            and 0 <= min(pc, sp) <= max(pc, sp) < 1 << 64
        ):
            raise ValueError(f"held exception {state['held']}")
    return bytes.fromhex(members["cpu"])


def check_members(what: str, found: object, kinds: Mapping[str, type]) -> dict[str, Any]:
    """`found`, where it is a JSON object with at least these members, of these kinds; else ValueError."""
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no object")
    for name, kind in kinds.items():
        if type(found.get(name)) is not kind:
            raise ValueError(f"{what} has no {kind.__name__} named {name}")
    return found


def check_row(what: str, found: object, kinds: Sequence[type]) -> list[Any]:
    """`found`, where it is a JSON array of such values; else ValueError."""
    if not isinstance(found, list) or list(map(type, found)) != list(kinds):
        raise ValueError(f"{what} is not of {', '.join(kind.__name__ for kind in kinds)}")
    return found


def _unpack_chunks(packed: memoryview, indices: Sequence[int]) -> dict[int, bytes]:
    """One frame that holds just these chunks, to its end, where its checksum is; ZstdError or ValueError."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    chunks: dict[int, bytes] = {}
    waiting, rest = iter(indices), bytearray()
    for at in range(0, len(packed), _PIECE):
        if frame.eof:
            raise ValueError("it goes on behind its end")
        rest += frame.decompress(packed[at : at + _PIECE])
        while len(rest) >= CHUNK and (index := next(waiting, None)) is not None:
            chunks[index] = bytes(rest[:CHUNK])
            del rest[:CHUNK]
        if len(chunks) == len(indices) and rest:
            raise ValueError("it has more than the description says")
    if not frame.eof or frame.unused_data:
        raise ValueError("it goes on behind its end" if frame.eof else "it is cut short")
    if len(chunks) < len(indices) or rest:
        raise ValueError("it has less than the description says")
    return chunks


def pack_ram(ram: Ram) -> dict[int, bytes]:
    """The chunks of guest RAM that are not zero."""
    found = {}
    for index in range(ram.size // CHUNK):
        chunk = ram.map[index * CHUNK : (index + 1) * CHUNK]
        if chunk != _ZERO:
            found[index] = chunk
    return found


def unpack_ram(ram: Ram, chunks: Mapping[int, bytes], *, blank: bool) -> None:
    """Make guest RAM what `chunks` say; only chunks that differ are written. `blank`: it is known to be zero."""
    for index in sorted(chunks) if blank else range(ram.size // CHUNK):
        wanted = chunks.get(index, _ZERO)
        at = index * CHUNK
        if ram.map[at : at + CHUNK] != wanted:
            ram.map[at : at + CHUNK] = wanted
