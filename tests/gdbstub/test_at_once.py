"""Packets that are answered in the server's own thread, over a socket and a real machine: nothing but speed differs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
import trio
import trio.testing

from emu import GuestMachine, boot_embedded
from emu.runner import open_runner
from emu.stops import Step
from gdbstub.rsp import NEED_DATA, Codec, Packet
from gdbstub.serving import Served, serve

PATIENCE = 30.0


class RawClient:
    """A debugger's end of a TCP connection."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), PATIENCE)
        self._codec = Codec(debugger=True)

    def ask(self, payload: bytes, behind: bytes = b"") -> bytes:
        """The reply; `behind` is sent in the same segment."""
        self.socket.sendall(self._codec.reply(payload) + behind)
        return self.read()

    def read(self) -> bytes:
        while True:
            event = self._codec.next_event()
            if event is NEED_DATA:
                data = self.socket.recv(0x10000)
                assert data, "the stub closed"
                self._codec.receive_data(data)
            elif isinstance(event, Packet):
                return event.payload

    def close(self) -> None:
        self.socket.close()


@pytest.fixture(params=[64, 32])
def bits(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


def near_a_tick(bits: int) -> GuestMachine:
    """The embedded guest in its busy loop, 900 instructions before the timer."""
    machine = boot_embedded(bits, "loop")
    machine.run(2_000_000)
    deadline = machine.clock.next_deadline_ns()
    assert deadline is not None
    machine.run(deadline - machine.clock.now_ns - 900)
    return machine


@pytest.fixture
def served(bits: int) -> Iterator[Served]:
    with serve(near_a_tick(bits), waiting=True) as served:
        yield served


def register(text: bytes, number: int) -> int:
    field = next(part for part in text.split(b";") if part.startswith(b"%02x:" % number))
    return int.from_bytes(bytes.fromhex(field.partition(b":")[2].decode()), "little")


def test_a_thousand_steps_are_those_of_the_machine_alone(served: Served, bits: int):
    """Every pc, over a timer interrupt too, with looks at memory and registers in between; then the same instructions
    have been executed, the handler's among them."""
    pc = 16 if bits == 64 else 8
    alone = near_a_tick(bits)
    before = alone.instructions
    with closing(RawClient(served.address)) as client:
        client.ask(b"?")
        for number in range(1000):
            step = alone.step()
            assert isinstance(step, Step)
            reply = client.ask(b"vCont;s:1")
            assert (reply[:3], register(reply, pc)) == (b"T05", step.pc), number
            if number % 7 == 0:
                assert client.ask(b"m%x,4" % step.pc) == alone.memory.read(step.pc, 4).hex().encode()
                assert len(client.ask(b"g")) == 2 * alone.registers.arch.packet_size
        assert served.call(lambda: served.machine.instructions) == alone.instructions > before + 1000


def test_range_steps_end_where_the_machine_leaves_the_range(served: Served, bits: int):
    """Short ranges, and one that holds all there is: there a breakpoint in the timer's handler ends the step, hundreds
    of instructions on."""
    pc = 16 if bits == 64 else 8
    alone = near_a_tick(bits)
    with closing(RawClient(served.address)) as client:
        client.ask(b"?")
        for size in (1, 2, 3, 1, 2, 3):
            first = alone.registers.read(alone.registers.arch.pc)
            while first <= (stop := alone.step()).pc < first + size:
                pass
            assert register(client.ask(b"vCont;r%x,%x:1" % (first, first + size)), pc) == stop.pc
        assert served.call(lambda: served.machine.instructions) == alone.instructions
        (target,) = alone.symbols.lookup("do_timer")
        before = alone.instructions
        alone.insert_breakpoint(target.address)
        alone.run(1_000_000)
        assert client.ask(b"Qqemu.sstep=1") == b"OK"  # interrupts are stepped into
        client.ask(b"Z0,%x,1" % target.address)
        reply = client.ask(b"vCont;r0,%x:1" % ((1 << bits) - 1))
        assert register(reply, pc) == target.address
        assert served.call(lambda: served.machine.instructions) == alone.instructions > before + 500


def test_ctrl_c_behind_a_step_stops_the_next_resume(served: Served):
    """The step has its reply; the interrupt that crossed it has its own when the client resumes, step or continue."""
    with closing(RawClient(served.address)) as client:
        client.ask(b"?")
        for resume in (b"vCont;s:1", b"vCont;c") * 10:
            assert client.ask(b"qC") == b"QC1"  # the last stop's reply is all sent then, and the step is done at once
            assert client.ask(b"vCont;s:1", behind=b"\x03").startswith(b"T05")
            assert client.ask(b"qC") == b"QC1"
            assert client.ask(resume).startswith(b"T02")
        assert client.ask(b"vCont;c", behind=b"\x03").startswith(b"T02")


def test_a_client_that_steps_without_end_leaves_others_their_turn(served: Served):
    """A visitor is answered meanwhile, though the one that steps always has its next packet there already, behind the
    acknowledgement of the last reply."""
    ended = threading.Event()
    steps = 0

    def step() -> None:
        nonlocal steps
        with closing(RawClient(served.address)) as client:
            client.ask(b"?")
            started.set()
            while not ended.is_set():
                client.ask(b"vCont;s:1")
                steps += 1

    started = threading.Event()
    thread = threading.Thread(target=step)
    thread.start()
    try:
        assert started.wait(PATIENCE)
        for _ in range(3):
            before = steps
            assert "instructions" in served.monitor("info stats")
            assert steps - before < 5_000, "it waited for more than its turn"
    finally:
        ended.set()
        thread.join(PATIENCE)
    assert not thread.is_alive()


async def test_nothing_is_done_at_once_while_the_machines_thread_is_busy():
    """The guest that runs, and one that nobody holds, are the other thread's."""
    machine = boot_embedded(64, "loop")
    async with open_runner(machine) as runner:
        assert not runner.is_idle()
        with pytest.raises(RuntimeError):
            runner.advance_at_once(machine.step, lambda stop: stop)
        await runner.pause()
        assert runner.is_idle()
        assert isinstance(runner.advance_at_once(machine.step, lambda stop: stop), Step)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runner.advance, machine.run, lambda stop: stop)
            await trio.testing.wait_all_tasks_blocked()
            assert not runner.is_idle()
            runner.interrupt()
        assert runner.is_idle()
        machine.request_stop()
        assert runner.advance_at_once(machine.step, lambda stop: stop) is None, "a stop that `advance` must judge"
        assert runner.advance_at_once(lambda: None, lambda stop: stop) is None, "there is more to do"
        runner.resume()
