"""The stub as a debugger sees it: a process of its own, a TCP socket, packets written by hand.

Rules: standard library only; the client is as small as can be, so that what is measured is the stub.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator

from tests.bench.client import Client
from tests.bench.row import Effort, Row, interleaved

_COMMAND = (sys.executable, "-m", "gdbstub", "load", "embedded", "--listen", "127.0.0.1:0", "--console", "none")
_LISTENING = re.compile(rb"listening on 127\.0\.0\.1:(\d+)")
_BLOCK = 0x1000
_READS, _STEPS = 100, 300


@contextlib.contextmanager
def _stub(*arguments: str) -> Iterator[tuple[int, float]]:
    """-> (port, seconds from the start of the process until it listens)."""
    start = time.perf_counter()
    with subprocess.Popen(
        [*_COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                found = _LISTENING.search(line)
                if found:
                    yield int(found[1]), time.perf_counter() - start
                    return
            raise EOFError("the stub ended before it listened")
        finally:
            process.kill()


def remote(effort: Effort) -> Iterator[Row]:
    """Start, memory reads and single steps."""

    def started() -> float:
        with _stub() as (_, duration):
            return duration

    yield Row("gdbstub load embedded, until it listens", interleaved(effort.rounds, started)[0], "s", limit="1")
    with _stub("--append", "loop") as (port, _), contextlib.closing(Client(port)) as client:
        client.ask(b"?")
        program_counter = _computing_pc(client)
        rates = interleaved(effort.rounds, lambda: _reads(client, program_counter & -_BLOCK), lambda: _steps(client))
        yield Row(f"RSP m, {_BLOCK} bytes a packet", rates[0], "MB/s")
        yield Row("RSP single steps (vCont;s)", rates[1], "1/s")


def _computing_pc(client: Client) -> int:
    """Where the guest is: rip is register 16 of gdb's amd64, 8 bytes, least significant first."""
    reply = re.sub(rb"(.)\*(.)", lambda run: run[1] * (run[2][0] - 28), client.ask(b"p10"))  # run-length encoding
    return int.from_bytes(bytes.fromhex(reply.decode()), "little")


def _reads(client: Client, vaddr: int) -> float:
    start = time.perf_counter()
    for _ in range(_READS):
        if client.ask(b"m%x,%x" % (vaddr, _BLOCK)).startswith(b"E"):
            raise EOFError("the stub does not read the guest's memory")
    return _READS * _BLOCK / (time.perf_counter() - start) / 1e6


def _steps(client: Client) -> float:
    start = time.perf_counter()
    for _ in range(_STEPS):
        if client.ask(b"vCont;s:1")[:1] not in (b"T", b"S"):
            raise EOFError("the stub does not step")
    return _STEPS / (time.perf_counter() - start)
