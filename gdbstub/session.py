"""One debugger's view of the machine: a packet's payload in, what to do about it out.

Rules: synchronous; in the machine's thread, or in another while that has nothing to do (`needs_target` and
`take_output`, which touch no machine, in any); no sockets, no framing. A session never runs the guest on its own: it
answers `Resume`, its owner calls `advance` until a stop is had and sends what `stopped` makes of it. This is the only
place where an error becomes `E nn`. The packets of a kind are in a module each; here is what they share. Source: GDB
manual, appendix E.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from emu.arch import Arch
from emu.iface import Machine, MachineError, MemoryFault
from emu.stops import Breakpoint, Step, Stop
from gdbstub import stops
from gdbstub.actions import Action, Resume, Send
from gdbstub.agent import Agent, StateVariables
from gdbstub.breakpackets import BreakPackets
from gdbstub.filepackets import FilePackets
from gdbstub.files import FileError, FileTree
from gdbstub.lldbpackets import LldbPackets
from gdbstub.monitor import Answer, Monitor
from gdbstub.packets import PacketError, PacketTable, packet, pair, unhex
from gdbstub.rsp import MAX_PACKET, MONITOR_STATUS, fit
from gdbstub.runpackets import RunPackets
from gdbstub.targetpackets import StepBits, TargetPackets
from gdbstub.threads import ThreadChoice
from gdbstub.tracepackets import TracePackets
from gdbstub.tracepoints import Tracing
from probes import rawtext

_AT_ONCE: Final = 32  # steps: in half a millisecond no client misses the server

MAX_WAITING_LINES: Final = 4096  # of output that the client does not keep up with; the oldest go first


class Session(RunPackets, TargetPackets, BreakPackets, FilePackets, TracePackets, LldbPackets):
    """The state of one connection, whether it has become the debugger or only asks monitor commands.

    `wake` is called, in the machine's thread, when `take_output` has something. `files`, `monitor` and `tracing` are
    shared by all sessions; without them their packets do not exist, nor without `restart`, which takes the machine back
    to where it began. `threads` says what its threads are, without it the processor.
    """

    def __init__(
        self,
        machine: Machine,
        arch: Arch,
        *,
        files: FileTree | None = None,
        monitor: Monitor | None = None,
        tracing: Tracing | None = None,
        restart: Callable[[], None] | None = None,
        threads: ThreadChoice | None = None,
        packet_size: int = MAX_PACKET,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        TargetPackets.__init__(self, machine, arch, packet_size)
        variables = tracing.variables if tracing else StateVariables()
        BreakPackets.__init__(self, Agent(machine, arch, variables, self._print))
        RunPackets.__init__(self, restart, threads if threads is not None else ThreadChoice())
        FilePackets.__init__(self, files)
        TracePackets.__init__(self, tracing)
        LldbPackets.__init__(self)
        self.attached = False
        self.rival: str | None = None
        """Who is debugging the machine already, as seen when this client came."""
        self.monitor = monitor
        self._wake = wake
        self._client: frozenset[str] = frozenset()
        self._closed = False
        self._output: deque[str] = deque(maxlen=MAX_WAITING_LINES)
        self._lost = 0  # of these, since the client was told last

    def allows(self, _name: str) -> bool:
        """Whether packet `name` exists for this client."""
        return True

    # ------------------------------------------------------------------------------------------------- for the server

    def needs_target(self, payload: bytes) -> bool:
        """Whether the guest must stand still, and this client be the debugger, for `payload` to be answered."""
        found = _TABLE.find(self, self._plain(payload))
        if found is None or found[0].declaration.anytime:
            return False
        return self._wants_target(found[0].declaration.name)

    def open(self) -> None:
        """This client is the debugger now, and the guest stands still for it."""
        self.attached, self._closed = True, False
        self._look_anew()

    def handle(self, payload: bytes) -> Action:
        """What to do about a packet. Never raises for anything a client may send."""
        found = _TABLE.find(self, self._plain(payload))
        if found is None:
            return Send((b"",))
        entry, rest = found
        try:
            self._check_state(entry.declaration.name)
            result: Action | bytes = getattr(self, entry.method)(rest)
        except MemoryFault:
            return Send((b"E14",))  # EFAULT, as QEMU says it; gdb makes its own sentence of it
        except FileError as error:
            return Send((b"F-1,%x" % error.errno,))
        except (PacketError, MachineError) as error:
            return self.refuse(str(error))
        return Send((result,)) if isinstance(result, bytes) else result

    def refuse(self, reason: str) -> Send:
        """An error reply: with the reason for a client that can show it, else E01."""
        if "error-message+" not in self._client:
            return Send((b"E01",))
        # Error texts are not unescaped by gdb, so they must not hold what the wire escapes.
        return Send((b"E." + re.sub(r"[^ -~]|[#$}*]", "?", reason).encode(),))

    def _refuse_aloud(self, reason: str) -> Send:
        """As `refuse`, for packets whose answer gdb lets console text come before: every gdb shows that, once."""
        return Send((*self._console(reason + "\n"), b"E01"))

    def advance(self, resume: Resume) -> Stop:
        """Run the guest as `resume` says. To be called again where somebody else's request ended it early."""
        if not resume.step:
            return self._machine.run()
        if resume.task is not None and self._tasks is not None:
            before = self._tasks.run_until_current(resume.task)
            if before is not None:
                return before
        into_interrupts = not self._step_bits & StepBits.NOIRQ
        while True:
            stop = self._told_of(self._machine.step(into_interrupts=into_interrupts), resume)
            if stop is not None:
                return stop

    def advance_at_once(self, resume: Resume) -> Stop | None:
        """As `advance` as far as that takes no time: a few steps, and no interrupt's handler; None where there is more
        to do, which is left to `advance`."""
        for _ in range(_AT_ONCE if resume.step and resume.task is None else 0):
            stop = self._machine.step_at_once()
            if stop is None or (stop := self._told_of(stop, resume)) is not None:
                return stop
        return None

    def _told_of(self, stop: Stop, resume: Resume) -> Stop | None:
        """The end of one step of `resume` for the client; None within the range that is stepped through."""
        if resume.stop_range is None or not isinstance(stop, Step):
            return stop
        first, end = resume.stop_range
        if not first <= stop.pc < end:
            return stop
        hardware = self._stops_at(stop.pc)
        return None if hardware is None else Breakpoint(stop.pc, hardware)

    def stopped(self, stop: Stop) -> tuple[bytes, ...]:
        """The payloads that tell of the end of a resume: console text where gdb has no word for it, then the reply."""
        explanation = self._explained(stop)
        return (*(self._console(explanation) if explanation else ()), self._ended(stop))

    def notification(self, stop: Stop) -> bytes | None:
        """Non-stop mode: what tells of the end of a resume, None where the client must acknowledge another first.

        Console text would be taken for the answer to a packet that crosses it: it waits for the next monitor command.
        """
        if explanation := self._explained(stop):
            self._print(explanation)
        reply = self._ended(stop)
        self._untold.append(reply)
        return b"Stop:" + reply if len(self._untold) == 1 else None

    def _explained(self, stop: Stop) -> str:
        return stops.explain(stop) + self._mode_changed()

    def close(self) -> None:
        """Undo all that this debugger put into the machine, but for what it wanted to stay. Idempotent."""
        self._take_out()
        self._machine.catch_exceptions(frozenset())
        if self.open_files is not None:
            self.open_files.close_all()
        if self.tracing is not None and not self.tracing.outlives_debugger:
            self.tracing.stop("tdisconnected:0")
        self.attached, self._closed, self.running = False, True, False
        if self.monitor is not None:
            self.monitor.end_stream(self.stream)

    def stream(self, line: str) -> None:
        """Keep a line for this client: it is sent while the guest runs, when gdb takes console text."""
        self._print(line + "\n")

    def _print(self, text: str) -> None:
        """Keep text for this client, if it is there still: a breakpoint's commands may outlive it."""
        if self._closed:
            return
        self._lost += len(self._output) == self._output.maxlen
        self._output.append(text)
        if len(self._output) == MAX_WAITING_LINES // 2:
            self._machine.request_stop()  # the run is taken up again when the server has had its turn
        self._wake()

    def take_output(self) -> tuple[bytes, ...]:
        """The payloads of the lines kept since the last call. Any thread."""
        if not self._output and not self._lost:
            return ()
        lines = []
        while self._output:
            lines.append(self._output.popleft())
        if self._lost:
            lines.insert(0, f"({self._lost} lines are lost: they came faster than they could be sent.)\n")
            self._lost = 0
        return tuple(self._console("".join(lines)))

    def _execute(self, monitor: Monitor, line: str) -> Answer:
        return monitor.execute(line, self.stream if self.attached else None)

    # ---------------------------------------------------------------------------------------------------- negotiation

    @packet("qSupported", anytime=True)
    def _supported(self, rest: bytes) -> bytes:
        """A client says what it can when it connects; one that asks again without a list has forgotten nothing."""
        if rest:
            self._client = frozenset(rest.decode("ascii", "replace").split(";"))
        words = [f"PacketSize={self._packet_size:x}", *_TABLE.features(self, self._client)]
        if self.rival is not None and MONITOR_STATUS not in self._client:
            # gdb shows no error text of ours while it connects, but it does show words it does not know.
            words.append(f"{self.rival} is debugging this machine already")
        return ";".join(words).encode()

    @packet("QStartNoAckMode", feature="QStartNoAckMode+", anytime=True)
    def _no_ack(self, _rest: bytes) -> Action:
        return Send((b"OK",), start_no_ack=True)

    @packet("qSymbol", anytime=True)
    def _symbol(self, _rest: bytes) -> bytes:
        return b"OK"  # ends the exchange: nothing is asked of gdb

    @packet("qRcmd", requires="monitor", anytime=True)
    def _monitor_command(self, rest: bytes) -> Action:
        assert self.monitor is not None
        line = rawtext.decode(unhex(rest))
        answer = self._execute(self.monitor, line)
        end = b"E01" if answer.refused and MONITOR_STATUS in self._client else b"OK"
        # In non-stop mode console text may come with this packet's answer only: others would be taken for theirs.
        waiting = self.take_output() if self.nonstop else ()
        return Send((*waiting, *self._console("".join(line + "\n" for line in answer.lines)), end))

    # --------------------------------------------------------------------------------------------------------- helpers

    def _part(self, document: bytes, window: bytes) -> bytes:
        """The `offset,length` part of a document as qXfer sends it."""
        offset, length = pair(window)
        if offset > len(document):
            raise PacketError("offset beyond the end of the object")
        data = fit(document[offset : offset + length], self._packet_size - 1)
        return (b"m" if offset + len(data) < len(document) else b"l") + data

    def _console(self, text: str) -> Iterator[bytes]:
        """`text` in as many `O` packets as it takes."""
        data = rawtext.encode(text)
        room = (self._packet_size - 1) // 2
        for start in range(0, len(data), room):
            yield b"O" + data[start : start + room].hex().encode()


_TABLE: Final = PacketTable(Session)
