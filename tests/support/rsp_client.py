"""Debuggers for tests: packets by hand over any trio stream, and a real gdb driven by its machine interface."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
from pygdbmi import gdbmiparser

from gdbstub.rsp import NEED_DATA, Codec, Packet


class RawClient:
    """Sends payloads and reads payloads; acknowledges like gdb until `no_ack`."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.codec = Codec(debugger=True)

    async def send(self, payload: bytes) -> None:
        await self.stream.send_all(self.codec.reply(payload))

    async def read(self) -> bytes:
        """The next payload; EOFError where the stub closes."""
        while True:
            event = self.codec.next_event()
            if event is NEED_DATA:
                data = await self.stream.receive_some(4096)
                if not data:
                    raise EOFError
                self.codec.receive_data(data)
            elif isinstance(event, Packet):
                if due := self.codec.acknowledgements():
                    await self.stream.send_all(due)
                return event.payload

    async def ask(self, payload: bytes) -> bytes:
        await self.send(payload)
        return await self.read()

    async def interrupt(self) -> None:
        await self.stream.send_all(b"\x03")


class Gdb:
    """A gdb process in MI mode; every wait fails after 20 seconds, naming what was awaited."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._buffer = b""
        self._token = 0
        self.records: list[dict[str, Any]] = []
        """All records not yet taken by `wait_stop`."""
        self.console = ""
        """All text shown to the user so far, the target's included."""

    async def run(self, command: str) -> dict[str, Any]:
        """The payload of the result; AssertionError with gdb's message where it is an error."""
        record = await self.result(command)
        assert record["message"] != "error", (command, record["payload"], self.console)
        return record["payload"] or {}

    async def result(self, command: str) -> dict[str, Any]:
        """The result record of an MI command or (without a leading dash) a CLI one."""
        self._token += 1
        assert self._process.stdin is not None
        await self._process.stdin.send_all(f"{self._token}{command}\n".encode())
        return await self._wait(command, lambda record: record["token"] == self._token and record["type"] == "result")

    async def cli(self, command: str) -> str:
        """What a CLI command prints."""
        before = len(self.console)
        escaped = command.replace("\\", "\\\\").replace('"', '\\"')
        await self.run(f'-interpreter-exec console "{escaped}"')
        return self.console[before:]

    async def wait_stop(self) -> dict[str, Any]:
        """The facts of the next `*stopped`."""
        record = await self._wait("a stop", lambda record: record["message"] == "stopped")
        payload: dict[str, Any] = record["payload"]
        return payload

    async def value(self, expression: str) -> str:
        result: str = (await self.run(f'-data-evaluate-expression "{expression}"'))["value"]
        return result

    async def _wait(self, awaited: str, wanted: Any) -> dict[str, Any]:
        with trio.move_on_after(20):
            while True:
                for index, record in enumerate(self.records):
                    if wanted(record):
                        return self.records.pop(index)
                await self._read()
        raise AssertionError(f"no answer to {awaited!r}; gdb said: {self.console[-2000:]}")

    async def _read(self) -> None:
        assert self._process.stdout is not None
        data = await self._process.stdout.receive_some(65536)
        assert data, f"gdb ended; it said: {self.console[-2000:]}"
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            if line.startswith(b"=traceframe-changed,end"):
                continue  # "end" without a value, on which pygdbmi fails
            record = gdbmiparser.parse_response(line.decode(errors="replace"))
            record.setdefault("token", None)
            if record["type"] in ("console", "target", "log", "output"):
                self.console += str(record["payload"] or "")
            else:
                self.records.append(record)


@asynccontextmanager
async def open_gdb(executable: str) -> AsyncIterator[Gdb]:
    """A gdb without the user's own settings; killed on leaving."""
    settings = ("set confirm off", "set pagination off", "set mi-async on", "set debuginfod enabled off")
    command = [executable, "-q", "-nx", "--interpreter=mi3", *(word for line in settings for word in ("-iex", line))]
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield Gdb(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
