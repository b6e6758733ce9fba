"""Actions of events under gdb: what a probe asks for reaches the person at the prompt."""

from __future__ import annotations

from collections.abc import Callable

from gdbstub.automation import gdb_session
from gdbstub.serving import Served

Embedded = Callable[..., Served]


def test_a_probe_s_stop_action_stops_gdb(gdb: str, embedded: Embedded):
    """gdb has no breakpoint there, so the reply must not call it one; twice, and then the guest runs on to its end."""
    served = embedded("opens=5 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        session.monitor("kprobe add p:o do_open flags=$arg2")
        session.monitor("echo 'stop:2 if flags >= 2' > events/kprobes/o/trigger")
        for flags in (2, 3):
            session.resume()
            stop = session.wait_stop()
            assert stop.function == "do_open"
            assert f"flags={flags:#x}" in session.monitor("trace").splitlines()[-1]
        session.execute("break do_timer")
        session.resume()
        assert session.wait_stop().function == "do_timer"
