"""`gdbstub` as a process of its own, for tests of what only a process has: descriptors, signals, a terminal.

Rules: tests only. Every wait has an end and names what it waited for; leaving the block leaves no process.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gdbstub.address import parse_address
from gdbstub.client import run_monitor_command

PATIENCE = 30.0  # seconds; two busy cores and a cold start take three


class Child:
    """A running `gdbstub`. What it wrote so far is in `out` and `err`."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int | None) -> None:
        self.process = process
        self.terminal = terminal
        """Our side of its terminal, where it has one: then standard output and error both arrive in `out`."""
        self.out = b""
        self.err = b""
        self._exit = os.pidfd_open(process.pid)
        self._streams = {"out": terminal} if terminal is not None else {}
        for name, pipe in (("out", process.stdout), ("err", process.stderr)):
            if pipe is not None:
                self._streams[name] = pipe.fileno()

    def wait_for(self, pattern: str, *, on: str = "out") -> re.Match[str]:
        """Read until `pattern` is in what came on "out" or "err"."""
        end = time.monotonic() + PATIENCE
        while (match := re.search(pattern, self.text(on))) is None:
            if not self._read(end):
                raise AssertionError(f"no {pattern!r} on {on}:\n{self.text('out')}\n{self.text('err')}")
        return match

    def text(self, on: str = "out") -> str:
        return (self.out if on == "out" else self.err).decode("utf-8", "replace").replace("\r\n", "\n")

    @property
    def address(self) -> str:
        """Where it listens, as it announced."""
        return self.wait_for(r"listening on (\S+)\n", on="err" if self.terminal is None else "out")[1]

    def type(self, data: bytes) -> None:
        if self.terminal is not None:
            os.write(self.terminal, data)
            return
        assert self.process.stdin is not None
        self.process.stdin.write(data)

    def close_output(self) -> None:
        """As a reader does that has had enough."""
        assert self.process.stdout is not None
        self.process.stdout.close()
        del self._streams["out"]

    def ended(self, signal_number: int | None = None) -> int:
        """Its exit status, after `signal_number` was sent to it; all it wrote is read."""
        if signal_number is not None:
            self.process.send_signal(signal_number)
        end = time.monotonic() + PATIENCE
        while self._read(end):
            pass
        return self.process.wait(0.1)

    def rest(self, seconds: float) -> None:
        """Let it run for so long, reading what it writes."""
        end = time.monotonic() + seconds
        while self._read(end):
            pass

    def cpu_seconds(self) -> float:
        """Processor time it has used (proc(5), /proc/PID/stat, fields 14 and 15)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def monitor(self, *words: str) -> tuple[int, str]:
        """What `gdbstub monitor` would give for these words: its exit status and its output."""
        said: list[str] = []
        carried_out = run_monitor_command(parse_address(self.address), " ".join(words), said.append)
        return int(not carried_out), "".join(said)

    def close(self) -> None:
        """Kill it if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE)
        os.close(self._exit)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def _read(self, end: float) -> bool:
        """Read what is there or comes before `end`; False once it has ended and all is read, or at `end`."""
        ready, _, _ = select.select([*self._streams.values(), self._exit], [], [], max(end - time.monotonic(), 0))
        waiting = [(name, stream) for name, stream in self._streams.items() if stream in ready]
        for name, stream in waiting:
            self._take(name, stream)
        return bool(waiting)

    def _take(self, name: str, stream: int) -> None:
        try:
            data = os.read(stream, 0x10000)
        except OSError:  # EIO: nobody has the terminal open any more
            data = b""
        if not data:
            del self._streams[name]
        elif name == "out":
            self.out += data
        else:
            self.err += data


@contextmanager
def gdbstub(
    *arguments: str, program: Sequence[str] = ("-m", "gdbstub"), terminal: tuple[int, int] | None = None
) -> Iterator[Child]:
    """`python PROGRAM ARGUMENTS` with pipes, or on a pseudo-terminal given as (ours, its)."""
    place = subprocess.PIPE if terminal is None else terminal[1]
    process = subprocess.Popen(
        [sys.executable, *program, *arguments],
        stdin=place,
        stdout=place,
        stderr=place,
        bufsize=0,
        start_new_session=True,
    )
    child = Child(process, terminal[0] if terminal else None)
    try:
        yield child
    finally:
        child.close()
