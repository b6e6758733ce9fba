"""The server over memory streams and sockets: attaching, running, leaving, and clients that behave badly."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from emu.arch import X86_64
from emu.runner import Runner, open_runner
from gdbstub.address import Address, AddressError, Tcp, Unix, parse_address
from gdbstub.client import run_monitor_command
from gdbstub.monitor import Monitor
from gdbstub.monitorservices import Services
from gdbstub.rsp import frame
from gdbstub.server import Server
from gdbstub.session import Session
from tests.support.fake_machine import CODE, FakeMachine
from tests.support.rsp_client import RawClient


def request(payload: bytes) -> bytes:
    return frame(payload, runs=False)


@pytest.fixture(autouse=True)
async def no_hang() -> AsyncIterator[None]:
    """A wrong server hangs."""
    with trio.fail_after(20):
        yield


class World:
    """A running machine with a server on it."""

    def __init__(self, machine: FakeMachine, runner: Runner, nursery: trio.Nursery, *, waiting: bool) -> None:
        self.machine = machine
        self.runner = runner
        self.nursery = nursery
        self.events: list[str] = []
        self.sessions: list[Session] = []
        self.server = Server(
            runner,
            self.new_session,
            on_kill=lambda: self.events.append("killed"),
            report=self.events.append,
            waiting=waiting,
        )

    def new_session(self, wake: Callable[[], None]) -> Session:
        session = Session(self.machine, X86_64, monitor=Monitor(Services(self.machine)), wake=wake)
        self.sessions.append(session)
        return session

    def connect(self) -> RawClient:
        ours, theirs = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self.server.serve_stream, theirs, f"client {len(self.sessions)}")
        return RawClient(ours)

    async def listen(self, address: Address) -> Address:
        bound: list[Address] = await self.nursery.start(self.server.serve, address)
        return bound[0]

    async def is_running(self) -> None:
        start = self.machine.instructions
        while self.machine.instructions == start:
            await trio.lowlevel.checkpoint()

    async def is_alone(self) -> None:
        while self.server.debugger is not None:
            await trio.lowlevel.checkpoint()

    async def is_still(self) -> bool:
        count = self.machine.instructions
        await self.runner.call(int)
        await self.runner.call(int)
        return self.machine.instructions == count


@asynccontextmanager
async def open_world(*, waiting: bool = False) -> AsyncIterator[World]:
    machine = FakeMachine(X86_64)
    async with open_runner(machine, paused=waiting) as runner, trio.open_nursery() as nursery:
        yield World(machine, runner, nursery, waiting=waiting)
        nursery.cancel_scope.cancel()


async def closed(client: RawClient) -> None:
    with pytest.raises(EOFError):
        await client.read()


async def test_guest_runs_until_a_client_needs_it_stopped():
    """Negotiation and monitor commands leave it alone; the first `?` holds it."""
    async with open_world() as world:
        client = world.connect()
        assert b"PacketSize=" in await client.ask(b"qSupported:swbreak+")
        await world.is_running()
        assert (await client.ask(b"?")).startswith(b"T05")
        assert await world.is_still()


async def test_no_ack_mode_ends_acknowledgement():
    """The OK is still preceded by its `+`; the next reply is not."""
    async with open_world() as world:
        client = world.connect()
        await client.stream.send_all(request(b"QStartNoAckMode"))
        assert await client.stream.receive_some() == b"+$OK#9a"
        await client.stream.send_all(request(b"qAttached"))
        assert await client.stream.receive_some() == frame(b"1")


async def test_breakpoint_is_hit_and_reported_once():
    """One stop reply a resume."""
    async with open_world() as world:
        client = world.connect()
        await client.ask(b"qSupported:swbreak+")
        await client.ask(b"Z0,%x,1" % (CODE + 3))
        assert b"swbreak:;" in await client.ask(b"vCont;c")
        assert await client.ask(b"qC") == b"QC1"
        assert world.machine.pc == CODE + 3


async def test_interrupt_stops_a_busy_guest():
    """0x03 while the resume is carried out."""
    async with open_world() as world:
        client = world.connect()
        await client.ask(b"?")
        await client.send(b"c")
        await world.is_running()
        await client.interrupt()
        assert (await client.read()).startswith(b"T02")
        assert await world.is_still()


async def test_interrupt_in_the_same_segment_as_the_resume():
    """It must neither be lost nor come first."""
    async with open_world() as world:
        client = world.connect()
        await client.stream.send_all(request(b"c") + b"\x03")
        assert (await client.read()).startswith(b"T02")


async def test_interrupt_of_a_stopped_guest_is_ignored():
    """No stop reply is owed; none may be sent."""
    async with open_world() as world:
        client = world.connect()
        await client.ask(b"?")
        await client.interrupt()
        assert await client.ask(b"qC") == b"QC1"
        assert (await client.ask(b"s")).startswith(b"T05")


async def test_interrupt_that_crosses_a_stop_reply_stops_the_next_resume():
    """gdb sends it while it steps over a breakpoint, goes on after that step, and waits for the stop it asked for."""
    async with open_world() as world:
        client = world.connect()
        await client.ask(b"?")
        assert (await client.ask(b"s")).startswith(b"T05")
        await client.interrupt()
        assert await client.ask(b"qC") == b"QC1"
        assert (await client.ask(b"c")).startswith(b"T02")
        assert (await client.ask(b"s")).startswith(b"T05")
        assert await client.ask(b"qC") == b"QC1"
        await client.interrupt()  # it is known to stand by now
        assert (await client.ask(b"s")).startswith(b"T05")


async def test_packets_while_the_guest_runs_are_refused_or_answered():
    """Those that need it stopped get an error, monitor commands an answer; the run goes on."""
    async with open_world() as world:
        client = world.connect()
        await client.ask(b"?")
        await client.send(b"c")
        assert await client.ask(b"g") == b"E01"
        assert (await client.ask(b"qRcmd," + b"symbols start".hex().encode())).startswith(b"O")
        assert await client.read() == b"OK"
        await world.is_running()
        await client.interrupt()
        assert (await client.read()).startswith(b"T02")


async def test_output_for_the_client_arrives_while_the_guest_runs():
    """What a trace streams is sent at once, and only then."""
    async with open_world() as world:
        client = world.connect()
        await client.ask(b"?")
        await world.runner.call(world.sessions[0].stream, "early")
        await client.send(b"c")
        assert bytes.fromhex((await client.read())[1:].decode()) == b"early\n"
        await world.runner.call(world.sessions[0].stream, "late")
        assert bytes.fromhex((await client.read())[1:].decode()) == b"late\n"


async def test_detach_lets_the_guest_run_without_breakpoints():
    """And the same connection may attach again."""
    async with open_world() as world:
        client = world.connect()
        await client.ask(b"Z0,%x,1" % CODE)
        assert await client.ask(b"D") == b"OK"
        assert world.machine.breakpoints == set()
        await world.is_running()
        assert (await client.ask(b"?")).startswith(b"T05")
        assert await world.is_still()


@pytest.mark.parametrize(
    "last_words", [b"", b"$m1000", b"$", b"\x03", request(b"c"), request(b"s"), b"+", request(b"c") + b"$g"]
)
async def test_client_that_vanishes_leaves_nothing(last_words: bytes):
    """Its breakpoints go, the guest runs on, another client can attach."""
    async with open_world() as world:
        client = world.connect()
        await client.ask(b"Z0,ffff0000,1")
        await client.stream.send_all(last_words)
        await client.stream.aclose()
        await world.is_alone()
        assert world.machine.breakpoints == set()
        await world.is_running()
        assert (await world.connect().ask(b"?")).startswith(b"T05")
        assert world.events == []


async def test_clients_killed_at_random_moments():
    """Sixty of them, cut anywhere in a whole conversation: the guest runs on, nothing leaks."""
    conversation = b"".join(
        request(payload)
        for payload in (b"qSupported:swbreak+", b"QStartNoAckMode", b"?", b"g", b"Z0,10004,1", b"vCont;c", b"s", b"c")
    )
    chance = random.Random(20)
    async with open_world() as world:
        for _ in range(60):
            client = world.connect()
            await client.stream.send_all(conversation[: chance.randrange(len(conversation))])
            if chance.random() < 0.5:
                await client.interrupt()
            await trio.testing.wait_all_tasks_blocked(chance.random() * 0.003)
            await client.stream.aclose()
        await world.is_alone()
        assert world.machine.breakpoints == set()
        assert world.events == []
        await world.is_running()


async def test_second_debugger_is_refused_and_the_first_goes_on():
    """With the reason, to a client that can show it; a monitor client is served."""
    async with open_world() as world:
        first, second, visitor = world.connect(), world.connect(), world.connect()
        await first.ask(b"?")
        assert b"error-message" not in await second.ask(b"qSupported:error-message+")
        assert await second.ask(b"?") == b"E.client 0 is debugging this machine; one debugger at a time"
        await closed(second)
        assert (await visitor.ask(b"qRcmd," + b"help".hex().encode())).startswith(b"O")
        assert (await first.ask(b"s")).startswith(b"T05")


async def test_second_debugger_is_told_while_it_connects():
    """In the one reply of which gdb shows unknown words."""
    async with open_world() as world:
        await world.connect().ask(b"?")
        second = world.connect()
        assert b";client 0 is debugging this machine already" in await second.ask(b"qSupported:swbreak+")


async def test_damaged_packets_keep_the_exchange_in_step():
    """`-` in ack mode, an error without."""
    async with open_world() as world:
        client = world.connect()
        await client.stream.send_all(b"$g#00")
        assert await client.stream.receive_some() == b"-"
        await client.ask(b"QStartNoAckMode")
        await client.stream.send_all(b"$g#00")
        assert await client.read() == b"E01"


async def test_last_reply_is_sent_again_on_request():
    """`-` from the client."""
    async with open_world() as world:
        client = world.connect()
        assert await client.ask(b"qAttached") == b"1"
        await client.stream.send_all(b"-")
        assert await client.read() == b"1"


async def test_a_packet_that_is_too_long_is_refused():
    """And the next one answered."""
    async with open_world() as world:
        client = world.connect()
        await client.send(b"M0,40000:" + b"0" * 0x40000)
        assert await client.read() == b"E01"
        assert await client.ask(b"vMustReplyEmpty") == b""


async def test_kill_tells_the_program():
    """`k` has no reply; the connection closes."""
    async with open_world() as world:
        client = world.connect()
        await client.send(b"k")
        await closed(client)
        assert world.events == ["killed"]


async def test_waiting_guest_starts_with_its_first_debugger():
    """It stands still for visitors; the debugger's detach sets it going."""
    async with open_world(waiting=True) as world:
        visitor, debugger = world.connect(), world.connect()
        await visitor.ask(b"qRcmd," + b"help".hex().encode())
        assert (await debugger.ask(b"?")).startswith(b"T05")
        assert world.machine.instructions == 0
        await debugger.ask(b"D")
        await world.is_running()


async def test_a_defect_of_ours_costs_one_connection(monkeypatch: pytest.MonkeyPatch):
    """It is reported with its traceback; the guest and the others go on."""
    async with open_world() as world:
        client = world.connect()
        await client.ask(b"?")
        monkeypatch.setattr(world.machine.registers, "read_many", lambda names: 1 // 0)
        await client.send(b"g")
        await closed(client)
        assert "ZeroDivisionError" in world.events[0]
        monkeypatch.undo()
        await world.is_running()
        assert (await world.connect().ask(b"?")).startswith(b"T05")


# ------------------------------------------------------------------------------------------------------------- sockets


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0", ":0", "unix:{}/gdb.sock"])
async def test_monitor_client_over_every_kind_of_socket(address: str, tmp_path: Path):
    """Listener, announced address and our own client agree; the guest is not stopped."""
    async with open_world() as world:
        bound = await world.listen(parse_address(address.format(tmp_path)))
        shown: list[str] = []
        done = await trio.to_thread.run_sync(run_monitor_command, bound, "symbols start", shown.append)
        assert (done, "".join(shown)) == (True, f"{CODE:016x}      6 start\n")
        refused = await trio.to_thread.run_sync(run_monitor_command, bound, "nonsense", shown.append)
        assert not refused
        await world.is_running()


async def test_tcp_connections_send_small_packets_at_once(monkeypatch: pytest.MonkeyPatch):
    """TCP_NODELAY on our side: without it each stop waits 40 ms."""
    async with open_world() as world:
        options: list[int] = []
        serve = world.server.serve_stream

        async def look(stream: trio.SocketStream, peer: str, *, observe: bool) -> None:
            options.append(stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            await serve(stream, peer, observe=observe)

        monkeypatch.setattr(world.server, "serve_stream", look)
        bound = await world.listen(Tcp("127.0.0.1", 0))
        client = RawClient(await trio.open_tcp_stream(bound.host, bound.port))
        assert await client.ask(b"vMustReplyEmpty") == b""
        assert options == [1]


async def test_unix_socket_is_private_and_goes_with_the_server(tmp_path: Path):
    """Only the owner may connect; a stale socket is replaced, a live one is not."""
    path = tmp_path / "gdb.sock"
    async with open_world() as world:
        await world.listen(Unix(str(path)))
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(AddressError, match="in use"):
            await world.server.serve(Unix(str(path)))
    assert not path.exists()
    stale = trio.socket.socket(trio.socket.AF_UNIX)
    await stale.bind(str(path))
    stale.close()
    async with open_world() as world:
        await world.listen(Unix(str(path)))


async def test_port_in_use_is_one_line():
    """As is a host that does not exist."""
    async with open_world() as world:
        bound = await world.listen(Tcp("127.0.0.1", 0))
        with pytest.raises(AddressError, match=r"cannot listen on 127\.0\.0\.1:\d+: .*in use"):
            await world.server.serve(bound)


async def test_stdio_serves_one_client(monkeypatch: pytest.MonkeyPatch):
    """`--listen -`: descriptors 0 and 1, until their end."""
    to_us, to_client = os.pipe(), os.pipe()
    duplicates = iter((to_us[0], to_client[1]))
    monkeypatch.setattr(os, "dup", lambda descriptor: next(duplicates))
    async with open_world() as world:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.server.serve, parse_address("-"))
            client = RawClient(
                trio.StapledStream(trio.lowlevel.FdStream(to_us[1]), trio.lowlevel.FdStream(to_client[0]))
            )
            assert await client.ask(b"qAttached") == b"1"
            await client.stream.aclose()
        assert world.events == []
