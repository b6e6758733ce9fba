"""Clients in great number and of bad manners, over real sockets: nothing leaks, the guest runs on.

Rules: the counts are what a CI run can afford; the long ones are those of `GDBSTUB_LONG_TESTS=1`.
"""

from __future__ import annotations

import gc
import os
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from emu.arch import X86_64
from emu.boot import boot_embedded
from emu.runner import open_runner
from emu.stops import Interrupted
from gdbstub.address import Tcp
from gdbstub.monitor import Monitor
from gdbstub.monitorservices import Services
from gdbstub.rsp import frame
from gdbstub.server import Server
from gdbstub.session import Session
from tests.support.carried import Carried
from tests.support.fake_machine import CODE, FakeMachine
from tests.support.rsp_client import RawClient

LONG = bool(os.environ.get("GDBSTUB_LONG_TESTS"))
CYCLES = 1000 if LONG else 150
VICTIMS = 200 if LONG else 60
AT_ONCE = 50


def request(payload: bytes) -> bytes:
    return frame(payload, runs=False)


@asynccontextmanager
async def served() -> AsyncIterator[tuple[Server, Tcp, list[str]]]:
    """The embedded guest in its endless loop, on a TCP port."""
    machine = boot_embedded(64, "loop")
    defects: list[str] = []
    with trio.fail_after(120):
        async with open_runner(machine) as runner, trio.open_nursery() as nursery:
            monitor = Monitor(Services(machine))

            def new_session(wake: object) -> Session:
                return Session(machine, machine.registers.arch, monitor=monitor)

            server = Server(runner, new_session, on_kill=lambda: None, report=defects.append)
            (bound,) = await nursery.start(server.serve, Tcp("127.0.0.1", 0))
            assert isinstance(bound, Tcp)
            yield server, bound, defects
            nursery.cancel_scope.cancel()


async def is_free(server: Server) -> None:
    while server.debugger is not None:
        await trio.sleep(0)


async def check_unharmed(server: Server, address: Tcp, defects: list[str]) -> None:
    """Nothing of a client is left, and the guest runs."""
    await is_free(server)
    machine = server.runner.machine
    assert defects == []
    assert not await server.runner.call(lambda: machine.caught_exceptions)
    client = RawClient(await trio.open_tcp_stream(address.host, address.port))
    assert (await client.ask(b"?")).startswith(b"T05")
    assert not machine.breakpoints.wanted  # type: ignore[attr-defined]  # the Machine behind the protocol
    assert not machine.watched._watches  # type: ignore[attr-defined]
    await client.stream.aclose()
    await is_free(server)
    start = await server.runner.call(lambda: machine.clock.instructions)
    while await server.runner.call(lambda: machine.clock.instructions) == start:
        pass


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_attach_and_detach_again_and_again():
    """With a breakpoint and a watchpoint each time: no descriptor and no object stays."""
    async with served() as (server, address, defects):
        sizes = []
        for cycle in range(CYCLES):
            client = RawClient(await trio.open_tcp_stream(address.host, address.port))
            assert (await client.ask(b"?")).startswith(b"T05")
            await client.ask(b"Z0,fffffffff0000000,1")
            await client.ask(b"Z2,fffffffff0000000,8")
            assert await client.ask(b"D") == b"OK"
            await client.stream.aclose()
            if cycle in (CYCLES // 2, CYCLES - 1):
                await is_free(server)
                gc.collect()
                sizes.append((descriptors(), sum(isinstance(thing, Session) for thing in gc.get_objects())))
        assert sizes[0] == sizes[1]
        await check_unharmed(server, address, defects)


CONVERSATION = b"".join(
    map(
        request,
        b"""
        qSupported:multiprocess+;swbreak+;hwbreak+ vMustReplyEmpty QStartNoAckMode ! ? g Z0,ffffffff81000000,1
        Z2,ffffffff81000000,8 mffffffff81000000,40 vCont;s:p1.1 qRcmd,68656c70 Z4,ffffffff81000000,4 vCont;c
        """.split(),
    )
)


async def test_clients_killed_at_random_moments():
    """Cut anywhere in a packet, while the guest runs for them, with and without a reset of the connection."""
    chance = random.Random(5)
    async with served() as (server, address, defects):
        for _ in range(VICTIMS):
            stream = await trio.open_tcp_stream(address.host, address.port)
            whole = chance.random() < 0.3
            await stream.send_all(CONVERSATION if whole else CONVERSATION[: chance.randrange(len(CONVERSATION))])
            if chance.random() < 0.5:
                with trio.move_on_after(chance.random() * 0.01):
                    await stream.receive_some(chance.randrange(1, 200))
            if chance.random() < 0.5:
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await trio.aclose_forcefully(stream)
        await check_unharmed(server, address, defects)


async def test_fifty_clients_at_once():
    """One becomes the debugger; the others are told so, and each gets its answer to everything else."""
    async with served() as (server, address, defects):
        told: list[bytes] = []

        async def one() -> None:
            client = RawClient(await trio.open_tcp_stream(address.host, address.port))
            await client.ask(b"qSupported:error-message+")
            assert (await client.ask(b"qRcmd," + b"symbols jiffies".hex().encode())).startswith(b"O6")
            assert await client.read() == b"OK"
            told.append(await client.ask(b"?"))
            if told[-1].startswith(b"T05"):
                while len(told) < AT_ONCE:
                    await trio.sleep(0)
            await client.stream.aclose()

        async with trio.open_nursery() as nursery:
            for _ in range(AT_ONCE):
                nursery.start_soon(one)
        assert sorted(reply[:3] for reply in told) == [b"E.1"] * (AT_ONCE - 1) + [b"T05"]
        await check_unharmed(server, address, defects)


# -------------------------------------------------------------------------------------------------- states of a session

PACKETS = st.sampled_from(
    b"""
    ? ! D k vKill;1 vRun; R00 vAttach;1 vAttach;2 g G p0 m10000,4 M20000,1:41 Hgp1.1 T1 qC qfThreadInfo qAttached c s
    QNonStop:0 QNonStop:1 vStopped vCtrlC QThreadEvents:1 vCont;c vCont;s:p1.1 vCont;t vCont;t:p1.1 vCont? vCont;x
    vCont;r10000,10004 Z0,10003,1 z0,10003,1 Z1,10001,1 z1,10001,1 Z2,20000,4 z2,20000,4 Z4,20000,1
    qXfer:threads:read::0,99
    """.split()
)


class States(RuleBasedStateMachine):
    """Packets in any order against what must hold of a session whatever its state: see the invariants."""

    @initialize(words=st.sets(st.sampled_from(["swbreak+", "hwbreak+", "multiprocess+", "error-message+"])))
    def connect(self, words: set[str]) -> None:
        self.machine = FakeMachine(X86_64)
        self.restarts = 0

        def restart() -> None:
            self.machine.registers.values["rip"] = CODE
            self.restarts += 1

        self.session = Session(self.machine, X86_64, monitor=Monitor(Services(self.machine)), restart=restart)
        self.session.handle(b"qSupported:" + ";".join(sorted(words)).encode())
        self.carried = Carried(self.session)

    @rule(payload=PACKETS)
    def packet(self, payload: bytes) -> None:
        self.carried.packet(payload)

    @rule()
    def stop(self) -> None:
        self.machine.request_stop()
        self.carried.end_run()

    @invariant()
    def a_run_is_known_to_both(self) -> None:
        if hasattr(self, "session"):
            self.carried.check()

    @invariant()
    def nothing_is_left_of_one_who_is_not_attached(self) -> None:
        if hasattr(self, "session") and not self.session.attached:
            assert not self.machine.breakpoints
            assert not self.machine.watchpoints

    def teardown(self) -> None:
        if hasattr(self, "session"):
            self.session.close()
            assert not self.machine.breakpoints
            assert not self.machine.watchpoints


TestStates = States.TestCase
TestStates.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("nonstop", [False, True])
def test_an_interrupt_is_one_report(nonstop: bool):
    """What the machine says of a request to stop is told once, in either mode."""
    session = Session(FakeMachine(X86_64), X86_64)
    session.open()
    if nonstop:
        session.handle(b"QNonStop:1")
    session.handle(b"vCont;c")
    stop = Interrupted(CODE)
    report = session.notification(stop) if nonstop else session.stopped(stop)[-1]
    assert report is not None
    assert report.removeprefix(b"Stop:").startswith(b"T02")
