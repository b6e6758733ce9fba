"""Run control byte by byte: non-stop, extended mode, threads; on the fake machine behind a real server."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from emu.arch import I386, X86_64
from emu.runner import open_runner
from emu.stops import Budget, GuestExit, Panic, Step
from gdbstub.actions import Send
from gdbstub.files import FileTree
from gdbstub.monitor import Monitor
from gdbstub.monitorservices import Services
from gdbstub.rsp import NEED_DATA, Codec, Notification, Packet
from gdbstub.server import Server
from gdbstub.session import Session
from tests.support.fake_machine import CODE, STACK, FakeMachine

GDB = b"qSupported:multiprocess+;swbreak+;hwbreak+;error-message+"


class Client:
    """Reads packets (`ask`) and notifications (`notified`) apart, without acknowledging."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._codec = Codec(debugger=True)
        self._codec.start_no_ack_mode()
        self._packets: list[bytes] = []
        self._notifications: list[bytes] = []

    async def send(self, payload: bytes) -> None:
        await self._stream.send_all(self._codec.reply(payload))

    async def ask(self, payload: bytes) -> bytes:
        await self.send(payload)
        return await self._next(self._packets)

    async def notified(self) -> bytes:
        return await self._next(self._notifications)

    async def _next(self, waiting: list[bytes]) -> bytes:
        while not waiting:
            event = self._codec.next_event()
            if event is NEED_DATA:
                data = await self._stream.receive_some()
                if not data:
                    raise EOFError
                self._codec.receive_data(data)
            elif isinstance(event, Packet):
                self._packets.append(event.payload)
            elif isinstance(event, Notification):
                self._notifications.append(event.payload)
        return waiting.pop(0)

    async def interrupt(self) -> None:
        await self._stream.send_all(b"\x03")

    async def close(self) -> None:
        await self._stream.aclose()

    @property
    def is_idle(self) -> bool:
        return not self._packets and not self._notifications


class World:
    def __init__(self, machine: FakeMachine, server: Server, nursery: trio.Nursery, events: list[str]) -> None:
        self.machine = machine
        self.server = server
        self.events = events
        self._nursery = nursery

    def connect(self) -> Client:
        ours, theirs = trio.testing.memory_stream_pair()
        self._nursery.start_soon(self.server.serve_stream, theirs, "a client")
        return Client(ours)

    async def debugger(self, *words: bytes) -> Client:
        client = self.connect()
        await client.ask(GDB)
        await client.ask(b"QStartNoAckMode")
        for word in words:
            assert await client.ask(word) == b"OK"
        return client

    async def is_running(self) -> None:
        start = self.machine.instructions
        while self.machine.instructions == start:
            await trio.lowlevel.checkpoint()

    async def is_still(self) -> bool:
        count = self.machine.instructions
        await self.server.runner.call(int)
        await self.server.runner.call(int)
        return self.machine.instructions == count


@asynccontextmanager
async def open_world() -> AsyncIterator[World]:
    machine = FakeMachine(X86_64)
    events: list[str] = []

    def restart() -> None:
        machine.registers.values["rip"], machine.registers.values["rax"] = CODE, 0
        machine.registers.values["rsp"] = STACK + 0x800
        events.append("restarted")

    def new_session(wake: object) -> Session:
        return Session(machine, X86_64, monitor=Monitor(Services(machine)), restart=restart)

    with trio.fail_after(20):
        async with open_runner(machine) as runner, trio.open_nursery() as nursery:
            server = Server(runner, new_session, on_kill=lambda: events.append("killed"), report=events.append)
            yield World(machine, server, nursery, events)
            nursery.cancel_scope.cancel()


def signal(reply: bytes) -> int:
    assert reply.startswith(b"T"), reply
    assert reply.endswith(b"thread:p1.1;")
    return int(reply[1:3], 16)


# ------------------------------------------------------------------------------------------------------------ threads


async def test_threads_are_the_cpus():
    """One, with a name; and nobody else's are known."""
    async with open_world() as world:
        client = await world.debugger()
        assert await client.ask(b"qfThreadInfo") == b"mp1.1"
        assert await client.ask(b"qsThreadInfo") == b"l"
        assert await client.ask(b"qC") == b"QCp1.1"
        assert bytes.fromhex((await client.ask(b"qThreadExtraInfo,p1.1")).decode()) == b"CPU 0"
        assert b'id="p1.1" core="0" name="CPU 0"' in await client.ask(b"qXfer:threads:read::0,1000")
        assert await client.ask(b"Tp1.1") == b"OK"
        for payload in (b"Tp1.2", b"Hgp2.1", b"Tx", b"vCont;s:p1.7"):
            assert await client.ask(payload) == b"E.no such thread"


async def test_thread_events_are_accepted():
    """There never are any: CPUs do not come and go."""
    async with open_world() as world:
        client = await world.debugger(b"QThreadEvents:1", b"QThreadEvents:0")
        assert (await client.ask(b"QThreadEvents:2")).startswith(b"E.")


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    ("packet", "pc"),
    [
        (b"s", CODE + 1),
        (b"S05", CODE + 1),
        (b"s10004", CODE + 6),
        (b"S05;10004", CODE + 6),
        (b"vCont;s:p1.1;c", CODE + 1),
        (b"vCont;S0b:p1.-1", CODE + 1),
        (b"vCont;r10000,10004:p1.1", CODE + 4),
        (b"vCont;r10000,10000", CODE + 1),
        (b"vCont;r10001,10000:-1", CODE + 1),
    ],
)
async def test_a_step_is_one_reply(packet: bytes, pc: int):
    """However it is said; a range that does not hold the pc is one step. Nothing else comes."""
    async with open_world() as world:
        client = await world.debugger()
        await client.ask(b"?")
        world.machine.registers.values["rip"] = CODE
        assert signal(await client.ask(packet)) == 5
        assert world.machine.pc == pc
        assert await client.ask(b"qC") == b"QCp1.1"
        assert client.is_idle


async def test_range_steps_stop_at_a_breakpoint_inside():
    """As gdb expects: it inserts them before."""
    async with open_world() as world:
        client = await world.debugger()
        await client.ask(b"?")
        world.machine.registers.values["rip"] = CODE
        await client.ask(b"Z0,%x,1" % (CODE + 3))
        assert b"swbreak:;" in await client.ask(b"vCont;r10000,10008")
        assert world.machine.pc == CODE + 3


@pytest.mark.parametrize("packet", [b"c", b"C05", b"vCont;c", b"vCont;C05:p1.1", b"c10003"])
async def test_ctrl_c_is_one_reply(packet: bytes):
    async with open_world() as world:
        client = await world.debugger()
        await client.ask(b"?")
        await client.send(packet)
        await world.is_running()
        await client.interrupt()
        assert signal(await client._next(client._packets)) == 2
        assert await client.ask(b"qC") == b"QCp1.1"
        assert client.is_idle


@pytest.mark.parametrize(
    "packet",
    b"vCont|vCont;|vCont;x|vCont;x;c|vCont;t:p1.1|vCont;rx,y|vCont;r|vCont;C|vCont;S:p1.1|vCont;Czz|vCont;C105|vCont;c5|"
    b"cx|s1 |C|S|S;10003|C05;x".split(b"|"),
)
async def test_what_cannot_be_resumed_is_refused(packet: bytes):
    """And the guest stands."""
    async with open_world() as world:
        client = await world.debugger()
        await client.ask(b"?")
        assert (await client.ask(packet)).startswith(b"E")
        assert await world.is_still()


# ------------------------------------------------------------------------------------------------------------ non-stop


async def test_nonstop_answers_at_once_and_notifies_of_the_stop():
    """The whole life of one resume: OK, the guest runs and is looked at, `vCont;t`, %Stop with signal 0, vStopped."""
    async with open_world() as world:
        client = await world.debugger(b"QNonStop:1")
        assert signal(await client.ask(b"?")) == 5
        assert await client.ask(b"vStopped") == b"OK"
        assert await client.ask(b"vCont;c:p1.-1") == b"OK"
        await world.is_running()
        assert await client.ask(b"m20000,4") == b"64617461"
        assert await client.ask(b"g") == b"E.the thread is running"
        assert await client.ask(b"vCont;c:p1.1") == b"OK"
        assert await client.ask(b"vCont;t:p1.1") == b"OK"
        notification = await client.notified()
        assert notification.startswith(b"Stop:")
        assert signal(notification.removeprefix(b"Stop:")) == 0
        assert await client.ask(b"vStopped") == b"OK"
        assert await world.is_still()
        assert await client.ask(b"vCont;t:p1.1") == b"OK"
        assert client.is_idle


async def test_nonstop_breakpoints_are_inserted_while_the_guest_runs():
    async with open_world() as world:
        client = await world.debugger(b"QNonStop:1")
        await client.ask(b"?")
        await client.ask(b"vStopped")
        await client.ask(b"vCont;c")
        await world.is_running()
        assert await client.ask(b"Z0,%x,1" % (CODE + 3)) == b"OK"
        assert b"swbreak:;" in await client.notified()
        assert world.machine.pc == CODE + 3


async def test_a_second_stop_waits_until_the_first_is_acknowledged():
    """A notification is lost if the client has not taken up the last one: it comes as the answer to vStopped."""
    async with open_world() as world:
        client = await world.debugger(b"QNonStop:1")
        await client.ask(b"?")
        await client.ask(b"vStopped")
        assert await client.ask(b"vCont;s") == b"OK"
        first = await client.notified()
        assert await client.ask(b"vCont;s") == b"OK"
        while (second := await client.ask(b"vStopped")) == b"OK":
            pass
        assert signal(second) == signal(first.removeprefix(b"Stop:")) == 5
        assert second != first.removeprefix(b"Stop:")
        assert await client.ask(b"vStopped") == b"OK"
        assert client.is_idle


async def test_nonstop_ctrl_c():
    """gdb's packet for it, and the byte: signal 2, by notification."""
    async with open_world() as world:
        client = await world.debugger(b"QNonStop:1")
        await client.ask(b"?")
        await client.ask(b"vStopped")
        assert await client.ask(b"vCtrlC") == b"OK"
        for byte in (False, True):
            assert await client.ask(b"vCont;c") == b"OK"
            await world.is_running()
            if byte:
                await client.interrupt()
            else:
                assert await client.ask(b"vCtrlC") == b"OK"
            assert signal((await client.notified()).removeprefix(b"Stop:")) == 2
            assert await client.ask(b"vStopped") == b"OK"


async def test_status_of_a_running_nonstop_guest_is_ok():
    """No thread is stopped, so none is told of; and the mode stays while it runs."""
    async with open_world() as world:
        client = await world.debugger(b"QNonStop:1")
        await client.ask(b"?")
        await client.ask(b"vStopped")
        await client.ask(b"vCont;c")
        assert await client.ask(b"?") == b"OK"
        assert (await client.ask(b"QNonStop:0")).startswith(b"E.")


@pytest.mark.parametrize("packet", [b"D;1", b"D"])
async def test_detach_from_a_running_nonstop_guest(packet: bytes):
    """Its run ends without a notification, and it runs on freely."""
    async with open_world() as world:
        client = await world.debugger(b"QNonStop:1")
        await client.ask(b"?")
        await client.ask(b"vStopped")
        await client.ask(b"vCont;c")
        await world.is_running()
        assert await client.ask(packet) == b"OK"
        await world.is_running()
        assert world.server.debugger is None
        assert client.is_idle


# ------------------------------------------------------------------------------------------------------- extended mode


async def test_extended_mode_restarts_the_machine():
    """vRun, R and vKill take it back; after vKill there is no process until vRun or vAttach."""
    async with open_world() as world:
        client = await world.debugger(b"!")
        assert signal(await client.ask(b"?")) == 5
        await client.ask(b"s")
        assert signal(await client.ask(b"vRun;2f62696e;6131")) == 5
        assert (world.machine.pc, world.events) == (CODE, ["restarted"])
        await client.ask(b"s")
        await client.send(b"R00")
        assert signal(await client.ask(b"?")) == 5
        assert world.machine.pc == CODE
        await client.ask(b"Z0,%x,1" % CODE)
        assert await client.ask(b"vKill;1") == b"OK"
        assert not world.machine.breakpoints
        assert await client.ask(b"?") == b"W00"
        assert await client.ask(b"qfThreadInfo") == b"l"
        assert b"<thread " not in await client.ask(b"qXfer:threads:read::0,1000")
        for payload in (b"g", b"m10000,4", b"c", b"Z0,10000,1"):
            assert await client.ask(payload) == b"E.there is no process; run or attach"
        assert await world.is_still()
        assert signal(await client.ask(b"vRun;")) == 5
        assert await client.ask(b"qfThreadInfo") == b"mp1.1"
        assert len(world.events) == 4


async def test_extended_mode_detaches_and_attaches_on_one_connection():
    """In between the guest runs, and nothing the client asks stops it."""
    async with open_world() as world:
        client = await world.debugger(b"!")
        await client.ask(b"?")
        assert await client.ask(b"D;1") == b"OK"
        await world.is_running()
        assert await client.ask(b"qfThreadInfo") == b"l"
        assert await client.ask(b"?") == b"W00"
        await world.is_running()
        assert signal(await client.ask(b"vAttach;1")) == 5
        assert await world.is_still()
        assert (await client.ask(b"vAttach;2")) == b"E.no such process"
        assert signal(await client.ask(b"s")) == 5


async def test_a_guest_that_has_ended_is_run_again():
    """W, then vRun: the program does not end with the guest while such a debugger is there."""
    async with open_world() as world:
        client = await world.debugger(b"!")
        await client.ask(b"?")
        world.machine.memory.write(CODE, b"\xe6\x13")  # the guest ends with status 3
        world.machine.registers.values["rip"] = CODE
        replies = [await client.ask(b"c"), await client._next(client._packets)]
        assert replies[-1] == b"W03;process:1"
        assert await client.ask(b"qfThreadInfo") == b"l"
        world.machine.memory.write(CODE, b"\x90\x90")
        assert signal(await client.ask(b"vRun;")) == 5
        assert signal(await client.ask(b"s")) == 5
        await client.close()
        await world.is_running()


async def test_an_end_is_reported_when_the_extended_debugger_leaves():
    """Then nobody can run it again."""
    async with open_world() as world:
        client = await world.debugger(b"!")
        await client.ask(b"?")
        world.machine.memory.write(CODE, b"\xe6\x13")
        world.machine.registers.values["rip"] = CODE
        await client.ask(b"c")
        await client.close()
        assert await world.server.runner.wait_stop() == GuestExit(3)


async def test_a_killed_machine_waits_for_the_next_debugger():
    """At its start: nobody has said that it should run."""
    async with open_world() as world:
        client = await world.debugger(b"!")
        await client.ask(b"?")
        assert await client.ask(b"vKill;1") == b"OK"
        await client.close()
        second = await world.debugger()
        assert signal(await second.ask(b"?")) == 5
        assert world.machine.pc == CODE
        await second.close()
        await world.is_running()


@pytest.mark.parametrize("packet", [b"vRun;", b"R00"])
async def test_restarting_is_for_extended_mode(packet: bytes):
    async with open_world() as world:
        client = await world.debugger()
        await client.ask(b"?")
        assert await client.ask(packet) == b"E.only in extended mode: target extended-remote"
        assert world.events == []


@pytest.mark.parametrize("packet", [b"k", b"vKill;1"])
async def test_killing_without_extended_mode_ends_the_program(packet: bytes):
    async with open_world() as world:
        client = await world.debugger()
        await client.ask(b"?")
        await client.send(packet)
        if packet != b"k":
            assert await client._next(client._packets) == b"OK"
        with pytest.raises(EOFError):
            await client._next(client._packets)
        assert world.events == ["killed"]


async def test_a_client_that_reconnects_at_once_is_let_in():
    """The debugger before it has closed without a word, and the server may not know yet."""
    async with open_world() as world:
        for _ in range(20):
            client = await world.debugger()
            assert signal(await client.ask(b"?")) == 5
            second = await world.debugger()
            world_second = second.send(b"?")
            await client.close()
            await world_second
            assert signal(await second._next(second._packets)) == 5
            await second.close()


# ------------------------------------------------------------------------------------------------------- without server


def test_each_stop_is_one_reply_with_its_thread():
    """For every kind of step and end."""
    session = Session(FakeMachine(X86_64), X86_64)
    assert session.stopped(Step(CODE))[-1].endswith(b"thread:1;")
    assert session.stopped(Budget(5))[-1] == b"W01"
    answer = session.handle(b"vCont?")
    assert isinstance(answer, Send)
    assert re.fullmatch(rb"vCont(;[cCtsSr])+", answer.payloads[0])


def test_files_are_there_without_a_process():
    """gdb looks whether its symbol file has changed between kill and run, and drops it where it cannot."""
    files = FileTree({"/vmlinux": lambda: b"ELF"}, exec_file="/vmlinux")
    session = Session(FakeMachine(X86_64), X86_64, files=files, restart=lambda: None)
    session.open()
    for payload in (b"!", b"vKill;1"):
        assert session.handle(payload) == Send((b"OK",))
    assert session.handle(b"vFile:open:" + b"/vmlinux".hex().encode() + b",0,0") == Send((b"F0",))
    assert session.handle(b"m10000,4") == Send((b"E01",))


def test_in_nonstop_a_stop_is_explained_with_the_next_monitor_command():
    """No console text may come before: it would be taken for an answer. It is said once."""
    machine = FakeMachine(X86_64)
    session = Session(machine, X86_64, monitor=Monitor(Services(machine)))
    session.open()
    session.handle(b"QNonStop:1")
    session.handle(b"vCont;c")
    assert session.notification(Panic(CODE, "no init")) is not None
    command = b"qRcmd," + b"help quit".hex().encode()
    first, second = session.handle(command), session.handle(command)
    assert isinstance(first, Send)
    assert isinstance(second, Send)
    assert bytes.fromhex(first.payloads[0][1:].decode()) == b"The guest kernel panics: no init\n"
    assert first.payloads[1:] == second.payloads


@pytest.mark.parametrize("packet", [b"c123456789", b"s123456789", b"C05;100000000"])
def test_no_address_is_cut_to_fit_a_32_bit_machine(packet: bytes):
    """It is refused, and the guest stands where it stood."""
    machine = FakeMachine(I386)
    session = Session(machine, I386)
    assert session.handle(packet) == Send((b"E01",))
    assert machine.pc == CODE
