"""The embedded guest with everything a debugger can reach of it, for tests: in-process packets, and a real gdb."""

from __future__ import annotations

import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from emu.boot import GuestMachine, boot_embedded
from emu.runner import Runner, open_runner
from emu.stops import Stop
from gdbstub.actions import Resume, Send
from gdbstub.address import Tcp
from gdbstub.files import FileTree
from gdbstub.server import Server
from gdbstub.session import Session
from gdbstub.sessions import EXEC_FILE
from gdbstub.symbolfile import kernel_elf
from gdbstub.tracepoints import Tracing
from probes.manager import Manager
from tests.support.rsp_client import Gdb, open_gdb

PIP_GDB = str(Path(sys.executable).parent / "gdb")
GDBS = [gdb for gdb in dict.fromkeys((shutil.which("gdb", path="/usr/bin:/usr/local/bin"), PIP_GDB)) if gdb]
every_gdb = pytest.mark.parametrize("gdb", GDBS, ids=lambda gdb: "pip" if gdb == PIP_GDB else "system")
every_size = pytest.mark.parametrize("bits", [64, 32])

START = 50_000
"""Instructions after which the guest is at work on its command line."""


class Target:
    """A guest and one tracing for all sessions: `machine`, or the embedded guest at work on `append`."""

    def __init__(self, bits: int, append: str = "calls=100000", machine: GuestMachine | None = None) -> None:
        self.machine: GuestMachine = machine or boot_embedded(bits, append)
        if machine is None:
            self.machine.run(START)
        self.arch = self.machine.registers.arch
        self.probes = Manager(self.machine)
        self.tracing = Tracing(self.machine, self.arch, self.probes)
        self.session = self.new_session()

    def new_session(self, files: FileTree | None = None, **options: object) -> Session:
        return Session(self.machine, self.arch, files=files, tracing=self.tracing, **options)  # type: ignore[arg-type]

    def address(self, name: str) -> int:
        (symbol,) = self.machine.symbols.lookup(name)
        return symbol.address

    def ask(self, payload: bytes) -> bytes:
        """The last payload that answers."""
        action = self.session.handle(payload)
        assert isinstance(action, Send), action
        return action.payloads[-1]

    def accept(self, *payloads: bytes) -> None:
        """Each is answered OK."""
        for payload in payloads:
            assert self.ask(payload) == b"OK", payload

    def run(self, instructions: int = 6_000) -> Stop:
        """As after `c`, for so many instructions, and stopped again."""
        assert isinstance(self.session.handle(b"c"), Resume)
        stop = self.machine.run(instructions)
        self.session.stopped(stop)
        return stop


@dataclass
class World:
    """A Target that is served, and a gdb."""

    target: Target
    gdb: Gdb
    runner: Runner
    port: int

    async def attach(self) -> None:
        await self.gdb.run(f"-target-select remote 127.0.0.1:{self.port}")
        await self.gdb.wait_stop()

    async def run_to(self, place: str, hits: int = 0) -> None:
        """Let the guest run until it is at `place`, `hits` times passed."""
        await self.gdb.run(f"-break-insert -t -i {hits} {place}")
        await self.resume()

    async def resume(self) -> dict[str, Any]:
        """Continue to the next stop; its facts."""
        await self.gdb.run("-exec-continue")
        return await self.gdb.wait_stop()

    def register(self, wide: str, narrow: str) -> str:
        """The name for this word size, as gdb writes it."""
        return "$" + (wide if self.target.machine.bits == 64 else narrow)


@asynccontextmanager
async def open_world(gdb: str, bits: int, *, machine: GuestMachine | None = None) -> AsyncIterator[World]:
    """The guest stands still until gdb attaches, and whenever gdb has stopped it."""
    target = Target(bits, machine=machine)
    files = FileTree({EXEC_FILE: kernel_elf(target.machine)}, exec_file=EXEC_FILE)
    async with (
        open_runner(target.machine, paused=True) as runner,
        trio.open_nursery() as nursery,
        open_gdb(gdb) as tool,
    ):
        server = Server(
            runner,
            lambda wake: target.new_session(files, wake=wake),
            on_kill=nursery.cancel_scope.cancel,
            report=pytest.fail,
            waiting=True,
        )
        bound = await nursery.start(server.serve, Tcp("127.0.0.1", 0))
        yield World(target, tool, runner, bound[0].port)
        nursery.cancel_scope.cancel()
