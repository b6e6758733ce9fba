"""`monitor catch exception` and the signals of exceptions, over the wire and in gdb."""

from __future__ import annotations

import pytest

from emu.arch import X86_64
from emu.boot import boot_embedded
from emu.stops import ExceptionRaised, TripleFault
from gdbstub.actions import Resume, Send
from gdbstub.monitor import Monitor
from gdbstub.monitorservices import Services
from gdbstub.session import Session
from tests.support.fake_machine import CODE, FakeMachine


def attached(machine: FakeMachine) -> Session:
    session = Session(machine, X86_64, monitor=Monitor(Services(machine)))
    session.open()
    return session


def monitor(session: Session, line: str) -> str:
    """What the command prints."""
    action = session.handle(b"qRcmd," + line.encode().hex().encode())
    assert isinstance(action, Send)
    return "".join(bytes.fromhex(payload[1:].decode()).decode() for payload in action.payloads[:-1])


def test_exceptions_are_caught_one_by_one_and_all():
    """What is caught is shown each time; `off` takes back."""
    machine = FakeMachine(X86_64)
    session = attached(machine)
    assert monitor(session, "catch exception 14") == "caught: 14\n"
    assert monitor(session, "catch exception 6") == "caught: 6 14\n"
    assert monitor(session, "catch exception 14 off") == "caught: 6\n"
    monitor(session, "catch exception all")
    assert machine.caught_exceptions == frozenset(range(32))
    assert monitor(session, "catch exception all off") == "caught: none\n"


@pytest.mark.parametrize("line", ["32", "-1", "x", "\u0661", "14 on", "", "14 off off", "9" * 5000])
def test_bad_ones_are_refused(line: str):
    machine = FakeMachine(X86_64)
    said = monitor(attached(machine), f"catch exception {line}")
    assert "an exception is 0 to 31" in said or said.startswith("usage: catch exception N|all [off]")
    assert not machine.caught_exceptions


def test_it_is_the_debuggers_and_goes_with_it():
    """A client that nobody would tell of a stop is refused."""
    machine = FakeMachine(X86_64)
    visitor = Session(machine, X86_64, monitor=Monitor(Services(machine)))
    assert "for the debugger that is attached" in monitor(visitor, "catch exception 14")
    session = attached(machine)
    monitor(session, "catch exception 14")
    session.close()
    assert not machine.caught_exceptions


@pytest.mark.parametrize(("vector", "signal"), [(0, 8), (1, 5), (3, 5), (6, 4), (11, 10), (13, 11), (14, 11), (17, 10)])
def test_the_signal_is_gdbs_number_of_what_linux_sends(vector: int, signal: int):
    """SIGBUS is 10, not 7; also for the exception that began a triple fault."""
    session = Session(FakeMachine(X86_64), X86_64)
    for stop in (ExceptionRaised(CODE, vector), TripleFault(CODE, vector)):
        *_, reply = session.stopped(stop)
        assert reply.startswith(b"T%02x" % signal)


def test_the_text_tells_what_the_signal_cannot():
    session = Session(FakeMachine(X86_64), X86_64)
    text, _ = session.stopped(ExceptionRaised(CODE, 14, 2, 0x1000))
    assert bytes.fromhex(text[1:].decode()) == (
        b"Exception 14 (page fault), error code 0x2, address 0x1000; the guest's handler is next.\n"
    )


@pytest.mark.parametrize("bits", [64, 32])
def test_a_kernels_exceptions_over_the_wire(bits: int):
    """The embedded guest's `traps`: int3, divide error, ud2 and #GP, in this order, each one stop reply."""
    machine = boot_embedded(bits, "traps=1 exit=0")
    session = Session(machine, machine.registers.arch, monitor=Monitor(Services(machine)))
    session.open()
    monitor(session, "catch exception all")
    monitor(session, "catch exception 14 off")
    signals = []
    while True:
        resume = session.handle(b"vCont;c")
        assert isinstance(resume, Resume)
        *_, reply = session.stopped(session.advance(resume))
        if reply.startswith(b"W"):
            break
        signals.append(int(reply[1:3], 16))
    assert signals == [5, 8, 4, 11]
