"""watch, rwatch and awatch as gdb's user types them: kinds, lengths, places, values before and after."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gdbstub.automation import GdbSession, gdb_session
from gdbstub.serving import Served

Embedded = Callable[..., Served]


def proceed(session: GdbSession, command: str = "continue") -> str:
    """The reason of the next stop."""
    session.resume(command)
    return session.wait_stop().reason


def test_watch_shows_the_values_before_and_after(gdb: str, embedded: Embedded):
    """The guest's clock counts by one; the instruction before the pc is the one that stored."""
    served = embedded("calls=50 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        session.execute("watch *(int *)&jiffies")
        for count in range(3):
            assert proceed(session) == "watchpoint-trigger"
            assert session.evaluate("*(int *)&jiffies") == str(count + 1)
        said = session.execute("info watchpoints")
        assert "hw watchpoint" in said
        assert "already hit 3 times" in said
        session.execute("delete")
        session.resume()
        assert session.interrupt().signal == "SIGINT"


@pytest.mark.parametrize(
    ("command", "reason"), [("rwatch", "read-watchpoint-trigger"), ("awatch", "access-watchpoint-trigger")]
)
def test_reads_and_accesses_are_told_apart(gdb: str, embedded: Embedded, command: str, reason: str):
    """`checksum` is read and added to by each round of exercise()."""
    served = embedded("calls=50 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        session.execute(f"{command} *(int *)&checksum")
        for _ in range(2):
            assert proceed(session) == reason


@pytest.mark.parametrize("size", [1, 3, 8, 13, 64])
def test_a_piece_of_the_stack_of_any_length_is_watched(new_gdb: str, embedded: Embedded, size: int):
    """From an odd address inside the frame of a function that calls on: the first change in it stops."""
    served = embedded("calls=50 loop", waiting=True)
    with gdb_session(served.address, gdb=new_gdb) as session:
        session.execute("tbreak nested_target")
        proceed(session)
        session.execute(f"watch -l *(char (*)[{size}])($sp - {size - 1} - sizeof(long))")
        assert proceed(session) == "watchpoint-trigger"
        session.execute("delete")
        session.execute("tbreak nested_target")
        assert proceed(session) == "breakpoint-hit"


def test_a_watchpoint_and_a_breakpoint_behind_it_are_both_told(gdb: str, embedded: Embedded):
    """gdb shows both at one stop, and goes on from it once."""
    served = embedded("calls=50 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        session.execute("watch *(int *)&jiffies")
        proceed(session)
        session.execute("break *$pc")
        session.resume()
        reason = session.wait_stop().reason
        assert "watchpoint-trigger" in reason
        assert "breakpoint-hit" in reason
        assert session.evaluate("*(int *)&jiffies") == "2"
        assert "already hit 1 time" in session.execute("info breakpoints 2")


def test_a_condition_on_a_watchpoint_is_gdbs(new_gdb: str, embedded: Embedded):
    """It goes on by itself until the value is there."""
    served = embedded("calls=50 loop", waiting=True)
    with gdb_session(served.address, gdb=new_gdb) as session:
        session.execute("watch *(int *)&jiffies if *(int *)&jiffies == 5")
        proceed(session)
        assert session.evaluate("*(int *)&jiffies") == "5"


def test_a_stack_of_linux_is_watched(new_gdb: str, linux: Served):
    """Below the frame of a function: what it calls writes there. Afterwards the guest runs on as before."""
    with gdb_session(linux.address, gdb=new_gdb) as session:
        session.execute("tbreak do_sys_openat2")
        session.resume()
        linux.type("cat /proc/version")
        assert session.wait_stop().function == "do_sys_openat2"
        session.execute("watch -l *(char (*)[31])($sp - 33)")
        for _ in range(3):
            assert proceed(session) == "watchpoint-trigger"
        session.execute("delete")
    with linux.printing(r"^Linux version"):
        linux.type("cat /proc/version")
