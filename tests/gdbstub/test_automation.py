"""gdb from a script: what comes back as text, what as a stop, and what a wait in vain says."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from emu import boot_embedded
from gdbstub.automation import GdbError, GdbTimeout, find_gdb, gdb_session
from gdbstub.serving import Served, serve


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(boot_embedded(64, "calls=3 loop"), waiting=True) as served:
        yield served


def test_a_session_is_shown_as_it_would_be_typed(served: Served):
    """Command, then what it printed; from `target remote` on."""
    shown: list[str] = []
    with gdb_session(served.address, show=shown.append) as gdb:
        assert gdb.execute('printf "%d\\n", 6 * 7') == "42\n"
    assert shown[0] == f"(gdb) target remote {served.address}"
    assert shown[-2:] == ['(gdb) printf "%d\\n", 6 * 7', "42"]


def test_stops_are_values(served: Served):
    """Of a breakpoint, with its number and place; of Ctrl-C, with gdb's signal."""
    with gdb_session(served.address) as gdb:
        gdb.execute("break do_timer")
        gdb.resume()
        hit = gdb.wait_stop()
        (timer,) = served.machine.symbols.lookup("do_timer")
        assert (hit.reason, hit.breakpoint, hit.function) == ("breakpoint-hit", 1, "do_timer")
        assert hit.pc is not None
        assert timer.address <= hit.pc < timer.address + timer.size
        gdb.execute("delete")
        gdb.resume()
        stop = gdb.interrupt()
        assert (stop.reason, stop.signal, stop.breakpoint) == ("signal-received", "SIGINT", None)
        assert gdb.stop is stop


def test_registers_memory_and_frames_are_values():
    """Numbers, bytes and places; what there is not is an error."""
    with serve(boot_embedded(64, "calls=3 loop"), waiting=True) as served, gdb_session(served.address) as gdb:
        number = gdb.break_at("fib", condition="$rdi > 0", temporary=True)
        gdb.resume()
        stop = gdb.wait_stop()
        assert (stop.breakpoint, stop.function) == (number, "fib")
        assert gdb.registers("rip", "eflags")["rip"] == stop.pc
        assert {"rax", "cr3", "idtr_base"} <= gdb.registers().keys()
        frames = gdb.backtrace(2)
        assert [(frame.level, frame.function) for frame in frames] == [(0, "fib"), (1, "exercise")]
        place = gdb.registers("rsp")["rsp"] - 0x200
        gdb.write_memory(place, b"written")
        assert gdb.read_memory(place, 7) == b"written"
        for wrong in (
            lambda: gdb.registers("rqx"),
            lambda: gdb.read_memory(0xFFFF << 48, 4),
            lambda: gdb.break_at("x y"),
        ):
            with pytest.raises(GdbError):
                wrong()


def test_monitor_text_comes_back(served: Served):
    with gdb_session(served.address) as gdb:
        assert "cr3" in gdb.monitor("info registers")


def test_a_refused_command_is_an_error_with_gdbs_reason(served: Served):
    """And the session goes on."""
    with gdb_session(served.address) as gdb:
        with pytest.raises(GdbError, match="No symbol") as caught:
            gdb.execute("print nowhere")
        assert caught.value.command == "print nowhere"
        assert gdb.evaluate("1 + 1") == "2"


def test_a_wait_in_vain_names_what_was_awaited(served: Served):
    """A guest in a busy loop never stops by itself."""
    with gdb_session(served.address) as gdb:
        gdb.resume()
        with pytest.raises(GdbTimeout, match=r"^a stop: nothing within 0\.2 seconds"):
            gdb.wait_stop(timeout=0.2)
        gdb.interrupt()


def test_a_gdb_that_dies_is_an_error_at_once(served: Served):
    with gdb_session(served.address) as gdb:
        os.kill(gdb.pid, signal.SIGKILL)
        with pytest.raises(GdbError, match="gdb has ended"):
            gdb.execute("print 1")


def test_a_stub_that_is_not_there_is_an_error():
    with (
        pytest.raises(GdbError, match=r"target remote 127\.0\.0\.1:1: .*Connection refused"),
        gdb_session("127.0.0.1:1"),
    ):
        pass


def test_a_gdb_that_is_not_there_is_an_error():
    with pytest.raises(GdbError, match="no such program"), gdb_session("127.0.0.1:1", gdb="/nowhere/gdb"):
        pass


def test_a_gdb_is_found_beside_this_python(monkeypatch: pytest.MonkeyPatch):
    """The test extra brings one, on the path or not."""
    monkeypatch.setenv("PATH", "/nowhere")
    found = find_gdb()
    assert found is not None
    assert os.access(found, os.X_OK)
