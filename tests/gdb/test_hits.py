"""Hits against what the guest can account for, and probes and breakpoints at one address."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gdbstub.automation import gdb_session
from gdbstub.serving import Served
from tests.support.embedded import Guest

Embedded = Callable[..., Served]


@pytest.mark.parametrize("arm", ["int3", "hook"])
def test_a_file_opened_a_hundred_times_is_a_hundred_hits(linux: Served, arm: str):
    """By a shell's loop; other opens do not carry its name. Armed through gdb, counted with gdb gone."""
    with gdb_session(linux.address) as session:
        session.monitor(f"kprobe add --arm {arm} p:open do_sys_openat2 file=+0($arg2):string")
    with linux.printing("^all opened"):
        linux.type("i=0; while [ $i -lt 100 ]; do read x < /proc/version; i=$((i+1)); done; echo all opened")
    trace = linux.monitor("trace")
    assert trace.count('file="/proc/version"') == 100
    assert "0 missed" in linux.monitor("kprobe info open")


@pytest.mark.parametrize("arm", ["int3", "hook"])
def test_a_breakpoint_and_a_probe_at_one_address_both_count(gdb: str, embedded: Embedded, bits: int, arm: str):
    """As many stops as hits as calls that the guest counted itself, whichever was set first."""
    served = embedded("calls=6 poweroff", waiting=True)
    stops: list[str] = []
    with gdb_session(served.address, gdb=gdb) as session:
        session.execute("tbreak run_workloads")
        session.resume()
        session.wait_stop()  # before that the kernel is not mapped
        session.execute("break *fib")
        session.monitor(f"kprobe add --arm {arm} p:fib fib")
        session.monitor(f"kprobe add --arm {arm} p:target2 target2")
        session.execute("break *target2")
        session.resume()
        while not (stop := session.wait_stop()).reason.startswith("exited"):
            assert stop.function is not None
            stops.append(stop.function)
            session.resume()
    called = served.call(lambda: Guest(served.machine, bits).counters)
    assert called["fib"] == 6 * 25
    assert {name: stops.count(name) for name in set(stops)} == {name: called[name] for name in ("fib", "target2")}
    hits = {status.name: (status.hits, status.missed) for status in served.call(served.probes.status)}
    assert hits == {f"kprobes/{name}": (called[name], 0) for name in ("fib", "target2")}


@pytest.mark.parametrize("arm", ["int3", "hook"])
def test_steps_across_a_probed_instruction_hit_it_once(gdb: str, embedded: Embedded, arm: str):
    """And end where they would without it."""
    served = embedded("calls=6 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        session.execute("break *target")
        session.resume()
        session.wait_stop()
        expected = [int(line.replace("=>", "").split()[0], 16) for line in session.execute("x/4i $pc").splitlines()]
        session.monitor(f"kprobe add --arm {arm} p:probe target")
        session.monitor(f"kprobe add --arm {arm} p:second {expected[1]:#x}")
        places = []
        for _ in range(3):
            session.resume("stepi")
            places.append(session.wait_stop().pc)
        assert places == expected[1:]
        assert ": enabled, 1 hits" in session.monitor("kprobe info probe")
        assert ": enabled, 1 hits" in session.monitor("kprobe info second")
