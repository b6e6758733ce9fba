"""The packets about tracepoints, as a part of `Session`: their syntax, and the frame that a debugger looks at.

Rules: as in `session`; what the packets mean is in `tracepoints`. Source: GDB manual, "Tracepoint Packets".
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from gdbstub.packets import PacketError, expression, fields, number, packet, pair, unhex
from gdbstub.tracebuffer import DEFAULT_SIZE, Frame
from gdbstub.tracepoints import MAX_SOURCES, Tracepoint, Tracing, Variable

if TYPE_CHECKING:
    from gdbstub.actions import Action

NO_FRAME: Final = 0xFFFFFFFF
_DEFINITION = re.compile(rb"([0-9a-fA-F]+):([0-9a-fA-F]+):([ED]):([0-9a-fA-F]+):([0-9a-fA-F]+)(.*)", re.S)


class TracePackets:
    """What `Session` answers where it was given a `tracing`."""

    tracing: Tracing | None
    _packet_size: int
    _part: Callable[[bytes, bytes], bytes]
    _refuse_aloud: Callable[[str], Action]

    def __init__(self, tracing: Tracing | None) -> None:
        self.tracing = tracing
        self._frame: Frame | None = None
        """The trace frame that registers and memory are read from; None: the machine as it is."""
        self._frame_number = -1
        self._pieces: deque[bytes] = deque()  # of the upload in progress

    @property
    def _trace(self) -> Tracing:
        assert self.tracing is not None
        return self.tracing

    # ------------------------------------------------------------------------------------------------- definitions

    @packet("QTinit", requires="tracing")
    def _trace_init(self, _rest: bytes) -> bytes:
        self._leave_frame()
        self._trace.reset()
        return b"OK"

    @packet("QTDP", requires="tracing", also=("ConditionalTracepoints+", "InstallInTrace+", "tracenz+"))
    def _trace_define(self, rest: bytes) -> bytes:
        text = rest.removesuffix(b"-")
        if rest.startswith(b"-"):
            point, actions = self._point(text[1:])
            self._trace.add_actions(point, actions)
        else:
            point = self._trace_point(text)
        if self._trace.running and text == rest:  # a trailing hyphen says that more is to come
            self._trace.arm(point)
        return b"OK"

    def _trace_point(self, text: bytes) -> Tracepoint:
        match = _DEFINITION.fullmatch(text)
        if match is None:
            raise PacketError("a tracepoint is NUMBER:ADDRESS:E|D:STEPS:PASSES")
        condition = None
        extra = match[6]
        while extra:
            if not extra.startswith(b":X"):
                raise PacketError("fast and static tracepoints are not supported")
            condition, extra = expression(extra[1:])
        place, address, steps, passes = (number(match[group]) for group in (1, 2, 4, 5))
        point = Tracepoint(place, address, match[3] == b"E", steps, passes)
        self._trace.add(point, condition)
        return point

    def _point(self, text: bytes) -> tuple[Tracepoint, bytes]:
        """The tracepoint that `number:address` names, and what follows the colon behind."""
        place, _, rest = text.partition(b":")
        address, _, rest = rest.partition(b":")
        return self._trace.find(number(place), number(address)), rest

    @packet("QTDPsrc", feature="TracepointSource+", requires="tracing")
    def _trace_source(self, rest: bytes) -> bytes:
        point, source = self._point(rest)
        if len(point.sources) >= MAX_SOURCES:
            raise PacketError(f"no more than {MAX_SOURCES} pieces of source")
        if source.count(b":") != 3:
            raise PacketError("source is TYPE:START:LENGTH:BYTES")
        point.sources.append(source)
        return b"OK"

    @packet("QTDV", feature="TraceStateVariables+", requires="tracing")
    def _trace_variable(self, rest: bytes) -> bytes:
        parts = rest.split(b":")
        if len(parts) != 4:
            raise PacketError("a variable is NUMBER:VALUE:BUILTIN:NAME")
        variable = Variable(number(parts[1]), parts[2] == b"1", unhex(parts[3]))
        self._trace.define_variable(number(parts[0]), variable)
        return b"OK"

    @packet("QTEnable", feature="EnableDisableTracepoints+", requires="tracing")
    def _trace_enable(self, rest: bytes) -> bytes:
        point, _ = self._point(rest)
        point.enabled = True
        if self._trace.running:
            self._trace.arm(point)
        return b"OK"

    @packet("QTDisable", requires="tracing")
    def _trace_disable(self, rest: bytes) -> bytes:
        point, _ = self._point(rest)
        point.enabled = False
        self._trace.disarm(point)
        return b"OK"

    @packet("QTro", requires="tracing")
    def _trace_readonly(self, rest: bytes) -> bytes:
        self._trace.readonly[:] = [pair(part) for part in rest.split(b":") if part]
        return b"OK"

    @packet("QTNotes", requires="tracing")
    def _trace_notes(self, rest: bytes) -> bytes:
        notes = (part.partition(b":") for part in rest.split(b";") if part)
        self._trace.annotate({name: value for name, _, value in notes})
        return b"OK"

    @packet("QTDisconnected", feature="DisconnectedTracing+", requires="tracing")
    def _trace_disconnected(self, rest: bytes) -> bytes:
        self._trace.outlives_debugger = bool(number(rest))
        return b"OK"

    @packet("QTBuffer:circular", requires="tracing")
    def _trace_circular(self, rest: bytes) -> bytes:
        self._trace.buffer.circular = bool(number(rest))
        return b"OK"

    @packet("QTBuffer:size", feature="QTBuffer:size+", requires="tracing")
    def _trace_size(self, rest: bytes) -> bytes:
        self._leave_frame()
        self._trace.resize(DEFAULT_SIZE if rest == b"-1" else number(rest))
        return b"OK"

    # ------------------------------------------------------------------------------------------------------ the run

    @packet("QTStart", requires="tracing")
    def _trace_start(self, _rest: bytes) -> Action | bytes:
        self._leave_frame()
        try:
            self._trace.start()
        except PacketError as error:
            return self._refuse_aloud(str(error))
        return b"OK"

    @packet("QTStop", requires="tracing")
    def _trace_stop(self, _rest: bytes) -> bytes:
        self._trace.stop("tstop::0")
        return b"OK"

    @packet("qTStatus", requires="tracing")
    def _trace_status(self, _rest: bytes) -> bytes:
        return self._trace.status().encode()

    @packet("qTP", requires="tracing")
    def _trace_usage(self, rest: bytes) -> bytes:
        point, _ = self._point(rest)
        return b"V%x:%x" % (point.hits, point.usage)

    @packet("qTV", requires="tracing")
    def _trace_value(self, rest: bytes) -> bytes:
        value = self._trace.variable(self._frame, number(rest))
        return b"U" if value is None else b"V%x" % value

    @packet("QTSave", requires="tracing")
    def _trace_save(self, _rest: bytes) -> Action:
        return self._refuse_aloud("the stub writes no file on its host; tsave without -r writes one on yours")

    # --------------------------------------------------------------------------------------------------- the frames

    @packet("QTFrame", requires="tracing")
    def _trace_select(self, rest: bytes) -> bytes:
        """Select a frame by number, or the first behind the selected one that matches; it stays selected if none
        does."""
        kind, colon, values = rest.partition(b":")
        if not colon:
            kind, values = b"", rest
        if kind in (b"range", b"outside"):
            first, last = pair(values.replace(b":", b","))
            inside = kind == b"range"
            return self._next_frame(lambda frame: (first <= frame.pc <= last) is inside)
        wanted = number(values)
        if kind == b"pc":
            return self._next_frame(lambda frame: frame.pc == wanted)
        if kind == b"tdp":
            return self._next_frame(lambda frame: frame.tracepoint == wanted)
        if kind:
            raise PacketError("a frame is sought by pc, tdp, range or outside")
        if wanted == NO_FRAME:
            self._leave_frame()
            return b"OK"
        if wanted >= len(self._trace.buffer.frames):
            return b"F-1"
        return self._enter_frame(wanted, self._trace.buffer.frames[wanted])

    def _next_frame(self, wanted: Callable[[Frame], bool]) -> bytes:
        for index, frame in enumerate(self._trace.buffer.frames):
            if index > self._frame_number and wanted(frame):
                return self._enter_frame(index, frame)
        return b"F-1"

    def _enter_frame(self, index: int, frame: Frame) -> bytes:
        self._frame_number, self._frame = index, frame
        return b"F%xT%x" % (index, frame.tracepoint)

    def _leave_frame(self) -> None:
        self._frame_number, self._frame = -1, None

    @packet("qXfer:traceframe-info:read", feature="qXfer:traceframe-info:read+", requires="tracing")
    def _trace_frame_info(self, rest: bytes) -> bytes:
        if self._frame is None:
            raise PacketError("no trace frame is selected")
        return self._part(self._frame.describe().encode(), rest.removeprefix(b":"))

    @packet("qTBuffer", requires="tracing")
    def _trace_upload(self, rest: bytes) -> bytes:
        offset, size = (number(text) for text in fields(rest, 2))
        return self._trace.buffer.raw(offset, min(size, self._packet_size // 2)).hex().encode() or b"l"

    # -------------------------------------------------------------------------------- definitions for a new debugger

    @packet("qTfP", requires="tracing")
    def _trace_first_point(self, _rest: bytes) -> bytes:
        self._pieces = deque(self._trace.upload())
        return self._next_piece()

    @packet("qTfV", requires="tracing")
    def _trace_first_variable(self, _rest: bytes) -> bytes:
        self._pieces = deque(self._trace.upload_variables())
        return self._next_piece()

    @packet("qTfSTM", requires="tracing")
    def _trace_first_marker(self, _rest: bytes) -> bytes:
        self._pieces.clear()  # static markers are something of a process's
        return self._next_piece()

    @packet("qTsP", requires="tracing")
    @packet("qTsV", requires="tracing")
    @packet("qTsSTM", requires="tracing")
    def _trace_more(self, _rest: bytes) -> bytes:
        return self._next_piece()

    def _next_piece(self) -> bytes:
        return self._pieces.popleft() if self._pieces else b"l"


def in_registers(frame: Frame) -> Iterator[bytes]:
    """Each register of a `g` reply in hex, with `xx` for a byte that was not collected."""
    for register in frame.arch.registers:
        value = frame.register(register.name)
        yield b"xx" * register.size if value is None else value.to_bytes(register.size, "little").hex().encode()
