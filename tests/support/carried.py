"""A session whose answers are carried out as `server` does it, without one, and what must hold whatever is sent."""

from __future__ import annotations

from gdbstub.actions import Detach, Resume, Send
from gdbstub.session import Session

_NOTHING_AT_ONCE = (b"k", b"R")  # in extended mode


class Carried:
    """A resume under way is ended by `end_run`, and by what ends it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.resuming: Resume | None = None

    def packet(self, payload: bytes) -> None:
        """AssertionError where the answer is none that a client could take."""
        session = self.session
        if session.needs_target(payload):
            if self.resuming is not None and not session.nonstop:
                return
            if self.resuming is not None and session.ends_run(payload):
                self.resuming, session.running = None, False
            if not session.attached:
                session.open()
        action = session.handle(payload)
        match action:
            case Resume():
                assert self.resuming is None
                self.resuming = action
            case Detach():
                session.close()
            case Send(payloads):
                assert all(isinstance(reply, bytes) for reply in payloads)
                assert payloads or payload.startswith(_NOTHING_AT_ONCE)
                assert all(reply.startswith(b"O") for reply in payloads[:-1]), "console text, then one reply"
            case _:
                pass  # the request to interrupt is what `end_run` does; who kills is gone

    def end_run(self) -> None:
        """The guest's run ends: exactly one report of it, with the thread of a machine that is still there."""
        if self.resuming is None:
            return
        stop = self.session.advance(self.resuming)
        self.resuming = None
        if self.session.nonstop:
            report = self.session.notification(stop)
            assert report is None or report.startswith((b"Stop:T", b"Stop:W"))
            return
        *console, reply = self.session.stopped(stop)
        assert all(text.startswith(b"O") for text in console)
        assert reply.startswith(b"W") or (reply.startswith(b"T") and b"thread:" in reply)

    def check(self) -> None:
        """A run is known to both sides."""
        assert self.session.running == (self.resuming is not None)
