"""Tasks as threads, packet by packet: ids, listings, what is kept of a task that does not run, refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

from emu.arch import X86_64
from emu.iface import MachineError, MemoryFault
from emu.stops import Breakpoint, Interrupted, Step, Stop
from gdbstub.actions import Resume, Send
from gdbstub.monitor import Monitor
from gdbstub.monitorservices import Services
from gdbstub.session import Session
from gdbstub.threads import ThreadChoice
from tests.support.asking import ask
from tests.support.fake_machine import CODE, FakeMachine

GDB = b"qSupported:multiprocess+;swbreak+;error-message+"


@dataclass
class FakeTask:
    id: int
    name: str
    state: str = "sleeping"
    core: bool = False


class FakeTasks:
    """Implements threads.Tasks: three tasks, of which 7 runs; each has a byte of memory of its own at 0x10."""

    def __init__(self) -> None:
        self.current = 7
        self.known = [FakeTask(3, 'a "<task>\x01'), FakeTask(7, "runs", core=True), FakeTask(0x400001, "idle")]
        self.stop_before: Stop | None = None
        self.memory = {3: bytearray(b"3"), 0x400001: bytearray(b"i")}

    def check(self) -> None:
        if not self.known:
            raise MachineError("nobody knows them")

    def all(self) -> Sequence[FakeTask]:
        return self.known

    def find(self, thread: int) -> FakeTask | None:
        return next((task for task in self.known if task.id == thread), None)

    def exists(self, thread: int) -> bool:
        return self.find(thread) is not None

    def registers(self, thread: int) -> Mapping[str, int]:
        return {"rip": 0x1234, "rsp": 0x5678} if thread == 3 else {}

    def read(self, thread: int, vaddr: int, size: int) -> bytes:
        if (vaddr, size) != (0x10, 1):
            raise MemoryFault(vaddr)
        return bytes(self.memory[thread])

    def write(self, thread: int, vaddr: int, data: bytes) -> None:
        self.memory[thread][:] = data

    def run_until_current(self, thread: int) -> Stop | None:
        self.current = thread
        return self.stop_before


@pytest.fixture
def tasks() -> FakeTasks:
    return FakeTasks()


@pytest.fixture
def session(tasks: FakeTasks) -> Session:
    machine = FakeMachine(X86_64)
    choice = ThreadChoice(tasks)
    session = Session(machine, X86_64, monitor=Monitor(Services(machine, threads=choice)), threads=choice)
    choice.choose("tasks")
    ask(session, GDB)
    session.open()
    return session


def test_listings_name_every_task(session: Session, tasks: FakeTasks) -> None:
    """By both packets; what XML cannot hold is not sent; the running one is current."""
    assert ask(session, b"qfThreadInfo") == b"mp1.3,p1.7,p1.400001"
    assert ask(session, b"qsThreadInfo") == b"l"
    assert ask(session, b"qC") == b"QCp1.7"
    document = ask(session, b"qXfer:threads:read::0,fff").decode()
    assert '<thread id="p1.3" core="0" name="a &quot;&lt;task&gt;?">sleeping</thread>' in document
    assert bytes.fromhex(ask(session, b"qThreadExtraInfo,p1.3").decode()).startswith(b'a "<task>')
    tasks.known += [FakeTask(100 + index, "many") for index in range(1000)]
    named, more = ask(session, b"qfThreadInfo"), b"m"
    while more != b"l":
        more = ask(session, b"qsThreadInfo")
        named += b"," + more[1:]
    assert named.count(b"p1.") == 1003


def test_registers_and_memory_are_the_selected_tasks(session: Session, tasks: FakeTasks) -> None:
    """What is not kept is unavailable; nothing of it can be set; memory is by its own tables."""
    assert ask(session, b"Hgp1.3") == b"OK"
    registers = ask(session, b"g")
    rip, rsp = (X86_64.numbers[name] for name in ("rip", "rsp"))
    assert len(registers) == 2 * X86_64.packet_size
    assert registers.startswith(b"xx" * 8)
    assert ask(session, b"p%x" % rip) == (0x1234).to_bytes(8, "little").hex().encode()
    assert ask(session, b"p%x" % rsp) == (0x5678).to_bytes(8, "little").hex().encode()
    assert b"does not run" in ask(session, b"P%x=%s" % (rip, b"00" * 8))
    assert b"does not run" in ask(session, b"G" + registers)
    assert ask(session, b"m10,1") == b"33"
    assert ask(session, b"M10,1:34") == b"OK"
    assert tasks.memory[3] == b"4"
    assert ask(session, b"Hgp1.7") == b"OK"
    assert ask(session, b"p%x" % rip) == CODE.to_bytes(8, "little").hex().encode()


@pytest.mark.parametrize("payload", [b"Hgp1.4", b"Tp1.4", b"T4", b"Hgp2.7", b"qThreadExtraInfo,p1.4", b"vCont;s:p1.4"])
def test_no_such_thread(session: Session, payload: bytes) -> None:
    assert ask(session, payload) == b"E.no such thread"


@pytest.mark.parametrize("payload", [b"Hg0", b"Hgp0.0", b"Hgp1.-1", b"Hg-1", b"Tp1.3", b"Hcp1.7"])
def test_ids_of_any_thread_and_of_known_ones(session: Session, payload: bytes) -> None:
    assert ask(session, payload) == b"OK"


def test_step_of_a_task_that_does_not_run(session: Session, tasks: FakeTasks) -> None:
    """The guest runs until it does, and then one instruction; a stop on the way is told as the thread's it is in."""
    resume = session.handle(b"vCont;s:p1.3;c:p1.-1")
    assert resume == Resume(step=True, task=3)
    assert session.advance_at_once(resume) is None
    stop = session.advance(resume)
    assert isinstance(stop, Step)
    assert b"thread:p1.3;" in session.stopped(stop)[-1]
    tasks.current, tasks.stop_before = 7, Breakpoint(CODE)
    assert session.advance(Resume(step=True, task=3)) == Breakpoint(CODE)
    assert session.handle(b"vCont;r10,20:p1.400001;c") == Resume(step=True, stop_range=(0x10, 0x20), task=0x400001)


def test_choice_is_seen_at_the_next_stop(session: Session, tasks: FakeTasks) -> None:
    """Until then ids mean what they meant; a guest whose tasks are not known has none to choose."""
    ask(session, b"qRcmd," + b"threads cpus".hex().encode())
    assert ask(session, b"qC") == b"QCp1.7"
    assert b"thread:p1.1;" in session.stopped(Interrupted(CODE))[-1]
    assert ask(session, b"qfThreadInfo") == b"mp1.1"
    tasks.known = []
    with pytest.raises(MachineError, match="nobody knows"):
        ThreadChoice(tasks).choose("tasks")
    with pytest.raises(MachineError, match="not known"):
        ThreadChoice().choose("tasks")


def test_non_stop_and_tasks_exclude_each_other(session: Session) -> None:
    """Asked for the one while the other is chosen it is refused; who has it already keeps the processor."""
    assert b"monitor threads cpus" in ask(session, b"QNonStop:1")
    ask(session, b"qSupported:multiprocess+")
    assert b"monitor threads cpus" in ask(session, b"QNonStop:1"), "gdb 13, which has no error-message, shows it too"
    ask(session, b"qRcmd," + b"threads cpus".hex().encode())
    assert ask(session, b"QNonStop:1") == b"OK"
    said = session.handle(b"qRcmd," + b"threads tasks".hex().encode())
    assert isinstance(said, Send)
    assert "gdb in non-stop mode keep the processor" in bytes.fromhex(said.payloads[0][1:].decode()).decode()
    assert b"thread:p1.1;" in ask(session, b"?")
