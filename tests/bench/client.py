"""A debugger as small as can be, so that what is measured is the stub.

Rules: standard library only.
"""

from __future__ import annotations

import functools
import socket
import struct
import time
from typing import Final

_PATIENCE: Final = 30  # seconds


@functools.lru_cache(16)  # a bench says the same over and over
def _framed(payload: bytes) -> bytes:
    return b"$%b#%02x" % (payload, sum(payload) & 0xFF)


class Client:
    """Packets out, packets in; no acknowledgements after `QStartNoAckMode`."""

    def __init__(self, port: int, patience: float = 0) -> None:
        """`patience`: seconds until the stub may begin to listen."""
        end = time.monotonic() + patience
        while True:
            try:
                self._socket = socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE)
                break
            except ConnectionRefusedError:
                if time.monotonic() > end:
                    raise
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The system's own patience: Python's costs a poll for each send and each read.
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _PATIENCE, 0))
        self._buffer = b""
        self.ask(b"QStartNoAckMode")
        self._socket.sendall(b"+")

    def ask(self, payload: bytes) -> bytes:
        """The reply's payload as it is on the wire; EOFError where the stub goes away."""
        self.send(payload)
        return self.read()

    def send(self, payload: bytes) -> None:
        self._socket.sendall(_framed(payload))

    def interrupt(self) -> bytes:
        """Ctrl-C. -> the stop reply."""
        self._socket.sendall(b"\x03")
        return self.read()

    def read(self) -> bytes:
        """The next payload; EOFError where the stub goes away."""
        data, self._buffer = self._buffer or self._receive(), b""
        while (end := data.find(b"#")) < 0 or len(data) < end + 3:
            data += self._receive()
        if len(data) > end + 3:
            self._buffer = data[end + 3 :]
        return data[data.index(b"$") + 1 : end]

    def _receive(self) -> bytes:
        data = self._socket.recv(1 << 16)
        if not data:
            raise EOFError("the stub closed the connection")
        return data

    def close(self) -> None:
        self._socket.close()
