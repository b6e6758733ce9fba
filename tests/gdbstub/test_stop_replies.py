"""How a session resumes, what it says of each stop, and of whose: packet by packet."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from emu.arch import I386
from emu.stops import (
    Breakpoint,
    Budget,
    ConsoleMatch,
    Defect,
    GuestExit,
    Halted,
    Interrupted,
    Panic,
    PowerOff,
    Reset,
    Step,
    Stop,
    TripleFault,
)
from gdbstub.actions import Detach, Kill, Resume
from gdbstub.session import Session
from tests.support.asking import GDB_13, ask, little, make_session
from tests.support.fake_machine import CODE, DATA, STACK, FakeMachine

# --------------------------------------------------------------------------------------------------------- run control


@pytest.mark.parametrize(
    ("payload", "resume"),
    [
        (b"c", Resume()),
        (b"C05", Resume()),
        (b"s", Resume(step=True)),
        (b"S05", Resume(step=True)),
        (b"vCont;c", Resume()),
        (b"vCont;c:p1.-1", Resume()),
        (b"vCont;C05:1", Resume()),
        (b"vCont;s:p1.1;c:p1.-1", Resume(step=True)),
        (b"vCont;S05:1;c", Resume(step=True)),
        (b"vCont;r10000,10008:p1.1;c:p1.-1", Resume(step=True, stop_range=(0x10000, 0x10008))),
    ],
)
def test_resumes_are_understood(session: Session, payload: bytes, resume: Resume):
    """The first action for our thread counts."""
    assert session.handle(payload) == resume


@pytest.mark.parametrize("payload", [b"cq", b"vCont;", b"vCont;x", b"vCont;s:2", b"vCont;r1", b"vCont", b"vCont;t"])
def test_malformed_resumes_do_not_run(session: Session, payload: bytes):
    """An error, and no stop reply is owed."""
    assert ask(session, payload) == b"E01"


@pytest.mark.parametrize("payload", [b"c%x" % DATA, b"C05;%x" % DATA, b"s%x" % DATA, b"S05;%x" % DATA])
def test_resume_at_an_address(session: Session, machine: FakeMachine, payload: bytes):
    """pc is moved first."""
    assert isinstance(session.handle(payload), Resume)
    assert machine.pc == DATA


def test_range_step_stops_outside_the_range(session: Session, machine: FakeMachine):
    """CODE .. CODE+6 is four instructions; the jump at CODE+6 is outside."""
    assert session.advance(Resume(step=True, stop_range=(CODE, CODE + 6))) == Step(CODE + 6)
    assert machine.instructions == 4


def test_range_step_steps_at_least_once(session: Session, machine: FakeMachine):
    """Even an empty range."""
    assert session.advance(Resume(step=True, stop_range=(CODE, CODE))) == Step(CODE + 1)


def test_range_step_sees_a_breakpoint_inside(session: Session, machine: FakeMachine):
    """gdb relies on it: it does not look at every step."""
    ask(session, b"Z0,%x,1" % (CODE + 3))
    assert session.advance(Resume(step=True, stop_range=(CODE, CODE + 6))) == Breakpoint(CODE + 3)


def test_range_step_ends_on_request(session: Session, machine: FakeMachine):
    """A range that holds a whole loop would run for ever."""
    machine.request_stop()
    assert session.advance(Resume(step=True, stop_range=(CODE, CODE + 8))) == Interrupted(CODE)


def reply(session: Session, stop: Stop) -> bytes:
    return session.stopped(stop)[-1]


EXPEDITED = b"06:%b;07:%b;10:%b;" % (little(0), little(STACK + 0x800), little(CODE))


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (Breakpoint(CODE), b"T05" + EXPEDITED + b"swbreak:;thread:p1.1;"),
        (Breakpoint(CODE, hardware=True), b"T05" + EXPEDITED + b"hwbreak:;thread:p1.1;"),
        (Step(CODE), b"T05" + EXPEDITED + b"thread:p1.1;"),
        (Interrupted(CODE), b"T02" + EXPEDITED + b"thread:p1.1;"),
        (Halted(CODE, "off"), b"T02" + EXPEDITED + b"thread:p1.1;"),
        (Panic(CODE, "boom"), b"T06" + EXPEDITED + b"thread:p1.1;"),
        (Defect(CODE, "Traceback"), b"T06" + EXPEDITED + b"thread:p1.1;"),
        (TripleFault(CODE, 14), b"T0b" + EXPEDITED + b"thread:p1.1;"),
        (PowerOff(), b"W00;process:1"),
        (ConsoleMatch("login:"), b"W00;process:1"),
        (Budget(1000), b"W01;process:1"),
        (GuestExit(5), b"W05;process:1"),
        (Reset(), b"W00;process:1"),
        (Reset(requested=False), b"W03;process:1"),
    ],
)
def test_each_stop_has_its_reply(session: Session, stop: Stop, expected: bytes):
    """GDB's signal numbers, expedited registers, always a thread; and `?` says the same again."""
    ask(session, GDB_13)
    assert reply(session, stop) == expected
    assert ask(session, b"?") == expected


def test_reason_of_an_unusual_stop_is_told_first(session: Session):
    """As console text before the reply, where gdb's own message would say too little."""
    *console, last = session.stopped(Panic(CODE, "no init"))
    assert [bytes.fromhex(line[1:].decode()) for line in console] == [b"The guest kernel panics: no init\n"]
    assert last.startswith(b"T06")
    assert len(session.stopped(Step(CODE))) == 1
    (line, last) = session.stopped(Step(CODE, left=CODE + 4))
    assert b"An interrupt led away from" in bytes.fromhex(line[1:].decode())
    assert last.startswith(b"T05")


def test_plain_thread_ids_without_multiprocess(session: Session):
    """A client that did not say multiprocess+ gets no `p`."""
    assert reply(session, Step(CODE)).endswith(b"thread:1;")
    assert reply(session, PowerOff()) == b"W00"
    assert ask(session, b"qC") == b"QC1"
    assert ask(session, b"qfThreadInfo") == b"m1"


def test_i386_expedites_its_own_registers():
    """ebp is 5, esp 4, eip 8, each four bytes."""
    session = make_session(I386)
    assert ask(session, b"?") == b"T0505:00000000;04:00080300;08:00000100;thread:1;"


# ----------------------------------------------------------------------------------------------- processes and threads


def test_threads_are_the_processors(session: Session):
    """One CPU, by either kind of query."""
    ask(session, GDB_13)
    assert ask(session, b"qC") == b"QCp1.1"
    assert ask(session, b"qfThreadInfo") == b"mp1.1"
    assert ask(session, b"qsThreadInfo") == b"l"
    assert bytes.fromhex(ask(session, b"qThreadExtraInfo,p1.1").decode()) == b"CPU 0"
    document = ask(session, b"qXfer:threads:read::0,1000")
    assert ElementTree.fromstring(document[1:])[0].attrib == {"id": "p1.1", "core": "0", "name": "CPU 0"}


@pytest.mark.parametrize(
    "payload", [b"Hg0", b"Hgp0.0", b"Hc-1", b"Hcp1.-1", b"Hg1", b"Hgp1.1", b"T1", b"Tp1.1", b"Hgp1"]
)
def test_our_thread_and_any_thread_exist(session: Session, payload: bytes):
    """In both notations."""
    assert ask(session, payload) == b"OK"


@pytest.mark.parametrize(
    "payload", [b"Hg2", b"Hgp2.1", b"Tp1.2", b"T", b"Hgx", b"Hgp1.", b"Tp1-1", b"qThreadExtraInfo,9"]
)
def test_other_threads_do_not(session: Session, payload: bytes):
    """Nor malformed ids."""
    assert ask(session, payload) == b"E01"


def test_the_machine_outlives_its_debugger(session: Session):
    """qAttached 1 makes gdb detach at quit; D, k and vKill say what they say."""
    assert ask(session, b"qAttached:1") == b"1"
    assert session.handle(b"D") == session.handle(b"D;1") == Detach(b"OK")
    assert session.handle(b"k") == Kill(None)
    assert session.handle(b"vKill;1") == Kill(b"OK")
    assert ask(session, b"vKill;2") == b"E01"
