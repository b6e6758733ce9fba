"""Breakpoints, steps, Ctrl-C and everything else that lets the guest run, as gdb's user types it."""

from __future__ import annotations

from collections.abc import Callable

from gdbstub.automation import GdbSession, Stopped, gdb_session
from gdbstub.serving import Served

Embedded = Callable[..., Served]

CALLERS = {
    64: ["do_sys_openat2", "__x64_sys_openat", "do_syscall_64"],
    32: ["do_sys_openat2", "__ia32_sys_openat"],
}
"""The innermost frames of an open() by a program of the guest's own word size."""


def ran(session: GdbSession, command: str) -> Stopped:
    session.resume(command)
    return session.wait_stop()


def test_a_breakpoint_in_linux_stops_with_its_callers(gdb: str, linux: Served, bits: int):
    """On do_sys_openat2, reached by a shell command; the first frames are those of the system call."""
    with gdb_session(linux.address, gdb=gdb) as session:
        session.execute("break do_sys_openat2")
        session.resume()
        linux.type("cat /proc/version")
        stop = session.wait_stop()
        assert (stop.reason, stop.function) == ("breakpoint-hit", "do_sys_openat2")
        frames = session.execute(f"bt {len(CALLERS[bits])}").splitlines()
        names = [frame.partition(" (")[0].split()[-1] for frame in frames]
        assert names[: len(CALLERS[bits])] == CALLERS[bits]


def test_finish_until_and_continue_in_linux(gdb: str, linux: Served, bits: int):
    """`finish` comes back to the caller, `until` and `advance` go to a place, `continue` to the next hit."""
    caller = CALLERS[bits][1]
    with gdb_session(linux.address, gdb=gdb) as session:
        session.execute("break do_sys_openat2")
        session.resume()
        linux.type("cat /proc/version /proc/uptime")
        assert session.wait_stop().function == "do_sys_openat2"
        assert ran(session, "finish").function == caller
        stop = ran(session, "continue")
        assert (stop.reason, stop.function) == ("breakpoint-hit", "do_sys_openat2")
        here = ran(session, "until *$pc+5")
        assert stop.pc is not None
        assert (here.reason, here.pc) == ("location-reached", stop.pc + 5)
        assert ran(session, "continue").function == "do_sys_openat2"


def test_stepi_goes_instruction_by_instruction(gdb: str, embedded: Embedded):
    """Through a function of the guest: each step ends where the disassembly says the next instruction is."""
    served = embedded("calls=50 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        session.execute("break target")
        ran(session, "continue")
        session.execute("delete")
        for _ in range(5):
            following = session.execute("x/2i $pc").splitlines()[1].split()[0]
            stop = ran(session, "stepi")
            assert (stop.reason, stop.pc) == ("end-stepping-range", int(following, 16))


def test_nexti_and_next_run_calls_whole(gdb: str, embedded: Embedded):
    """nexti goes over a call; next, without line numbers, goes on to the caller, and step out of the callee."""
    served = embedded("calls=50 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        session.execute("break nested_target")
        ran(session, "continue")
        while "call" not in (line := session.execute("x/i $pc")):
            ran(session, "stepi")
        assert "inner_target" in line
        after = session.execute("x/2i $pc").splitlines()[1].split()[0]
        assert ran(session, "nexti").pc == int(after, 16)
        assert ran(session, "next").function == "exercise"
        session.execute("delete")
        session.execute("break inner_target")
        assert ran(session, "continue").function == "inner_target"
        assert ran(session, "step").function != "inner_target"


def test_ctrl_c_stops_a_kernel_that_computes(gdb: str, embedded: Embedded):
    """Time after time, in the busy loop, and the guest goes on from there."""
    served = embedded("loop")
    with gdb_session(served.address, gdb=gdb) as session:
        for _ in range(3):
            session.resume()
            stop = session.interrupt()
            assert (stop.reason, stop.signal, stop.function is not None) == ("signal-received", "SIGINT", True)


def test_ctrl_c_stops_a_shell_that_computes(new_gdb: str, linux: Served):
    """A program in ring 3 that never sleeps."""
    with linux.printing("while"):
        linux.type("while :; do :; done")
    with gdb_session(linux.address, gdb=new_gdb) as session:
        for _ in range(3):
            session.resume()
            assert session.interrupt().signal == "SIGINT"


def test_a_jump_to_a_breakpoint_stops_there_at_once(gdb: str, embedded: Embedded):
    """gdb steps over only the breakpoint it stopped at; one that the pc was moved to is a hit, at once."""
    served = embedded("calls=50 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        session.execute("break *target")
        start = ran(session, "continue").pc
        before = served.call(lambda: served.machine.instructions)
        session.execute("break *fib")
        for command in ("jump *fib", "continue"):
            stop = ran(session, command)
            assert (stop.reason, served.call(lambda: served.machine.instructions)) == ("breakpoint-hit", before)
            session.execute(f"set var $pc = {start}")
