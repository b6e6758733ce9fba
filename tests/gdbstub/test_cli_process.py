"""`gdbstub load` as a process on the embedded guest: listeners, signals, pipes, a terminal, processor time, monitor."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from gdbstub.cli import main
from gdbstub.rsp import NEED_DATA, Codec, Packet
from tests.support.process import PATIENCE, Child, gdbstub

IDLE = ("load", "embedded", "--listen", "127.0.0.1:0")
BUSY = (*IDLE, "--append", "loop")
QUICKLY = 5.0  # seconds for what should take a tenth
Talk: TypeAlias = Callable[[bytes], bytes]


@pytest.fixture
def idle() -> Iterator[Child]:
    """A guest that has done its work and waits for input."""
    with gdbstub(*IDLE) as child:
        child.wait_for("embedded: done\n")
        yield child


def debugger(child: Child) -> socket.socket:
    host, _, port = child.address.rpartition(":")
    connection = socket.create_connection((host, int(port)), PATIENCE)
    connection.settimeout(PATIENCE)
    return connection


class Wire:
    """A debugger's end of a connection, one packet at a time."""

    def __init__(self, send: Callable[[bytes], object], receive: Callable[[], bytes]) -> None:
        self._send = send
        self._receive = receive
        self._codec = Codec(debugger=True)

    def send(self, payload: bytes) -> None:
        self._send(self._codec.reply(payload))

    def read(self) -> bytes:
        while True:
            event = self._codec.next_event()
            if event is NEED_DATA:
                data = self._receive()
                assert data, "the stub closed"
                self._codec.receive_data(data)
            elif isinstance(event, Packet):
                with contextlib.suppress(ConnectionError):  # a stub that has ended needs none
                    self._send(self._codec.acknowledgements())
                return event.payload

    def ask(self, payload: bytes) -> bytes:
        self.send(payload)
        return self.read()


def on(connection: socket.socket) -> Wire:
    return Wire(connection.sendall, lambda: connection.recv(4096))


def hear(connection: socket.socket, text: bytes) -> None:
    """Read until `text` has come."""
    heard = b""
    while text not in heard:
        data = connection.recv(4096)
        assert data, heard
        heard += data


# ---------------------------------------------------------------------------------------------------------- listening


def test_port_0_is_announced_on_standard_error_with_the_port_in_use(idle: Child):
    """And a debugger gets an answer there."""
    with debugger(idle) as connection:
        assert on(connection).ask(b"qAttached") == b"1"
    assert "listening" not in idle.text("out")


def test_a_unix_socket_is_there_while_the_program_is(tmp_path: Path):
    """It goes with the program."""
    path = tmp_path / "socket"
    with gdbstub("load", "embedded", "--listen", f"unix:{path}") as child:
        child.wait_for(f"listening on unix:{path}", on="err")
        assert child.monitor("help")[0] == 0
        assert child.ended(signal.SIGTERM) == 0
    assert not path.exists()


def test_no_listen_listens_nowhere():
    """Not even where the default is."""
    with gdbstub("load", "embedded", "--no-listen") as child:
        child.wait_for("embedded: done")
        sockets = [link for link in Path(f"/proc/{child.process.pid}/fd").iterdir() if "socket" in os.readlink(link)]
        listening = [line.split() for line in Path(f"/proc/{child.process.pid}/net/tcp").read_text().splitlines()[1:]]
        inodes = {row[9] for row in listening if row[3] == "0A"}
        assert not any(os.readlink(link)[8:-1] in inodes for link in sockets)


def test_a_debugger_on_standard_input_and_output():
    """`target remote | gdbstub load ... --listen -`: packets, and nothing else, on standard output."""
    with gdbstub("load", "embedded", "--listen", "-") as child:
        assert child.process.stdout is not None
        wire = Wire(child.type, lambda: os.read(child.process.stdout.fileno(), 4096))
        assert b"QStartNoAckMode+" in wire.ask(b"qSupported")
        assert wire.ask(b"?").startswith(b"T")
        wire.send(b"k")
        assert child.ended() == 0


def test_a_pipe_that_ends_ends_a_stub_without_a_goal():
    """Nobody else can attach; with --until the guest goes on to it."""
    with gdbstub("load", "embedded", "--append", "calls=3 loop", "--listen", "-") as child:
        assert child.process.stdin is not None
        child.process.stdin.close()
        assert child.ended() == 0
    with gdbstub("load", "embedded", "--listen", "-", "--until", "embedded: done") as child:
        assert child.process.stdin is not None
        child.process.stdin.close()
        assert child.ended() == 0
        assert "matched: embedded: done" in child.text("err")


@pytest.mark.parametrize("command", ["monitor", "report"])
def test_output_that_cannot_be_written_is_one_line(command: str, tmp_path: Path):
    """A full disk behind `>`: status 2, and no defect of ours."""
    trace = tmp_path / "t.txt"
    trace.write_text('             cat-85      [000] .....     0.494528: open: (do_sys_openat2+0x0/0x170) file="/x"\n')
    with gdbstub(*IDLE) as child, open("/dev/full", "wb") as full:
        words = {"monitor": ("monitor", child.address, "help"), "report": ("report", str(trace))}[command]
        command_line = [sys.executable, "-m", "gdbstub", *words]
        done = subprocess.run(command_line, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (2, b"gdbstub: standard output: No space left on device\n")


@pytest.mark.parametrize(
    ("closed", "words", "status", "said"),
    [
        (">&-", "--help", 2, "gdbstub: standard output: Bad file descriptor\n"),
        (">&-", "load embedded --no-listen --append calls=1", 2, "gdbstub: standard output: Bad file descriptor\n"),
        (">&- <&-", "load embedded --no-listen --console none --append exit=0", 0, None),
        (">/dev/full", "load embedded --no-listen --append exit=0", 2, None),
        ("2>&- >/dev/null", "load embedded --no-listen --console none --append exit=0", 0, ""),
        (">/dev/null 2>&- <&-", "boto", 2, ""),
    ],
)
def test_standard_descriptors_that_are_closed_or_full(closed: str, words: str, status: int, said: str | None):
    """Output that was asked for and is lost is status 2, not success; messages and input may be missing."""
    command = f"exec {sys.executable} -m gdbstub {words} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False, timeout=60)
    assert done.returncode == status, done.stderr
    assert said is None or done.stderr.decode() == said


def test_a_summary_that_cannot_be_written_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    words = ["load", "embedded", "--no-listen", "--console", "none", "--append", "exit=0", "--summary", "/dev/full"]
    assert main(words) == 2
    assert "gdbstub: /dev/full: no space left on device" in capfd.readouterr().err


def test_what_only_talks_loads_no_machine():
    """Help and a monitor command are there at once: neither the engine nor the probe engine is imported."""
    heavy = "sorted({'unicorn', 'capstone', 'drgn', 'trio', 'emu', 'probes'} & sys.modules.keys())"
    script = f"import sys; from gdbstub import cli; cli.main(['monitor', '127.0.0.1:1', 'help']); print({heavy})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=60)
    assert done.stdout == b"[]\n"
    assert b"127.0.0.1:1: Connection refused" in done.stderr


def test_wait_holds_the_guest_until_a_debugger_has_come_and_gone():
    """Visitors do not let it go."""
    with gdbstub(*IDLE, "--wait") as child:
        assert "instructions 0" in child.monitor("info", "stats")[1]
        with debugger(child) as connection:
            wire = on(connection)
            assert wire.ask(b"?").startswith(b"T")
            assert "instructions 0" in child.monitor("info", "stats")[1]
            assert wire.ask(b"D") == b"OK"
        child.wait_for("embedded: done")


def test_a_debugger_is_told_of_the_end_it_waited_through():
    """A run under a debugger ends the program like any other, and the debugger hears it first."""
    with gdbstub(*IDLE, "--wait", "--until", "embedded: done") as child, debugger(child) as connection:
        wire = on(connection)
        wire.ask(b"?")
        replies = [wire.ask(b"vCont;c")]
        while replies[-1].startswith(b"O"):
            replies.append(wire.read())
        assert replies[-1] == b"W00"
        assert child.ended() == 0


def test_log_rsp_has_packets_of_both_directions():
    """Seen from the debugger, with who it is."""
    with gdbstub(*IDLE, "--console", "none", "--log", "rsp") as child:
        with debugger(child) as connection:
            on(connection).ask(b"qAttached")
        child.wait_for(r"\d+ rsp: -> 127\.0\.0\.1:\d+ qAttached\n +\d+ rsp: <- 127\.0\.0\.1:\d+ 1\n", on="err")


# ------------------------------------------------------------------------------------------------------------ the end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("arguments", [IDLE, BUSY, (*IDLE, "--wait")], ids=["idle", "busy", "held"])
def test_a_signal_ends_it_with_0(arguments: tuple[str, ...], number: signal.Signals):
    """Whatever the guest is doing, and without a word."""
    with gdbstub(*arguments) as child:
        child.wait_for("listening", on="err")
        assert "--wait" in arguments or child.wait_for("embedded: ")
        assert child.ended(number) == 0
        assert child.text("err").splitlines() == [f"listening on {child.address}"]


def test_a_signal_ends_a_guest_that_nobody_listens_to():
    """Its standard output is a full pipe: the guest stands still in the middle of a character."""
    chatter = (*IDLE, "--log", "io", "--log-file", "/dev/stdout", "--append", "calls=30 opens=100 faults=9 user=100")
    with gdbstub(*chatter) as child:
        assert child.process.stdout is not None
        child.wait_for("listening", on="err")
        poll = select.poll()
        poll.register(child.process.stdout.fileno(), select.POLLIN)
        assert poll.poll(PATIENCE * 1000)
        child.process.send_signal(signal.SIGTERM)
        assert child.process.wait(QUICKLY) == 0


def test_a_reader_that_has_enough_ends_it_quietly():
    """`gdbstub load ... | head -1`."""
    with gdbstub(*IDLE) as child:
        child.wait_for("embedded: ")
        child.close_output()
        child.type(b"hello\n")
        assert child.ended() == 0
        assert child.text("err").splitlines() == [f"listening on {child.address}"]


@pytest.mark.parametrize("words", [["monitor", "ADDRESS", "info", "mem"], ["monitor", "ADDRESS", "help"]])
def test_monitor_into_a_closed_pipe_ends_quietly(idle: Child, words: list[str]):
    """No complaint of the interpreter at its end."""
    reading, writing = os.pipe()
    os.close(reading)
    words = [idle.address if word == "ADDRESS" else word for word in words]
    done = subprocess.run(
        [sys.executable, "-m", "gdbstub", *words], stdout=writing, stderr=subprocess.PIPE, timeout=PATIENCE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


# -------------------------------------------------------------------------------------------------------------- input


def test_standard_input_is_the_guest_s_keyboard(idle: Child):
    """A pipe's bytes are all the guest's, Ctrl-A too; its end is not the guest's end."""
    idle.type(b"hi\x01x\n")
    idle.wait_for("echo: hi")
    assert idle.process.stdin is not None
    idle.process.stdin.close()
    assert idle.monitor("info", "stats")[0] == 0


def test_standard_input_may_be_a_file(tmp_path: Path):
    """Which cannot be polled; the machine is one that waits for input already."""
    snapshot, typed = str(tmp_path / "snapshot"), tmp_path / "typed"
    typed.write_bytes(b"from a file\n")
    prompt = ["load", "embedded", "--no-listen", "--console", "none", "--until", "embedded: done"]
    assert main([*prompt, "--snapshot", snapshot]) == 0
    words = ["load", "--restore", snapshot, "--no-listen", "--until", "echo: from a file"]
    with typed.open("rb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "gdbstub", *words], stdin=file, capture_output=True, timeout=PATIENCE, check=False
        )
    assert done.returncode == 0


def test_console_on_a_tcp_port_serves_one_client_at_a_time():
    """Both ways; a second client is told, and the next one served after the first has left."""
    with gdbstub(*IDLE, "--console", "127.0.0.1:0", "--wait") as child:
        port = int(child.wait_for(r"console on 127\.0\.0\.1:(\d+)", on="err")[1])
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as first:
            first.settimeout(PATIENCE)
            with debugger(child) as connection:
                on(connection).ask(b"?")  # its leaving lets the guest go
            hear(first, b"embedded: done")
            first.sendall(b"one\n")
            hear(first, b"echo: one")
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as second:
                second.settimeout(PATIENCE)
                assert second.makefile("rb").read() == b"somebody else has this console\n"
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as third:
            third.settimeout(PATIENCE)
            third.sendall(b"three\n")
            hear(third, b"echo: three")
        assert child.text("out") == ""


# -------------------------------------------------------------------------------------------------------------- paces


def test_an_idle_guest_uses_next_to_no_processor_time(idle: Child):
    """Paced by the wall clock because nothing else would end it: a busy host may double what is a tenth of a second."""
    before = idle.cpu_seconds()
    idle.rest(1.0)
    assert idle.cpu_seconds() - before < 0.2


# ----------------------------------------------------------------------------------------------------------- terminal


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, its = pty.openpty()
    modes = termios.tcgetattr(its)
    yield ours, its
    assert termios.tcgetattr(its) == modes, "the terminal's modes are not what they were"
    os.close(its)


def test_a_terminal_s_next_line_begins_at_its_start(terminal: tuple[int, int]):
    """Where the guest stopped in the middle of a line, what we say of it does not stand behind it."""
    with gdbstub("load", "embedded", "--no-listen", "--until", "embedded: re", terminal=terminal) as child:
        child.wait_for("\nembedded: re\ngdbstub: matched")


def test_ctrl_a_helps_and_ends(terminal: tuple[int, int]):
    """The guest gets everything else, Ctrl-C too; the fixture looks at the modes."""
    with gdbstub(*IDLE, terminal=terminal) as child:
        child.wait_for("embedded: done")
        child.type(b"a\x03b\r")
        child.wait_for(r"echo: a\x03b")
        child.type(b"\x01h")
        child.wait_for("Ctrl-A x  end the machine and this program")
        child.type(b"\x01x")
        assert child.ended() == 0


def test_ctrl_a_c_interrupts_into_the_waiting_debugger(terminal: tuple[int, int]):
    """Without one it says so, and the next debugger's run is not cut short by it."""
    with gdbstub(*IDLE, terminal=terminal) as child:
        child.wait_for("embedded: done")
        child.type(b"\x01c")
        child.wait_for("no debugger is waiting for the guest to stop")
        with debugger(child) as connection:
            wire = on(connection)
            wire.ask(b"?")
            wire.send(b"vCont;c")
            child.type(b"still running\r")
            child.wait_for("echo: still running")
            child.type(b"\x01c")
            assert wire.read().startswith(b"T02")
        assert child.ended(signal.SIGTERM) == 0


CRASHING = """
import sys
from gdbstub import cli, console
async def broken(*_):
    raise ZeroDivisionError("broken on purpose")
console.type_in = broken
sys.exit(cli.main())
"""


def test_a_crash_gives_the_terminal_back(terminal: tuple[int, int]):
    """With the report readable; the fixture looks at the modes."""
    with gdbstub(*IDLE, program=("-c", CRASHING), terminal=terminal) as child:
        child.wait_for("embedded: done")
        child.type(b"x")
        assert child.ended() == 4
        assert "please report this" in child.text()


def test_a_terminal_sees_how_far_a_silent_guest_is(terminal: tuple[int, int]):
    """One line that goes when the run ends."""
    with gdbstub(*BUSY, "--console", "none", terminal=terminal) as child:
        child.wait_for(r"\d M instructions, \d+\.\d s of the guest's time")
        assert child.ended(signal.SIGTERM) == 0
        assert child.out.endswith(b"\r\x1b[K")


# ------------------------------------------------------------------------------------------------------------ monitor

LIFE_OF_A_PROBE = [
    ("kprobe add p:open do_open file=+0($arg1):string", "p:kprobes/open do_open file=+0($arg1):string"),
    ("kprobe add --disabled p:calls do_calls", "p:kprobes/calls do_calls"),
    ("kprobe list", "p:kprobes/open do_open file=+0($arg1):string\np:kprobes/calls do_calls"),
    ("kprobe info calls", "kprobes/calls: disabled, 0 hits, 0 missed"),
    ("kprobe enable c*", "kprobes/calls"),
    ("kprobe info calls", "kprobes/calls: enabled, 0 hits, 0 missed"),
    ("kprobe disable calls", "kprobes/calls"),
    ("kprobe del calls", "kprobes/calls"),
    ("kprobe list", "p:kprobes/open do_open file=+0($arg1):string"),
]
FACTS = [
    ("help", "kprobe add [OPTIONS] DEF"),
    ("help trace", "trace stream on|off"),
    ("info registers", "rip ffffffff81"),
    ("info mem", " -rwx"),
    ("info tlb", "ffffffff80200000: 0000000000200000 -rwx 2048K"),
    ("info pic", "pic slave: IRR "),
    ("info timers", "next timer in "),
    ("info stats", "virtual time "),
    ("xp/4xb 0x100000", "0000000000100000: 0x"),
    ("xp/2i start_kernel", "push"),
    ("snapshot list", "no snapshots"),
    ("snapshot save here", "here: saved at instruction "),
    ("snapshot list", "here  instruction "),
    ("snapshot restore here", "here: restored at instruction "),
]


def test_a_probe_s_life_by_monitor_commands(idle: Child):
    """add, list, info, enable, disable, del, each with the answer a person gets."""
    for command, answer in LIFE_OF_A_PROBE:
        status, said = idle.monitor(command)
        assert (status, said.startswith(answer)) == (0, True), (command, said)


def test_what_the_monitor_tells_of_the_machine(idle: Child):
    """Every topic, physical memory, snapshots."""
    for command, fact in FACTS:
        status, said = idle.monitor(command)
        assert (status, fact in said) == (0, True), (command, said)


def test_a_refused_definition_in_the_monitor_shows_where_and_what_was_meant(
    idle: Child, capsys: pytest.CaptureFixture[str]
):
    """The command's status is 1, its output the lines of `--probe`."""
    assert main(["monitor", idle.address, "kprobe", "add", "p:open do_opne file=+0($arg1):string"]) == 1
    assert capsys.readouterr().out == (
        "Invalid probed address or symbol (EINVAL)\n"
        "  p:open do_opne file=+0($arg1):string\n"
        "         ^\n"
        "did you mean do_open, do_opens?\n"
    )


def test_trace_commands_over_a_running_guest():
    """The last records, recording switched off and on, and emptied."""
    with gdbstub(*IDLE, "--probe", "p:echo do_serial") as child:
        child.wait_for("embedded: done")

        def hits() -> int:
            return len(child.monitor("trace")[1].splitlines())

        def key(letter: bytes) -> None:
            child.type(letter + b"\n")
            child.wait_for("echo: " + letter.decode())

        key(b"a")
        assert hits() > 0
        assert len(child.monitor("trace", "1")[1].splitlines()) == 1
        assert child.monitor("trace", "clear") == (0, "")
        assert child.monitor("trace", "off") == (0, "")
        key(b"b")
        assert hits() == 0
        assert child.monitor("trace", "on") == (0, "")
        key(b"c")
        assert hits() > 0


def test_trace_stream_reaches_the_debugger_while_the_guest_runs():
    """As console packets, before any stop."""
    with gdbstub(*IDLE, "--wait", "--probe", "p:open do_open n=$arg2:u32") as child:
        with debugger(child) as connection:
            wire = on(connection)
            wire.ask(b"?")
            assert wire.ask(b"qRcmd," + b"trace stream on".hex().encode()) == b"OK"
            wire.send(b"vCont;c")
            shown = ""
            while shown.count("\n") < 100:
                shown += bytes.fromhex(wire.read().removeprefix(b"O").decode()).decode()
        assert [line.rpartition("n=")[2] for line in shown.splitlines()] == [str(n) for n in range(100)]


def test_quit_ends_the_program(idle: Child):
    """And who said so gets an answer."""
    assert idle.monitor("quit") == (0, "")
    assert idle.ended() == 0
