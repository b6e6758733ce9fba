"""Z0 to Z4 byte by byte: what is inserted, what the stop reply says, what is left when the debugger goes."""

from __future__ import annotations

import pytest

from emu.arch import I386, X86_64
from emu.boot import boot_embedded
from emu.stops import WatchKind, Watchpoint
from gdbstub.actions import Resume
from gdbstub.breakpackets import MAX_BREAKPOINTS
from gdbstub.session import Session
from tests.support.asking import ask
from tests.support.fake_machine import CODE, DATA, FakeMachine

KINDS = [(b"2", WatchKind.WRITE), (b"3", WatchKind.READ), (b"4", WatchKind.ACCESS)]


# --------------------------------------------------------------------------------------------------------- breakpoints


@pytest.mark.parametrize(("kind", "hardware"), [(b"0", False), (b"1", True)])
def test_breakpoints_are_idempotent(session: Session, machine: FakeMachine, kind: bytes, hardware: bool):
    """Twice inserted and once removed is removed; removing again is fine."""
    place = b"%x,1" % (CODE + 3)
    assert ask(session, b"Z" + kind + b"," + place) == b"OK"
    assert ask(session, b"Z" + kind + b"," + place) == b"OK"
    assert machine.breakpoints == {(CODE + 3, hardware)}
    assert ask(session, b"z" + kind + b"," + place) == b"OK"
    assert ask(session, b"z" + kind + b"," + place) == b"OK"
    assert machine.breakpoints == set()


def test_closing_removes_this_sessions_breakpoints_only(session: Session, machine: FakeMachine):
    """Another owner's stay."""
    machine.insert_breakpoint(CODE + 1)
    ask(session, b"Z0,%x,1" % CODE)
    ask(session, b"z0,%x,1" % (CODE + 1))
    session.close()
    session.close()
    assert machine.breakpoints == {(CODE + 1, False)}


def test_the_number_of_breakpoints_is_bounded(session: Session):
    """A hostile client cannot fill our memory; what is there stays idempotent."""
    for address in range(MAX_BREAKPOINTS):
        assert ask(session, b"Z0,%x,1" % address) == b"OK"
    assert ask(session, b"Z0,ffffff,1") == b"E01"
    assert ask(session, b"Z0,0,1") == b"OK"


# -------------------------------------------------------------------------------------------------------- watchpoints


@pytest.mark.parametrize(("number", "kind"), KINDS)
def test_a_watchpoint_is_inserted_and_removed(session: Session, machine: FakeMachine, number: bytes, kind: WatchKind):
    """Both as often as gdb likes: the second time changes nothing."""
    for _ in range(2):
        assert ask(session, b"Z%b,20001,7" % number) == b"OK"
    assert machine.watchpoints == {(kind, 0x20001, 7)}
    for _ in range(2):
        assert ask(session, b"z%b,20001,7" % number) == b"OK"
    assert not machine.watchpoints


@pytest.mark.parametrize(("number", "kind"), KINDS)
def test_the_stop_says_which_kind_and_where(session: Session, number: bytes, kind: WatchKind):
    """In GDB's words, with signal 5, whatever the client has announced."""
    reply = session.stopped(Watchpoint(0x10000, kind, 0xFFFF800000020003))[-1]
    assert reply.startswith(b"T05")
    assert reply.endswith(b";%b:ffff800000020003;thread:1;" % kind.value.encode())


@pytest.mark.parametrize("payload", [b"Z2,20000", b"Z2,x,4", b"Z3,20000,", b"Z4,20000,0", b"Z2,20000,4;X1,22", b"z2,"])
def test_malformed_ones_are_refused(session: Session, machine: FakeMachine, payload: bytes):
    assert ask(session, payload) == b"E01"
    assert not machine.watchpoints


@pytest.mark.parametrize("kind", [b"0", b"1", b"2", b"3", b"4"])
def test_none_leads_past_the_last_address(session: Session, machine: FakeMachine, kind: bytes):
    """A length that wraps around is refused, of breakpoints too; the last byte is a place like others."""
    assert ask(session, b"Z%b,fffffffffffffffe,3" % kind) == b"E01"
    assert not machine.watchpoints
    assert not machine.breakpoints
    assert ask(session, b"Z%b,fffffffffffffffe,2" % kind) == b"OK"
    assert ask(session, b"z%b,fffffffffffffffe,2" % kind) == b"OK"


def test_their_number_is_bounded(session: Session):
    """What stands already can be said again."""
    for index in range(MAX_BREAKPOINTS):
        assert ask(session, b"Z2,%x,1" % (DATA + index)) == b"OK"
    assert ask(session, b"Z4,%x,1" % DATA) == b"E01"
    assert ask(session, b"Z2,%x,1" % DATA) == b"OK"


def test_none_is_left_when_the_debugger_goes(session: Session, machine: FakeMachine):
    ask(session, b"Z2,20000,4")
    ask(session, b"Z4,30000,1")
    session.close()
    assert not machine.watchpoints


@pytest.mark.parametrize("bits", [64, 32])
def test_a_kernels_clock_is_watched_over_the_wire(bits: int):
    """Z4 on the embedded guest's `jiffies`: a load and store in one instruction is one stop, and pc is behind it."""
    machine = boot_embedded(bits, "loop")
    session = Session(machine, machine.registers.arch)
    jiffies = machine.symbols.lookup("jiffies")[0].address
    assert ask(session, b"Z4,%x,%x" % (jiffies, bits // 8)) == b"OK"
    resume = session.handle(b"c")
    assert isinstance(resume, Resume)
    reply = session.stopped(session.advance(resume))[-1]
    assert b"awatch:%x;" % jiffies in reply
    assert reply.count(b"watch") == 1
    arch = I386 if bits == 32 else X86_64
    assert b"%02x:%b;" % (arch.numbers[arch.pc], machine.cpu.pc.to_bytes(bits // 8, "little").hex().encode()) in reply
