"""The packets about registers, memory and their description, as a part of `Session`.

Rules: as in `session`. What a trace frame has collected stands in for the machine while one is selected. Source: GDB
manual, "Packets", "General Query Packets" and "Target Descriptions".
"""

from __future__ import annotations

from collections.abc import Callable

from emu.arch import Arch, Register, target_xml
from emu.iface import Machine, MemoryFault
from gdbstub.packets import PacketError, number, packet, pair, unhex
from gdbstub.rsp import fit
from gdbstub.tracebuffer import Frame
from gdbstub.tracepackets import in_registers
from gdbstub.tracepoints import Tracing


class TargetPackets:
    """What `Session` answers about the state of its machine, which it reads and writes."""

    _frame: Frame | None
    _trace: Tracing
    _part: Callable[[bytes, bytes], bytes]

    def __init__(self, machine: Machine, arch: Arch, packet_size: int) -> None:
        self._machine = machine
        self._arch = arch
        self._packet_size = packet_size
        self._description = target_xml(arch).encode()

    @packet("qXfer:features:read", feature="qXfer:features:read+")
    def _features(self, rest: bytes) -> bytes:
        annex, _, window = rest.partition(b":")
        return self._part(self._description, window) if annex == b"target.xml" else b"E00"

    @packet("g")
    def _read_registers(self, _rest: bytes) -> bytes:
        if self._frame is not None:
            return b"".join(in_registers(self._frame))
        return self._arch.pack(self._machine.registers.read_many(self._arch.names)).hex().encode()

    @packet("G")
    def _write_registers(self, rest: bytes) -> bytes:
        self._check_live()
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
        return self._machine.registers.read(register.name).to_bytes(register.size, "little").hex().encode()

    @packet("P")
    def _write_register(self, rest: bytes) -> bytes:
        self._check_live()
        index, _, value = rest.partition(b"=")
        register = self._register(index)
        data = unhex(value)
        if len(data) != register.size:
            raise PacketError(f"{register.name} has {register.size} bytes, not {len(data)}")
        self._machine.registers.write(register.name, int.from_bytes(data, "little"))
        return b"OK"

    @packet("m")
    def _read_hex(self, rest: bytes) -> bytes:
        vaddr, size = pair(rest)
        if size == 0:
            raise PacketError("no bytes asked for")
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

    def _register(self, text: bytes) -> Register:
        index = number(text)
        if index >= len(self._arch.registers):
            raise PacketError(f"no register {index}")
        return self._arch.registers[index]

    def _read(self, vaddr: int, size: int) -> bytes:
        """Memory up to the first byte that is not there; MemoryFault where that is the first."""
        if self._frame is not None:
            return self._trace.read(self._frame, vaddr, size)
        try:
            return self._machine.memory.read(vaddr, size)
        except MemoryFault as fault:
            if not vaddr < fault.address < vaddr + size:
                raise
            return self._machine.memory.read(vaddr, fault.address - vaddr)

    def _write(self, place: bytes, data: bytes) -> bytes:
        self._check_live()
        vaddr, size = pair(place)
        if size != len(data):
            raise PacketError(f"{size} bytes announced, {len(data)} sent")
        self._machine.memory.write(vaddr, data)
        return b"OK"

    def _check_live(self) -> None:
        if self._frame is not None:
            raise PacketError("a trace frame is selected; what was collected cannot be changed")
