"""gdb as a debug adapter, with README's launch configuration: what an editor does."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gdbstub.serving import LIMIT, Served
from tests.support.readme import README

Embedded = Callable[..., Served]


class Editor:
    """The editor's end of the Debug Adapter Protocol."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._sent = 0

    def send(self, command: str, **arguments: Any) -> int:
        """-> the request's number."""
        self._sent += 1
        request = {"seq": self._sent, "type": "request", "command": command, "arguments": arguments}
        body = json.dumps(request).encode()
        assert self._process.stdin is not None
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        return self._sent

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The body of a request's answer, which must be a success."""
        number = self.send(command, **arguments)
        answer = self._until(lambda message: message.get("request_seq") == number)
        assert answer["success"], answer
        return answer.get("body", {})

    def wait_for(self, event: str) -> dict[str, Any]:
        """The body of the next such event."""
        return self._until(lambda message: message.get("event") == event).get("body", {})

    def _until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        output = self._process.stdout
        assert output is not None
        while True:
            size = 0
            while line := output.readline().strip():
                size = int(line.rpartition(b":")[2])
            assert size, "gdb has ended"
            message: dict[str, Any] = json.loads(output.read(size))
            if wanted(message):
                return message


@contextmanager
def editor(gdb: str) -> Iterator[Editor]:
    command = [gdb, "--nx", "--quiet", "--interpreter=dap"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as process:
        watchdog = threading.Timer(LIMIT, process.kill)  # so that a wait in vain ends
        watchdog.start()
        try:
            yield Editor(process)
        finally:
            watchdog.cancel()
            process.kill()


def test_an_editor_attaches_by_readmes_configuration(new_gdb: str, embedded: Embedded):
    """Breakpoint by name, continue, stack, registers' scope, memory, step, disconnect; the guest goes on."""
    block = re.search(r"```json\n(.*?)```", README.read_text(), re.DOTALL)
    assert block is not None
    (configuration,) = json.loads(block[1])["configurations"]
    assert configuration["request"] == "attach"
    served = embedded("calls=50 loop", waiting=True)
    with editor(new_gdb) as dap:
        dap.ask("initialize", adapterID="gdb")
        dap.send("attach", **{**configuration, "target": served.address})
        dap.wait_for("initialized")
        dap.ask("setFunctionBreakpoints", breakpoints=[{"name": "fib"}])
        dap.ask("configurationDone")
        assert dap.wait_for("stopped")["reason"] == "attach"
        (thread,) = dap.ask("threads")["threads"]
        assert thread["name"] == "CPU 0"
        dap.ask("continue", threadId=thread["id"])
        assert dap.wait_for("stopped")["reason"] == "breakpoint"
        frames = dap.ask("stackTrace", threadId=thread["id"])["stackFrames"]
        assert [frame["name"] for frame in frames[:2]] == ["fib", "exercise"]
        place = frames[0]["instructionPointerReference"]
        assert dap.ask("readMemory", memoryReference=place, count=4)["data"]
        scopes = dap.ask("scopes", frameId=frames[0]["id"])["scopes"]
        assert "Registers" in [scope["name"] for scope in scopes]
        dap.ask("next", threadId=thread["id"], granularity="instruction")
        assert dap.wait_for("stopped")["reason"] == "step"
        dap.ask("disconnect", terminateDebuggee=False)
    served.wait_running()
