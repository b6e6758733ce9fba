"""The monitor client against stubs that are not ours, and the addresses it takes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gdbstub.address import AddressError, Stdio, Tcp, Unix, parse_address
from gdbstub.client import ClientError, run_monitor_command
from gdbstub.rsp import Codec, Packet, frame


@pytest.fixture
def stub(request: pytest.FixtureRequest) -> Iterator[Tcp]:
    """A stub that answers each packet with the next of the given replies, then closes."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(5)

    def serve() -> None:
        connection, _ = listener.accept()
        codec = Codec()
        with connection:
            for replies in request.param:
                while not isinstance(codec.next_event(), Packet):
                    if not (data := connection.recv(4096)):
                        return
                    codec.receive_data(data)
                connection.sendall(codec.acknowledgements() + replies)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):  # closing with bytes unread would be a reset
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    yield Tcp("127.0.0.1", listener.getsockname()[1])
    listener.close()
    thread.join()


def ask(stub: Tcp) -> tuple[bool, str]:
    shown: list[str] = []
    return run_monitor_command(stub, "info", shown.append, timeout=5), "".join(shown)


def hexed(text: str) -> bytes:
    return text.encode().hex().encode()


@pytest.mark.parametrize(
    ("stub", "expected"),
    [
        (
            [frame(b""), frame(b"O" + hexed("one\n")) + frame(b"O" + hexed("two\n")) + frame(b"OK")],
            (True, "one\ntwo\n"),
        ),
        ([frame(b""), frame(hexed("all in one"))], (True, "all in one")),
        ([frame(b""), frame(b"E01")], (False, "")),
        ([frame(b""), frame(b"E.not today")], (False, "not today\n")),
    ],
    indirect=["stub"],
)
def test_every_form_of_answer_is_read(stub: Tcp, expected: tuple[bool, str]):
    """Console packets, all in one, errors with and without a text."""
    assert ask(stub) == expected


@pytest.mark.parametrize(
    ("stub", "reason"),
    [
        ([frame(b""), frame(b"")], "no monitor commands"),
        ([frame(b""), frame(b"Ozz")], "no monitor output"),
        ([frame(b""), frame("Oé".encode())], "no monitor output"),
        ([frame(b""), b""], "closed the connection"),
        ([], "closed the connection"),
    ],
    indirect=["stub"],
)
def test_a_stub_without_an_answer_is_an_error(stub: Tcp, reason: str):
    """One line, never a traceback."""
    with pytest.raises(ClientError, match=reason):
        ask(stub)


def test_standard_input_is_nothing_to_connect_to():
    """`gdbstub monitor -` makes no sense."""
    with pytest.raises(AddressError, match="one client"):
        run_monitor_command(Stdio(), "help", print)


def test_client_without_a_stub_says_so(tmp_path: Path):
    """One line with the address."""
    with pytest.raises(ClientError, match=r"unix:.*No such file"):
        run_monitor_command(Unix(str(tmp_path / "none")), "help", print)


@pytest.mark.parametrize(
    "text", ["", "host", "host:port", "host:70000", "unix:", "::1:1234", "host:-1", "host:١", "host:" + "1" * 5000]
)
def test_addresses_that_are_none(text: str):
    """The text is named in the error."""
    with pytest.raises(AddressError, match=r"address|socket|IPv6"):
        parse_address(text)


def test_addresses_come_back_as_written():
    """str() is the inverse of parse_address."""
    for text in ("127.0.0.1:1234", "[::1]:0", "unix:/tmp/x", "localhost:65535"):
        assert str(parse_address(text)) == text
    assert parse_address(":1234") == parse_address("1234") == Tcp("127.0.0.1", 1234)
