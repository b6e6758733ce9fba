"""`gdbstub replay`: a record run again, as far as it goes the same way.

Rules: no sockets, no clock but the guest's, one thread. What came from outside is given to the machine at the moment
the record names, and what comes of it is recorded anew: the two records must be equal. Whatever can differ (another
program, another engine, a defect) shows as the first line that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from emu.machine import Machine
from emu.stops import Interrupted, Stop
from gdbstub.actions import Kill, Resume
from gdbstub.packets import PacketError, unhex
from gdbstub.recording import Event, Recorder
from gdbstub.session import Session

_OUTSIDE: Final = frozenset(("connect", "attach", "detach", "->", "interrupt", "input", "end"))
TOLD_EVERY: Final = 500_000_000
"""Instructions between two lines about how far a replay has come: about ten seconds."""
_WALL_CLOCK: Final = (b"info stats",)  # monitor commands that tell of the host's time


@dataclass(frozen=True, slots=True)
class Difference:
    """The first event that is not the recorded one; `now` is None where there is none."""

    number: int
    recorded: Event
    now: Event | None

    def __str__(self) -> str:
        return (
            f"event {self.number} differs\n"
            f"  recorded: {self.recorded}\n"
            f"  now:      {self.now or 'nothing, the guest has come to the next event'}"
        )


class Replay:
    """Carries out `events` on `machine`, once. `waiting`: the guest stands still until the first debugger.

    `progress` is told now and then how far it has come.
    """

    def __init__(
        self, machine: Machine, events: Sequence[Event], *, waiting: bool, progress: Callable[[str], None]
    ) -> None:
        self._machine = machine
        self._events = events
        self._waiting = waiting
        self._progress = progress
        self._told_at = machine.instructions
        self._sessions: dict[int, Session] = {}
        self._resume: tuple[Session, Resume] | None = None
        self._now: list[Event] = []
        self._compared = 0
        self._ended = False
        machine.pacer = _Moments(machine)

    def record(self, event: Event) -> None:
        """What the recorder of this run writes to."""
        self._now.append(event)

    def run(self, recorder: Recorder, new_session: Callable[[Callable[[], None]], Session]) -> Difference | None:
        """All of it, or up to the first difference. `recorder` writes to `record`, and makes the sessions."""
        for number, event in enumerate(self._events, 1):
            self._tell_progress(number)
            if event.what not in _OUTSIDE:
                if event.what == "<-" and self._resume is not None:
                    self._run_to(event.at + 1, 0)  # it stopped there by itself
                continue
            self._run_to(event.at, event.ns)
            self._carry_out(event, recorder, new_session)
            if (difference := self._compare()) is not None or self._ended:
                return difference
        return self._compare(complete=True)

    def _tell_progress(self, number: int) -> None:
        now = self._machine.instructions
        if now - self._told_at >= TOLD_EVERY:
            self._told_at = now
            self._progress(f"event {number:,} of {len(self._events):,}, instruction {now:,} of {self._events[-1].at:,}")

    def _carry_out(
        self, event: Event, recorder: Recorder, new_session: Callable[[Callable[[], None]], Session]
    ) -> None:
        data = event.data.encode("latin-1")
        if event.what == "input":
            self._machine.devices.uart.receive(data)
        elif event.what == "end":
            recorder.note_end()
            self._ended = True
        elif event.what == "connect":
            self._sessions[event.client] = session = new_session(_nobody_waits)
            session.rival = data.decode() or None
        elif event.client in self._sessions:
            self._serve(self._sessions[event.client], event, data)

    def _serve(self, session: Session, event: Event, data: bytes) -> None:
        match event.what:
            case "attach":
                session.open()
                self._waiting = False
            case "detach":
                session.close()
                self._resume, self._waiting = None, session.killed
            case "interrupt":
                if self._resume is not None:
                    _tell(session, Interrupted(self._machine.cpu.linear_pc))
                    self._resume = None
            case "->":
                if self._resume is not None and session.ends_run(data):
                    self._resume, session.running = None, False
                action = session.handle(data)
                if isinstance(action, Resume):
                    self._resume = session, action
                self._ended = isinstance(action, Kill)

    def _run_to(self, at: int, ns: int) -> None:
        """Let the guest run, if anybody would, until this moment or a stop of its own before it."""
        machine = self._machine
        held = self._waiting or any(session.attached for session in self._sessions.values())
        if held and self._resume is None:
            return
        machine.stop_at = (at, ns)
        if self._resume is None:
            machine.run()
        else:
            session, resume = self._resume
            stop = session.advance(resume)
            if not isinstance(stop, Interrupted):
                _tell(session, stop)
                self._resume = None
        machine.stop_at = None
        machine.cancel_stop()

    def _compare(self, *, complete: bool = False) -> Difference | None:
        """What was recorded now against the record, from where the last comparison ended; a record may be cut short."""
        count = len(self._events) if complete else len(self._now)
        for number in range(self._compared, min(count, len(self._events))):
            then = self._events[number]
            now = self._now[number] if number < len(self._now) else None
            if then != now and not self._may_differ(number):
                return Difference(number + 1, then, now)
        self._compared = len(self._now)
        return None

    def _may_differ(self, number: int) -> bool:
        """An answer that tells of the host's time."""
        if number >= len(self._events) or self._events[number].what != "<-":
            return False
        client = self._events[number].client
        asked = [event.data for event in self._events[:number] if event.what == "->" and event.client == client]
        name, _, rest = asked[-1].partition(",") if asked else ("", "", "")
        try:
            return name == "qRcmd" and unhex(rest.encode("latin-1")).startswith(_WALL_CLOCK)
        except PacketError:
            return False


def _tell(session: Session, stop: Stop) -> None:
    if session.nonstop:
        session.notification(stop)
    else:
        session.stopped(stop)


def _nobody_waits() -> None:
    """Of a session's `wake`: console text is in the record already."""


class _Moments:
    """The pacer of a replay: an idle guest skips to the next timer, or stops at the moment in between."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def idle(self, until_ns: int | None) -> int | None:
        machine, goal = self._machine, self._machine.stop_at
        if goal is None or machine.instructions < goal[0]:
            return until_ns
        if machine.clock.now_ns >= goal[1]:
            machine.request_stop()
            return None
        return goal[1] if until_ns is None else min(until_ns, goal[1])

    def wake(self) -> None: ...
