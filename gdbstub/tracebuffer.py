"""What tracepoints have collected: frames, and the buffer that holds them, in the bytes of gdb's trace files.

Rules: data only; no machine, no packet. Source: GDB manual, appendix "Trace File Format"; gdbserver's tracepoint.cc.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from emu.arch import Arch

DEFAULT_SIZE: Final = 5 << 20  # bytes; as gdbserver's
MAX_SIZE: Final = 32 << 20
MAX_FRAMES: Final = 1 << 16  # a frame that holds nothing has 6 bytes in the buffer, but some hundred in our memory
_MAX_BLOCK: Final = 0xFFFF  # a memory block's length has 16 bits
_FRAME_HEADER: Final = struct.Struct("<HI")
_MEMORY_HEADER: Final = struct.Struct("<cQH")
_VARIABLE: Final = struct.Struct("<ciQ")


@dataclass
class Frame:
    """One hit. `registers` are those collected; `memory` is (virtual address, bytes) in the order of collection.

    Implements agent.Sink.
    """

    arch: Arch
    tracepoint: int
    pc: int
    registers: dict[str, int] = field(default_factory=dict)
    memory: list[tuple[int, bytes]] = field(default_factory=list)
    variables: list[tuple[int, int]] = field(default_factory=list)

    def record_memory(self, vaddr: int, data: bytes) -> None:
        self.memory.append((vaddr & ((1 << 8 * self.arch.word_size) - 1), data))

    def record_variable(self, number: int, value: int) -> None:
        self.variables.append((number, value))

    def record_registers(self, values: Mapping[str, int]) -> None:
        self.registers.update(values)

    @cached_property
    def raw(self) -> bytes:
        """The frame as in the buffer; to be asked for when everything is collected.

        A trace file has no word for a register that wasn't collected: it is 0 there.
        """
        blocks = []
        if self.registers:
            blocks.append(b"R" + self.arch.pack([self.registers.get(name, 0) for name in self.arch.names]))
        for vaddr, data in self.memory:
            for at in range(0, len(data), _MAX_BLOCK):
                part = data[at : at + _MAX_BLOCK]
                blocks.append(_MEMORY_HEADER.pack(b"M", vaddr + at, len(part)) + part)
        blocks.extend(_VARIABLE.pack(b"V", number, value) for number, value in self.variables)
        body = b"".join(blocks)
        return _FRAME_HEADER.pack(self.tracepoint & 0xFFFF, len(body)) + body

    def read(self, vaddr: int, size: int) -> bytes:
        """The bytes from `vaddr` on that were collected without a gap, at most `size`; empty where not even the first
        was."""
        found = bytearray()
        while len(found) < size:
            at = vaddr + len(found)
            piece = next((data[at - base :] for base, data in self.memory if base <= at < base + len(data)), b"")
            if not piece:
                break
            found += piece[: size - len(found)]
        return bytes(found)

    def register(self, name: str) -> int | None:
        """The pc is known of every frame."""
        return self.registers.get(name, self.pc if name == self.arch.pc else None)

    def describe(self) -> str:
        """The document of `qXfer:traceframe-info:read` (GDB manual, "Traceframe Info Format")."""
        memory = (f'<memory start="{vaddr:#x}" length="{len(data):#x}"/>' for vaddr, data in self.memory)
        variables = (f'<tvar id="{number:#x}"/>' for number in sorted({number for number, _ in self.variables}))
        return "".join(
            (
                '<?xml version="1.0"?>\n<!DOCTYPE traceframe-info SYSTEM "traceframe-info.dtd">\n<traceframe-info>',
                *memory,
                *variables,
                "</traceframe-info>\n",
            )
        )


class TraceBuffer:
    """Frames in the order of collection, `size` bytes and MAX_FRAMES of them at most.

    When it is full, a `circular` one forgets the oldest; another takes no more.
    """

    def __init__(self) -> None:
        self.size = DEFAULT_SIZE
        self.circular = False
        self.created = 0
        """Frames ever appended since the last `clear`."""
        self.frames: deque[Frame] = deque()
        self.used = 0
        self._upload: bytes | None = None

    def clear(self) -> None:
        self.frames.clear()
        self.used = self.created = 0
        self._upload = None

    def append(self, frame: Frame) -> bool:
        """False where there is no room."""
        size = len(frame.raw)
        if size > self.size or (not self.circular and self._lacks_room(size)):
            return False
        while self._lacks_room(size):
            self.used -= len(self.frames.popleft().raw)
        self.frames.append(frame)
        self.used += size
        self.created += 1
        self._upload = None
        return True

    def _lacks_room(self, size: int) -> bool:
        return self.used + size > self.size or len(self.frames) >= MAX_FRAMES

    def raw(self, offset: int, size: int) -> bytes:
        """A part of all frames' bytes, for `tsave`; empty at the end."""
        if self._upload is None:
            self._upload = b"".join(frame.raw for frame in self.frames)
        return self._upload[offset : offset + size]
