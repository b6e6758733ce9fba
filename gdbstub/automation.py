"""Stock gdb driven by a script: commands in, text and typed stops out.

Rules: blocking, one thread; pygdbmi lives here. Nothing is known of our stub: any `target remote` will do. Every wait
has an end, and the error says what was waited for.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sysconfig
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from pygdbmi.gdbcontroller import GdbController
from pygdbmi.gdbmiparser import parse_response, response_is_finished

DEFAULT_TIMEOUT: Final = 60.0
_GRACE: Final = 2.0  # seconds that gdb has to end by itself
_SETTINGS: Final = (
    "set confirm off",
    "set pagination off",
    "set width 0",
    "set style enabled off",
    "set mi-async on",
    "set debuginfod enabled off",
    "set auto-load off",
    "set tcp auto-retry off",  # else a stub that is not there takes 15 seconds to be missed
)
_PORTION: Final = 1 << 16
_KEPT_TEXT: Final = 2000  # characters of what gdb said last, for error messages


class GdbError(Exception):
    """gdb refused `command` or came to an end; `said` is what it printed meanwhile."""

    def __init__(self, command: str, reason: str, said: str = "") -> None:
        super().__init__(f"{command}: {reason}")
        self.command = command
        self.reason = reason
        self.said = said


class GdbTimeout(GdbError):
    """What was awaited did not come within `seconds`."""

    def __init__(self, awaited: str, seconds: float, said: str = "") -> None:
        tail = f"; gdb's last words: {said[-_KEPT_TEXT:].strip()!r}" if said.strip() else ""
        super().__init__(awaited, f"nothing within {seconds:g} seconds{tail}", said)
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class Stopped:
    """The target has stopped.

    `reason` is GDB/MI's word ("breakpoint-hit", "end-stepping-range", "function-finished", "location-reached",
    "signal-received", "exited-normally", "exited"), empty where gdb gives none, as on attaching. `pc` and `function`
    are None after an exit, `function` also where no symbol covers the pc. `breakpoint` is its number.
    """

    reason: str
    pc: int | None = None
    function: str | None = None
    breakpoint: int | None = None
    signal: str | None = None
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a backtrace; `function` is None where no symbol covers the pc."""

    level: int
    pc: int
    function: str | None


class GdbSession:
    """A gdb process attached to a target; made by `gdb_session`. `stop` is the newest stop that was waited for."""

    def __init__(self, program: str, *, timeout: float = DEFAULT_TIMEOUT, show: Callable[[str], None] | None = None):
        command = [program, "--nx", "--quiet", "--interpreter=mi3"]
        self._gdb = GdbController([*command, *_options(_SETTINGS)])
        self._timeout = timeout
        self._show = show
        self._stops: deque[Stopped] = deque()
        self._results: dict[int, dict[str, Any]] = {}
        self._token = 0
        self._running = (0, "")  # token and text of the command that let the target run last
        self._text: list[str] = []  # what the command in progress printed
        self._partial: dict[IO[bytes], bytes] = {}  # lines that have not come whole yet
        self.stop: Stopped | None = None

    @property
    def pid(self) -> int:
        """gdb's process."""
        assert self._gdb.gdb_process is not None  # until `close`
        return int(self._gdb.gdb_process.pid)

    def execute(self, command: str, timeout: float | None = None) -> str:
        """Carry out a console command as if typed. -> what it printed; GdbError where gdb refuses it.

        A command that lets the target run is for `resume`: given here, gdb takes no other until the target stops.
        """
        if self._show is not None:
            self._show(f"(gdb) {command}")
        self._ask(f"-interpreter-exec console {_quoted(command)}", command, timeout)
        said = "".join(self._text)
        if self._show is not None and said.strip():
            self._show(said.rstrip("\n"))
        return said

    def monitor(self, command: str, timeout: float | None = None) -> str:
        """What the stub answers to a monitor command."""
        return self.execute(f"monitor {command}", timeout)

    def resume(self, command: str = "continue", timeout: float | None = None) -> None:
        """Let the target run as `command` says (continue, stepi, next, finish, until ...); `wait_stop` has its stop."""
        self.execute(f"{command} &", timeout)

    def evaluate(self, expression: str) -> str:
        """The value of an expression, as gdb prints it; GdbError where it has none."""
        payload = self._ask(f"-data-evaluate-expression {_quoted(expression)}", f"print {expression}", None)
        return str(payload["value"])

    def break_at(
        self, place: str, *, condition: str | None = None, temporary: bool = False, hardware: bool = False
    ) -> int:
        """The number of a new breakpoint at `place`, written as for `break`; GdbError where there is no such place."""
        options = [*(["-t"] if temporary else []), *(["-h"] if hardware else [])]
        options += ["-c", _quoted(condition)] if condition is not None else []
        answer = self._ask(" ".join(("-break-insert", *options, _quoted(place))), f"break {place}", None)
        return int(answer["bkpt"]["number"])

    def backtrace(self, limit: int | None = None) -> list[Frame]:
        """The frames of the stopped CPU, innermost first, at most `limit`."""
        window = "" if limit is None else f" 0 {limit - 1}"
        answer = self._ask(f"-stack-list-frames{window}", "backtrace", None)
        return [_frame(frame) for frame in answer["stack"]]

    def registers(self, *names: str) -> dict[str, int]:
        """Registers that hold a number, by name; all of them where none is named. GdbError for a name there is not."""
        known = self._ask("-data-list-register-names", "register names", None)["register-names"]
        numbers = {name: str(number) for number, name in enumerate(known) if name}
        for name in names:
            if name not in numbers:
                raise GdbError(f"${name}", "no such register")
        wanted = " ".join(numbers[name] for name in names)
        answer = self._ask(f"-data-list-register-values --skip-unavailable x {wanted}", "register values", None)
        values = {known[int(entry["number"])]: entry["value"] for entry in answer["register-values"]}
        return {name: int(value, 16) for name, value in values.items() if value.startswith("0x")}

    def read_memory(self, address: int, size: int) -> bytes:
        """`size` bytes of the target; GdbError where not all of them are there."""
        answer = self._ask(f"-data-read-memory-bytes {address:#x} {size}", f"{size} bytes at {address:#x}", None)
        data = b"".join(bytes.fromhex(block["contents"]) for block in answer["memory"])
        if len(data) != size:
            raise GdbError(f"{size} bytes at {address:#x}", f"only {len(data)} are there")
        return data

    def write_memory(self, address: int, data: bytes) -> None:
        """GdbError where they cannot all be written."""
        self._ask(f"-data-write-memory-bytes {address:#x} {data.hex()}", f"write at {address:#x}", None)

    def wait_stop(self, timeout: float | None = None) -> Stopped:
        """The next stop that was not waited for yet, one for each time the target has run.

        GdbTimeout; GdbError where gdb found only after `resume` that it cannot let the target run.
        """
        token, command = self._running
        self._receive(lambda: bool(self._stops) or token in self._results, "a stop", timeout)
        if not self._stops:
            raise GdbError(command, self._results.pop(token)["payload"]["msg"], "".join(self._text))
        self.stop = self._stops.popleft()
        return self.stop

    def interrupt(self, timeout: float | None = None) -> Stopped:
        """Ctrl-C, and the stop it leads to. The target must be running."""
        if self._show is not None:
            self._show("(gdb) interrupt")
        self._ask("-exec-interrupt", "interrupt", timeout)
        return self.wait_stop(timeout)

    def close(self) -> None:
        """End gdb, which detaches. Idempotent."""
        process = self._gdb.gdb_process
        if process is None:
            return
        with contextlib.suppress(OSError):  # it has ended already
            process.stdin.close()  # the end of its input: gdb detaches and leaves
        with contextlib.suppress(GdbError):
            self._receive(lambda: process.poll() is not None, "its end", _GRACE)
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            stream.close()
        self._gdb.gdb_process = None

    # ------------------------------------------------------------------------------------------------------ internals

    def _ask(self, line: str, shown: str, timeout: float | None) -> dict[str, Any]:
        """The payload of the result of an MI command."""
        self._token += 1
        token = self._token
        self._text = []
        try:
            self._gdb.write(f"{token}{line}", read_response=False)
        except OSError as error:
            raise GdbError(shown, f"gdb has ended: {error.strerror}") from error
        self._receive(lambda: token in self._results, shown, timeout)
        result = self._results.pop(token)
        if result["message"] == "error":
            raise GdbError(shown, result["payload"]["msg"], "".join(self._text))
        if result["message"] == "running":
            self._running = (token, shown)
        return result["payload"] or {}

    def _receive(self, done: Callable[[], bool], awaited: str, timeout: float | None) -> None:
        """Take in what gdb says until `done`."""
        seconds = self._timeout if timeout is None else timeout
        end = time.monotonic() + seconds
        while not done():
            process = self._gdb.gdb_process
            streams = [process.stdout, process.stderr]
            ready, _, _ = select.select(streams, [], [], max(end - time.monotonic(), 0))
            if not ready:
                raise GdbTimeout(awaited, seconds, "".join(self._text))
            records = [record for stream in ready for record in self._read(stream)]
            for record in records:
                self._take(record)
            if not records and process.poll() is not None and not done():
                raise GdbError(awaited, f"gdb has ended with status {process.returncode}", "".join(self._text))

    def _read(self, stream: IO[bytes]) -> Iterator[dict[str, Any]]:
        """The records of whole lines. pygdbmi's own reading loses all of a portion with one line that it cannot parse,
        and it cannot parse `=traceframe-changed,end`."""
        with contextlib.suppress(BlockingIOError):
            self._partial[stream] = self._partial.get(stream, b"") + os.read(stream.fileno(), _PORTION)
        *lines, self._partial[stream] = self._partial.get(stream, b"").split(b"\n")
        for line in lines:
            text = line.decode("utf-8", "replace").rstrip("\r")
            if text and not response_is_finished(text):
                with contextlib.suppress(TypeError):
                    yield parse_response(text)

    def _take(self, record: dict[str, Any]) -> None:
        kind, payload = record["type"], record["payload"]
        if kind == "result" and record["token"] is not None:
            self._results[record["token"]] = record
        elif kind in ("console", "target", "log", "output"):
            self._text.append(str(payload or ""))
        elif record["message"] == "stopped":
            self._stops.append(_stopped(payload or {}))  # a breakpoint whose commands are silent has none


def _stopped(payload: dict[str, Any]) -> Stopped:
    """From the facts of GDB/MI's *stopped record."""
    frame = payload.get("frame", {})
    number, code = payload.get("bkptno"), payload.get("exit-code")
    return Stopped(
        reason=payload.get("reason", ""),
        pc=int(frame["addr"], 16) if "addr" in frame else None,
        function=frame.get("func") if frame.get("func") != "??" else None,
        breakpoint=None if number is None else int(number),
        signal=payload.get("signal-name"),
        exit_code=None if code is None else int(code, 8),  # GDB/MI writes it in octal
    )


def _frame(fields: dict[str, Any]) -> Frame:
    function = fields.get("func")
    return Frame(int(fields["level"]), int(fields["addr"], 16), function if function != "??" else None)


def _quoted(text: str) -> str:
    """As a parameter of an MI command."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _options(settings: tuple[str, ...]) -> list[str]:
    return [word for setting in settings for word in ("-iex", setting)]


@contextlib.contextmanager
def gdb_session(
    address: str,
    *,
    gdb: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    show: Callable[[str], None] | None = None,
) -> Iterator[GdbSession]:
    """A gdb attached to the stub at `address` (HOST:PORT or unix:PATH), and its first stop waited for.

    `gdb` is its executable, by default what `find_gdb` finds; `timeout`, in seconds, holds for every wait that does not
    name its own; `show` is given each command as typed, and what it printed. GdbError where gdb cannot be had or does
    not attach. On leaving gdb detaches and ends.
    """
    program = gdb or find_gdb()
    if program is None:
        raise GdbError("gdb", "not found: `pip install 'gdb-for-pwndbg>=18,<19'` or `apt-get install gdb`")
    if not os.access(program, os.X_OK):
        raise GdbError(program, "no such program")
    session = GdbSession(program, timeout=timeout, show=show)
    try:
        session.execute(f"target remote {address.removeprefix('unix:')}")
        session.wait_stop()
        yield session
    finally:
        session.close()


def find_gdb() -> str | None:
    """The system's gdb, or the one that the package gdb-for-pwndbg installs beside this Python."""
    scripts = Path(sysconfig.get_path("scripts"))
    for name in ("gdb", "pwndbg-gdb", "gdb-for-pwndbg"):
        found = shutil.which(name) or shutil.which(str(scripts / name))
        if found is not None:
            return found
    return None
