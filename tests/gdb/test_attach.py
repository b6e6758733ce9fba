"""Attaching, leaving and coming back, with stock gdb, Linux and the embedded guest, both word sizes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress

import pytest

from gdbstub.automation import GdbError, gdb_session
from gdbstub.serving import Served, serve
from tests.gdb.conftest import LINUX
from tests.support.kernels import switched_on

Embedded = Callable[..., Served]


def symbol(served: Served, name: str) -> int:
    (found, *_) = served.machine.symbols.lookup(name)
    return found.address


def test_symbols_are_there_without_a_further_command(gdb: str, linux: Served):
    """Names resolve both ways, and the halted guest's frames are named."""
    with gdb_session(linux.address, gdb=gdb) as session:
        assert "<vfs_read>:" in session.execute("x/i vfs_read")
        assert "vfs_read" in session.execute(f"info symbol {symbol(linux, 'vfs_read'):#x}")
        assert "idle ()" in session.execute("bt")


def test_a_guest_that_boots_is_attached_to(gdb: str, bits: int):
    """At any moment; it goes on booting after a look and a step, and again after the debugger has gone."""
    with serve(switched_on(LINUX[bits])) as served:
        with served.printing("Linux version"):
            pass
        for _ in range(2):
            with gdb_session(served.address, gdb=gdb) as session:
                session.resume("stepi")
                assert session.wait_stop().reason == "end-stepping-range"
                assert "start_kernel" in session.execute("info address start_kernel")
            served.wait_running()


def test_break_start_kernel_waits_until_it_is_mapped(gdb: str, bits: int):
    """Attached before the first instruction, when nothing is at that address yet."""
    with serve(switched_on(LINUX[bits]), waiting=True) as served, gdb_session(served.address, gdb=gdb) as session:
        assert served.call(lambda: served.machine.instructions) == 0
        with pytest.raises(GdbError, match="Cannot access memory at address"):
            session.execute("x/i start_kernel")
        session.execute(f"break *{symbol(served, 'start_kernel'):#x}")
        session.execute("break start_kernel")
        session.resume()
        stop = session.wait_stop()
        assert (stop.reason, stop.function, stop.pc) == (
            "breakpoint-hit",
            "start_kernel",
            symbol(served, "start_kernel"),
        )
        assert f"=> {stop.pc:#x} <start_kernel>:" in session.execute("x/i $pc")


def test_a_detached_guest_runs_without_breakpoints(gdb: str, embedded: Embedded):
    """And can be attached to again, as often as wanted."""
    served = embedded("loop")
    for _ in range(2):
        with gdb_session(served.address, gdb=gdb) as session:
            session.execute("break do_timer")
            session.resume()
            assert session.wait_stop().reason == "breakpoint-hit"
            session.execute("detach")
            served.wait_running()
            assert served.call(lambda: served.machine.text.armed_bytes()) == {}


def test_a_gdb_that_is_killed_leaves_probes_and_nothing_else(gdb: str, embedded: Embedded):
    """Killed at a breakpoint with breakpoints inserted: the guest runs on, another debugger attaches."""
    served = embedded("loop")
    with suppress(GdbError), gdb_session(served.address, gdb=gdb) as session:
        session.execute("set breakpoint always-inserted on")
        session.monitor("kprobe add p:tick do_timer")
        session.execute("break do_irq")
        session.execute("hbreak schedule")
        session.resume()
        session.wait_stop()
        assert len(served.call(served.machine.text.armed_bytes)) == 2
        os.kill(session.pid, signal.SIGKILL)
    served.wait_running()
    served.wait_running()
    assert not served.call(lambda: served.machine.text.owners(symbol(served, "do_irq")))
    assert len(served.call(lambda: served.machine.text.owners(symbol(served, "do_timer")))) == 1
    assert "tick: enabled" in served.monitor("kprobe info tick")
    with gdb_session(served.address, gdb=gdb) as session:
        assert session.stop is not None
        session.execute("break do_timer")
        session.resume()
        assert session.wait_stop().function == "do_timer"


def test_a_second_debugger_is_told_who_is_first(gdb: str, embedded: Embedded):
    """In words that gdb shows; the first session is not disturbed."""
    served = embedded("loop")
    with gdb_session(served.address, gdb=gdb) as first:
        with pytest.raises(GdbError) as refused, gdb_session(served.address, gdb=gdb):
            pass
        assert "is debugging this machine already" in refused.value.said + refused.value.reason
        first.resume("stepi")
        assert first.wait_stop().reason == "end-stepping-range"


def test_monitor_commands_are_served_beside_a_debugger(new_gdb: str, embedded: Embedded):
    """While the guest runs for it and while it is stopped by it; gdb sees no stop."""
    served = embedded("loop")
    with gdb_session(served.address, gdb=new_gdb) as session:
        assert "cr3" in served.monitor("info registers")
        session.resume()
        served.monitor("kprobe add p:tick do_timer")
        served.wait_running()
        assert "tick: enabled" in served.monitor("kprobe info tick")
        stop = session.interrupt()
        assert stop.signal == "SIGINT"
