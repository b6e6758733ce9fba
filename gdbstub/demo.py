"""The guided main job, unattended: boot a stock kernel, attach stock gdb, set a kprobe, watch file names arrive.

Rules: everything goes through the public doors: the `gdbstub` command in a process of its own, gdb through
`automation`. What is typed to gdb is printed before its answer, so that a reader can do the same by hand.
"""

from __future__ import annotations

import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import IO

from emu.iface import MachineError
from emu.images.fetch import FetchError, fetch
from gdbstub.automation import GdbError, GdbSession, find_gdb, gdb_session

PROBE = "p:open do_sys_openat2 file=+0($arg2):string"
EMBEDDED_PROBE = "p:open do_open file=+0($arg1):string"
WORKLOAD = "cat /proc/version /proc/uptime; ls /bin /sys/kernel >/dev/null; md5sum /init /bin/busybox"
BOOT_SECONDS, STEP_SECONDS = 300.0, 60.0
_LISTENING = re.compile(r"listening on (\S+)")

Say = Callable[[str], None]


class DemoError(Exception):
    """A step that did not happen; one line."""


class _Guest:
    """`gdbstub boot` or `load` as a child, its console on our pipes."""

    def __init__(self, arguments: list[str], say: Say) -> None:
        say("$ gdbstub " + " ".join(arguments))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gdbstub", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        self._say = say
        self._events: queue.Queue[str | None] = queue.Queue()
        self.address = ""
        for stream, read in ((self.process.stdout, self._read_console), (self.process.stderr, self._read_messages)):
            threading.Thread(target=read, args=(stream,), daemon=True).start()

    def _read_console(self, stream: IO[bytes]) -> None:
        line = b""
        while data := stream.read(1):
            if data == b"\n":
                self._say("| " + line.decode("utf-8", "replace").rstrip("\r"))
                line = b""
                continue
            line += data
            if line == b"/ # ":
                self._events.put("prompt")
        self._events.put(None)

    def _read_messages(self, stream: IO[bytes]) -> None:
        for raw in stream:
            line = raw.decode("utf-8", "replace").rstrip()
            self._say(line)
            if match := _LISTENING.search(line):
                self.address = match[1]
                self._events.put("listening")

    def wait(self, event: str, seconds: float) -> None:
        """Until `event` ("listening", "prompt"); DemoError where it does not come."""
        end = time.monotonic() + seconds
        while True:
            try:
                happened = self._events.get(timeout=max(end - time.monotonic(), 0.01))
            except queue.Empty:
                raise DemoError(f"no {event} within {seconds:.0f} seconds") from None
            if happened is None:
                raise DemoError(f"the guest ended before its {event}")
            if happened == event:
                return

    def type(self, line: str) -> None:
        if self.process.stdin is None:
            raise DemoError("the guest has no console")
        self.process.stdin.write(line.encode() + b"\n")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STEP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()


def demo(say: Say) -> int:
    """Run it; 0 if every step worked, else 1 with the step that did not."""
    began = time.monotonic()
    gdb_program = find_gdb()
    if gdb_program is None:
        say("no gdb here: `pip install 'gdb-for-pwndbg>=18,<19'` or `apt-get install gdb`, then run this again")
        return 1
    guest: _Guest | None = None
    try:
        kernel = _choose(say)
        guest = _Guest([*kernel, "--listen", "127.0.0.1:0"], say)
        guest.wait("listening", BOOT_SECONDS)
        linux = "--wait" not in kernel
        if linux:
            say("booting to a shell ...")
            guest.wait("prompt", BOOT_SECONDS)
        with gdb_session(guest.address, gdb=gdb_program, timeout=STEP_SECONDS, show=say) as gdb:
            _session(guest, gdb, linux=linux, say=say)
        guest.process.wait(STEP_SECONDS)
        say(f"demo done in {time.monotonic() - began:.0f} seconds")
        return 0
    except KeyboardInterrupt:
        say("gdbstub demo: interrupted before it was done")
        return 1
    except (DemoError, GdbError, OSError, subprocess.TimeoutExpired) as error:
        say(f"gdbstub demo: {error}")
        return 1
    finally:
        if guest is not None:
            guest.close()


def _choose(say: Say) -> list[str]:
    """A fetched kernel, else one fetched now, else the embedded guest."""
    try:
        fetch("amd64", progress=say)
        return ["boot", "amd64"]
    except (FetchError, MachineError) as error:
        say(f"no kernel to be had ({error}); using the embedded guest")
        return ["load", "embedded", "--wait"]


def _session(guest: _Guest, gdb: GdbSession, *, linux: bool, say: Say) -> None:
    gdb.monitor("kprobe add " + (PROBE if linux else EMBEDDED_PROBE))
    gdb.resume()
    if linux:
        say(f"/ # {WORKLOAD}")
        guest.type(WORKLOAD)
        guest.wait("prompt", STEP_SECONDS)
    gdb.interrupt()
    trace = gdb.monitor("trace")
    gdb.monitor("kprobe info open")
    gdb.execute("bt 3")
    gdb.execute("x/2i " + ("do_sys_openat2" if linux else "do_open"))
    if "open: (" not in trace:
        raise DemoError("the kprobe was not hit")
    gdb.monitor("quit")
