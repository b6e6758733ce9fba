"""Where a stub listens and where its clients find it: `HOST:PORT`, `unix:PATH`, `-`.

Rules: standard library only; parsing, no sockets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, TypeAlias

LOOPBACK: Final = "127.0.0.1"
_PORT: Final = re.compile(r"[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class Tcp:
    """A host name or address of either family, and a port; port 0 lets the system pick one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Unix:
    """The path of a socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class Stdio:
    """Standard input and output: `target remote | gdbstub ... --listen -`."""

    def __str__(self) -> str:
        return "standard input and output"


Address: TypeAlias = Tcp | Unix | Stdio


class AddressError(Exception):
    """An address that is none, or that cannot be used; one line that names it."""


def parse_address(text: str) -> Address:
    """`HOST:PORT`, `[V6]:PORT`, `:PORT` or `PORT` (loopback), `unix:PATH`, `-`. AddressError for anything else."""
    if text == "-":
        return Stdio()
    if text.startswith("unix:"):
        if len(text) == len("unix:"):
            raise AddressError(f"{text!r} names no socket: unix:PATH")
        return Unix(text[len("unix:") :])
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise AddressError(f"{text!r}: an IPv6 address stands in brackets, [ADDRESS]:PORT")
    if _PORT.fullmatch(port) is None or int(port) > 0xFFFF:
        raise AddressError(f"{text!r} is no address: HOST:PORT, unix:PATH or -")
    return Tcp(host or LOOPBACK, int(port))
