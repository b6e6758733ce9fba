"""A socket used past trio: what arrives is had, at any pace, and neither end waits."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from gdbstub.wire import Gone, Wire


@pytest.fixture
def ends() -> Iterator[tuple[Wire, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        yield Wire(ours.fileno(), 16), theirs


def test_what_has_come_is_had_in_portions_and_in_order(ends: tuple[Wire, socket.socket]):
    wire, peer = ends
    peer.sendall(b"0123456789abcdefXYZ")
    assert (wire.receive(), wire.receive()) == (b"0123456789abcdef", b"XYZ")


def test_nothing_is_none_and_the_end_is_empty(ends: tuple[Wire, socket.socket]):
    wire, peer = ends
    assert wire.receive() is None
    peer.shutdown(socket.SHUT_WR)
    assert (wire.receive(), wire.receive()) == (b"", b"")


def test_a_client_of_any_pace_is_heard(ends: tuple[Wire, socket.socket]):
    """Also while looks are not worth their time, and when they are again."""
    wire, peer = ends
    for number in range(60):
        if number % 3 == 0 or number > 40:
            peer.sendall(b"%d" % number)
            assert wire.receive() == b"%d" % number
        else:
            assert wire.receive() is None


def test_what_finds_no_room_is_given_back(ends: tuple[Wire, socket.socket]):
    wire, peer = ends
    data = bytes(range(256)) * 0x4000
    rest = wire.send(data)
    assert 0 < len(rest) < len(data)
    assert wire.send(rest) == rest
    got = bytearray()
    while len(got) < len(data) - len(rest):
        got += peer.recv(0x10000)
    assert bytes(got) + rest == data


def test_a_peer_that_is_gone_is_told(ends: tuple[Wire, socket.socket]):
    wire, peer = ends
    peer.close()
    with pytest.raises(Gone):
        wire.send(b"x")
