"""What gdb shows of a stopped guest: its memory without anything of ours in it, and its registers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gdbstub.automation import GdbError, GdbSession, gdb_session
from gdbstub.serving import Served

Embedded = Callable[..., Served]
UNMAPPED = {64: 0xFFFF_9000_0000_0000, 32: 0xFFF0_0000}


def stopped_at(session: GdbSession, function: str) -> None:
    session.execute(f"tbreak {function}")
    session.resume()
    assert session.wait_stop().function == function


def test_unmapped_memory_is_an_error_and_no_zeros(gdb: str, linux: Served, bits: int):
    """In gdb's own words, for every way to look, and the session goes on."""
    with gdb_session(linux.address, gdb=gdb) as session:
        for command in ("x/4x {:#x}", "x/i {:#x}", "print *(int *) {:#x}"):
            with pytest.raises(GdbError, match=f"Cannot access memory at address {UNMAPPED[bits]:#x}"):
                session.execute(command.format(UNMAPPED[bits]))
        with pytest.raises(GdbError, match="Cannot access memory at address"):
            session.execute(f"set var *(int *) {UNMAPPED[bits]:#x} = 1")
        assert "<vfs_read>" in session.execute("x/i vfs_read")


@pytest.mark.parametrize("arm", ["int3", "hook"])
def test_a_probed_address_shows_the_guests_own_bytes(gdb: str, embedded: Embedded, arm: str):
    """To x/i, disassemble and x/x, also with gdb's breakpoints inserted at and beside the probe."""
    served = embedded("calls=50 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        stopped_at(session, "target")
        looks = ("x/4i target2", "disassemble target2", "x/16xb target2", "x/i do_timer")
        before = [session.execute(look) for look in looks]
        session.execute("set breakpoint always-inserted on")
        session.monitor(f"kprobe add --arm {arm} p:probe target2")
        assert [session.execute(look) for look in looks] == before
        session.execute("break *target2")
        session.execute("break do_timer")
        session.execute(
            "maintenance flush dcache" if "dcache" in session.execute("help maintenance flush") else "stepi"
        )
        assert [session.execute(look) for look in looks] == before
        session.resume()
        assert session.wait_stop().function == "target2"
        assert [session.execute(look).replace("=> ", "   ") for look in looks] == before


def test_written_code_is_read_back_under_a_breakpoint(gdb: str, embedded: Embedded):
    """A write over an armed byte keeps the breakpoint and shows the new byte; undoing both leaves the new byte."""
    served = embedded("calls=50 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        stopped_at(session, "target")
        session.execute("set breakpoint always-inserted on")
        session.monitor("kprobe add --arm int3 p:probe target2")
        session.execute("set var *(unsigned char *)&target2 = 0x90")
        assert session.execute("output/x *(unsigned char *)&target2") == "0x90"
        session.monitor("kprobe del probe")
        assert session.execute("output/x *(unsigned char *)&target2") == "0x90"


def test_registers_are_set_and_read_back(gdb: str, embedded: Embedded, bits: int):
    """General ones, flags by name, x87 and SSE; the machine has them too."""
    served = embedded("calls=50 loop", waiting=True)
    wide = "rax" if bits == 64 else "eax"
    with gdb_session(served.address, gdb=gdb) as session:
        stopped_at(session, "target")
        session.execute(f"set var ${wide} = 0x1234")
        session.execute("set var $eflags = $eflags | 1")
        session.execute("set var $xmm1.v4_int32[2] = 77")
        session.execute("set var $st0 = 1.5")
        assert session.evaluate(f"${wide}") == str(0x1234)
        assert "CF" in session.evaluate("$eflags")
        assert session.evaluate("$st0") == "1.5"
        assert session.evaluate("$xmm1.v4_int32[2]") == "77"
        assert served.call(lambda: served.machine.registers.read(wide)) == 0x1234
        assert served.call(lambda: served.machine.registers.read("xmm1")) >> 64 & 0xFFFFFFFF == 77


def test_info_registers_all_shows_every_register(gdb: str, linux: Served, bits: int):
    """Of a Linux guest at any point, x87 and SSE among them."""
    with gdb_session(linux.address, gdb=gdb) as session:
        shown = {line.split()[0] for line in session.execute("info registers all").splitlines() if line.strip()}
    assert {"rip" if bits == 64 else "eip", "eflags", "st7", "mxcsr", "xmm7", "fctrl", "cs"} <= shown


def test_memory_is_written_and_read_back(gdb: str, embedded: Embedded):
    """Through gdb, and the guest computes with it."""
    served = embedded("calls=50 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        stopped_at(session, "target")
        session.execute("set var *(int *)&checksum = 0x55AA")
        assert session.evaluate("*(int *)&checksum") == str(0x55AA)
        stopped_at(session, "fib")
        results = 0 + 1 + 0 + 3  # of target, target2, recursed_target and nested_target in the first round
        assert session.evaluate("*(int *)&checksum") == str(0x55AA + results)
