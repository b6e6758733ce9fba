"""A session packet by packet: payload in, payload out, on the fake machine."""

from __future__ import annotations

import struct
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.arch import I386, X86_64, Arch, target_xml
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
from gdbstub.actions import Detach, Kill, Resume, Send
from gdbstub.breakpackets import MAX_BREAKPOINTS
from gdbstub.files import FileTree
from gdbstub.monitor import Monitor
from gdbstub.monitorservices import Services
from gdbstub.session import Session
from tests.support.fake_machine import CODE, DATA, PAGE, PROGRAM, STACK, FakeMachine

KERNEL = bytes(range(256)) * 40


def make(arch: Arch = X86_64, packet_size: int = 0x1000) -> Session:
    machine = FakeMachine(arch)
    return Session(
        machine,
        arch,
        files=FileTree({"/vmlinux": lambda: KERNEL, "/sys/notes": b"note"}, exec_file="/vmlinux"),
        monitor=Monitor(Services(machine)),
        packet_size=packet_size,
    )


@pytest.fixture
def session() -> Session:
    return make()


@pytest.fixture
def machine(session: Session) -> FakeMachine:
    return session._machine


def ask(session: Session, payload: bytes) -> bytes:
    """The one payload that answers."""
    action = session.handle(payload)
    assert isinstance(action, Send), action
    assert len(action.payloads) == 1
    return action.payloads[0]


def little(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little").hex().encode()


# --------------------------------------------------------------------------------------------------------- negotiation

GDB_13 = (
    b"qSupported:multiprocess+;swbreak+;hwbreak+;qRelocInsn+;fork-events+;vfork-events+;exec-events+;vContSupported+;"
    b"QThreadEvents+;no-resumed+;memory-tagging+;xmlRegisters=i386"
)


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


# ----------------------------------------------------------------------------------------------------------- registers


@pytest.mark.parametrize("arch", [I386, X86_64], ids=lambda arch: arch.name)
def test_description_is_served_in_parts(arch: Arch):
    """Read in small windows it is the generated document."""
    session = make(arch, packet_size=0x100)
    document = b""
    while True:
        part = ask(session, b"qXfer:features:read:target.xml:%x,200" % len(document))
        document += part[1:]
        if part[:1] == b"l":
            break
    assert document.decode() == target_xml(arch)
    assert ElementTree.fromstring(document).tag == "target"


def test_description_has_one_annex(session: Session):
    """E00 for another, as the manual says; E01 beyond the end."""
    assert ask(session, b"qXfer:features:read:other.xml:0,100") == b"E00"
    assert ask(session, b"qXfer:features:read:target.xml:fffff,100") == b"E01"


@pytest.mark.parametrize("arch", [I386, X86_64], ids=lambda arch: arch.name)
def test_all_registers_are_read_in_order(arch: Arch):
    """`g` is every register's bytes, at the place its number says."""
    session = make(arch)
    for index, name in enumerate(arch.names):
        session._machine.registers.write(name, index + 1)
    expected = b"".join(little(index + 1, register.size) for index, register in enumerate(arch.registers))
    assert ask(session, b"g") == expected


def test_all_registers_are_written(session: Session, machine: FakeMachine):
    """`G` is the inverse of `g`."""
    values = {name: index + 7 for index, name in enumerate(X86_64.names)}
    packet = b"G" + X86_64.pack(list(values.values())).hex().encode()
    assert ask(session, packet) == b"OK"
    assert machine.registers.values == values


def test_one_register_is_read_and_written(session: Session, machine: FakeMachine):
    """By number, in its own size: rip is 0x10, xmm0 0x28."""
    assert ask(session, b"p10") == little(CODE)
    assert ask(session, b"P28=" + b"0102" + b"00" * 14) == b"OK"
    assert machine.registers.values["xmm0"] == 0x0201
    assert ask(session, b"p28") == b"0102" + b"00" * 14


@pytest.mark.parametrize("payload", [b"p", b"pzz", b"p999", b"P10", b"P10=00", b"P10=zz", b"G00", b"Gq", b"G"])
def test_malformed_register_packets_change_nothing(session: Session, machine: FakeMachine, payload: bytes):
    """E01, and the registers are as before."""
    before = dict(machine.registers.values)
    assert ask(session, payload) == b"E01"
    assert machine.registers.values == before


# -------------------------------------------------------------------------------------------------------------- memory


def test_memory_is_read_in_hex_and_binary(session: Session):
    """`m` in digits, `x` with its leading `b`."""
    assert ask(session, b"m%x,4" % DATA) == b"64617461"
    assert ask(session, b"x%x,4" % DATA) == b"bdata"
    assert ask(session, b"x%x,0" % DATA) == b"b"


def test_memory_is_written_in_hex_and_binary(session: Session, machine: FakeMachine):
    """`M` and `X`; gdb probes `X` with no bytes."""
    assert ask(session, b"M%x,2:4142" % DATA) == b"OK"
    assert ask(session, b"X%x,2:CD" % (DATA + 2)) == b"OK"
    assert ask(session, b"X%x,0:" % DATA) == b"OK"
    assert machine.memory.read(DATA, 4) == b"ABCD"


def test_reading_ends_where_memory_ends(session: Session):
    """A prefix is a right answer; nothing at all is EFAULT, never zeros."""
    last = STACK + PAGE - 2
    assert ask(session, b"m%x,4" % last) == b"0000"
    assert ask(session, b"x%x,4" % last) == b"b\0\0"
    assert ask(session, b"m%x,4" % (STACK + PAGE)) == b"E14"
    assert ask(session, b"x%x,4" % (STACK + PAGE)) == b"E14"


def test_writing_over_the_end_writes_nothing(session: Session, machine: FakeMachine):
    """All or nothing."""
    last = STACK + PAGE - 1
    assert ask(session, b"M%x,2:ffff" % last) == b"E14"
    assert machine.memory.read(last, 1) == b"\0"


def test_a_read_is_cut_to_the_packet_size():
    """The client asks for more than was announced; the reply still fits."""
    session = make(packet_size=0x100)
    assert len(ask(session, b"m%x,ffffffffffff" % CODE)) == 0x100
    session._machine.memory.write(CODE, b"#" * 0x200)
    assert ask(session, b"x%x,200" % CODE) == b"b" + b"#" * 127


@pytest.mark.parametrize(
    "payload",
    b"m|m0|m,|m0,|m-1,4|m 1,4|m1_0,4|m11111111111111111,1|m1,1,1|x1|M20000,1|M20000,2:41|M20000,1:4|X,0:".split(b"|"),
)
def test_malformed_memory_packets_are_refused(session: Session, payload: bytes):
    """One error for all of them."""
    assert ask(session, payload) == b"E01"


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
    session = make(I386)
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
    session = make(packet_size=0x80)
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


# --------------------------------------------------------------------------------------------------------------- files


def path(name: str) -> bytes:
    return name.encode().hex().encode()


def test_exec_file_is_named(session: Session):
    """With or without a process id as annex."""
    assert ask(session, b"qXfer:exec-file:read:1:0,fff") == b"l/vmlinux"
    assert ask(session, b"qXfer:exec-file:read::0,4") == b"m/vml"


def test_a_file_is_read_whole(session: Session):
    """open, fstat, pread to the end, close: escapes never make a reply too long."""
    assert ask(session, b"vFile:setfs:0") == b"F0"
    assert ask(session, b"vFile:open:" + path("/vmlinux") + b",0,1c0") == b"F0"
    result, _, attachment = ask(session, b"vFile:fstat:0").partition(b";")
    assert result == b"F40"
    assert struct.unpack(">7I3Q3I", attachment)[7] == len(KERNEL)
    content = b""
    while True:
        result, _, attachment = ask(session, b"vFile:pread:0,1000,%x" % len(content)).partition(b";")
        assert result == b"F%x" % len(attachment)
        if not attachment:
            break
        content += attachment
    assert content == KERNEL
    assert ask(session, b"vFile:close:0") == b"F0"
    assert ask(session, b"vFile:pread:0,1,0") == b"F-1,9"


@pytest.mark.parametrize(
    ("payload", "errno"),
    [
        (b"vFile:open:" + path("/etc/passwd") + b",0,0", 2),
        (b"vFile:open:" + path("/vmlinux/../etc/passwd") + b",0,0", 2),
        (b"vFile:open:" + path("/vmlinux") + b",1,0", 30),
        (b"vFile:open:" + path("/vmlinux") + b",601,1b6", 30),
        (b"vFile:open:" + path("/sys") + b",0,0", 21),
        (b"vFile:close:7", 9),
        (b"vFile:fstat:7", 9),
        (b"vFile:readlink:" + path("/vmlinux"), 22),
        (b"vFile:readlink:" + path("/nosuch"), 2),
        (b"vFile:stat:" + path("/nosuch"), 2),
    ],
)
def test_file_errors_are_numbers_of_gdb(session: Session, payload: bytes, errno: int):
    """Nothing of the host's file system is there, and nothing can be written."""
    assert ask(session, payload) == b"F-1,%x" % errno


def test_open_files_are_bounded(session: Session):
    """EMFILE, and a closed number is used again."""
    opened = [ask(session, b"vFile:open:" + path("/vmlinux") + b",0,0") for _ in range(65)]
    assert opened[-1] == b"F-1,18"
    ask(session, b"vFile:close:3")
    assert ask(session, b"vFile:open:" + path("/vmlinux") + b",0,0") == b"F3"


def test_stat_knows_files_and_folders(session: Session):
    """The mode's type bits."""
    for name, kind in (("/vmlinux", 0o100000), ("/sys", 0o040000), ("/", 0o040000)):
        attachment = ask(session, b"vFile:stat:" + path(name)).partition(b";")[2]
        assert struct.unpack(">7I3Q3I", attachment)[2] & 0o170000 == kind


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
    session = make()
    for word, rest in packets:
        action = session.handle(word + (rest if isinstance(rest, bytes) else rest.encode()))
        assert isinstance(action, Send | Resume | Detach | Kill)
    session.close()
    assert session._machine.breakpoints == set()


def test_reads_show_the_guests_own_bytes(session: Session):
    """What `Memory.read` gives is passed on as it is, with a breakpoint on it."""
    ask(session, b"Z0,%x,1" % CODE)
    assert ask(session, b"m%x,8" % CODE) == PROGRAM.hex().encode()
