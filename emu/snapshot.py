"""The whole state of a machine as a value, and as a file.

Rules: what is saved is the guest's alone: armed int3 bytes and the slot window are taken out first, so that the same
moment gives the same snapshot with and without probes. RAM is kept by chunks, and only those that are not zero. The
file is a fixed header, a JSON description and zstd frames; a damaged or foreign one is an ImageError.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import zstandard
from construct import Bytes, Const, ConstructError, Int32ul, Struct

from emu.iface import ImageError
from emu.ram import MAX_SIZE, MIN_SIZE, Ram

CHUNK = 64 << 10
_ZERO = bytes(CHUNK)
_LIMIT = 64 << 20  # bytes of the JSON description a file may claim
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
    """Plain values: instructions, clock, devices, pending poll, halted, console text, what the image is."""

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
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ImageError(name, error.strerror or str(error)) from error
        try:
            header = Header.parse(data)
        except ConstructError:
            raise ImageError(name, "is not a snapshot of a machine", 0) from None
        if header.format != FORMAT:
            raise ImageError(name, f"snapshot format {header.format}, this program reads {FORMAT}", 8)
        at = Header.sizeof()
        small = data[at : at + header.description_size]
        if hashlib.sha256(small).digest() != header.description_sha256:
            raise ImageError(name, "the description is damaged", at)
        try:
            described = json.loads(zstandard.ZstdDecompressor().decompress(small, max_output_size=_LIMIT))
            cpu = _check_description(described)
        except (zstandard.ZstdError, ValueError) as error:
            raise ImageError(name, f"the description is wrong: {error}", at) from error
        at += header.description_size
        try:
            stream = zstandard.ZstdDecompressor().stream_reader(data[at:])
            ram = {index: stream.read(CHUNK) for index in described["chunks"]}
            beyond = stream.read(1)  # reading to the end is what compares the checksum
        except zstandard.ZstdError as error:
            raise ImageError(name, f"the memory is damaged: {error}", at) from error
        if beyond or any(len(chunk) != CHUNK for chunk in ram.values()):
            raise ImageError(name, "the memory has another size than the description says", at)
        return cls(described["memory"], described["long_mode"], ram, cpu, described["state"])


_DESCRIPTION = {"memory": int, "long_mode": bool, "cpu": str, "chunks": list, "state": dict}
_STATE = {"instructions": int, "halted": bool, "clock": dict, "devices": dict, "console": str, "about": dict}
_COUNT_LIMIT = 1 << 62  # instructions: a century of them


def _check_description(described: object) -> bytes:
    """ValueError where a file's JSON is not what `save` writes; -> the CPU state image it has.

    What the clock, the devices and `about` hold is for those who load it to check.
    """
    members = _check_members("the description", described, _DESCRIPTION)
    memory, chunks = members["memory"], members["chunks"]
    if not MIN_SIZE <= memory <= MAX_SIZE or memory % (2 << 20):
        raise ValueError(f"memory size {memory}")
    if any(type(index) is not int for index in chunks):
        raise ValueError("a chunk's number is no integer")
    if chunks and (chunks[0] < 0 or chunks[-1] >= memory // CHUNK or any(a >= b for a, b in pairwise(chunks))):
        raise ValueError("the chunks' numbers are not rising or beyond memory")
    state = _check_members("the state", members["state"], _STATE)
    counts = [state["instructions"]] + ([] if state.get("poll_at") is None else [state["poll_at"]])
    if any(type(count) is not int or not 0 <= count < _COUNT_LIMIT for count in counts):
        raise ValueError(f"instruction counts {counts}")
    state.setdefault("poll_at", None)
    return bytes.fromhex(members["cpu"])


def _check_members(what: str, found: object, kinds: Mapping[str, type]) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no object")
    for name, kind in kinds.items():
        if type(found.get(name)) is not kind:
            raise ValueError(f"{what} has no {kind.__name__} named {name}")
    return found


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
