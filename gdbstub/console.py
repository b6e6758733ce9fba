"""The host's end of the guest's serial line: this terminal, a file, one TCP client, or nobody.

Rules: trio lives here. What the guest prints comes in the machine's thread and must not hold it up for longer than a
reader takes; what is typed goes to the machine through the runner, and waits here while the guest does not read.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import trio

from emu.boot import GuestMachine
from emu.runner import Runner
from gdbstub.address import Tcp
from gdbstub.terminal import HELP, Key, Keys, raw_terminal, say

_LEAVING = 0.5  # seconds a new client waits for the one before to be gone
_PORTION = 0x4000
_FULL_PAUSE = 0.05  # seconds until a guest that has a megabyte of input waiting is offered more
_QUEUED = 1 << 16  # portions of console text that wait for a TCP client


class ConsoleError(Exception):
    """The console cannot be had; one line."""


class Keyboard:
    """Standard input into the guest. On a terminal Ctrl-A is ours: `end` and `interrupt` are what it can ask for."""

    def __init__(self, machine: GuestMachine, runner: Runner, end: Callable[[], None], interrupt: Callable[[], None]):
        self._type = partial(type_in, machine, runner)
        self._end = end
        self._interrupt = interrupt

    async def run(self) -> None:
        """Until the end of the input, which is not the guest's end. The terminal is as before on leaving."""
        keys = Keys()
        with raw_terminal(0) as is_terminal:
            while data := await _read_input(0):
                if not is_terminal:
                    await self._type(data)
                    continue
                for part in keys.take(data):
                    await self._take(part)

    async def _take(self, part: bytes | Key) -> None:
        match part:
            case Key.END:
                self._end()
            case Key.INTERRUPT:
                self._interrupt()
            case Key.HELP:
                say(HELP)
            case bytes():
                await self._type(part)


async def type_in(machine: GuestMachine, runner: Runner, data: bytes) -> None:
    """Have `data` arrive at the guest's serial port, waiting while it has more unread than it may."""
    while data:
        data = data[await runner.call(machine.devices.uart.receive, data) :]
        if data:
            await trio.sleep(_FULL_PAUSE)


async def _read_input(descriptor: int) -> bytes:
    """The next bytes; none at the end, or where there is no such descriptor."""
    try:
        await trio.lowlevel.wait_readable(descriptor)
    except PermissionError:  # epoll_ctl(2): a regular file or /dev/null, which always has what it has
        await trio.lowlevel.checkpoint()
    except OSError:
        return b""
    try:
        return os.read(descriptor, _PORTION)
    except OSError:  # the terminal is gone, or is not ours to read
        return b""


async def serve_tcp(
    address: Tcp,
    machine: GuestMachine,
    runner: Runner,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """The console for one client at a time; what is printed while nobody is there is lost. ConsoleError."""
    try:
        listeners = await trio.open_tcp_listeners(address.port, host=address.host)
    except OSError as error:
        raise ConsoleError(f"cannot have the console on {address}: {error.strerror or error}") from error
    turn = trio.Lock()

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            with trio.move_on_after(_LEAVING) as patience:
                await turn.acquire()
            if patience.cancelled_caught:
                await stream.send_all(b"somebody else has this console\n")
                return
            try:
                await _serve_client(machine, runner, stream)
            finally:
                turn.release()

    for listener in listeners:
        name = listener.socket.getsockname()
        say(f"console on {Tcp(name[0], name[1])}")
    task_status.started()
    await trio.serve_listeners(serve, listeners)


async def _serve_client(machine: GuestMachine, runner: Runner, stream: trio.SocketStream) -> None:
    sender, receiver = trio.open_memory_channel[bytes](_QUEUED)
    token = trio.lowlevel.current_trio_token()

    def sink(data: bytes) -> None:
        token.run_sync_soon(_offer, sender, data)

    machine.console.sinks.append(sink)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_forward, receiver, stream)
            async for data in stream:
                await type_in(machine, runner, bytes(data))
            nursery.cancel_scope.cancel()
    except* (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # the client went away
    finally:
        machine.console.sinks.remove(sink)


def _offer(sender: trio.MemorySendChannel[bytes], data: bytes) -> None:
    try:
        sender.send_nowait(data)
    except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
        return  # a client that does not read loses text, the guest loses no time


async def _forward(receiver: trio.MemoryReceiveChannel[bytes], stream: trio.SocketStream) -> None:
    async for data in receiver:
        await stream.send_all(data)
