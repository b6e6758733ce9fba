"""Conditions and commands of breakpoints, packet by packet, on the fake machine."""

from __future__ import annotations

import pytest

from emu.arch import X86_64
from emu.stops import Breakpoint, Interrupted
from gdbstub.actions import Resume, Send
from gdbstub.conditions import MAX_EXPRESSIONS
from gdbstub.rsp import MAX_PACKET
from gdbstub.session import MAX_WAITING_LINES, Session
from tests.support.fake_machine import CODE, DATA, FakeMachine

RAX = X86_64.numbers["rax"]


class World:
    """A session on a machine that counts in rax for ever; it is odd at `hit`."""

    hit = CODE + 3

    def __init__(self) -> None:
        self.machine = FakeMachine(X86_64)
        self.session = Session(self.machine, X86_64)

    def ask(self, payload: bytes) -> tuple[bytes, ...]:
        action = self.session.handle(payload)
        assert isinstance(action, Send)
        return action.payloads

    def run(self) -> tuple[bytes, ...]:
        """What the client is sent until the stop reply, which is left out."""
        stop = self.session.advance(Resume())
        assert isinstance(stop, Breakpoint)
        assert stop.pc == self.hit
        return (*self.session.take_output(), *self.session.stopped(stop))[:-1]

    @property
    def rax(self) -> int:
        return self.machine.registers.read("rax")


@pytest.fixture
def world() -> World:
    return World()


def x(code: bytes) -> bytes:
    """An expression as packets have it."""
    return b"X%x,%b" % (len(code), code.hex().encode())


def rax_is(value: int) -> bytes:
    return bytes((0x26, 0, RAX, 0x22, value, 0x13, 0x27))


def printf(text: bytes, *registers: int) -> bytes:
    pushed = b"".join(bytes((0x26, 0, register)) for register in reversed(registers))
    return pushed + bytes.fromhex("22002200 34") + bytes((len(registers), 0, len(text) + 1)) + text + b"\0\x27"


def test_a_condition_decides(world: World):
    """The guest goes on while it is false; the stop is reported where it is true, and there only."""
    assert world.ask(b"Z0,%x,1;" % world.hit + x(rax_is(5))) == (b"OK",)
    assert world.run() == ()
    assert world.rax == 5


@pytest.mark.parametrize("separator", [b"", b";"])
def test_any_of_several_conditions_decides(world: World, separator: bytes):
    """Two breakpoints of gdb's at one address: both conditions come, one behind the other."""
    world.ask(b"Z0,%x,1;" % world.hit + x(rax_is(9)) + separator + x(rax_is(5)))
    world.run()
    assert world.rax == 5


def test_a_condition_that_fails_stops_and_says_so(world: World):
    """As gdb does with one that it evaluates itself."""
    world.ask(b"Z0,%x,1;" % world.hit + x(bytes.fromhex("22081a27")))
    (said,) = world.run()
    text = bytes.fromhex(said[1:].decode()).decode()
    assert text == f"Stopped at {world.hit:#x}, as the breakpoint's condition failed: invalid memory access at 0x8.\n"


def test_a_condition_without_a_value_stops(world: World):
    """It cannot be called false."""
    world.ask(b"Z0,%x,1;" % world.hit + x(b"\x27"))
    (said,) = world.run()
    assert b"it has no value" in bytes.fromhex(said[1:].decode())


def test_commands_run_instead_of_a_stop(world: World):
    """What they print is console text; a condition beside them says when they run."""
    world.ask(b"Z0,%x,1;" % world.hit + x(rax_is(3)) + b";cmds:0," + x(printf(rb"rax=%d\n", RAX)) + b",")
    world.ask(b"Z1,%x,1;" % world.hit + x(rax_is(5)))
    (said,) = world.run()
    assert bytes.fromhex(said[1:].decode()) == b"rax=3\n"
    assert world.rax == 5


def test_a_command_that_fails_says_so(world: World):
    """The guest goes on all the same."""
    world.ask(b"Z0,%x,1;" % world.hit + x(rax_is(3)) + b";cmds:0," + x(printf(b"%s", RAX)))
    world.ask(b"Z1,%x,1;" % world.hit + x(rax_is(5)))
    (said,) = world.run()
    assert bytes.fromhex(said[1:].decode()).startswith(b"Breakpoint command at 0x10003 failed: invalid memory access")


def test_several_commands_run_in_order(world: World):
    """Two dprintfs at one address."""
    commands = x(printf(b"a")) + x(printf(b"b")) + b"," + x(printf(rb"c\n"))
    world.ask(b"Z0,%x,1;" % world.hit + x(rax_is(1)) + b";cmds:0," + commands)
    world.ask(b"Z1,%x,1;" % world.hit + x(rax_is(3)))
    (said,) = world.run()
    assert bytes.fromhex(said[1:].decode()) == b"abc\n"


def test_a_second_packet_replaces_the_condition(world: World):
    """gdb sends Z0 again, without removing it first, when a condition has changed."""
    world.ask(b"Z0,%x,1;" % world.hit + x(rax_is(201)))
    world.ask(b"Z0,%x,1;" % world.hit + x(rax_is(7)))
    world.run()
    assert world.rax == 7
    world.ask(b"Z0,%x,1" % world.hit)
    world.run()
    assert world.rax == 7  # the fake machine stops where it stands


def test_range_steps_ask_conditions(world: World):
    """A step over a range ends at a breakpoint only where its condition is true."""
    world.ask(b"Z0,%x,1;" % world.hit + x(rax_is(7)))
    action = world.session.handle(b"vCont;r%x,%x:1" % (CODE, CODE + 0x100))
    assert isinstance(action, Resume)
    assert world.session.advance(action) == Breakpoint(world.hit)
    assert world.rax == 7


@pytest.mark.parametrize(
    "options",
    [
        b"Y",
        b"X",
        b"X3,2201",
        b"X2,22zz",
        b"X1,01",
        b"X1,ff",
        b"X2,2201",
        b"cmds:0,Q",
        b"X1,27" * (MAX_EXPRESSIONS + 1),
        b"cmds:0," + x(printf(b"%f", RAX)),
    ],
)
def test_what_cannot_be_run_is_refused(world: World, options: bytes):
    """And no breakpoint is there then: one that ignores its condition is worse than none."""
    assert world.ask(b"Z0,%x,1;" % world.hit + options) == (b"E01",)
    assert world.machine.breakpoints == set()


def test_output_that_is_lost_is_counted(world: World):
    """A client that does not keep up is told how much it has missed."""
    for _ in range(MAX_WAITING_LINES + 5):
        world.session.stream("line")
    text = b"".join(bytes.fromhex(payload[1:].decode()) for payload in world.session.take_output())
    assert text.startswith(b"(5 lines are lost")
    assert text.count(b"line\n") == MAX_WAITING_LINES
    assert world.session.take_output() == ()
    assert all(len(payload) <= MAX_PACKET for payload in world.session.take_output())


def test_much_output_ends_the_run(world: World):
    """So that the server can send it before it is too much; the run is then taken up again."""
    world.ask(b"Z0,%x,1;cmds:0," % world.hit + x(printf(rb"x\n")))
    assert isinstance(world.session.advance(Resume()), Interrupted)
    text = b"".join(bytes.fromhex(payload[1:].decode()) for payload in world.session.take_output())
    assert MAX_WAITING_LINES // 2 <= text.count(b"x\n") < MAX_WAITING_LINES


def test_strings_come_from_the_guest(world: World):
    """dprintf of a string in its memory."""
    world.machine.registers.write("rbx", DATA)
    world.ask(b"Z0,%x,1;cmds:0," % world.hit + x(printf(rb"%s\n", X86_64.numbers["rbx"])))
    world.ask(b"Z1,%x,1;" % world.hit + x(rax_is(1)))
    (said,) = world.run()
    assert bytes.fromhex(said[1:].decode()) == b"data of the guest\n"
