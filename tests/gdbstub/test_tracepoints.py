"""Tracepoints packet by packet, on the embedded guest: definition, run, frames, upload, and what is refused."""

from __future__ import annotations

import struct
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu.arch import I386, X86_64
from emu.stops import Breakpoint, Interrupted
from gdbstub.actions import Send
from gdbstub.session import Session
from gdbstub.tracebuffer import DEFAULT_SIZE, MAX_FRAMES, MAX_SIZE, Frame, TraceBuffer
from gdbstub.tracepoints import Tracing
from probes.kprobe import Kprobe
from tests.support.tracing import Target

ALL_REGISTERS = b"R" + b"FF" * 12
ERROR = b"E01"


@pytest.fixture(params=[64, 32])
def target(request: pytest.FixtureRequest) -> Target:
    return Target(request.param)


@pytest.fixture
def wide() -> Target:
    """Where the word size makes no difference."""
    return Target(64)


def define(target: Target, *actions: bytes, number: int = 1, symbol: str = "target", rest: bytes = b"E:0:0") -> bytes:
    """A tracepoint at a function's first instruction. -> its `number:address`."""
    place = b"%x:%x" % (number, target.address(symbol))
    target.accept(b"QTDP:%b:%b%b" % (place, rest, b"-" if actions else b""))
    for action in actions:
        more = b"-" if action is not actions[-1] else b""
        target.accept(b"QTDP:-%b:%b%b" % (place, action, more))
    return place


def x(code: str) -> bytes:
    return b"X%x,%b" % (len(code) // 2, code.encode())


def fields(status: bytes) -> dict[str, str]:
    """The named parts of a qTStatus reply; `running` is its first letter's digit."""
    first, *rest = status.decode().removesuffix(":").split(";")
    return {"running": first[1:], **dict(part.split(":", 1) for part in rest)}


def traced(target: Target, *actions: bytes, **how: object) -> bytes:
    """Define, run a little, stop. -> `number:address`."""
    target.accept(b"QTinit")
    place = define(target, *actions, **how)  # type: ignore[arg-type]
    target.accept(b"QTStart")
    target.run()
    target.accept(b"QTStop")
    return place


# --------------------------------------------------------------------------------------------------- features, status


def test_features_are_announced_with_their_handlers(wide: Target):
    """And none of fast or static tracepoints."""
    words = set(wide.ask(b"qSupported").decode().split(";"))
    assert {
        "ConditionalTracepoints+",
        "InstallInTrace+",
        "tracenz+",
        "TracepointSource+",
        "TraceStateVariables+",
        "EnableDisableTracepoints+",
        "DisconnectedTracing+",
        "QTBuffer:size+",
        "qXfer:traceframe-info:read+",
    } <= words
    assert not {"FastTracepoints+", "StaticTracepoints+"} & words


def test_status_before_any_trace(wide: Target):
    """Every field of the manual's, and a buffer that is empty."""
    assert fields(wide.ask(b"qTStatus")) == {
        "running": "0",
        "tnotrun": "0",
        "tframes": "0",
        "tcreated": "0",
        "tfree": f"{DEFAULT_SIZE:x}",
        "tsize": f"{DEFAULT_SIZE:x}",
        "circular": "0",
        "disconn": "0",
        "starttime": "0",
        "stoptime": "0",
        "username": "",
        "notes": "",
    }


def test_status_of_a_run(wide: Target):
    """Running, then stopped by a command with its note; times are the guest's."""
    define(wide)
    wide.accept(b"QTNotes:user:6d65;notes:68690a;", b"QTDisconnected:1", b"QTBuffer:circular:1", b"QTStart")
    started = wide.machine.clock.now_ns // 1000
    wide.run()
    running = fields(wide.ask(b"qTStatus"))
    assert running["running"] == "1"
    assert running["starttime"] == f"{started:x}"
    wide.accept(b"QTStop", b"QTNotes:tstop:646f6e65;")
    stopped = fields(wide.ask(b"qTStatus"))
    assert stopped["running"] == "0"
    assert stopped["tstop"] == "646f6e65:0"
    assert (stopped["username"], stopped["notes"]) == ("6d65", "68690a")
    assert (stopped["circular"], stopped["disconn"]) == ("1", "1")
    assert int(stopped["stoptime"], 16) == wide.machine.clock.now_ns // 1000
    assert int(stopped["tframes"], 16) > 0


# ---------------------------------------------------------------------------------------------------- what is collected


def test_registers_of_a_hit(target: Target):
    """`g` in a frame shows what a breakpoint there shows; without a frame, the machine."""
    first = target.machine.snapshot()
    target.machine.insert_breakpoint(target.address("target"))
    assert target.machine.run(100_000) == Breakpoint(target.address("target"))
    at_the_hit = target.ask(b"g")
    target.machine.remove_breakpoint(target.address("target"))
    target.machine.restore(first)
    traced(target, ALL_REGISTERS)
    now = target.ask(b"g")
    assert now != at_the_hit
    assert target.ask(b"QTFrame:0") == b"F0T1"
    assert target.ask(b"g") == at_the_hit
    number = target.arch.numbers[target.arch.pc]
    word = target.address("target").to_bytes(target.arch.word_size, "little")
    assert target.ask(b"p%x" % number) == word.hex().encode()
    assert target.ask(b"QTFrame:ffffffff") == b"OK"
    assert target.ask(b"g") == now


def test_registers_that_were_not_collected(target: Target):
    """The pc is that of the tracepoint; all else is `xx`."""
    traced(target)
    target.ask(b"QTFrame:0")
    numbers, size = target.arch.numbers, target.arch.word_size
    assert target.ask(b"p%x" % numbers[target.arch.expedited[1]]) == b"xx" * size
    word = target.address("target").to_bytes(size, "little").hex().encode()
    assert target.ask(b"p%x" % numbers[target.arch.pc]) == word
    assert target.ask(b"g").count(word) == 1
    assert set(target.ask(b"g").replace(word, b"")) == {ord("x")}


def test_a_mask_adds_to_the_general_registers(wide: Target):
    """They are always there; a vector register is, where its bit is set."""
    numbers = wide.arch.numbers
    traced(wide, b"R%x" % (1 << numbers["xmm1"]))
    wide.ask(b"QTFrame:0")
    assert b"x" not in wide.ask(b"p%x" % numbers["rsi"])
    assert b"x" not in wide.ask(b"p%x" % numbers["xmm1"])
    assert wide.ask(b"p%x" % numbers["xmm0"]) == b"xx" * 16


def test_memory_of_a_hit(target: Target):
    """By address, by base register, by expression; elsewhere there is none, and nothing can be written."""
    name = target.address("copy_source")
    sp = target.arch.numbers[target.arch.expedited[1]]
    traced(target, b"M-1,%x,8" % name, b"M%x,0,4" % sp, x(f"26{sp:04x}0d1027"), ALL_REGISTERS)
    target.ask(b"QTFrame:0")
    stack = int.from_bytes(bytes.fromhex(target.ask(b"p%x" % sp).decode()), "little")
    assert target.ask(b"m%x,8" % name) == target.machine.memory.read(name, 8).hex().encode()
    assert len(target.ask(b"m%x,40" % stack)) == 32  # what was collected of it, and no more
    assert target.ask(b"m%x,8" % (name + 8)) == b"E14"
    assert target.ask(b"x%x,4" % name) == b"b" + target.machine.memory.read(name, 4)
    assert target.ask(b"M%x,1:00" % name) == ERROR
    assert target.ask(b"P%x=%b" % (sp, b"00" * target.arch.word_size)) == ERROR
    assert target.ask(b"G00") == ERROR


def test_read_only_memory_is_looked_up(wide: Target):
    """What the debugger has called unchanging is read from the guest."""
    code = wide.address("target")
    traced(wide)
    wide.accept(b"QTro:%x,%x:1000,2000" % (code, code + 64))
    wide.ask(b"QTFrame:0")
    assert wide.ask(b"m%x,4" % code) == wide.machine.memory.read(code, 4).hex().encode()
    assert wide.ask(b"m%x,4" % (code - 0x100)) == b"E14"


def test_what_a_frame_holds(wide: Target):
    """traceframe-info names memory and variables; without a frame it is an error."""
    name = wide.address("copy_source")
    wide.accept(b"QTinit", b"QTDV:2:7:0:666f6f")
    define(wide, b"M-1,%x,8" % name, x("2e000227"))
    wide.accept(b"QTStart")
    wide.run()
    wide.accept(b"QTStop")
    assert wide.ask(b"qXfer:traceframe-info:read::0,1000") == ERROR
    wide.ask(b"QTFrame:0")
    document = wide.ask(b"qXfer:traceframe-info:read::0,1000")
    assert document[:1] == b"l"
    root = ElementTree.fromstring(document[1:].split(b'.dtd">')[1])
    assert [(child.tag, dict(child.attrib)) for child in root] == [
        ("memory", {"start": f"{name:#x}", "length": "0x8"}),
        ("tvar", {"id": "0x2"}),
    ]
    assert wide.ask(b"qTV:2") == b"V7"
    assert wide.ask(b"qTV:1") == b"U"


def test_conditions(wide: Target):
    """Only hits where it holds are collected."""
    rdi = wide.arch.numbers["rdi"]
    wide.accept(b"QTinit")
    define(wide, ALL_REGISTERS, rest=b"E:0:0:" + x(f"26{rdi:04x}22010f27"))  # odd arguments
    wide.accept(b"QTStart")
    wide.run(20_000)
    frames = int(fields(wide.ask(b"qTStatus"))["tframes"], 16)
    arguments = []
    for number in range(frames):
        wide.ask(b"QTFrame:%x" % number)
        arguments.append(int.from_bytes(bytes.fromhex(wide.ask(b"p%x" % rdi).decode()), "little"))
    assert frames > 2
    assert all(argument % 2 for argument in arguments)


@pytest.mark.parametrize("where", ["condition", "action"])
def test_an_error_ends_the_trace(wide: Target, where: str):
    """Its text is in the status, with the tracepoint's number."""
    bad = x("22081a27")
    wide.accept(b"QTinit")
    if where == "condition":
        define(wide, number=5, rest=b"E:0:0:" + bad)
    else:
        define(wide, bad, number=5)
    wide.accept(b"QTStart")
    wide.run()
    status = fields(wide.ask(b"qTStatus"))
    assert status["running"] == "0"
    assert status["terror"] == b"invalid memory access at 0x8".hex() + ":5"


def test_registers_are_those_of_the_description_that_was_read(wide: Target):
    """A session that began in another mode of the processor: `reg 16` is rip for gdb, and not that mode's st0."""
    machine = wide.machine
    session = Session(machine, I386, tracing=Tracing(machine, I386, wide.probes))
    define_rip = b"QTDP:1:%x:E:0:0:%b" % (wide.address("target"), x("26001027"))
    assert session.handle(define_rip) == Send((ERROR,))
    session.handle(b"qXfer:features:read:target.xml:0,10")
    assert session.handle(define_rip) == Send((b"OK",))


def test_state_variables(wide: Target):
    """They count hits, start anew with each run, and can be uploaded; the built-in one is the guest's time."""
    wide.accept(b"QTinit", b"QTDV:2:fffffffffffffffe:0:636f756e74")
    define(wide, x("2c00022201022d000227"))
    wide.accept(b"QTStart")
    wide.run()
    hits = int(fields(wide.ask(b"qTStatus"))["tcreated"], 16)
    assert wide.ask(b"qTV:2") == b"V%x" % (hits - 2)
    assert wide.ask(b"qTV:1") == b"V%x" % (wide.machine.clock.now_ns // 1000)
    assert wide.ask(b"qTV:9") == b"U"
    wide.accept(b"QTStop", b"QTStart")
    assert wide.ask(b"qTV:2") == b"Vfffffffffffffffe"
    assert wide.ask(b"qTfV") == b"1:0:1:" + b"trace_timestamp".hex().encode()
    assert wide.ask(b"qTsV") == b"2:fffffffffffffffe:0:636f756e74"
    assert wide.ask(b"qTsV") == b"l"


def test_while_stepping(target: Target):
    """A frame at the hit, then one behind each of the next instructions, as stepping by hand finds them."""
    target.machine.insert_breakpoint(target.address("fib"))
    target.machine.run(100_000)
    target.machine.remove_breakpoint(target.address("fib"))
    start = target.machine.snapshot()
    expected = [target.address("fib")]
    for _ in range(5):
        target.machine.step()
        expected.append(target.machine.registers.read(target.arch.pc))
    target.machine.restore(start)
    target.accept(b"QTinit")
    define(target, b"S" + ALL_REGISTERS, symbol="fib", rest=b"E:5:1")
    target.accept(b"QTStart")
    target.run()
    status = fields(target.ask(b"qTStatus"))
    assert (status["tpasscount"], status["tframes"]) == ("1", "6")
    pcs = []
    for number in range(6):
        target.ask(b"QTFrame:%x" % number)
        value = target.ask(b"p%x" % target.arch.numbers[target.arch.pc])
        pcs.append(int.from_bytes(bytes.fromhex(value.decode()), "little"))
    assert pcs == expected


def test_pass_count(wide: Target):
    """The trace ends with that hit; the guest runs on."""
    wide.accept(b"QTinit")
    place = define(wide, number=3, rest=b"E:0:4")
    wide.accept(b"QTStart")
    wide.run()
    assert fields(wide.ask(b"qTStatus"))["tpasscount"] == "3"
    assert wide.ask(b"qTP:" + place) == b"V4:18"


def test_the_guest_is_not_changed(target: Target):
    """A traced run leaves the memory that a bare run leaves."""
    bare = Target(target.machine.bits)
    bare.run(8_000)
    target.accept(b"QTinit")
    define(target, ALL_REGISTERS)
    define(target, b"S" + ALL_REGISTERS, number=2, symbol="fib", rest=b"E:3:0")
    target.accept(b"QTStart")
    target.run(8_000)
    assert int(fields(target.ask(b"qTStatus"))["tframes"], 16) > 10
    target.accept(b"QTStop")
    assert target.machine.ram_sha256() == bare.machine.ram_sha256()
    assert target.machine.instructions == bare.machine.instructions


def test_a_traced_run_ends_soon_when_asked(wide: Target):
    """Though each hit leaves the guest in a slot, where no run may end."""
    wide.accept(b"QTinit")
    place = define(wide, symbol="fib")
    wide.accept(b"QTStart")
    wide.probes.register(Kprobe(symbol="target", pre_handler=lambda *_: wide.machine.request_stop()))
    assert isinstance(wide.run(200_000), Interrupted)
    assert int(wide.ask(b"qTP:" + place)[1:].split(b":")[0], 16) <= 26


def test_a_breakpoint_at_the_same_place(wide: Target):
    """Both happen, once each."""
    place = define(wide)
    wide.accept(b"QTStart", b"Z0,%x,1" % wide.address("target"))
    assert wide.run() == Breakpoint(wide.address("target"))
    assert wide.run() == Breakpoint(wide.address("target"))
    assert wide.ask(b"qTP:" + place).startswith(b"V1:")


# --------------------------------------------------------------------------------------------------------------- frames


def test_frames_are_found(wide: Target):
    """By number, pc, tracepoint and range, always behind the one that is selected."""
    wide.accept(b"QTinit")
    one = define(wide, number=1, symbol="target")
    two = define(wide, number=2, symbol="target2")
    wide.accept(b"QTStart")
    wide.run()
    wide.accept(b"QTStop")
    pc, other = (place.split(b":")[1] for place in (one, two))
    points = [point.tracepoint for point in wide.tracing.buffer.frames]
    second = points.index(2)
    assert points[0] == 1
    assert wide.ask(b"QTFrame:0") == b"F0T1"
    assert wide.ask(b"QTFrame:pc:" + other) == b"F%xT2" % second
    assert wide.ask(b"QTFrame:tdp:1") == b"F%xT1" % (third := points.index(1, second))
    assert wide.ask(b"QTFrame:outside:%b:%b" % (pc, pc)) == b"F%xT2" % (fourth := points.index(2, third))
    assert wide.ask(b"QTFrame:range:%b:%b" % (pc, pc)) == b"F%xT1" % (fifth := points.index(1, fourth))
    assert wide.ask(b"QTFrame:tdp:9") == b"F-1"
    assert wide.ask(b"QTFrame:ffff") == b"F-1"
    assert wide.ask(b"QTFrame:tdp:2") == b"F%xT2" % points.index(2, fifth)
    wide.accept(b"QTFrame:ffffffff")
    assert wide.ask(b"QTFrame:tdp:2") == b"F%xT2" % second


def test_resuming_leaves_the_frame(wide: Target):
    """What is read then is the machine again."""
    traced(wide, ALL_REGISTERS)
    wide.ask(b"QTFrame:0")
    then = wide.ask(b"g")
    wide.run(1)
    assert wide.ask(b"g") != then


def test_a_full_buffer_ends_the_trace(wide: Target):
    """As many frames as fit are kept."""
    wide.accept(b"QTinit", b"QTBuffer:size:40")
    define(wide)
    wide.accept(b"QTStart")
    wide.run()
    status = fields(wide.ask(b"qTStatus"))
    assert (status["tfull"], status["tframes"], status["tfree"], status["tsize"]) == ("0", "a", "4", "40")


def test_a_circular_buffer_keeps_the_last(wide: Target):
    """The oldest frames go; frame 0 is the oldest that is left."""
    wide.accept(b"QTinit", b"QTBuffer:size:40", b"QTBuffer:circular:1")
    define(wide, number=1, symbol="target")
    define(wide, number=2, symbol="target2")
    wide.accept(b"QTStart")
    wide.run(20_000)
    status = fields(wide.ask(b"qTStatus"))
    assert (status["running"], status["tframes"]) == ("1", "a")
    assert int(status["tcreated"], 16) > 12


@pytest.mark.parametrize("circular", [False, True])
def test_the_number_of_frames_is_bounded(circular: bool):
    """Frames that hold nothing fill the buffer before they fill our memory."""
    buffer = TraceBuffer()
    buffer.circular = circular
    taken = [buffer.append(Frame(X86_64, 1, number)) for number in range(MAX_FRAMES + 2)]
    assert taken.count(False) == (0 if circular else 2)
    assert len(buffer.frames) == MAX_FRAMES
    assert buffer.frames[0].pc == (2 if circular else 0)
    assert buffer.used == len(buffer.raw(0, buffer.size))


@pytest.mark.parametrize("size", [b"0", b"%x" % (MAX_SIZE + 1), b"zz", b"-2"])
def test_sizes_of_the_buffer(wide: Target, size: bytes):
    """Bounded; -1 is the default; not while a trace is running."""
    assert wide.ask(b"QTBuffer:size:" + size) == ERROR
    wide.accept(b"QTBuffer:size:100", b"QTBuffer:size:-1")
    assert fields(wide.ask(b"qTStatus"))["tsize"] == f"{DEFAULT_SIZE:x}"
    wide.accept(b"QTStart")
    assert wide.ask(b"QTBuffer:size:100") == ERROR


# --------------------------------------------------------------------------------------------------------------- upload


def test_the_buffer_is_uploaded(wide: Target):
    """In pieces, as a trace file has it: number, size, then blocks R, M and V, little-endian."""
    name = wide.address("copy_source")
    wide.accept(b"QTinit", b"QTDV:2:7:0:666f6f")
    define(wide, ALL_REGISTERS, b"M-1,%x,8" % name, x("2e000227"), rest=b"E:0:1")
    wide.accept(b"QTStart")
    wide.run()
    data, offset = b"", 0
    while (piece := wide.ask(b"qTBuffer:%x,%x" % (offset, 100))) != b"l":
        data += bytes.fromhex(piece.decode())
        offset = len(data)
    size = wide.arch.packet_size
    number, length = struct.unpack_from("<HI", data)
    assert (number, length, len(data)) == (1, 1 + size + 11 + 8 + 13, 6 + length)
    assert data[6:7] == b"R"
    at = 7 + size
    assert struct.unpack_from("<cQH", data, at) == (b"M", name, 8)
    assert data[at + 11 : at + 19] == wide.machine.memory.read(name, 8)
    assert struct.unpack_from("<ciQ", data, at + 19) == (b"V", 2, 7)


def test_definitions_are_uploaded(wide: Target):
    """As they came, action by action: what a debugger that attaches later asks for."""
    condition = x("220127")
    place = define(wide, ALL_REGISTERS + b"M-1,1000,8", b"S" + x("27"), b"R0F", rest=b"D:2:3:" + condition)
    wide.accept(b"QTDPsrc:%b:cmd:0:3:616263" % place)
    pieces = [wide.ask(b"qTfP")]
    while pieces[-1] != b"l":
        pieces.append(wide.ask(b"qTsP"))
    assert pieces == [
        b"T%b:D:2:3:%b" % (place, condition),
        b"A%b:%b" % (place, ALL_REGISTERS),
        b"A%b:M-1,1000,8" % place,
        b"S%b:%b" % (place, x("27")),
        b"S%b:R0F" % place,
        b"Z%b:cmd:0:3:616263" % place,
        b"l",
    ]
    assert wide.ask(b"qTfSTM") == b"l"


# ------------------------------------------------------------------------------------------------- changes, disconnects


def test_enabling_while_a_trace_is_running(wide: Target):
    """A disabled tracepoint collects from QTEnable to QTDisable; a new one from its last packet on."""
    wide.accept(b"QTinit")
    place = define(wide, rest=b"D:0:0")
    wide.accept(b"QTStart")
    wide.run()
    assert wide.ask(b"qTP:" + place) == b"V0:0"
    wide.accept(b"QTEnable:" + place)
    wide.run()
    hits = wide.ask(b"qTP:" + place)
    assert hits > b"V0:0"
    wide.accept(b"QTDisable:" + place)
    wide.run()
    assert wide.ask(b"qTP:" + place) == hits
    new = define(wide, ALL_REGISTERS, number=2, symbol="target2")
    wide.run()
    assert wide.ask(b"qTP:" + new) > b"V0:0"


@pytest.mark.parametrize("stays", [False, True])
def test_when_the_debugger_goes(wide: Target, stays: bool):
    """The trace ends, or goes on where QTDisconnected asked for that; the next debugger sees it."""
    define(wide)
    wide.accept(b"QTDisconnected:%d" % stays, b"QTStart")
    wide.session.close()
    wide.machine.run(20_000)
    wide.session = wide.new_session()
    status = fields(wide.ask(b"qTStatus"))
    assert status["running"] == str(int(stays))
    assert (int(status["tframes"], 16) > 0) is stays
    assert ("tdisconnected" in status) is not stays


def test_commands_that_stay(wide: Target):
    """A breakpoint with persistent commands goes on without its debugger; the next one can remove it."""
    wide.accept(b"QTinit", b"QTDV:2:0:0:6e", b"QTStart")
    place = b"0,%x,1" % wide.address("target")
    wide.accept(b"Z%b;cmds:1,%b" % (place, x("2c00022201022d000227")))
    wide.session.close()
    wide.machine.run(20_000)
    assert wide.tracing.variables.get(2) > 0
    wide.session = wide.new_session()
    wide.accept(b"z" + place)
    count = wide.tracing.variables.get(2)
    wide.machine.run(20_000)
    assert wide.tracing.variables.get(2) == count


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "payload",
    [
        b"QTDP:",
        b"QTDP:1",
        b"QTDP:1:1000:Q:0:0",
        b"QTDP:1:1000:E:0:0:F5",
        b"QTDP:1:1000:S:0:0",
        b"QTDP:1:1000:E:0:0:X1,01",
        b"QTDP:-1:1000:R03",
        b"QTDPsrc:1:1000:cmd:0:1:41",
        b"QTDV:1:2",
        b"QTDV:x:2:0:41",
        b"QTEnable:1:1000",
        b"QTFrame:range:1",
        b"QTFrame:colour:1",
        b"QTFrame:",
        b"QTro:1",
        b"QTDisconnected:x",
        b"QTNotes:user:4",
        b"qTP:1:1000",
        b"qTBuffer:1",
        b"qXfer:traceframe-info:read::0,100",
    ],
)
def test_what_is_refused(wide: Target, payload: bytes):
    """Packets that say nothing, or of what is not there."""
    assert wide.ask(payload) == ERROR


@pytest.mark.parametrize("action", [b"Q", b"R", b"M1", b"M-1,0,%x" % (1 << 30), b"Mfff,0,1", b"X1,01", b"L", b"R0FX"])
def test_actions_that_are_refused(wide: Target, action: bytes):
    """Unknown, too large, of no register, not to be run."""
    place = define(wide)
    assert wide.ask(b"QTDP:-%b:%b" % (place, action)) == ERROR


def test_a_tracepoint_where_there_is_no_instruction(wide: Target):
    """The start is refused, with the reason as console text, and no other tracepoint is armed then."""
    define(wide)
    wide.accept(b"QTDP:2:%x:E:0:0" % (wide.address("target") + 2))
    action = wide.session.handle(b"QTStart")
    assert isinstance(action, Send)
    text, answer = action.payloads
    assert answer == ERROR
    assert b"tracepoint 2 at" in bytes.fromhex(text[1:].decode())
    wide.run()
    assert fields(wide.ask(b"qTStatus"))["tframes"] == "0"
    assert all(point.probe is None for point in wide.tracing.points.values())


def test_the_stub_saves_no_file(wide: Target):
    """QTSave names a file on our host; the answer says what to do instead."""
    action = wide.session.handle(b"QTSave:" + b"/tmp/x".hex().encode())
    assert isinstance(action, Send)
    assert b"writes no file on its host" in bytes.fromhex(action.payloads[0][1:].decode())
    assert action.payloads[-1] == ERROR


NAMES = [b"QTDP:", b"QTDP:-1:1000:", b"QTDPsrc:", b"QTDV:", b"QTFrame:", b"QTro:", b"QTNotes:", b"QTBuffer:size:"]
NAMES += [b"QTEnable:", b"QTDisable:", b"qTV:", b"qTP:", b"qTBuffer:", b"QTStart", b"QTStop", b"QTinit", b"qTStatus"]
_shared: list[Target] = []


@settings(max_examples=150)
@given(
    st.sampled_from(NAMES), st.one_of(st.binary(max_size=30), st.text("0123abEDRMX:;,-", max_size=30).map(str.encode))
)
def test_no_packet_raises(name: bytes, rest: bytes):
    """Whatever follows a packet's name, there is an answer."""
    if not _shared:
        _shared.append(Target(64))
    assert isinstance(_shared[0].session.handle(name + rest), Send)
