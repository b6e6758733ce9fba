"""What is fuzzed: functions that take any bytes, and raise where something does not hold.

Rules: deterministic, and atheris is not known here, so that what it has found is a test like others. An input that a
client may not send does not exist; an error is an answer, an exception is a find.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

from emu.arch import I386, X86_64
from emu.boot import GuestMachine, boot_embedded
from emu.snapshot import Snapshot
from emu.stops import Budget, Interrupted, Stop
from gdbstub.files import FileTree
from gdbstub.monitor import Monitor
from gdbstub.rsp import NEED_DATA, Codec, Event, Notification, Packet, frame
from gdbstub.services import services
from gdbstub.session import Session
from gdbstub.threads import ThreadChoice
from gdbstub.tracepoints import Tracing
from probes import rawtext
from probes.manager import Manager
from tests.support.carried import Carried
from tests.support.fake_machine import CODE, FakeMachine

MAX_INSTRUCTIONS: Final = 500  # of one continue
MAX_STEPS: Final = 300  # of one input
START: Final = 100_000  # instructions; the embedded guest is in its loop then
LIMIT: Final = 64  # bytes of a packet, for the codec: both sides of it are near


def codec(data: bytes) -> None:
    """Whatever arrives is the same events in any portions, keeps no more than the limit, and what was sent arrives."""
    portion = data[0] % 8 + 1 if data else 1
    for debugger in (False, True):
        whole, due = _received(Codec(limit=LIMIT, debugger=debugger), data, len(data) or 1)
        assert (whole, due) == _received(Codec(limit=LIMIT, debugger=debugger), data, portion)
    for event in whole:
        if isinstance(event, (Packet, Notification)):
            sent = Codec()
            sent.receive_data(frame(event.payload, runs=False))
            assert sent.next_event() == Packet(event.payload)
    debugger_end = Codec(debugger=True)
    debugger_end.receive_data(frame(data))
    assert debugger_end.next_event() == Packet(data)


def _received(end: Codec, data: bytes, portion: int) -> tuple[list[Event], bytes]:
    """The events of `data` and all that is sent for them."""
    events: list[Event] = []
    due = b""
    for start in range(0, len(data), portion):
        end.receive_data(data[start : start + portion])
        while (event := end.next_event()) is not NEED_DATA:
            events.append(event)
            due += end.acknowledgements()
        assert len(end._input) <= LIMIT + 3
    return events, due


def session(data: bytes) -> None:
    """A conversation with a machine of a handful of instructions: fast, and every packet is there."""
    arch = I386 if data[:1] > b"\x7f" else X86_64
    machine = FakeMachine(arch)

    def restart() -> None:
        machine.registers.values[arch.pc] = CODE

    _converse(machine, data[1:], restart=restart)
    assert not machine.breakpoints
    assert not machine.watchpoints


def machine(data: bytes) -> None:
    """A conversation with the embedded guest in its loop: real memory, registers, breakpoints, probes and runs."""
    guest, moment = _embedded(32 if data[:1] > b"\x7f" else 64)
    guest.restore(moment)
    probes = Manager(guest)
    served = services(guest, probes, quit=lambda: None, threads=(threads := ThreadChoice()))
    tracing = Tracing(guest, guest.registers.arch, probes)
    try:
        _converse(
            guest,
            data[1:],
            restart=lambda: guest.restore(moment),
            monitor=Monitor(served),
            tracing=tracing,
            threads=threads,
        )
        assert tracing.standing or not guest.breakpoints.wanted
        assert not guest.watched._watches
        assert not guest.caught_exceptions
    finally:
        tracing.reset()
        for vaddr, hardware in tuple(tracing.standing):
            guest.remove_breakpoint(vaddr, hardware)
        probes.reset()


def monitor(data: bytes) -> None:
    """Lines of monitor commands over the embedded guest and its probes, which runs a little behind each empty one."""
    guest, moment = _embedded(32 if data[:1] > b"\x7f" else 64)
    guest.restore(moment)
    probes = Manager(guest)
    commands = Monitor(services(guest, probes, quit=lambda: None, threads=ThreadChoice()))
    try:
        for line in data[1:].split(b"\n"):
            if not line:
                guest.run(MAX_INSTRUCTIONS)
                continue
            answer = commands.execute(rawtext.decode(line), lambda text: None)
            assert answer.lines or not answer.refused, "a refusal says why"
            assert all("\n" not in text for text in answer.lines)
    finally:
        probes.reset()


@functools.cache
def _embedded(bits: int) -> tuple[GuestMachine, Snapshot]:
    guest = boot_embedded(bits, "loop")
    guest.run(START)
    return guest, guest.snapshot()


def _converse(target: Any, data: bytes, **services: Any) -> None:
    """A packet a line, and an end of the guest's run for each line that is empty."""
    files = FileTree({"/vmlinux": b"\x7fELF" + bytes(60)}, exec_file="/vmlinux")
    client = Carried(Session(_Bounded(target), target.registers.arch, files=files, **services))
    try:
        for line in data.split(b"\n"):
            if line:
                client.packet(line)
            else:
                client.end_run()
            client.check()
        client.end_run()
    finally:
        client.session.close()


class _Bounded:
    """A machine whose runs end, as if somebody had interrupted them."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self._steps = MAX_STEPS

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def run(self) -> Stop:
        stop = self._target.run(MAX_INSTRUCTIONS)
        return self._interrupted() if isinstance(stop, Budget) else stop

    def step(self, *, into_interrupts: bool = False) -> Stop:
        self._steps -= 1
        return self._target.step(into_interrupts=into_interrupts) if self._steps > 0 else self._interrupted()

    def _interrupted(self) -> Stop:
        return Interrupted(self._target.registers.read(self._target.registers.arch.pc))


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "codec": codec,
    "session": session,
    "machine": machine,
    "monitor": monitor,
}
