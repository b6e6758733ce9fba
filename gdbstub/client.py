"""The other end of a stub, for one monitor command: what `gdbstub monitor` is made of.

Rules: blocking sockets, no trio, no machine. It sends nothing that needs a stopped target, so the guest runs on; but
for a stream of the trace, which takes the debugger's place until Ctrl-C.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

from gdbstub.address import Address, AddressError, Stdio, Tcp, Unix
from gdbstub.rsp import MONITOR_STATUS, NEED_DATA, Codec, Packet

_PORTION = 0x4000


class ClientError(Exception):
    """The stub cannot be talked to; one line."""


def run_monitor_command(
    address: Address, command: str, write: Callable[[str], None], *, timeout: float | None = 30.0
) -> bool:
    """Have the stub at `address` carry out `command`; its output goes to `write` as it comes, bytes that are
    no UTF-8 as lone surrogates (PEP 383).

    False where the command was refused (the output then says why; stubs other than ours say OK all the same).
    ClientError where there is no stub, no answer for `timeout` seconds, or it has no monitor commands. AddressError for
    an address that one cannot connect to.
    """
    with _connection_errors(address):
        connection = _connect(address, timeout)
    with connection:
        replies = _Replies(connection, address)
        replies.ask(b"qSupported:" + MONITOR_STATUS.encode())
        next(replies)
        stream = command.split() == ["trace", "stream", "on"]
        if stream:
            replies.ask(b"?")  # lines come while the guest runs for a debugger: be one
            next(replies)
            connection.settimeout(None)
        replies.ask(b"qRcmd," + command.encode("utf-8", "surrogateescape").hex().encode())
        done = _print(replies, write)  # what `write` raises is the caller's own
        if stream and done:
            _follow(replies, write)
        return done


@contextlib.contextmanager
def _connection_errors(address: Address) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise ClientError(f"{address}: no answer in time") from error
    except OSError as error:
        raise ClientError(f"{address}: {error.strerror or error}") from error


def _print(replies: _Replies, write: Callable[[str], None]) -> bool:
    for payload in replies:
        if payload == b"OK":
            return True
        if payload == b"":
            raise ClientError("the stub has no monitor commands")
        if payload.startswith(b"E"):
            if payload.startswith(b"E."):
                write(payload[2:].decode(errors="replace") + "\n")
            return False
        console = payload.startswith(b"O")
        try:
            write(_text(payload[console:]))
        except ValueError as error:
            raise ClientError("the stub's answer is no monitor output") from error
        if not console:  # the other form the manual allows: all output in the final reply
            return True
    return False


def _follow(replies: _Replies, write: Callable[[str], None]) -> None:
    """Let the guest run and print what comes, until it stops or the user has seen enough: then it runs on alone."""
    replies.ask(b"c")
    try:
        payload = b"O"
        while payload.startswith(b"O"):
            write(_text(payload[1:]))
            payload = next(replies)
    except KeyboardInterrupt:
        replies.interrupt()
        while next(replies).startswith(b"O"):
            pass  # what was on its way
    except ValueError as error:
        raise ClientError("the stub's answer is no console text") from error
    replies.ask(b"D")
    next(replies)


def _text(digits: bytes) -> str:
    return bytes.fromhex(digits.decode("ascii")).decode("utf-8", "surrogateescape")


class _Replies(Iterator[bytes]):
    """The payloads a stub sends, each acknowledged."""

    def __init__(self, connection: socket.socket, address: Address) -> None:
        self._connection = connection
        self._address = address
        self._codec = Codec(debugger=True)

    def ask(self, payload: bytes) -> None:
        with _connection_errors(self._address):
            self._connection.sendall(self._codec.reply(payload))

    def interrupt(self) -> None:
        with _connection_errors(self._address):
            self._connection.sendall(b"\x03")

    def __next__(self) -> bytes:
        while True:
            event = self._codec.next_event()
            if event is NEED_DATA:
                with _connection_errors(self._address):
                    data = self._connection.recv(_PORTION)
                if not data:
                    raise ClientError("the stub closed the connection")
                self._codec.receive_data(data)
                continue
            if due := self._codec.acknowledgements():
                with contextlib.suppress(ConnectionError):  # a stub that has gone needs none; its answer still counts
                    self._connection.sendall(due)
            if isinstance(event, Packet):
                return event.payload


def _connect(address: Address, timeout: float | None) -> socket.socket:
    match address:
        case Tcp(host, port):
            return socket.create_connection((host, port), timeout)
        case Unix(path):
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(timeout)
            try:
                connection.connect(path)
            except OSError:
                connection.close()
                raise
            return connection
        case Stdio():
            raise AddressError("a stub on standard input and output has one client, the process that started it")
