"""gdb beside return probes: it sees true return addresses, and walks over returns as if nobody followed them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from gdbstub.automation import gdb_session
from gdbstub.serving import Served

Embedded = Callable[..., Served]
WAYS = ["--trampoline", "--shadow"]


def frames(text: str) -> list[str]:
    """Function names of a backtrace, inside out."""
    return re.findall(r"^#\d+\s+(?:0x[0-9a-f]+ in )?(\w+)", text, re.MULTILINE)


@pytest.mark.parametrize("way", WAYS)
def test_backtrace_inside_probed_functions_is_true(gdb: str, embedded: Embedded, way: str):
    """Two nested functions with return probes: the callers are those of the program."""
    served = embedded("calls=6 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        session.execute("tbreak run_workloads")
        session.resume()
        session.wait_stop()
        for function in ("nested_target", "inner_target"):
            session.monitor(f"kretprobe add {way} r {function}")
        session.execute("break inner_target")
        session.resume()
        session.wait_stop()
        session.resume("stepi 3")
        session.wait_stop()
        assert frames(session.execute("bt"))[:4] == ["inner_target", "nested_target", "exercise", "do_calls"]


@pytest.mark.parametrize("way", WAYS)
def test_finish_and_stepi_over_a_followed_return(gdb: str, embedded: Embedded, way: str):
    """`finish` stops in the caller; `stepi` at a `ret` goes there, not to us; both returns are handled."""
    served = embedded("calls=6 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        session.execute("tbreak run_workloads")
        session.resume()
        session.wait_stop()
        session.monitor(f"kretprobe add {way} r:e recursed_target")
        session.execute("tbreak recursed_target")
        session.resume()
        session.wait_stop()
        session.resume("finish")
        assert session.wait_stop().function == "exercise"
        # its last instruction
        ret = [line for line in session.execute("disassemble recursed_target").splitlines() if "ret" in line][-1]
        session.execute(f"tbreak *{re.findall(r'0x[0-9a-f]+', ret)[0]}")
        session.resume()
        session.wait_stop()
        session.resume("stepi")
        assert session.wait_stop().function == "exercise"
        session.resume("stepi")
        session.wait_stop()
        assert "2 entries = 2 returned + 0 live" in session.monitor("kretprobe info e")
