"""Exceptions as gdb's user sees them: signals by name, at the instruction, and the guest goes on."""

from __future__ import annotations

from collections.abc import Callable

from gdbstub.automation import gdb_session
from gdbstub.serving import Served

Embedded = Callable[..., Served]


def test_caught_exceptions_are_signals(gdb: str, embedded: Embedded):
    """gdb passes them on when it continues, whatever it does with SIGTRAP."""
    served = embedded("traps=1 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        session.monitor("catch exception all")
        session.monitor("catch exception 14 off")
        seen = []
        for _ in range(4):
            session.resume()
            stop = session.wait_stop()
            seen.append((stop.signal, session.execute("x/i $pc").split("\t")[-1].split()[0]))
        assert [signal for signal, _ in seen] == ["SIGTRAP", "SIGFPE", "SIGILL", "SIGSEGV"]
        assert [name for _, name in seen][:3] == ["int3", "div", "ud2"]
        session.resume()
        assert session.interrupt().signal == "SIGINT"


def test_a_fault_that_nobody_handles_is_a_signal(gdb: str, embedded: Embedded):
    """An undefined instruction without a usable gate: the processor would shut down; gdb shows where and why."""
    served = embedded("triple", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        session.resume()
        assert session.wait_stop().signal == "SIGILL"
        assert "ud2" in session.execute("x/i $pc")


def test_page_faults_of_linux_are_caught(new_gdb: str, linux: Served):
    """A program that starts touches new pages; each fault stops once, and the program ends as always."""
    with gdb_session(linux.address, gdb=new_gdb) as session:
        session.monitor("catch exception 14")
        session.resume()
        linux.type("cat /proc/version")
        for _ in range(5):
            assert session.wait_stop().signal == "SIGSEGV"
            session.resume()
        session.wait_stop()
        session.monitor("catch exception 14 off")
        with linux.printing("^Linux version"):
            session.resume()
