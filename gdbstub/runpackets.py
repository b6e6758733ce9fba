"""The packets about processes, threads and running, as a part of `Session`.

Rules: as in `session`. The wire's view of a machine: one process, 1, whose threads are the CPUs, numbered from 1, or
the guest's tasks by their own numbers (`threads`). Which of the two, a client is told by its next stop.

In all-stop mode a resume is answered by its stop. In non-stop mode it is answered at once, the guest runs while other
packets are answered, and a stop is a notification: the next one is not sent before the client has acknowledged the last
(`vStopped`). In extended mode (`!`) a debugger outlives its process: it may restart the machine, and detach and attach
on one connection; in between there is no process for it. Source: GDB manual, "Packets" and "Remote Non-Stop".
"""

from __future__ import annotations

import re
from binascii import hexlify
from collections import deque
from collections.abc import Callable
from html import escape
from typing import Final

from emu.arch import Arch
from emu.iface import Machine
from emu.stops import Interrupted, Stop
from gdbstub import stops
from gdbstub.actions import Action, Detach, Interrupt, Kill, Resume, Send
from gdbstub.packets import PacketError, number, packet, pair
from gdbstub.threads import CPU, CPU_NAME, Tasks, ThreadChoice

PROCESS: Final = 1
_LAST_SIGNAL: Final = 0xFF
_MAX_LISTED: Final = 256  # threads in one packet

_CONTINUE: Final = Resume()
_STEP: Final = Resume(step=True)

STARTING: Final = frozenset({"vRun", "vAttach", "R"})
"""Packets that end a state without a process."""

_WITHOUT_PROCESS: Final = STARTING | {
    "?", "D", "Hc", "Hg", "T", "k", "qAttached", "qC", "qXfer:threads:read", "qfThreadInfo", "qsThreadInfo", "vKill",
    "vStopped",
}  # fmt: skip
_OF_A_STOPPED_THREAD: Final = frozenset({"g", "G", "p", "P"})
_ENDING_A_RUN: Final = STARTING | {"D", "k", "vKill"}


class RunPackets:
    """What `Session` answers about who runs, and how. `restart` takes the machine back to where it began."""

    attached: bool
    _machine: Machine
    _arch: Arch
    _client: frozenset[str]
    _part: Callable[[bytes, bytes], bytes]
    _take_out: Callable[[], None]
    _leave_frame: Callable[[], None]
    _thread_suffix: bool

    def __init__(self, restart: Callable[[], None] | None, threads: ThreadChoice) -> None:
        self._thread_choice = threads
        self._tasks: Tasks | None = None  # this client's threads; None: the processor is the only one
        self._selected: int | None = None  # a task that does not run, whose registers and memory are asked for
        self._listing: list[int] = []  # what `qsThreadInfo` goes on with
        self.restart = restart
        self.extended = False
        self.nonstop = False
        self.running = False
        """The guest runs for this debugger, who is owed a stop."""
        self.killed = False
        """The debugger has ended its process and started none: nobody wants the guest to run."""
        self._restarted = False
        self._gone = False  # extended mode: there is no process for this debugger
        self._pausing = False  # the stop to come was asked for by `vCont;t`
        self._last_stop: Stop | None = None
        self._untold: deque[bytes] = deque()  # stops for `vStopped`; the first one has been sent

    # -------------------------------------------------------------------------------------------------- for the session

    def _wants_target(self, name: str) -> bool:
        """Whether packet `name`, of those that need a stopped guest, does so now."""
        return not self._gone or self.attached or name in STARTING

    def _check_state(self, name: str) -> None:
        """PacketError where packet `name` has no meaning now."""
        if self._gone and name not in _WITHOUT_PROCESS and not name.startswith("vFile:"):
            raise PacketError("there is no process; run or attach")
        if self.running and name in _OF_A_STOPPED_THREAD:
            raise PacketError("the thread is running")

    def _look_anew(self) -> None:
        """The client learns next who runs: its threads are from now on what was chosen last.

        In non-stop mode, and for lldb, the processor stays the only one.
        """
        self._tasks = None if self.nonstop or self._thread_suffix else self._thread_choice.shown
        self._selected = None

    def took_up_restart(self) -> bool:
        """Whether the machine has begun again since this was asked last."""
        restarted, self._restarted = self._restarted, False
        return restarted

    def ends_run(self, payload: bytes) -> bool:
        """Whether the run under way must be over before `payload` is carried out."""
        name = payload.partition(b";")[0].decode("latin-1")
        return name in _ENDING_A_RUN or payload[:1] in (b"D", b"k", b"R")

    # -------------------------------------------------------------------------------------------- processes and threads

    @packet("!", anytime=True)
    def _extend(self, _rest: bytes) -> bytes:
        self.extended = True
        return b"OK"

    @packet("Hg", feature="multiprocess+", negotiated=True)  # ids are then written pPROCESS.THREAD
    def _select(self, rest: bytes) -> bytes:
        thread = self._find_thread(rest)
        self._selected = None if thread == self._running_thread else thread
        return b"OK"

    @packet("Hc")
    @packet("T")
    def _check_thread(self, rest: bytes) -> bytes:
        self._find_thread(rest)
        return b"OK"

    @packet("qC")
    def _current_thread(self, _rest: bytes) -> bytes:
        return b"QC" + (b"0" if self._gone else self._thread_id)

    @packet("qfThreadInfo")
    def _first_threads(self, _rest: bytes) -> bytes:
        tasks = self._tasks
        self._listing = [] if self._gone else [CPU] if tasks is None else [task.id for task in tasks.all()]
        return self._more_threads(b"")

    @packet("qsThreadInfo")
    def _more_threads(self, _rest: bytes) -> bytes:
        now, self._listing = self._listing[:_MAX_LISTED], self._listing[_MAX_LISTED:]
        return b"m" + b",".join(self._written(thread) for thread in now) if now else b"l"

    @packet("qThreadExtraInfo")
    def _thread_name(self, rest: bytes) -> bytes:
        thread = self._find_thread(rest)
        task = self._tasks.find(thread) if self._tasks is not None and thread is not None else None
        return (f"{task.name}: {task.state}" if task is not None else CPU_NAME).encode().hex().encode()

    @packet("qXfer:threads:read", feature="qXfer:threads:read+")
    def _threads(self, rest: bytes) -> bytes:
        if self._tasks is None:
            rows = [f'<thread id="{self._thread_id.decode()}" core="0" name="{CPU_NAME}"/>']
        else:
            rows = [
                f'<thread id="{self._written(task.id).decode()}" core="0" name="{_xml(task.name)}">'
                f"{_xml(task.state)}</thread>"
                for task in self._tasks.all()
            ]
        document = f'<?xml version="1.0"?>\n<threads>{"" if self._gone else "".join(rows)}</threads>\n'
        return self._part(document.encode(), rest.removeprefix(b":"))

    @packet("QThreadEvents", feature="QThreadEvents+")
    def _thread_events(self, rest: bytes) -> bytes:
        """A machine's CPUs neither come nor go: the client is told of each that does."""
        if rest not in (b"0", b"1"):
            raise PacketError("0 or 1 is expected")
        return b"OK"

    @packet("qAttached")
    def _was_attached(self, _rest: bytes) -> bytes:
        return b"1"  # gdb's quit then detaches: the machine goes on

    @packet("D")
    def _detach(self, rest: bytes) -> Action:
        check_process(rest)
        self._gone = self.extended
        return Detach(b"OK")

    @packet("k")
    def _kill(self, _rest: bytes) -> Action:
        return self._end_process() or Kill(None)

    @packet("vKill")
    def _kill_process(self, rest: bytes) -> Action | bytes:
        check_process(rest)
        return b"OK" if self._end_process() else Kill(b"OK")

    def _end_process(self) -> Action | None:
        """In extended mode the machine goes back to its start and stands there; None where killing ends it."""
        if not self.extended or self.restart is None:
            return None
        if self.attached and not self._gone:
            self._start_over()
            self.killed = True
        self._gone = True
        return Send(())

    @packet("R", requires="restart")
    def _restart(self, _rest: bytes) -> Action:
        self._start_over()
        return Send(())  # the client asks `?` next

    @packet("vRun", requires="restart")
    def _run(self, _rest: bytes) -> bytes:
        """The file and arguments that gdb names are its own: what runs is the machine, from its start."""
        self._start_over()
        return self._stop_reply(None)

    @packet("vAttach")
    def _attach(self, rest: bytes) -> bytes:
        check_process(b";" + rest)
        self._gone = self.killed = False
        if self.nonstop:
            self._untold.clear()
            return b"OK"
        return self._stop_reply(self._last_stop)

    def _start_over(self) -> None:
        if not self.extended or self.restart is None:
            raise PacketError("only in extended mode: target extended-remote")
        self._take_out()
        self.restart()
        self._restarted = True
        self._gone = self.killed = False
        self._last_stop = None
        self._untold.clear()

    # ----------------------------------------------------------------------------------------------------- run control

    @packet("?")
    def _why(self, _rest: bytes) -> bytes:
        self._look_anew()
        if not self.nonstop:
            return b"W00" if self._gone else self._stop_reply(self._last_stop)
        self._untold.clear()
        if self._gone or self.running:
            return b"OK"
        self._untold.append(self._stop_reply(self._last_stop))
        return self._untold[0]

    @packet("vStopped")
    def _stop_is_known(self, _rest: bytes) -> bytes:
        if self._untold:
            self._untold.popleft()
        return self._untold[0] if self._untold else b"OK"

    @packet("QNonStop", feature="QNonStop+", anytime=True)
    def _set_nonstop(self, rest: bytes) -> bytes:
        if rest not in (b"0", b"1"):
            raise PacketError("0 or 1 is expected")
        if self.running:
            raise PacketError("the mode cannot change while the guest runs")
        if rest == b"1" and self._thread_choice.shown is not None:
            # gdb of any version shows this answer as it is, also one that cannot show the errors of other packets.
            return b"E.tasks are not stopped one by one: `monitor threads cpus` for non-stop mode"
        self.nonstop = rest == b"1"
        self._untold.clear()
        return b"OK"

    @packet("c")
    def _continue(self, rest: bytes) -> Action:
        self._jump(rest)
        return self._go(_CONTINUE)

    @packet("C")
    def _continue_signalled(self, rest: bytes) -> Action:
        return self._continue(_behind_signal(rest))

    @packet("s")
    def _step(self, rest: bytes) -> Action:
        self._jump(rest)
        return self._go(_STEP)

    @packet("S")
    def _step_signalled(self, rest: bytes) -> Action:
        return self._step(_behind_signal(rest))

    def _jump(self, address: bytes) -> None:
        if not address:
            return
        pc = number(address)
        if pc >> 8 * self._arch.word_size:
            raise PacketError(f"{pc:#x} is no address of an {self._arch.gdb_name}")
        self._machine.registers.write(self._arch.pc, pc)

    @packet("vCont?", feature="vContSupported+", anytime=True)
    def _resume_actions(self, _rest: bytes) -> bytes:
        return b"vCont;c;C;t;s;S;r"

    @packet("vCont")
    def _resume(self, rest: bytes) -> Action:
        """The first action counts: gdb puts a step before what all others do.

        Signals have no meaning to a processor and are dropped.
        """
        action, _, text = rest.partition(b";")[0].partition(b":")
        thread = self._find_thread(text) if text else None
        sleeping = None if thread == self._running_thread else thread
        if action[:1] in (b"C", b"S"):
            _behind_signal(action[1:])
            action = action[:1].lower()
        match action:
            case b"s":
                return self._go(_STEP if sleeping is None else Resume(step=True, task=sleeping))
            case b"c":
                return self._go(_CONTINUE)
            case b"t":
                return self._pause()
        if action[:1] == b"r":
            return self._go(Resume(step=True, stop_range=pair(action[1:]), task=sleeping))
        raise PacketError("the actions of vCont are c, s, t, C and S with a signal, r with a range")

    def _go(self, resume: Resume) -> Action:
        if self.running:  # non-stop: the thread does so already
            return Send((b"OK",))
        self.running, self._pausing = True, False
        self._leave_frame()
        return resume

    def _pause(self) -> Action:
        if not self.nonstop:
            raise PacketError("vCont;t is for non-stop mode")
        if not self.running:
            return Send((b"OK",))
        self._pausing = True
        return Interrupt(b"OK")

    @packet("vCtrlC")
    def _interrupt(self, _rest: bytes) -> Action:
        return Interrupt(b"OK") if self.running else Send((b"OK",))

    def _ended(self, stop: Stop) -> bytes:
        """The reply that tells of the end of a resume."""
        self.running = False
        self._last_stop = stop
        self._look_anew()
        reply = self._stop_reply(stop)
        self._gone = self.extended and stops.exit_status(stop) is not None
        return reply

    def _stop_reply(self, stop: Stop | None) -> bytes:
        status = stops.exit_status(stop)
        if status is not None:
            return b"W%02x%b" % (status & 0xFF, b";process:%x" % PROCESS if self._multi else b"")
        signal = 0 if self._pausing and isinstance(stop, Interrupted) else stops.signal(stop)
        reason = stops.reason(stop, self._client).encode()
        return b"T%02x%b%bthread:%b;" % (signal, self._expedited(), reason, self._thread_id)

    def _expedited(self) -> bytes:
        """The registers that a debugger looks at first."""
        arch = self._arch
        size, values = arch.word_size, self._machine.registers.read_many(arch.expedited)
        return arch.expedited_fields % tuple([hexlify(value.to_bytes(size, "little")) for value in values])

    @property
    def _multi(self) -> bool:
        return "multiprocess+" in self._client

    @property
    def _running_thread(self) -> int:
        return CPU if self._tasks is None else self._tasks.current

    @property
    def _thread_id(self) -> bytes:
        """Of the thread that runs, as the client writes it."""
        return self._written(self._running_thread)

    def _written(self, thread: int) -> bytes:
        return b"p%x.%x" % (PROCESS, thread) if self._multi else b"%x" % thread

    def _find_thread(self, text: bytes) -> int | None:
        """The thread that an id, in either notation, names; None for any. PacketError where there is none."""
        match = _THREAD_ID.fullmatch(text)
        if match is None:
            raise PacketError("no such thread")
        process, of_process, alone = match.groups()
        thread = int(of_process or alone or b"-1", 16)
        if process is not None and int(process, 16) not in (-1, 0, PROCESS):
            raise PacketError("no such thread")
        if thread in (-1, 0):
            return None
        if not (thread == CPU if self._tasks is None else self._tasks.exists(thread)):
            raise PacketError("no such thread")
        return thread


# ------------------------------------------------------------------------------------------------------- packet fields

_THREAD_ID = re.compile(rb"(?:p(-1|[0-9a-fA-F]+)(?:\.(-1|[0-9a-fA-F]+))?|(-1|[0-9a-fA-F]+))")


def _xml(text: str) -> str:
    """A guest's text in an attribute or an element; what XML cannot hold is shown as ?."""
    return escape("".join(letter if letter.isprintable() else "?" for letter in text))


def check_process(text: bytes) -> None:
    """PacketError unless the number, after an optional separator, is our process's; nothing at all is any."""
    text = text.removeprefix(b";")
    if text and number(text) != PROCESS:
        raise PacketError("no such process")


def _behind_signal(text: bytes) -> bytes:
    """What follows a signal's number and its separator; PacketError where there is no such number."""
    signal, _, rest = text.partition(b";")
    if number(signal) > _LAST_SIGNAL:
        raise PacketError("a signal has two digits")
    return rest
