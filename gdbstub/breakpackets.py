"""The packets about breakpoints and watchpoints, as a part of `Session`.

Rules: as in `session`. What a debugger has put into the machine is kept here, for the day it leaves. Source: GDB
manual, "Packets" (z0 to z4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from emu.iface import Machine
from emu.stops import WatchKind
from gdbstub.agent import Agent
from gdbstub.conditions import Decision, decision
from gdbstub.packets import ADDRESSES, PacketError, packet, pair
from gdbstub.tracepoints import Tracing

MAX_BREAKPOINTS: Final = 4096
"""Of a debugger's breakpoints, and of its watchpoints."""


class BreakPackets:
    """What `Session` answers about places where the guest shall stop."""

    tracing: Tracing | None
    stream: Callable[[str], None]
    _machine: Machine

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._breakpoints: dict[tuple[int, bool], Decision | None] = {}
        self._watchpoints: set[tuple[WatchKind, int, int]] = set()

    # The words are those of its stops' reason, and of what may stand behind the address.
    @packet("Z0", feature="swbreak+", negotiated=True, also=("ConditionalBreakpoints+", "BreakpointCommands+"))
    def _insert_software(self, rest: bytes) -> bytes:
        return self._insert(rest, hardware=False)

    @packet("Z1", feature="hwbreak+", negotiated=True)
    def _insert_hardware(self, rest: bytes) -> bytes:
        return self._insert(rest, hardware=True)

    @packet("z0")
    def _remove_software(self, rest: bytes) -> bytes:
        return self._remove(rest, hardware=False)

    @packet("z1")
    def _remove_hardware(self, rest: bytes) -> bytes:
        return self._remove(rest, hardware=True)

    @packet("Z2")
    def _watch_writes(self, rest: bytes) -> bytes:
        return self._watch(WatchKind.WRITE, rest)

    @packet("Z3")
    def _watch_reads(self, rest: bytes) -> bytes:
        return self._watch(WatchKind.READ, rest)

    @packet("Z4")
    def _watch_accesses(self, rest: bytes) -> bytes:
        return self._watch(WatchKind.ACCESS, rest)

    @packet("z2")
    def _unwatch_writes(self, rest: bytes) -> bytes:
        return self._unwatch(WatchKind.WRITE, rest)

    @packet("z3")
    def _unwatch_reads(self, rest: bytes) -> bytes:
        return self._unwatch(WatchKind.READ, rest)

    @packet("z4")
    def _unwatch_accesses(self, rest: bytes) -> bytes:
        return self._unwatch(WatchKind.ACCESS, rest)

    def _insert(self, rest: bytes, *, hardware: bool) -> bytes:
        place, _, options = rest.partition(b";")
        vaddr, _kind = _place(place)
        if len(self._breakpoints) >= MAX_BREAKPOINTS and (vaddr, hardware) not in self._breakpoints:
            raise PacketError(f"no more than {MAX_BREAKPOINTS} breakpoints")
        decide = decision(vaddr, options, self._agent, self.stream)
        self._machine.insert_breakpoint(vaddr, hardware, decide)
        self._breakpoints[vaddr, hardware] = decide
        if self.tracing is not None:
            self.tracing.standing.discard((vaddr, hardware))
        return b"OK"

    def _remove(self, rest: bytes, *, hardware: bool) -> bytes:
        vaddr, _kind = pair(rest)
        left = self.tracing.standing if self.tracing is not None else set()
        if (vaddr, hardware) in self._breakpoints or (vaddr, hardware) in left:
            self._machine.remove_breakpoint(vaddr, hardware)
            self._breakpoints.pop((vaddr, hardware), None)
            left.discard((vaddr, hardware))
        return b"OK"

    def _watch(self, kind: WatchKind, rest: bytes) -> bytes:
        watch = (kind, *_place(rest))
        if len(self._watchpoints) >= MAX_BREAKPOINTS and watch not in self._watchpoints:
            raise PacketError(f"no more than {MAX_BREAKPOINTS} watchpoints")
        self._machine.insert_watchpoint(*watch)
        self._watchpoints.add(watch)
        return b"OK"

    def _unwatch(self, kind: WatchKind, rest: bytes) -> bytes:
        watch = (kind, *pair(rest))
        if watch in self._watchpoints:
            self._machine.remove_watchpoint(*watch)
            self._watchpoints.discard(watch)
        return b"OK"

    def _stops_at(self, pc: int) -> bool | None:
        """Whether a breakpoint whose condition holds stands at `pc`: None if not, else if it is a hardware one."""
        for hardware in (False, True):
            if (pc, hardware) in self._breakpoints:
                decide = self._breakpoints[pc, hardware]
                if decide is None or decide():
                    return hardware
        return None

    def _take_out(self) -> None:
        """Undo all of it, but for breakpoints that shall outlive the debugger."""
        for (vaddr, hardware), decide in self._breakpoints.items():
            if decide is not None and decide.persistent and self.tracing is not None:
                self.tracing.standing.add((vaddr, hardware))
            else:
                self._machine.remove_breakpoint(vaddr, hardware)
        for watch in self._watchpoints:
            self._machine.remove_watchpoint(*watch)
        self._breakpoints.clear()
        self._watchpoints.clear()


def _place(text: bytes) -> tuple[int, int]:
    """Address and length; PacketError for a length that leads past the last address there is."""
    vaddr, size = pair(text)
    if vaddr + size > ADDRESSES:
        raise PacketError("address and length lead past the end of the address space")
    return vaddr, size
