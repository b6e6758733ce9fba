"""The packets about registers, memory and their description, as a part of `Session`.

Rules: as in `session`. What a trace frame has collected stands in for the machine while one is selected. Sources: GDB
manual, "Packets", "General Query Packets" and "Target Descriptions"; the `qemu` packets are those of QEMU's manual,
"GDB usage", "Changing single-stepping behaviour" and "Examining physical memory".
"""

from __future__ import annotations

import enum
import functools
import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Final

from emu.arch import Arch, Register, target_xml
from emu.iface import Machine, MemoryFault
from gdbstub.agent import Agent
from gdbstub.packets import ADDRESSES, PacketError, number, packet, pair, unhex
from gdbstub.rsp import fit
from gdbstub.threads import Tasks
from gdbstub.tracebuffer import Frame
from gdbstub.tracepackets import in_registers
from gdbstub.tracepoints import Tracing

MAX_SEARCHED: Final = 1 << 30
"""Bytes of one search or checksum: tables of a guest may map a page so often that an address space takes days."""
_PORTION: Final = 1 << 16
_PAGED: Final = 1 << 31  # CR0.PG
_REVERSED: Final = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class StepBits(enum.IntFlag):
    """QEMU's words for what a step leaves out. A guest's time is its instructions, so a step never takes more of it
    than one and NOTIMER changes nothing."""

    ENABLE = 1
    NOIRQ = 2
    NOTIMER = 4


class TargetPackets:
    """What `Session` answers about the state of its machine, which it reads and writes."""

    tracing: Tracing | None
    _tasks: Tasks | None
    _selected: int | None
    _frame: Frame | None
    _trace: Tracing
    _agent: Agent
    _part: Callable[[bytes, bytes], bytes]

    def __init__(self, machine: Machine, arch: Arch, packet_size: int) -> None:
        self._machine = machine
        self._arch = self._arch_then = arch
        self._packet_size = packet_size
        self._description = target_xml(arch).encode()
        self._physical = False
        self._step_bits = StepBits.ENABLE | StepBits.NOIRQ | StepBits.NOTIMER

    # ----------------------------------------------------------------------------------------------- what the target is

    @packet("qXfer:features:read", feature="qXfer:features:read+")
    def _features(self, rest: bytes) -> bytes:
        """The processor as it is when a client begins to read: from then on this session's registers are those."""
        annex, _, window = rest.partition(b":")
        if annex != b"target.xml":
            return b"E00"
        if pair(window)[0] == 0:
            self._describe(self._machine.registers.arch)
        return self._part(self._description, window)

    def _describe(self, arch: Arch) -> None:
        if arch is self._arch:
            return
        self._arch = self._arch_then = self._agent.arch = arch
        self._description = target_xml(arch).encode()
        if self.tracing is not None:
            self.tracing.describe(arch)

    def _mode_changed(self) -> str:
        """A line for the user where the processor has left the mode that this client's registers are of; else empty.

        gdb cannot be told in mid-session; it asks when it connects.
        """
        then, self._arch_then = self._arch_then, self._machine.registers.arch
        if self._arch_then in (then, self._arch):
            return ""
        return (
            f"The processor is an {self._arch_then.gdb_name} now, and was an {self._arch.gdb_name} when gdb connected: "
            "`disconnect` and connect again for its registers.\n"
        )

    @packet("qXfer:memory-map:read", feature="qXfer:memory-map:read+")
    def _memory_map(self, rest: bytes) -> bytes:
        """All of the address space as RAM, what stands behind addresses without paging first. gdb reads the map once,
        refuses what is not in it, and the guest may map anything anywhere later; unmapped reads are refused by `m`.
        To gdb, `x $eax` is about an int: it looks the address up sign-extended, and sends 32 bits of it. The range for
        that is a byte short: an end of 2^64 is 0 to gdb, and of a 32-bit target `info mem` shows it as 0x100000000.
        """
        size = self._machine.memory.size
        top = 1 << (8 * self._arch.word_size)
        borders = [0, top // 2, top] if self._machine.registers.read("cr0") & _PAGED else [0, size, top]
        ranges = [*itertools.pairwise(borders), *([] if top == ADDRESSES else [(ADDRESSES - top // 2, ADDRESSES - 1)])]
        rows = (f'<memory type="ram" start="{start:#x}" length="{end - start:#x}"/>' for start, end in ranges)
        document = "\n".join(('<?xml version="1.0"?>', "<memory-map>", *rows, "</memory-map>\n"))
        return self._part(document.encode(), rest.removeprefix(b":"))

    @packet("qqemu.Supported", anytime=True)
    def _qemu_packets(self, _rest: bytes) -> bytes:
        return b"sstepbits;sstep;PhyMemMode"

    @packet("qqemu.sstepbits", anytime=True)
    def _known_step_bits(self, _rest: bytes) -> bytes:
        return ",".join(f"{bit.name}={bit:x}" for bit in StepBits).encode()

    @packet("qqemu.sstep")
    def _read_step_bits(self, _rest: bytes) -> bytes:
        return b"0x%x" % self._step_bits

    @packet("Qqemu.sstep")
    def _write_step_bits(self, rest: bytes) -> bytes:
        bits = number(rest.removeprefix(b"0x"))
        if bits > sum(StepBits) or not bits & StepBits.ENABLE:
            raise PacketError("sstep is 1 (a step), with 2 (no interrupts) and 4 (no timers)")
        self._step_bits = StepBits(bits)
        return b"OK"

    @packet("qqemu.PhyMemMode")
    def _read_memory_mode(self, _rest: bytes) -> bytes:
        return b"%d" % self._physical

    @packet("Qqemu.PhyMemMode")
    def _write_memory_mode(self, rest: bytes) -> bytes:
        self._physical = number(rest) != 0
        return b"OK"

    # ------------------------------------------------------------------------------------------------------- registers

    @packet("g")
    def _read_registers(self, _rest: bytes) -> bytes:
        if self._frame is not None:
            return b"".join(in_registers(self._frame))
        if self._selected is not None:
            return b"".join(self._kept_registers())
        return self._arch.pack(self._machine.registers.read_many(self._arch.names)).hex().encode()

    @packet("G")
    def _write_registers(self, rest: bytes) -> bytes:
        self._check_runs()
        try:
            values = self._arch.unpack(unhex(rest))
        except ValueError as error:
            raise PacketError(str(error)) from error
        self._machine.registers.write_many(values)
        return b"OK"

    @packet("p")
    def _read_register(self, rest: bytes) -> bytes:
        register = self._register(rest)
        if self._frame is not None:
            return list(in_registers(self._frame))[number(rest)]
        if self._selected is not None:
            return list(self._kept_registers())[number(rest)]
        return self._machine.registers.read(register.name).to_bytes(register.size, "little").hex().encode()

    @packet("P")
    def _write_register(self, rest: bytes) -> bytes:
        self._check_runs()
        index, _, value = rest.partition(b"=")
        register = self._register(index)
        data = unhex(value)
        if len(data) != register.size:
            raise PacketError(f"{register.name} has {register.size} bytes, not {len(data)}")
        self._machine.registers.write(register.name, int.from_bytes(data, "little"))
        return b"OK"

    def _kept_registers(self) -> Iterator[bytes]:
        """Each register, of a task that does not run, as `g` has them: those that are not kept are unavailable."""
        kept = self._tasks.registers(self._selected) if self._tasks is not None and self._selected is not None else {}
        for register in self._arch.registers:
            value = kept.get(register.name)
            yield b"xx" * register.size if value is None else value.to_bytes(register.size, "little").hex().encode()

    def _register(self, text: bytes) -> Register:
        index = number(text)
        if index >= len(self._arch.registers):
            raise PacketError(f"no register {index}")
        return self._arch.registers[index]

    # ---------------------------------------------------------------------------------------------------------- memory

    @packet("m")
    def _read_hex(self, rest: bytes) -> bytes:
        vaddr, size = pair(rest)
        return self._read(vaddr, min(size, self._packet_size // 2)).hex().encode()

    @packet("x", feature="binary-upload+")
    def _read_binary(self, rest: bytes) -> bytes:
        vaddr, size = pair(rest)
        return b"b" + fit(self._read(vaddr, min(size, self._packet_size - 1)), self._packet_size - 1)

    @packet("M")
    def _write_hex(self, rest: bytes) -> bytes:
        place, _, data = rest.partition(b":")
        return self._write(place, unhex(data))

    @packet("X")
    def _write_binary(self, rest: bytes) -> bytes:
        place, _, data = rest.partition(b":")
        return self._write(place, data)

    @packet("qSearch:memory", feature="qSearch:memory+")
    def _search(self, rest: bytes) -> bytes:
        address, _, rest = rest.partition(b";")
        size, _, pattern = rest.partition(b";")
        if not pattern:
            raise PacketError("nothing to search for")
        at, kept = number(address), b""
        for data in self._portions(at, number(size)):
            window = kept + data
            found = window.find(pattern)
            if found >= 0:
                return b"1,%x" % (at - len(kept) + found)
            at += len(data)
            kept = window[len(window) - len(pattern) + 1 :] if len(pattern) > 1 else b""
        return b"0"

    @packet("qCRC")
    def _checksum(self, rest: bytes) -> bytes:
        """CRC-32 with gdb's polynomial, most significant bit first: zlib's is the same one, mirrored."""
        address, size = pair(rest)
        crc = 0
        for data in self._portions(address, size):
            crc = zlib.crc32(data.translate(_REVERSED), crc)
        return b"C%x" % int(f"{crc ^ 0xFFFFFFFF:032b}"[::-1], 2)

    def _portions(self, address: int, size: int) -> Iterator[bytes]:
        """The memory of a range; MemoryFault when it comes to a byte that is not there."""
        if size > MAX_SEARCHED:
            raise PacketError(f"no more than {MAX_SEARCHED} bytes at once")
        end = address + size
        while address < end:
            data = self._read(address, min(_PORTION, end - address))
            yield data
            address += len(data)

    def _read(self, vaddr: int, size: int) -> bytes:
        """Memory up to the first byte that is not there; MemoryFault where that is the first."""
        if self._frame is not None:
            return self._trace.read(self._frame, vaddr, size)
        memory = self._machine.memory
        read = memory.read_physical if self._physical else memory.read
        if self._tasks is not None and self._selected is not None and not self._physical:
            read = functools.partial(self._tasks.read, self._selected)
        try:
            return read(vaddr, size)
        except MemoryFault as fault:
            if not vaddr < fault.address < vaddr + size:
                raise
            return read(vaddr, fault.address - vaddr)

    def _write(self, place: bytes, data: bytes) -> bytes:
        self._check_live()
        vaddr, size = pair(place)
        if size != len(data):
            raise PacketError(f"{size} bytes announced, {len(data)} sent")
        memory = self._machine.memory
        if self._tasks is not None and self._selected is not None and not self._physical:
            self._tasks.write(self._selected, vaddr, data)
        else:
            (memory.write_physical if self._physical else memory.write)(vaddr, data)
        return b"OK"

    def _check_runs(self) -> None:
        self._check_live()
        if self._selected is not None:
            raise PacketError("this task does not run: only its kernel has its registers")

    def _check_live(self) -> None:
        if self._frame is not None:
            raise PacketError("a trace frame is selected; what was collected cannot be changed")
