"""A client that looks at the machine and cannot change it: the endpoint of `--observe`.

Rules: as in `session`; no trio. The guest is neither held nor slowed for an observer, so what it is shown as a stop is
a moment: its registers are those of that moment, while memory is as it is when it is read. `continue` lets go of the
moment, Ctrl-C takes another. Packets that are not listed here do not exist for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, cast

from emu.arch import Arch
from emu.iface import Machine, MachineError, Memory
from emu.stops import Interrupted
from gdbstub.actions import Action, Resume
from gdbstub.files import FileTree
from gdbstub.monitor import Answer, Monitor
from gdbstub.packets import PacketError
from gdbstub.session import Session

_PACKETS: Final = frozenset({
    "?", "D", "G", "Hc", "Hg", "M", "P", "QStartNoAckMode", "Qqemu.PhyMemMode", "T", "X", "c", "g", "m", "p",
    "qAttached", "qC", "qCRC", "qRcmd", "qSearch:memory", "qSupported", "qSymbol", "qThreadExtraInfo",
    "qXfer:exec-file:read", "qXfer:features:read", "qXfer:memory-map:read", "qXfer:threads:read", "qfThreadInfo",
    "qqemu.PhyMemMode", "qsThreadInfo", "vCont", "vCont?", "vFile:close", "vFile:fstat", "vFile:lstat",
    "vFile:open", "vFile:pread", "vFile:readlink", "vFile:setfs", "vFile:stat", "x",
})  # fmt: skip
"""What looks; and G, P, M and X, so that writing is refused aloud: gdb takes silence for success."""
_REASON: Final = "this endpoint only shows the machine"


class _Registers:
    """Implements iface.Registers over a copy."""

    def __init__(self, arch: Arch, values: Mapping[str, int]) -> None:
        self.arch = arch
        self._values = values

    def read(self, name: str) -> int:
        return self._values[name]

    def read_many(self, names: Sequence[str]) -> list[int]:
        return [self._values[name] for name in names]

    def write(self, _name: str, _value: int) -> None:
        raise MachineError(_REASON)

    def write_many(self, _values: Mapping[str, int]) -> None:
        raise MachineError(_REASON)


class _Memory:
    """Implements iface.Memory, but for writing."""

    def __init__(self, memory: Memory) -> None:
        self.size = memory.size
        self.read, self.read_physical, self.translate = memory.read, memory.read_physical, memory.translate

    def write(self, _vaddr: int, _data: bytes) -> None:
        raise MachineError(_REASON)

    def write_physical(self, _paddr: int, _data: bytes) -> None:
        raise MachineError(_REASON)


class _Moment:
    """As much of iface.Machine as the packets above need: registers of the last `look`, memory as it is."""

    def __init__(self, machine: Machine, arch: Arch) -> None:
        self._machine = machine
        self.memory = _Memory(machine.memory)
        self.registers = _Registers(arch, {})

    def look(self) -> None:
        registers = self._machine.registers
        names = registers.arch.names
        self.registers = _Registers(registers.arch, dict(zip(names, registers.read_many(names), strict=True)))


class ObserverSession(Session):
    """A session that is never the debugger; any number of them may be there."""

    def __init__(
        self,
        machine: Machine,
        arch: Arch,
        *,
        files: FileTree | None = None,
        monitor: Monitor | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._moment = _Moment(machine, arch)
        super().__init__(cast(Machine, self._moment), arch, files=files, monitor=monitor, wake=wake)

    def allows(self, name: str) -> bool:
        return name in _PACKETS

    def open(self) -> None:
        """The client wants to look: at this moment."""
        self._moment.look()
        super().open()

    def interrupted(self) -> tuple[bytes, ...]:
        """The payloads for Ctrl-C: another moment."""
        self._moment.look()
        return self.stopped(Interrupted(self._moment.registers.read(self._arch.pc)))

    def close(self) -> None:
        """There is nothing of it in the machine."""
        self.attached = self.running = False

    def _go(self, resume: Resume) -> Action:
        if resume.step:
            raise PacketError(_REASON + ": nothing is stepped")
        return super()._go(resume)

    def _execute(self, monitor: Monitor, line: str) -> Answer:
        return monitor.execute(line, looks_only=True)
