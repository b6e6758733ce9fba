"""lldb's own packets, byte by byte, and a session of a real lldb."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from emu import boot_embedded
from emu.arch import I386, X86_64, Arch
from gdbstub.serving import serve
from gdbstub.session import Session
from tests.support.asking import ask
from tests.support.fake_machine import CODE, FakeMachine
from tests.support.tiny import Tiny

LLDB = str(Path(sys.executable).parent / "lldb")


def pairs(reply: bytes) -> dict[str, str]:
    return dict(pair.split(":", 1) for pair in reply.decode().split(";") if pair)


@pytest.mark.parametrize(("arch", "triple"), [(I386, "i386-unknown-none"), (X86_64, "x86_64-unknown-none")])
def test_host_and_process_are_told(arch: Arch, triple: str):
    """The triple names no operating system: lldb then looks for no loader."""
    session = Session(FakeMachine(arch), arch)
    for payload in (b"qHostInfo", b"qProcessInfo"):
        found = pairs(ask(session, payload))
        assert bytes.fromhex(found["triple"]).decode() == triple
        assert (found["endian"], found["ptrsize"]) == ("little", str(arch.word_size))
    assert pairs(ask(session, b"qProcessInfo"))["pid"] == "1"


@pytest.mark.parametrize("arch", [I386, X86_64], ids=lambda arch: arch.name)
def test_registers_are_enumerated_as_the_g_packet_has_them(arch: Arch):
    """Offsets without gaps, names and sizes of the description, the frame's registers by generic names."""
    session = Session(FakeMachine(arch), arch)
    offset, generic = 0, {}
    for index, register in enumerate(arch.registers):
        found = pairs(ask(session, b"qRegisterInfo%x" % index))
        assert (found["name"], int(found["bitsize"]), int(found["offset"])) == (register.name, register.bits, offset)
        offset += register.size
        generic[found.get("generic", "")] = register.name
    assert [generic[name] for name in ("pc", "sp", "fp", "flags")] == [arch.pc, *reversed(arch.expedited[:2]), "eflags"]
    assert ask(session, b"qRegisterInfo%x" % len(arch.registers)) == b"E45"
    assert ask(session, b"qRegisterInfozz") == b"E01"


def test_register_packets_may_name_the_thread():
    """Once lldb has asked for it; the answers are the same."""
    session = Session(FakeMachine(X86_64), X86_64)
    before = ask(session, b"p10"), ask(session, b"g")
    assert ask(session, b"QThreadSuffixSupported") == b"OK"
    assert (ask(session, b"p10;thread:0001;"), ask(session, b"g;thread:0001;")) == before
    assert ask(session, b"P10=%b;thread:0001;" % (CODE + 3).to_bytes(8, "little").hex().encode()) == b"OK"
    assert ask(session, b"p10") == (CODE + 3).to_bytes(8, "little").hex().encode()


def test_threads_are_told_as_json():
    assert json.loads(ask(Session(FakeMachine(X86_64), X86_64), b"jThreadsInfo")) == [{"tid": 1, "name": "CPU 0"}]


@pytest.mark.parametrize("bits", [32, 64])
def test_regions_cover_the_address_space_in_order(bits: int):
    """Walking from 0, mapped ranges and holes follow each other to the last address; rights are those of the tables."""
    guest = Tiny(bits, "hlt")
    guest.map(0x50000, 0)
    guest.map(0x60000, 0x60000 | 5)  # user, not writable
    session = Session(guest.machine, guest.machine.registers.arch)
    at, rows = 0, []
    while at < 1 << bits:
        found = pairs(ask(session, b"qMemoryRegionInfo:%x" % at))
        start, size = int(found["start"], 16), int(found["size"], 16)
        assert (start, size > 0) == (at, True)
        rows.append((start, found.get("permissions", "")))
        at = start + size
    assert rows[:6] == [(0, "rwx"), (0x50000, ""), (0x51000, "rwx"), (0x60000, "rx"), (0x61000, "rwx"), (0x200000, "")]
    assert pairs(ask(session, b"qMemoryRegionInfo:50800")) == {"start": "50000", "size": "1000"}


@pytest.mark.parametrize("bits", [64, 32])
def test_a_session_of_lldb(bits: int):
    """Attach, breakpoint, continue, step, registers, memory, detach."""
    machine = boot_embedded(bits, "calls=50 loop")
    (target,) = machine.symbols.lookup("target")
    commands = (
        "breakpoint set -H -a {0:#x}", "continue", "register read pc", "si", "register read pc cr0",
        "memory region {0:#x}", "memory read -c 8 {0:#x}", "memory write {1:#x} 0x5a", "memory read -c 1 {1:#x}",
        "thread list", "breakpoint delete -f", "detach",
    )  # fmt: skip
    with serve(machine, waiting=True) as served:
        (scratch,) = machine.symbols.lookup("checksum")
        words = [
            part
            for command in (f"gdb-remote {served.address}", *commands)
            for part in ("-o", command.format(target.address, scratch.address))
        ]
        done = subprocess.run(
            [LLDB, "--no-lldbinit", "-b", *words], capture_output=True, text=True, timeout=60, check=False
        )
        said = done.stdout
    assert "stop reason = breakpoint 1.1" in said, said + done.stderr
    assert re.search(rf"[re]ip = 0x0*{target.address:x}\b", said), said
    assert "stop reason = instruction step into" in said
    assert "cr0 = 0x" in said
    assert re.search(r"^\[0x[0-9a-f]+-0x[0-9a-f]+\) r[w-]x", said, re.MULTILINE), said
    assert re.search(r"^0x[0-9a-f]+: 5a", said, re.MULTILINE), said
    assert "CPU 0" in said
    assert "Process 1 detached" in said
