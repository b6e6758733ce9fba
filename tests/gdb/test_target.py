"""The target as gdb's user handles it: memory searched, compared, saved and put back; registers; calls and returns."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from emu.images.embedded import embedded_guest
from gdbstub.automation import GdbError, GdbSession, Stopped, gdb_session
from gdbstub.serving import Served
from tests.support.images import Load, build_elf

Embedded = Callable[..., Served]


def ran(session: GdbSession, command: str = "continue") -> Stopped:
    session.resume(command)
    return session.wait_stop()


def stopped_at(session: GdbSession, function: str) -> None:
    session.execute(f"tbreak {function}")
    assert ran(session).function == function


def address(session: GdbSession, expression: str) -> int:
    return int(session.evaluate(f"(unsigned long) {expression}"))


def test_gdb_takes_the_machine_for_no_operating_systems_program(gdb: str, embedded: Embedded):
    """By the description, whatever the file says: gdb looks for no libraries, system calls, signal frames of Linux."""
    with gdb_session(embedded("loop").address, gdb=gdb) as session:
        assert '(currently "none")' in session.execute("show osabi")


def test_find_names_every_place(gdb: str, embedded: Embedded):
    """By the stub's own search: bytes that the wire escapes too; and the search ends where memory does."""
    served = embedded("calls=50 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        stopped_at(session, "target")
        start = address(session, "$sp") - 0x400
        pattern = b"}#$*needle"
        for offset in (0x11, 0x100):
            served.call(lambda offset=offset: served.machine.memory.write(start + offset, pattern))  # type: ignore[misc]
        wanted = ", ".join(f"(char) {byte}" for byte in pattern)
        said = session.execute(f"find {start:#x}, +0x300, {wanted}")
        assert [int(found, 16) for found in re.findall(r"^0x[0-9a-f]+", said, re.M)] == [start + 0x11, start + 0x100]
        assert "2 patterns found." in said
        assert "Pattern not found." in session.execute(f"find {start:#x}, +0x105, {wanted}, (char) 0xfe")


def test_compare_sections_tells_changed_memory(gdb: str, embedded: Embedded, bits: int, tmp_path: Path):
    """Against a file on gdb's side, by checksums: an image as it was loaded, and after a write to one part."""
    image = embedded_guest(bits, "calls=50 loop")
    text = next(s for s in image.segments if s.paddr <= 0x100000 < s.paddr + len(s.data) or s is image.segments[0])
    loads = [Load(text.paddr, text.paddr, bytes(text.data))]
    file = tmp_path / "image.elf"
    file.write_bytes(build_elf(bits, loads, text.paddr, symbols=[("start", text.paddr, 1)]))
    served = embedded("calls=50 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        session.execute(f"file {file}")
        assert "matched." in session.execute("compare-sections")
        session.execute(f"set var *(char *) {text.paddr:#x} ^= 1")
        assert "MIS-MATCHED!" in session.execute("compare-sections")


def test_memory_is_dumped_and_restored(gdb: str, embedded: Embedded, tmp_path: Path):
    """A kilobyte with every byte value, by gdb's own files."""
    served = embedded("calls=50 loop", waiting=True)
    file = tmp_path / "stack.bin"
    with gdb_session(served.address, gdb=gdb) as session:
        stopped_at(session, "target")
        start = address(session, "$sp") - 0x800
        data = bytes(range(256)) * 4
        served.call(lambda: served.machine.memory.write(start, data))
        session.execute(f"dump binary memory {file} {start:#x} {start + len(data):#x}")
        assert file.read_bytes() == data
        file.write_bytes(data[::-1])
        session.execute(f"restore {file} binary {start:#x}")
        assert served.call(lambda: served.machine.memory.read(start, len(data))) == data[::-1]


def test_x_shows_memory_in_every_form(gdb: str, embedded: Embedded):
    """Strings, bytes, words and instructions, of one place."""
    served = embedded("calls=50 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        stopped_at(session, "target")
        place = address(session, "$sp") - 0x200
        served.call(lambda: served.machine.memory.write(place, b"GDB stub\0\x90\xc3"))
        assert '"GDB stub"' in session.execute(f"x/s {place:#x}")
        assert session.execute(f"x/2xw {place:#x}").split()[-2:] == ["0x20424447", "0x62757473"]
        assert session.execute(f"x/3db {place:#x}").split()[-3:] == ["71", "68", "66"]
        assert re.search(r"nop.*\n.*ret", session.execute(f"x/2i {place + 9:#x}"))


def test_a_guest_function_is_called_and_leaves_no_trace(gdb: str, embedded: Embedded, bits: int):
    """With its result; afterwards every register is what it was, and the guest goes on."""
    served = embedded("calls=50 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        stopped_at(session, "target")
        names = served.machine.registers.arch.names
        before = served.call(lambda: served.machine.registers.read_many(names))
        argument = "10" if bits == 64 else ""
        result = session.execute(f"output ((int (*)()) fib)({argument})")
        if bits == 64:
            assert result == "55"
        assert served.call(lambda: served.machine.registers.read_many(names)) == before
        stopped_at(session, "target")


def test_a_kernel_function_is_called_while_the_kernel_idles(new_gdb: str, linux: Served, bits: int):
    """Linux in HLT, on a stack that 64-bit kernels cannot execute: the call comes back, and the shell works on."""
    call = (
        "((unsigned (*)(unsigned)) jiffies_to_msecs)(25)" if bits == 64 else "((unsigned (*)(void)) get_random_u32)()"
    )
    with gdb_session(linux.address, gdb=new_gdb) as session:
        value = int(session.evaluate(call))
        assert value == 100 if bits == 64 else 0 <= value < 1 << 32
        assert int(session.evaluate(call)) >= 0
    with linux.printing("^still here"):
        linux.type("echo still here")


def test_return_and_jump_move_the_program(gdb: str, embedded: Embedded):
    """`return` leaves a function unexecuted, `jump` goes on elsewhere; nothing is executed twice."""
    served = embedded("calls=50 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        stopped_at(session, "inner_target")
        before = served.call(lambda: served.machine.instructions)
        session.execute("return")
        assert "nested_target" in session.execute("frame")
        assert served.call(lambda: served.machine.instructions) == before
        session.execute("tbreak *target2")
        stop = ran(session, "jump *target2")
        assert (stop.function, served.call(lambda: served.machine.instructions)) == ("target2", before)


def test_system_registers_are_shown_and_set(gdb: str, embedded: Embedded, bits: int):
    """With names for the bits; and what the processor does not take is an error."""
    served = embedded("calls=50 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        stopped_at(session, "target")
        general = session.execute("info registers")
        assert re.search(r"^cr0 .*\[ PE .*PG \]", general, re.M)
        assert re.search(r"^idtr_base ", general, re.M)
        cr3 = int(session.execute("output/x $cr3"), 16)
        assert cr3 == served.call(lambda: served.machine.cpu.cr3)
        session.execute("set var $dr0 = 0x1234")
        assert served.call(lambda: served.machine.registers.read("dr0")) == 0x1234
        with pytest.raises(GdbError, match="Could not write register"):
            session.execute(f"set var $cr0 = (unsigned {'long' if bits == 64 else 'int'}) 0x80000000")
        assert int(session.execute("output/x $cr3"), 16) == cr3


def test_physical_memory_through_gdb(gdb: str, embedded: Embedded):
    """QEMU's packet, as its manual has it: code at its physical address; without it, addresses are linear again."""
    served = embedded("calls=50 loop", waiting=True)
    with gdb_session(served.address, gdb=gdb) as session:
        stopped_at(session, "target")
        code = session.execute("x/16xb &target").split(":")[1:]
        vaddr = address(session, "&target")
        paddr = served.call(lambda: served.machine.memory.translate(vaddr))
        assert paddr not in (None, vaddr)
        session.execute("maintenance packet Qqemu.PhyMemMode:1")
        shown = session.execute(f"x/16xb {paddr:#x}").split(":")[1:]
        assert [row.split()[:8] for row in shown] == [row.split()[:8] for row in code]
        with pytest.raises(GdbError, match="Cannot access memory"):
            session.execute(f"x/xb {served.machine.ram.size:#x}")
        session.execute("maintenance packet Qqemu.PhyMemMode:0")
        assert session.execute("x/16xb &target").split(":")[1:] == code
