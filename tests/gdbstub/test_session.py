"""A session packet by packet: what is announced, errors, monitor commands, any input."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.arch import X86_64
from emu.stops import Breakpoint
from gdbstub.actions import Detach, Kill, Resume, Send
from gdbstub.session import Session
from tests.support.asking import GDB_13, ask, make_session
from tests.support.fake_machine import CODE, PROGRAM, FakeMachine

# --------------------------------------------------------------------------------------------------------- negotiation


def test_only_what_has_a_handler_is_announced(session: Session):
    """The whole list for gdb 13.1: the packet size, and no word of a feature nobody handles."""
    words = set(ask(session, GDB_13).decode().split(";"))
    assert words == {
        "PacketSize=1000",
        "QStartNoAckMode+",
        "multiprocess+",
        "qXfer:threads:read+",
        "vContSupported+",
        "QNonStop+",
        "QThreadEvents+",
        "qXfer:features:read+",
        "qXfer:memory-map:read+",
        "qSearch:memory+",
        "binary-upload+",
        "swbreak+",
        "hwbreak+",
        "ConditionalBreakpoints+",
        "BreakpointCommands+",
        "qXfer:exec-file:read+",
    }


def test_negotiated_features_need_the_client(session: Session):
    """A client that does not know swbreak must never be sent it."""
    words = ask(session, b"qSupported").decode().split(";")
    assert not {"swbreak+", "hwbreak+", "multiprocess+"} & set(words)
    assert b"swbreak" not in session.stopped(Breakpoint(CODE))[-1]


def test_a_client_that_asks_again_without_a_list_is_remembered(session: Session):
    """As by gdb's `maint packet qSupported`: its thread ids and stop reasons stay what they were; a list replaces."""
    announced = ask(session, GDB_13)
    assert ask(session, b"qSupported") == announced
    assert ask(session, b"qC") == b"QCp1.1"
    assert b"swbreak" in session.stopped(Breakpoint(CODE))[-1]
    ask(session, b"qSupported:error-message+")
    assert ask(session, b"qC") == b"QC1"


def test_no_exec_file_without_files():
    """A capability that is absent is neither announced nor answered."""
    bare = Session(FakeMachine(X86_64), X86_64)
    assert b"exec-file" not in ask(bare, GDB_13)
    for payload in (b"qXfer:exec-file:read:1:0,100", b"vFile:setfs:0", b"qRcmd,68"):
        assert ask(bare, payload) == b""


@pytest.mark.parametrize(
    "payload",
    [
        b"vMustReplyEmpty",
        b"qTStatus",
        b"QNonstop:0",
        b"vContX",
        b"Z5,10000,4",
        b"qOffsets",
        b"vRun;",
        b"R0",
        b"",
        b"\xff",
    ],
)
def test_unknown_packets_are_answered_empty(session: Session, payload: bytes):
    """And do not make the client the debugger."""
    assert ask(session, payload) == b""
    assert not session.needs_target(payload)


def test_no_ack_mode_is_agreed(session: Session):
    """The server switches after the OK."""
    assert session.handle(b"QStartNoAckMode") == Send((b"OK",), start_no_ack=True)


@pytest.mark.parametrize(
    "payload", [b"?", b"g", b"m0,1", b"Hg0", b"qXfer:features:read:target.xml:0,1", b"Z0,0,1", b"D"]
)
def test_debugging_needs_the_target(session: Session, payload: bytes):
    """These stop the guest and make the client its debugger."""
    assert session.needs_target(payload)


@pytest.mark.parametrize("payload", [b"qSupported", b"QStartNoAckMode", b"qRcmd,68", b"vCont?", b"qSymbol::"])
def test_asking_does_not_need_the_target(session: Session, payload: bytes):
    """A `monitor` client looks while the guest runs."""
    assert not session.needs_target(payload)


def test_error_texts_go_only_to_clients_that_show_them(session: Session):
    """gdb before 16 knows `E nn` alone; texts never hold a byte that the wire would escape."""
    assert ask(session, b"pffff") == b"E01"
    ask(session, b"qSupported:error-message+")
    assert ask(session, b"pffff") == b"E.no register 65535"
    assert session.refuse("a#b$c}d*e\nf") == Send((b"E.a?b?c?d?e?f",))


# ------------------------------------------------------------------------------------------------------------- monitor


def test_monitor_answers_in_console_packets(session: Session):
    """Then OK, refused or not: gdb makes a protocol error of anything else."""
    action = session.handle(b"qRcmd," + b"symbols start".hex().encode())
    assert action == Send((b"O" + f"{CODE:016x}      6 start\n".encode().hex().encode(), b"OK"))
    assert session.handle(b"qRcmd," + b"nonsense".hex().encode()).payloads[-1] == b"OK"


def test_monitor_client_learns_of_a_refusal(session: Session):
    """By the feature word of ours."""
    ask(session, b"qSupported:monitor-status+")
    assert session.handle(b"qRcmd," + b"nonsense".hex().encode()).payloads[-1] == b"E01"
    assert session.handle(b"qRcmd," + b"help".hex().encode()).payloads[-1] == b"OK"


def test_long_monitor_output_is_cut_into_packets():
    """None is longer than announced, nothing is lost."""
    session = make_session(packet_size=0x80)
    *console, end = session.handle(b"qRcmd," + b"help".hex().encode()).payloads
    assert end == b"OK"
    assert max(map(len, console)) <= 0x80
    assert b"quit" in bytes.fromhex("".join(line[1:].decode() for line in console))


@pytest.mark.parametrize("payload", [b"qRcmd,6", b"qRcmd,zz"])
def test_monitor_text_that_is_none(session: Session, payload: bytes):
    """Bad digits."""
    assert ask(session, payload) == b"E01"


def test_stream_is_kept_until_it_can_be_sent(session: Session):
    """Lines in, console packets out, once."""
    woken = []
    session._wake = lambda: woken.append(True)
    session.stream("hit one")
    session.stream("hit two")
    assert session.take_output() == (b"O" + b"hit one\nhit two\n".hex().encode(),)
    assert session.take_output() == ()
    assert woken == [True, True]


# ----------------------------------------------------------------------------------------------------------- any input

words = st.sampled_from(
    b"g G p P m M X x c s C S H Hg T D Z0, z1, ? vCont; vKill; vFile: vFile:open: vFile:pread: qXfer: qRcmd, qSymbol: "
    b"qXfer:features:read: qXfer:exec-file:read: qSupported: qThreadExtraInfo, QStartNoAckMode qAttached".split()
)


@given(
    st.lists(st.tuples(words, st.binary(max_size=24) | st.text("0123456789abcdef,:;=-p.", max_size=24)), max_size=12)
)
def test_no_packet_raises(packets: list[tuple[bytes, bytes | str]]):
    """Whatever a client sends is answered with an action, and closing cleans up."""
    session = make_session()
    for word, rest in packets:
        action = session.handle(word + (rest if isinstance(rest, bytes) else rest.encode()))
        assert isinstance(action, Send | Resume | Detach | Kill)
    session.close()
    assert session._machine.breakpoints == set()


def test_reads_show_the_guests_own_bytes(session: Session):
    """What `Memory.read` gives is passed on as it is, with a breakpoint on it."""
    ask(session, b"Z0,%x,1" % CODE)
    assert ask(session, b"m%x,8" % CODE) == PROGRAM.hex().encode()
