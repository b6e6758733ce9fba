"""The endpoint of --observe: looks, never changes, never holds; byte by byte, and with gdb."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from emu.arch import X86_64
from emu.boot import boot_embedded
from emu.runner import open_runner
from gdbstub.automation import GdbError, GdbSession, Stopped, gdb_session
from gdbstub.monitor import Monitor
from gdbstub.monitorservices import Services
from gdbstub.observe import ObserverSession
from gdbstub.server import Server
from gdbstub.serving import serve
from gdbstub.session import Session
from tests.gdb.conftest import PIP_GDB
from tests.support.fake_machine import FakeMachine
from tests.support.process import gdbstub
from tests.support.rsp_client import RawClient


@asynccontextmanager
async def open_world(clients: int = 1) -> AsyncIterator[tuple[FakeMachine, Server, list[RawClient], RawClient]]:
    """A running machine, its server, some observers and a debugger that has not come yet."""
    machine = FakeMachine(X86_64)
    monitor = Monitor(Services(machine))
    with trio.fail_after(20):
        async with open_runner(machine) as runner, trio.open_nursery() as nursery:
            server = Server(
                runner,
                lambda wake: Session(machine, X86_64, monitor=monitor, wake=wake),
                on_kill=lambda: pytest.fail("killed"),
                report=pytest.fail,
                new_observer=lambda wake: ObserverSession(machine, X86_64, monitor=monitor, wake=wake),
            )
            ends = []
            for index in range(clients + 1):
                ours, theirs = trio.testing.memory_stream_pair()

                async def attend(stream: trio.abc.Stream = theirs, observe: bool = index < clients) -> None:
                    await server.serve_stream(stream, "somebody", observe=observe)

                nursery.start_soon(attend)
                ends.append(RawClient(ours))
            yield machine, server, ends[:-1], ends[-1]
            nursery.cancel_scope.cancel()


def ran(session: GdbSession) -> Stopped:
    session.resume()
    return session.wait_stop()


async def is_running(machine: FakeMachine) -> None:
    start = machine.instructions
    while machine.instructions == start:
        await trio.lowlevel.checkpoint()


async def test_an_observer_looks_while_the_guest_runs():
    """Registers are those of one moment, however often they are asked; memory is there; nothing stands still."""
    async with open_world() as (machine, server, (observer,), _):
        assert (await observer.ask(b"?")).startswith(b"T05")
        registers = await observer.ask(b"g")
        await is_running(machine)
        assert await observer.ask(b"g") == registers
        assert await observer.ask(b"m20000,4") == b"64617461"
        assert await observer.ask(b"qfThreadInfo") == b"m1"
        assert server.debugger is None


async def test_continue_lasts_until_ctrl_c_and_shows_another_moment():
    """One stop reply, signal 2."""
    async with open_world() as (machine, _, (observer,), _):
        await observer.ask(b"?")
        before = await observer.ask(b"p0")
        await observer.send(b"vCont;c")
        await is_running(machine)
        await observer.interrupt()
        assert (await observer.read()).startswith(b"T02")
        await is_running(machine)
        await observer.send(b"c")
        await observer.interrupt()
        assert (await observer.read()).startswith(b"T02")
        assert await observer.ask(b"p0") != before


@pytest.mark.parametrize(
    "payload",
    b"Z0,10000,1 Z2,20000,1 k vKill;1 s vRun; R00 ! QNonStop:1 vCtrlC C05 S05 z0,10000,1 QTinit vAttach;1".split(),
)
async def test_what_changes_something_does_not_exist(payload: bytes):
    async with open_world() as (machine, _, (observer,), _):
        await observer.ask(b"?")
        assert await observer.ask(payload) == b""
        await is_running(machine)
        assert machine.memory.read(0x20000, 4) == b"data"
        assert not machine.breakpoints


@pytest.mark.parametrize("payload", [b"M20000,1:41", b"X20000,1:A", b"P0=0000000000000000"])
async def test_writes_are_refused_aloud(payload: bytes):
    """gdb believes that they have happened where they are unknown."""
    async with open_world() as (machine, _, (observer,), _):
        await observer.ask(b"qSupported:error-message+")
        await observer.ask(b"?")
        assert await observer.ask(payload) == b"E.this endpoint only shows the machine"
        assert machine.memory.read(0x20000, 4) == b"data"


@pytest.mark.parametrize("payload", [b"vCont;s", b"vCont;r10000,10004", b"vCont;t", b"c10000"])
async def test_steps_and_jumps_are_refused(payload: bytes):
    async with open_world() as (_, _, (observer,), _):
        await observer.ask(b"qSupported:error-message+")
        await observer.ask(b"?")
        assert (await observer.ask(payload)).startswith(b"E.")


async def test_only_what_looks_is_announced():
    async with open_world() as (_, _, (observer,), _):
        words = (await observer.ask(b"qSupported:swbreak+;hwbreak+;multiprocess+")).decode()
        assert "qXfer:features:read+" in words
        for word in ("swbreak", "QNonStop", "Conditional", "QThreadEvents"):
            assert word not in words


async def test_monitor_commands_that_change_something_are_refused():
    """And those that look answer."""
    async with open_world() as (machine, _, (observer,), _):

        async def monitor(line: str) -> str:
            text = ""
            reply = await observer.ask(b"qRcmd," + line.encode().hex().encode())
            while reply.startswith(b"O") and reply != b"OK":
                text += bytes.fromhex(reply[1:].decode()).decode()
                reply = await observer.read()
            return text

        await observer.ask(b"?")
        assert "start_kernel" in await monitor("symbols start*")
        for line in ("quit", "catch exception all", "kprobe del all", "snapshot save x", "trace clear", "script x"):
            assert "only shows the machine" in await monitor(line)
        assert not machine.caught_exceptions


async def test_observers_and_a_debugger_do_not_meet():
    """Fifty look while one debugger steps: each has its own answers, and the debugger's guest stands when it does."""
    async with open_world(50) as (machine, server, observers, debugger):
        assert (await debugger.ask(b"?")).startswith(b"T05")
        assert server.debugger is not None
        count = machine.instructions

        async def look(observer: RawClient) -> None:
            assert (await observer.ask(b"?")).startswith(b"T05")
            assert await observer.ask(b"m20000,4") == b"64617461"
            await observer.stream.aclose()

        async with trio.open_nursery() as nursery:
            for observer in observers:
                nursery.start_soon(look, observer)
        assert machine.instructions == count
        assert (await debugger.ask(b"s")).startswith(b"T05")


@pytest.mark.parametrize("bits", [64, 32])
def test_gdb_observes_a_running_kernel(bits: int):
    """Attach, a frame, memory, Ctrl-C for another moment; writing and quitting are refused; the guest runs on."""
    with serve(boot_embedded(bits, "loop")) as served, gdb_session(served.observed, gdb=PIP_GDB) as session:
        assert "#0" in session.execute("bt 1")
        assert "0x" in session.execute("x/2i $pc")
        session.resume()
        served.wait_running()
        assert session.interrupt().signal == "SIGINT"
        for command in ("set var $pc = 0", "set var *(char *)$sp = 0"):
            with pytest.raises(GdbError):
                session.execute(command)
        session.execute("break *((long)$pc & ~0xfff)")
        with pytest.raises(GdbError) as refused:
            ran(session)
        assert "Cannot insert" in refused.value.said
        served.wait_running()


def test_the_program_announces_where_it_is_observed(tmp_path: Path):
    """Beside the debuggers' own endpoint."""
    path = tmp_path / "observers"
    with gdbstub("load", "embedded", "--listen", "127.0.0.1:0", "--observe", f"unix:{path}") as child:
        child.wait_for(f"observed on unix:{path}", on="err")
        assert child.address
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"$?#3f")
            heard = b""
            while b"thread:1;" not in heard:
                heard += client.recv(4096)
            assert b"$T05" in heard
