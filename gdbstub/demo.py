"""The guided main job, unattended: boot a stock kernel, attach stock gdb, set a kprobe, watch file names arrive.

Rules: everything goes through the public doors: the `gdbstub` command in a process of its own, gdb through pygdbmi.
What is typed to gdb is printed before its answer, so that a reader can do the same by hand.
"""

from __future__ import annotations

import queue
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from pygdbmi.constants import GdbTimeoutError
from pygdbmi.gdbcontroller import GdbController

from emu.iface import MachineError
from emu.images.fetch import FetchError, fetch

PROBE = "p:open do_sys_openat2 file=+0($arg2):string"
EMBEDDED_PROBE = "p:open do_open file=+0($arg1):string"
WORKLOAD = "cat /proc/version /proc/uptime; ls /bin /sys/kernel >/dev/null; md5sum /init /bin/busybox"
BOOT_SECONDS, STEP_SECONDS = 300.0, 60.0
_LISTENING = re.compile(r"listening on (\S+)")

Say = Callable[[str], None]


class DemoError(Exception):
    """A step that did not happen; one line."""


def find_gdb() -> str | None:
    """The system's gdb, or the one that the package gdb-for-pwndbg installs beside this Python."""
    scripts = Path(sysconfig.get_path("scripts"))
    for name in ("gdb", "pwndbg-gdb", "gdb-for-pwndbg"):
        found = shutil.which(name) or shutil.which(str(scripts / name))
        if found is not None:
            return found
    return None


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


class _Gdb:
    """Stock gdb over its machine interface; commands are shown as a person would type them."""

    def __init__(self, program: str, say: Say) -> None:
        self._say = say
        self._gdb = GdbController([program, "--nx", "--quiet", "--interpreter=mi3"])
        self._stopped = False
        self._ask("-gdb-set mi-async on", show=False)
        self._ask("-gdb-set confirm off", show=False)

    def command(self, text: str) -> str:
        """A console command; what it printed. DemoError where gdb refuses it."""
        return self._ask(text)

    def _ask(self, text: str, *, show: bool = True) -> str:
        if show:
            self._say(f"(gdb) {text}")
        said: list[str] = []
        result: dict[str, Any] | None = None
        replies = self._gdb.write(text, timeout_sec=STEP_SECONDS, raise_error_on_timeout=False)
        end = time.monotonic() + STEP_SECONDS
        while True:
            for reply in replies:
                self._stopped |= reply["message"] == "stopped"
                if reply["type"] in ("console", "target"):
                    said.append(str(reply["payload"]))
                if reply["type"] == "result":
                    result = reply
            if result is not None:
                break
            if time.monotonic() > end:
                raise DemoError(f"gdb did not answer {text!r}")
            replies = self._gdb.get_gdb_response(timeout_sec=1, raise_error_on_timeout=False)
        if result["message"] == "error":
            raise DemoError(f"gdb refused {text!r}: {result['payload']['msg']}")
        output = "".join(said)
        if show and output.strip():
            self._say(output.rstrip("\n"))
        return output

    def wait_stop(self) -> None:
        """Until the guest has stopped since the last `wait_stop`."""
        end = time.monotonic() + STEP_SECONDS
        while not self._stopped and time.monotonic() < end:
            for reply in self._gdb.get_gdb_response(timeout_sec=1, raise_error_on_timeout=False):
                self._stopped |= reply["message"] == "stopped"
        if not self._stopped:
            raise DemoError("the guest did not stop")
        self._stopped = False

    def close(self) -> None:
        self._gdb.exit()


def demo(say: Say) -> int:
    """Run it; 0 if every step worked, else 1 with the step that did not."""
    began = time.monotonic()
    gdb_program = find_gdb()
    if gdb_program is None:
        say("no gdb here: `pip install 'gdb-for-pwndbg>=18,<19'` or `apt-get install gdb`, then run this again")
        return 1
    guest: _Guest | None = None
    gdb: _Gdb | None = None
    try:
        kernel = _choose(say)
        guest = _Guest([*kernel, "--listen", "127.0.0.1:0"], say)
        guest.wait("listening", BOOT_SECONDS)
        linux = "--wait" not in kernel
        if linux:
            say("booting to a shell ...")
            guest.wait("prompt", BOOT_SECONDS)
        gdb = _Gdb(gdb_program, say)
        _session(guest, gdb, linux=linux, say=say)
        guest.process.wait(STEP_SECONDS)
        say(f"demo done in {time.monotonic() - began:.0f} seconds")
        return 0
    except (DemoError, GdbTimeoutError, OSError, subprocess.TimeoutExpired) as error:
        say(f"gdbstub demo: {error}")
        return 1
    finally:
        if gdb is not None:
            gdb.close()
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


def _session(guest: _Guest, gdb: _Gdb, *, linux: bool, say: Say) -> None:
    gdb.command(f"target remote {guest.address}")
    gdb.wait_stop()
    gdb.command("monitor kprobe add " + (PROBE if linux else EMBEDDED_PROBE))
    gdb.command("continue &")
    if linux:
        say(f"/ # {WORKLOAD}")
        guest.type(WORKLOAD)
        guest.wait("prompt", STEP_SECONDS)
    gdb.command("interrupt")
    gdb.wait_stop()
    trace = gdb.command("monitor trace")
    gdb.command("monitor kprobe info open")
    gdb.command("bt 3")
    gdb.command("x/2i " + ("do_sys_openat2" if linux else "do_open"))
    if "open: (" not in trace:
        raise DemoError("the kprobe was not hit")
    gdb.command("monitor quit")
