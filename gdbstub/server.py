"""The trio shell: listeners, one nursery per connection, and the carrying out of what sessions answer.

Rules: trio lives here; no packet is understood here. A session is called in the machine's thread, through the runner,
or while that has nothing to do in trio's own. A connection is a visitor until its first packet that needs a stopped
target; with that it becomes *the* debugger and the guest is held. There is one debugger at a time; visitors
(`gdbstub monitor`) are served meanwhile, and stop the guest for no longer than a look takes.
"""

from __future__ import annotations

import os
import socket
import stat
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Final, TypeAlias, assert_never

import trio

from emu.runner import Runner
from emu.stops import Stop
from gdbstub.actions import Action, Detach, Kill, Resume, Send
from gdbstub.actions import Interrupt as InterruptRun
from gdbstub.address import Address, AddressError, Stdio, Tcp, Unix
from gdbstub.observe import ObserverSession
from gdbstub.rsp import (
    NEED_DATA,
    Ack,
    BadChecksum,
    Codec,
    Event,
    Interrupt,
    Nack,
    NextEvent,
    Notification,
    Packet,
    TooLong,
)
from gdbstub.session import Session
from gdbstub.wire import Gone, Wire

_PORTION: Final = 0x4000  # bytes read at once; gdb's packets are short, and large buffers cost time to make
_BACKLOG: Final = 16
_PATIENCE: Final = 1.0  # seconds for a last reply
_LEAVING: Final = 0.25  # ... for a debugger that has closed to be noticed; a moment for the one that comes
_TURN_NS: Final = 10_000_000  # of answering packets at once, before everybody else has a turn
_SHORT: Final = (b"g", b"G", b"p", b"P", b"m", b"M", b"x", b"X", b"s", b"H", b"T", b"vCont;")
"""Packets whose answer takes less than a switch of threads does; of those that resume, what `Session.advance_at_once`
can do of it."""
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError, Gone)

NewSession: TypeAlias = Callable[[Callable[[], None]], Session]
"""Makes the session of one connection; its argument is the session's `wake`."""
NewObserver: TypeAlias = Callable[[Callable[[], None]], ObserverSession]


class Server:
    """All connections to one machine.

    `new_session` is called for each; `on_kill` when a debugger ends the machine (`kill`); `report` gets the text of a
    defect of ours, which costs no more than its connection; `log`, where given, each packet with its direction.
    `new_observer` makes the sessions of clients that only look (`serve` with `observe`), which hold nothing. With
    `waiting`, one hold of the runner's is given back when the first debugger has come: the guest stands still for it.
    """

    def __init__(
        self,
        runner: Runner,
        new_session: NewSession,
        *,
        on_kill: Callable[[], None],
        report: Callable[[str], None],
        waiting: bool = False,
        log: Callable[[str], None] | None = None,
        new_observer: NewObserver | None = None,
    ) -> None:
        self.runner = runner
        self.new_session = new_session
        self.new_observer = new_observer
        self.on_kill = on_kill
        self.report = report
        self.log = log
        self.debugger: Connection | None = None
        self._waiting = waiting
        self._left = trio.Event()  # the debugger has gone
        self._unanswered = 0
        self._answered = trio.Event()

    async def serve(
        self,
        address: Address,
        announce: Callable[[str], None] = lambda text: None,
        *,
        observe: bool = False,
        task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen at `address` until cancelled (or, on standard input, until its end).

        `announce` is told "listening on ..." for each listener, with the port in use; a nursery's `start` returns these
        addresses. AddressError where listening fails.
        """
        if isinstance(address, Stdio):
            task_status.started([address])
            stdin, stdout = trio.lowlevel.FdStream(os.dup(0)), trio.lowlevel.FdStream(os.dup(1))
            await self.serve_stream(trio.StapledStream(stdout, stdin), str(address))
            return
        async with _listen(address) as listeners:
            bound = [_bound_address(listener) for listener in listeners]
            for place in bound:
                announce(f"{'observed' if observe else 'listening'} on {place}")
            task_status.started(bound)
            await trio.serve_listeners(partial(self._serve_socket, observe=observe), listeners)

    async def _serve_socket(self, stream: trio.SocketStream, *, observe: bool) -> None:
        name = stream.socket.getpeername() if stream.socket.family != socket.AF_UNIX else None
        await self.serve_stream(stream, str(Tcp(name[0], name[1])) if name else "a local client", observe=observe)

    async def serve_stream(self, stream: trio.abc.Stream, peer: str, *, observe: bool = False) -> None:
        """Serve one client until it closes; `peer` names it for others. Cancelled, the debugger is detached first."""
        if observe:
            assert self.new_observer is not None
            await Observer(self, self.new_observer, stream, peer).serve()
        else:
            await Connection(self, self.new_session, stream, peer).serve()

    def first_debugger_is_here(self) -> None:
        """Give back the hold of `waiting`, once."""
        if self._waiting:
            self._waiting = False
            self.runner.resume()

    def wait_for_debugger(self) -> None:
        """Keep a hold of the runner's for the next debugger to give back."""
        self._waiting = True

    async def is_free(self) -> bool:
        """Whether no debugger is there, or the one there is goes within a moment: it may have closed just now."""
        with trio.move_on_after(_LEAVING):
            while self.debugger is not None:
                await self._left.wait()
        return self.debugger is None

    def debugger_has_left(self) -> None:
        self.debugger = None
        self._left.set()
        self._left = trio.Event()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Around everything that ends with a reply to a client."""
        self._unanswered += 1
        try:
            yield
        finally:
            self._unanswered -= 1
            if not self._unanswered:
                self._answered.set()
                self._answered = trio.Event()

    async def finish_answers(self) -> None:
        """Until no client is owed the reply to a packet that was taken up, or does not read it for a second.

        For who is about to cancel `serve`: else `monitor quit` would go without its answer.
        """
        with trio.move_on_after(_PATIENCE):
            while self._unanswered:
                await self._answered.wait()

    def interrupt(self) -> bool:
        """Ctrl-C on the debugger's behalf; False where none is waiting for the guest to stop."""
        if self.debugger is None or not self.debugger.waits:
            return False
        self.runner.interrupt()
        return True


class Connection:
    """One client. A task reads it; while the guest runs for it, another carries that out and sends the reply."""

    def __init__(self, server: Server, new_session: NewSession, stream: trio.abc.Stream, peer: str) -> None:
        self.peer = peer
        self._server = server
        self._runner = server.runner
        self._stream = stream
        self._codec = Codec()
        self._sending = trio.Lock()
        self._output = trio.Event()  # the session has lines to send
        token = trio.lowlevel.current_trio_token()
        self._session = new_session(lambda: token.run_sync_soon(self._output_is_ready, idempotent=True))
        if server.debugger is not None:
            self._session.rival = server.debugger.peer
        self._wire = Wire(stream.socket.fileno(), _PORTION) if isinstance(stream, trio.SocketStream) else None
        self._unsent = b""  # of an answer at once, what there was no room for
        self._resuming = False  # a stop reply is owed
        self._crossed: bool | None = None  # a Ctrl-C came after the stop reply, which it crossed; None: it cannot have
        self._run = trio.CancelScope()
        self._run_is_over = trio.Event()
        self._nursery: trio.Nursery

    @property
    def waits(self) -> bool:
        """Whether the guest runs for this client, which is owed a stop reply."""
        return self._resuming

    async def serve(self) -> None:
        """Until the client closes, is refused, or sends what we fail at. Leaves nothing of it in the machine."""
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._send_output)
                await self._read()
                self._nursery.cancel_scope.cancel()
        except* _GONE:
            pass  # the client vanished while we sent
        except* Exception as defects:  # noqa: BLE001  a defect of ours must not end the guest with the connection
            self._server.report("".join(traceback.format_exception(defects)))
        finally:
            with trio.CancelScope(shield=True):
                await self._leave()
                await trio.aclose_forcefully(self._stream)

    async def _read(self) -> None:
        while data := await self._stream.receive_some(_PORTION):
            self._codec.receive_data(data)
            while (event := self._next()) is not NEED_DATA:
                with self._server.answering():
                    if not await self._take(event):
                        return

    def _next(self) -> NextEvent | Action:
        """The next event that takes more than a moment, or what is left to do of one: others are answered right here.

        So is what comes within a moment of the answer, from a client that asks for one thing after another: by way of
        trio's loop, a packet takes as long as a step does.
        """
        codec, wire = self._codec, self._wire
        event = self._next_but_acks()
        if wire is None:
            return event
        end = time.perf_counter_ns() + _TURN_NS
        while time.perf_counter_ns() < end:
            if not isinstance(event, Packet) or not self._may_answer_at_once(event.payload):
                return event
            if (left := self._answer_at_once(wire, event.payload)) is not None:
                return left
            event = self._next_but_acks()
            if event is NEED_DATA and (data := wire.receive()):  # its end is seen by `_read`
                codec.receive_data(data)
                event = self._next_but_acks()
        return event

    def _next_but_acks(self) -> NextEvent:
        """Nothing is to be done about `+`: a client in ack mode does not leave the turn with each."""
        while isinstance(event := self._codec.next_event(), Ack):
            pass
        return event

    async def _take(self, event: Event | Action) -> bool:
        """Carry out one event; False where the connection is over."""
        match event:
            case Packet(payload):
                self._log("->", payload)
                if not self._crossed:
                    self._crossed = None
                return await self._packet(payload)
            case Interrupt():
                self._log("->", b"\x03")
                if self._resuming:
                    self._interrupt()
                elif self._crossed is not None:
                    self._crossed = True
            case BadChecksum():
                if self._codec.ack_mode:
                    await self._send()
                else:  # nobody sends it again, but a reply keeps both ends in step
                    await self._send(*self._session.refuse("the packet was damaged on its way").payloads)
            case TooLong(limit):
                await self._send(*self._session.refuse(f"a packet is longer than {limit} bytes").payloads)
            case Nack():
                await self._send()
            case Ack() | Notification():
                pass
            case _:
                return await self._carry_out(event)
        return True

    async def _packet(self, payload: bytes) -> bool:
        if self._session.needs_target(payload):
            if self._resuming and not self._session.nonstop:
                await self._send(*self._session.refuse("the guest is running").payloads)
                return True
            if self._resuming and self._session.ends_run(payload):
                await self._end_run()
            if not await self._become_debugger():
                await self._send(*self._session.refuse(self._busy()).payloads)
                return payload != b"?"  # gdb 13 to 18 take errors before this, and no error here for an end
        action = await self._runner.call(self._session.handle, payload)
        if self._session.took_up_restart():
            self._runner.begin_again()
        return await self._carry_out(action)

    def _may_answer_at_once(self, payload: bytes) -> bool:
        session = self._session
        return (
            payload.startswith(_SHORT)
            and session.attached
            and not self._resuming
            and not self._crossed
            and not session.nonstop
            and not self._sending.locked()
            and self._runner.is_idle()
        )

    def _answer_at_once(self, wire: Wire, payload: bytes) -> Action | None:
        """In this thread: the machine's has nothing to do. -> what is left to carry out."""
        self._log("->", payload)
        session, self._crossed = self._session, None
        action = session.handle(payload)
        if isinstance(action, Send):
            payloads: tuple[bytes, ...] | None = action.payloads
        elif isinstance(action, Resume) and action.step:
            payloads = self._runner.advance_at_once(
                partial(session.advance_at_once, action), self._tell, final=not session.extended
            )
            self._crossed = None if payloads is None else False
        else:
            payloads = None
        if payloads is None:
            return action
        self._unsent = wire.send(self._outgoing(payloads))
        return Send(()) if self._unsent else None

    async def _carry_out(self, action: Action) -> bool:
        match action:
            case Send(payloads, start_no_ack):
                await self._send(*payloads)
                if start_no_ack:
                    self._codec.start_no_ack_mode()
            case Resume():
                await self._send(*((b"OK",) if self._session.nonstop else ()))
                self._resuming = True
                self._run, self._run_is_over = trio.CancelScope(), trio.Event()
                self._output.set()
                self._nursery.start_soon(self._resume, action)
                if self._crossed:  # gdb resumes after a stop that it did not want to see, and waits for its Ctrl-C
                    self._interrupt()
                self._crossed = None
            case InterruptRun(payload):
                await self._send(payload)
                if self._resuming:
                    self._interrupt()
            case Detach(payload):
                await self._leave()
                await self._send(payload)
            case Kill(reply):
                await self._send(*(() if reply is None else (reply,)))
                self._server.on_kill()
                return False
            case _:
                assert_never(action)
        return True

    async def _resume(self, resume: Resume) -> None:
        session = self._session
        try:
            with self._run:
                payloads = await self._runner.advance(
                    partial(session.advance, resume), self._tell, final=not session.extended
                )
        finally:
            self._resuming = False
            self._run_is_over.set()
        if self._run.cancelled_caught:
            return
        with self._server.answering():
            if session.nonstop:
                await self._notify(*payloads)
            else:
                self._crossed = False
                await self._send(*payloads)

    def _interrupt(self) -> None:
        self._runner.interrupt()

    async def _end_run(self) -> None:
        """End the guest's run without telling the client, who has asked for something that ends it."""
        self._run.cancel()
        await self._run_is_over.wait()
        self._session.running = False

    def _tell(self, stop: Stop) -> tuple[bytes, ...]:
        """The machine's thread: what the client is sent at a stop, output that still waits before it."""
        if self._session.nonstop:
            notification = self._session.notification(stop)
            return () if notification is None else (notification,)
        return (*self._session.take_output(), *self._session.stopped(stop))

    async def _notify(self, *payloads: bytes) -> None:
        """Send these as notifications, which are no answer to anything."""
        async with self._sending:
            for payload in payloads:
                self._log("<-", b"%" + payload)
                await self._stream.send_all(self._codec.notify(payload))

    async def _send(self, *payloads: bytes) -> None:
        """Acknowledgements that are due, and these packets, in one piece."""
        async with self._sending:
            data, self._unsent = self._unsent + self._outgoing(payloads), b""
            if data:
                await self._stream.send_all(data)

    def _outgoing(self, payloads: Sequence[bytes]) -> bytes:
        if self._server.log is not None:
            for payload in payloads:
                self._log("<-", payload)
        return b"".join(map(self._codec.reply, payloads)) or self._codec.acknowledgements()

    def _output_is_ready(self) -> None:
        self._output.set()

    async def _send_output(self) -> None:
        """Send the session's lines while the guest runs for this client: only then may console text come unasked."""
        while True:
            await self._output.wait()
            self._output = trio.Event()
            if self._resuming and not self._session.nonstop:
                await self._send(*self._session.take_output())

    async def _become_debugger(self) -> bool:
        """Hold the guest for this client; False where another has it."""
        if self._session.attached:
            return True
        if not await self._server.is_free():
            return False
        self._server.debugger = self
        await self._runner.pause()
        self._session.open()
        self._server.first_debugger_is_here()
        return True

    async def _leave(self) -> None:
        """If this is the debugger: take what it put into the machine out, and let the guest run on."""
        if self._session.attached:
            try:
                await self._runner.call(self._session.close)
            finally:
                if self._session.killed:
                    self._server.wait_for_debugger()
                else:
                    self._runner.resume()
        if self._server.debugger is self:
            self._server.debugger_has_left()

    def _log(self, direction: str, payload: bytes) -> None:
        """Seen from the debugger: what it sends goes ->; bytes that are no printable ASCII are shown as escapes."""
        if self._server.log is not None:
            self._server.log(f"{direction} {self.peer} {payload.decode('latin-1').encode('unicode_escape').decode()}")

    def _busy(self) -> str:
        debugger = self._server.debugger
        return f"{debugger.peer if debugger else 'another client'} is debugging this machine; one debugger at a time"


class Observer(Connection):
    """A client that only looks: it holds nothing and resumes nothing. What it takes for a run lasts until Ctrl-C."""

    def __init__(self, server: Server, new_session: NewObserver, stream: trio.abc.Stream, peer: str) -> None:
        super().__init__(server, self._keep(new_session), stream, peer)
        self._woken = trio.Event()

    def _keep(self, new_session: NewObserver) -> NewSession:
        def make(wake: Callable[[], None]) -> Session:
            self._observer = new_session(wake)
            return self._observer

        return make

    def _may_answer_at_once(self, payload: bytes) -> bool:
        return False  # the machine may run, and is not held

    async def _become_debugger(self) -> bool:
        if not self._session.attached:
            await self._runner.call(self._session.open)
        return True

    async def _leave(self) -> None:
        self._session.close()

    async def _resume(self, _resume: Resume) -> None:
        await self._woken.wait()
        payloads = await self._runner.call(self._observer.interrupted)
        self._resuming, self._woken = False, trio.Event()
        with self._server.answering():
            await self._send(*payloads)

    def _interrupt(self) -> None:
        self._woken.set()


# ------------------------------------------------------------------------------------------------------------ listeners


@asynccontextmanager
async def _listen(address: Tcp | Unix) -> AsyncIterator[list[trio.SocketListener]]:
    """Listeners at `address`, closed on leaving. AddressError where the system refuses."""
    try:
        if isinstance(address, Tcp):
            listeners = await trio.open_tcp_listeners(address.port, host=address.host, backlog=_BACKLOG)
        else:
            listeners = [await _unix_listener(address.path)]
    except OSError as error:
        raise AddressError(f"cannot listen on {address}: {error.strerror or error}") from error
    try:
        yield listeners
    finally:
        for listener in listeners:
            listener.socket.close()
        if isinstance(address, Unix):
            os.unlink(address.path)


async def _unix_listener(path: str) -> trio.SocketListener:
    """A socket at `path` that only its owner may use; one left there by a program that is gone is replaced."""
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_stale(path):
            os.unlink(path)
        mask = os.umask(0o177)
        try:
            await listener.bind(path)
        finally:
            os.umask(mask)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return trio.SocketListener(listener)


def _is_stale(path: str) -> bool:
    """Whether a socket stands at `path` that nobody listens on."""
    if not os.path.exists(path) or not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) != 0


def _bound_address(listener: trio.SocketListener) -> Address:
    name = listener.socket.getsockname()
    return Unix(str(name)) if listener.socket.family == socket.AF_UNIX else Tcp(name[0], name[1])
