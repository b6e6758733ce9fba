"""Non-stop mode and extended-remote as gdb's user has them: run, kill, detach and attach again on one connection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from emu.boot import boot_embedded
from gdbstub.automation import GdbError, GdbSession
from gdbstub.serving import Served, serve


@contextmanager
def connected(gdb: str, served: Served, *commands: str, target: str = "remote") -> Iterator[GdbSession]:
    session = GdbSession(gdb)
    try:
        for command in (*commands, f"target {target} {served.address}"):
            session.execute(command)
        session.wait_stop()
        yield session
    finally:
        session.close()


@contextmanager
def embedded(bits: int, append: str) -> Iterator[Served]:
    with serve(boot_embedded(bits, append), waiting=True, again=lambda: boot_embedded(bits, append)) as served:
        yield served


def test_nonstop_runs_looks_and_stops(gdb: str, bits: int):
    """Memory is read while the guest runs; breakpoints go in and come as notifications; interrupt; step; detach."""
    with embedded(bits, "calls=5 loop") as served, connected(gdb, served, "set non-stop on") as session:
        session.execute("break inner_target")
        session.resume()
        stop = session.wait_stop()
        assert (stop.reason, stop.function) == ("breakpoint-hit", "inner_target")
        session.execute("delete")
        session.resume("finish")
        assert session.wait_stop().function == "nested_target"
        session.resume("stepi")
        assert session.wait_stop().reason == "end-stepping-range"
        session.resume()
        first = int(session.evaluate("*(int *)&jiffies"))
        while int(session.evaluate("*(int *)&jiffies")) == first:
            pass  # the guest runs meanwhile
        assert session.interrupt().signal in ("0", "SIGINT")
        session.resume()
        session.execute("detach")
        served.wait_running()


def test_run_restarts_the_machine(gdb: str, bits: int):
    """From wherever it is, and after it has ended: each run meets the same breakpoint at the same instruction."""
    with embedded(bits, "calls=2 exit=3") as served, connected(gdb, served, target="extended-remote") as session:
        session.execute("break inner_target")
        session.resume()
        assert session.wait_stop().function == "inner_target"
        count = served.call(lambda: served.machine.instructions)
        for _ in range(2):
            session.resume("run")
            assert session.wait_stop().function == "inner_target"
            assert served.call(lambda: served.machine.instructions) == count
        session.execute("disable")
        session.resume()
        end = session.wait_stop()
        assert (end.reason, end.exit_code) == ("exited", 3)
        session.execute("enable")
        session.resume("run")
        assert session.wait_stop().function == "inner_target"
        assert served.call(lambda: served.machine.instructions) == count


def test_kill_detach_and_attach_on_one_connection(gdb: str, bits: int):
    """There is no process after kill; after detach the guest runs, and attach stops it again."""
    with embedded(bits, "loop") as served, connected(gdb, served, target="extended-remote") as session:
        session.execute("kill")
        with pytest.raises(GdbError, match=r"not being run|no registers"):
            session.execute("info registers")
        session.resume("starti")
        session.wait_stop()
        assert served.call(lambda: served.machine.instructions) == 0
        session.execute("detach")
        served.wait_running()
        session.execute("attach 1")
        session.wait_stop()
        assert session.evaluate("$pc") != ""
        session.execute("monitor info stats")


def test_remote_says_that_run_is_for_extended_remote(new_gdb: str):
    """gdb does so itself."""
    with embedded(64, "loop") as served, connected(new_gdb, served) as session, pytest.raises(GdbError):
        session.resume("run")


def test_info_threads_names_the_cpu(gdb: str, bits: int):
    with embedded(bits, "loop") as served, connected(gdb, served) as session:
        assert '"CPU 0"' in session.execute("info threads")
