"""One debugger's view of the machine: a packet's payload in, what to do about it out.

Rules: synchronous, in the machine's thread (all but `needs_target` and `take_output`, which touch no machine); no
sockets, no framing. A session never runs the guest on its own: it answers `Resume`, its owner calls `advance` until a
stop is had and sends what `stopped` makes of it. This is the only place where an error becomes `E nn`.

What the wire says of the machine: one process, 1, whose threads are the CPUs, numbered from 1. Source: GDB manual,
appendix E.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from emu.arch import Arch
from emu.iface import Breakpoint, Machine, MachineError, MemoryFault, Step, Stop
from gdbstub import stops
from gdbstub.actions import Action, Detach, Kill, Resume, Send
from gdbstub.agent import Agent, StateVariables
from gdbstub.breakpackets import BreakPackets
from gdbstub.filepackets import FilePackets
from gdbstub.files import FileError, FileTree
from gdbstub.monitor import Monitor
from gdbstub.packets import PacketError, PacketTable, number, packet, pair, unhex
from gdbstub.rsp import MAX_PACKET, fit
from gdbstub.targetpackets import StepBits, TargetPackets
from gdbstub.tracepackets import TracePackets
from gdbstub.tracepoints import Tracing

MONITOR_STATUS: Final = "monitor-status+"
"""Our own feature word: a client that says it gets E01 after the text of a refused `qRcmd`, where gdb gets OK."""

MAX_WAITING_LINES: Final = 4096  # of output that the client does not keep up with; the oldest go first
PROCESS: Final = 1
THREAD: Final = 1


class Session(TargetPackets, BreakPackets, FilePackets, TracePackets):
    """The state of one connection, whether it has become the debugger or only asks monitor commands.

    `wake` is called, in the machine's thread, when `take_output` has something. `files`, `monitor` and `tracing` are
    shared by all sessions; without them their packets do not exist.
    """

    def __init__(
        self,
        machine: Machine,
        arch: Arch,
        *,
        files: FileTree | None = None,
        monitor: Monitor | None = None,
        tracing: Tracing | None = None,
        packet_size: int = MAX_PACKET,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        TargetPackets.__init__(self, machine, arch, packet_size)
        variables = tracing.variables if tracing else StateVariables()
        BreakPackets.__init__(self, Agent(machine, arch, variables, self._print))
        FilePackets.__init__(self, files)
        TracePackets.__init__(self, tracing)
        self.attached = False
        self.rival: str | None = None
        """Who is debugging the machine already, as seen when this client came."""
        self.monitor = monitor
        self._wake = wake
        self._client: frozenset[str] = frozenset()
        self._last_stop: Stop | None = None
        self._closed = False
        self._output: deque[str] = deque(maxlen=MAX_WAITING_LINES)
        self._lost = 0  # of these, since the client was told last

    # ------------------------------------------------------------------------------------------------- for the server

    def needs_target(self, payload: bytes) -> bool:
        """Whether the guest must stand still, and this client be the debugger, for `payload` to be answered."""
        found = _TABLE.find(self, payload)
        return found is not None and not found[0].declaration.anytime

    def handle(self, payload: bytes) -> Action:
        """What to do about a packet. Never raises for anything a client may send."""
        found = _TABLE.find(self, payload)
        if found is None:
            return Send((b"",))
        entry, rest = found
        try:
            result: Action | bytes = getattr(self, entry.method)(rest)
        except MemoryFault:
            return Send((b"E14",))  # EFAULT, as QEMU says it; gdb makes its own sentence of it
        except FileError as error:
            return Send((b"F-1,%x" % error.errno,))
        except (PacketError, MachineError) as error:
            return self.refuse(str(error))
        if isinstance(result, Resume):
            self._leave_frame()
        return Send((result,)) if isinstance(result, bytes) else result

    def refuse(self, reason: str) -> Send:
        """An error reply: with the reason for a client that can show it, else E01."""
        if "error-message+" not in self._client:
            return Send((b"E01",))
        # Error texts are not unescaped by gdb, so they must not hold what the wire escapes.
        return Send((b"E." + re.sub(r"[^ -~]|[#$}*]", "?", reason).encode(),))

    def _refuse_aloud(self, reason: str) -> Send:
        """As `refuse`, for packets whose answer gdb lets console text come before: every gdb shows that."""
        return Send((*self._console(reason + "\n"), *self.refuse(reason).payloads))

    def advance(self, resume: Resume) -> Stop:
        """Run the guest as `resume` says. To be called again where somebody else's request ended it early."""
        if not resume.step:
            return self._machine.run()
        while True:
            stop = self._machine.step(into_interrupts=not self._step_bits & StepBits.NOIRQ)
            if resume.stop_range is None or not isinstance(stop, Step):
                return stop
            first, end = resume.stop_range
            if not first <= stop.pc < end:
                return stop
            hardware = self._stops_at(stop.pc)
            if hardware is not None:
                return Breakpoint(stop.pc, hardware)

    def stopped(self, stop: Stop) -> tuple[bytes, ...]:
        """The payloads that tell of the end of a resume: console text where gdb has no word for it, then the reply."""
        self._last_stop = stop
        explanation = stops.explain(stop) + self._mode_changed()
        return (*self._console(explanation), self._stop_reply(stop))

    def close(self) -> None:
        """Undo all that this debugger put into the machine, but for what it wanted to stay. Idempotent."""
        self._take_out()
        if self.open_files is not None:
            self.open_files.close_all()
        if self.tracing is not None and not self.tracing.outlives_debugger:
            self.tracing.stop("tdisconnected:0")
        self.attached, self._closed = False, True
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
        lines = []
        while self._output:
            lines.append(self._output.popleft())
        if self._lost:
            lines.insert(0, f"({self._lost} lines are lost: they came faster than they could be sent.)\n")
            self._lost = 0
        return tuple(self._console("".join(lines)))

    # ---------------------------------------------------------------------------------------------------- negotiation

    @packet("qSupported", anytime=True)
    def _supported(self, rest: bytes) -> bytes:
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
        try:
            line = unhex(rest).decode()
        except UnicodeDecodeError as error:
            raise PacketError("a monitor command is UTF-8 text") from error
        answer = self.monitor.execute(line, self.stream if self.attached else None)
        end = b"E01" if answer.refused and MONITOR_STATUS in self._client else b"OK"
        return Send((*self._console("".join(line + "\n" for line in answer.lines)), end))

    # -------------------------------------------------------------------------------------------- processes and threads

    @packet("Hg", feature="multiprocess+", negotiated=True)  # ids are then written pPROCESS.THREAD
    @packet("Hc")
    @packet("T")
    def _thread(self, rest: bytes) -> bytes:
        _check_thread(rest)
        return b"OK"

    @packet("qC")
    def _current_thread(self, _rest: bytes) -> bytes:
        return b"QC" + self._thread_id

    @packet("qfThreadInfo")
    def _first_threads(self, _rest: bytes) -> bytes:
        return b"m" + self._thread_id

    @packet("qsThreadInfo")
    def _more_threads(self, _rest: bytes) -> bytes:
        return b"l"

    @packet("qThreadExtraInfo")
    def _thread_name(self, rest: bytes) -> bytes:
        _check_thread(rest)
        return b"CPU 0".hex().encode()

    @packet("qXfer:threads:read", feature="qXfer:threads:read+")
    def _threads(self, rest: bytes) -> bytes:
        thread = self._thread_id.decode()
        document = f'<?xml version="1.0"?>\n<threads><thread id="{thread}" core="0" name="CPU 0"/></threads>\n'
        return self._part(document.encode(), rest.removeprefix(b":"))

    @packet("qAttached")
    def _was_attached(self, _rest: bytes) -> bytes:
        return b"1"  # gdb's quit then detaches: the machine goes on

    @packet("?")
    def _why(self, _rest: bytes) -> bytes:
        return self._stop_reply(self._last_stop)

    @packet("D")
    def _detach(self, _rest: bytes) -> Action:
        return Detach(b"OK")

    @packet("k")
    def _kill(self, _rest: bytes) -> Action:
        return Kill(None)

    @packet("vKill")
    def _kill_process(self, rest: bytes) -> Action:
        if number(rest) != PROCESS:
            raise PacketError("no such process")
        return Kill(b"OK")

    # ----------------------------------------------------------------------------------------------------- run control

    @packet("c")
    def _continue(self, rest: bytes) -> Action:
        self._jump(rest)
        return Resume()

    @packet("C")
    def _continue_signalled(self, rest: bytes) -> Action:
        return self._continue(rest.partition(b";")[2])

    @packet("s")
    def _step(self, rest: bytes) -> Action:
        self._jump(rest)
        return Resume(step=True)

    @packet("S")
    def _step_signalled(self, rest: bytes) -> Action:
        return self._step(rest.partition(b";")[2])

    def _jump(self, address: bytes) -> None:
        if address:
            self._machine.registers.write(self._arch.pc, number(address))

    @packet("vCont?", feature="vContSupported+", anytime=True)
    def _resume_actions(self, _rest: bytes) -> bytes:
        return b"vCont;c;C;s;S;r"

    @packet("vCont")
    def _resume(self, rest: bytes) -> Action:
        """The first action that names our thread counts. Signals have no meaning to a processor and are dropped."""
        for item in rest.split(b";"):
            action, _, thread = item.partition(b":")
            if thread:
                _check_thread(thread)
            match action[:1]:
                case b"c" | b"C":
                    return Resume()
                case b"s" | b"S":
                    return Resume(step=True)
                case b"r":
                    return Resume(step=True, stop_range=pair(action[1:]))
        raise PacketError("vCont has no action for the thread")

    # --------------------------------------------------------------------------------------------------------- helpers

    @property
    def _multi(self) -> bool:
        return "multiprocess+" in self._client

    @property
    def _thread_id(self) -> bytes:
        return b"p%x.%x" % (PROCESS, THREAD) if self._multi else b"%x" % THREAD

    def _part(self, document: bytes, window: bytes) -> bytes:
        """The `offset,length` part of a document as qXfer sends it."""
        offset, length = pair(window)
        if offset > len(document):
            raise PacketError("offset beyond the end of the object")
        data = fit(document[offset : offset + length], self._packet_size - 1)
        return (b"m" if offset + len(data) < len(document) else b"l") + data

    def _console(self, text: str) -> Iterator[bytes]:
        """`text` in as many `O` packets as it takes."""
        data = text.encode("utf-8", "replace")
        room = (self._packet_size - 1) // 2
        for start in range(0, len(data), room):
            yield b"O" + data[start : start + room].hex().encode()

    def _stop_reply(self, stop: Stop | None) -> bytes:
        status = stops.exit_status(stop)
        if status is not None:
            return b"W%02x%b" % (status & 0xFF, b";process:%x" % PROCESS if self._multi else b"")
        arch = self._arch
        expedited = b"".join(
            b"%02x:%b;" % (arch.numbers[name], value.to_bytes(arch.word_size, "little").hex().encode())
            for name, value in zip(arch.expedited, self._machine.registers.read_many(arch.expedited), strict=True)
        )
        reason = stops.reason(stop, self._client).encode()
        return b"T%02x%b%bthread:%b;" % (stops.signal(stop), expedited, reason, self._thread_id)


_TABLE: Final = PacketTable(Session)


# ------------------------------------------------------------------------------------------------------- packet fields

_THREAD_ID = re.compile(rb"(?:p(-1|[0-9a-fA-F]+)(?:\.(-1|[0-9a-fA-F]+))?|(-1|[0-9a-fA-F]+))")


def _check_thread(text: bytes) -> None:
    """PacketError unless the thread id, in either notation, names our thread or any."""
    match = _THREAD_ID.fullmatch(text)
    if match is None or not {b"-1", b"0", b"1", b"01", None}.issuperset(match.groups()):
        raise PacketError("no such thread")
