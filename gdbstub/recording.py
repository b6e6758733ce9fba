"""`--log-rsp`: everything that reaches a machine from outside, each with the moment it took effect.

Rules: the machine's thread, between two instructions of the guest. A record is JSON, a line an event, the first line
about the machine. A moment is an instruction count and, for a guest in HLT, the virtual time: with these the guest's
course is decided, so `replay` can run it again. Written as it happens: a record that was cut short is a record too.

    connect   a client's first packet; data: who was debugging then
    attach    the client holds the guest              detach   it is gone, and what it put there
    ->        a packet of the client                  <-       a packet for it: an answer, or the end of a resume
    output    console text for it, while the guest ran (how it was cut into packets depends on the wire)
    interrupt Ctrl-C has stopped the guest            input    bytes for the guest's serial port
    end       of the run; data: the hash of RAM
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

from emu.iface import MachineError
from emu.machine import Machine
from emu.stops import Interrupted, Stop
from gdbstub.actions import Action, Detach, Interrupt, Kill, Send
from gdbstub.session import Session

FORMAT: Final = 1
_WHOLE: Final = 256  # bytes of an answer that are kept as they are; of a file that is read, the hash is enough

What: TypeAlias = Literal["connect", "attach", "detach", "->", "<-", "output", "interrupt", "input", "end"]


class RecordError(MachineError):
    """A file that is no record, or of another version; the text says where."""


@dataclass(frozen=True, slots=True)
class Start:
    """The machine as it was when recording began. `command` is the command line that made it."""

    command: tuple[str, ...]
    instructions: int
    ram_sha256: str


@dataclass(frozen=True, slots=True)
class Event:
    """One line. `client` counts the connections from 1, 0 is nobody; `data` is Latin-1, of bytes."""

    at: int
    ns: int
    what: What
    client: int = 0
    data: str = ""

    def __str__(self) -> str:
        who = f" client {self.client}" if self.client else ""
        return f"at instruction {self.at} ({self.ns} ns){who} {self.what} {self.data!r}"


class Recorder:
    """Gives each event of `machine` to `write`, and makes the sessions whose packets are events."""

    def __init__(self, machine: Machine, write: Callable[[Event], None]) -> None:
        self._machine = machine
        self._write = write
        self._clients = 0
        self._packets = 0  # being handled: what one of them types, it will type again
        machine.devices.uart.on_receive = self._received

    def note(self, what: What, client: int = 0, data: bytes = b"") -> None:
        """An event of this moment."""
        machine = self._machine
        self._write(Event(machine.instructions, machine.clock.now_ns, what, client, data.decode("latin-1")))

    def note_end(self) -> None:
        """The last one."""
        self.note("end", data=self._machine.ram_sha256().encode())

    def session(self, *arguments: Any, **options: Any) -> RecordedSession:
        """A `Session` made of these, with the next client's number."""
        self._clients += 1
        return RecordedSession(self, self._clients, *arguments, **options)

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Around what a packet does."""
        self._packets += 1
        try:
            yield
        finally:
            self._packets -= 1

    def _received(self, data: bytes) -> None:
        if not self._machine.cpu.running and not self._packets:  # nor what `--send` types when the guest prints
            self.note("input", data=data)


class RecordedSession(Session):
    """A session whose packets are noted."""

    def __init__(self, recorder: Recorder, client: int, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._recorder = recorder
        self._number = client
        self._known = self._holds = False

    def handle(self, payload: bytes) -> Action:
        if not self._known:
            self._known = True
            self._note("connect", (self.rival or "").encode())
        if self.attached and not self._holds:
            self._holds = True
            self._note("attach")
        self._note("->", payload)
        with self._recorder.handling():
            action = super().handle(payload)
        match action:
            case Send(payloads):
                self._note_answers(payloads)
            case Detach(reply) | Interrupt(reply):
                self._note_answers((reply,))
            case Kill(None):
                pass
            case Kill(bytes() as reply):
                self._note_answers((reply,))
        return action

    def stopped(self, stop: Stop) -> tuple[bytes, ...]:
        if isinstance(stop, Interrupted):
            self._note("interrupt")
        payloads = super().stopped(stop)
        self._note_answers(payloads)
        return payloads

    def notification(self, stop: Stop) -> bytes | None:
        if isinstance(stop, Interrupted):
            self._note("interrupt")
        payload = super().notification(stop)
        if payload is not None:
            self._note_answers((b"%" + payload,))
        return payload

    def close(self) -> None:
        if self._holds:
            self._holds = False
            self._note("detach")
        super().close()

    def _print(self, text: str) -> None:
        self._note("output", text.encode("utf-8", "replace"))
        super()._print(text)

    def _note_answers(self, payloads: Sequence[bytes]) -> None:
        for payload in payloads:
            if len(payload) > _WHOLE:
                digest = hashlib.sha256(payload).hexdigest()
                payload = payload[:_WHOLE] + f"... {len(payload)} bytes, SHA-256 {digest}".encode()
            self._note("<-", payload)

    def _note(self, what: What, data: bytes = b"") -> None:
        self._recorder.note(what, self._number, data)


# ------------------------------------------------------------------------------------------------------------- as text


def start_line(start: Start) -> str:
    """The first line of a record."""
    return json.dumps({"gdbstub record": FORMAT, **asdict(start)})


def event_line(event: Event) -> str:
    """Each other one."""
    return json.dumps({name: value for name, value in asdict(event).items() if value not in (0, "")})


def _event(fields: dict[str, Any]) -> Event:
    """From a line's fields; ValueError or TypeError where they are not what `event_line` writes."""
    event = Event(**{"at": 0, "ns": 0, **fields})
    if event.what not in get_args(What) or not isinstance(event.data, str):
        raise ValueError("no event")
    for number in (event.at, event.ns, event.client):
        if not isinstance(number, int) or not 0 <= number < 1 << 64:
            raise ValueError("no number of an event")
    event.data.encode("latin-1")
    return event


def read_record(name: str, lines: Iterator[str]) -> tuple[Start, list[Event]]:
    """A record of this version; RecordError with the line's number. A last line that was cut short is left out."""
    start: Start | None = None
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n") and start is not None:
            break
        try:
            fields = json.loads(line)
            if start is None:
                if fields.pop("gdbstub record") != FORMAT:
                    raise RecordError(f"{name}: a record of another version of gdbstub")
                start = Start(tuple(map(str, fields["command"])), int(fields["instructions"]), fields["ram_sha256"])
            else:
                events.append(_event(fields))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise RecordError(f"{name}:{number}: no line of a record made by --log-rsp") from error
    if start is None:
        raise RecordError(f"{name}: an empty file, no record")
    return start, events
