"""What gdb's user does to a booted Linux: both gdbs, both word sizes, one kernel and one gdb for all that can share it.

Each test finds the guest stopped by gdb with nothing of gdb's in it, and leaves it so. Where a program is needed it is
`cat`, stopped where it is about to open the first of the files it was given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from gdbstub.automation import GdbSession, Stopped, gdb_session
from gdbstub.serving import Served, serve
from tests.gdb.conftest import LINUX
from tests.gdb.test_extended_gdb import connected
from tests.support.images import Load, build_elf
from tests.support.kernels import PROMPT, another

FILES = ("/proc/version", "/proc/uptime", "/proc/loadavg")
PAGE = 0x1000


@dataclass
class Shell:
    """A kernel with a shell at its prompt, and a gdb that has stopped it. `busy`: a program of a test's runs in it."""

    served: Served
    session: GdbSession
    bits: int
    busy: bool = False

    @property
    def path(self) -> str:
        """The register that points to the file name at the entry of do_sys_openat2(dfd, filename, how): an int to gdb,
        which in 32 bits is a negative one."""
        return "$rsi" if self.bits == 64 else "$edx"

    def ran(self, command: str = "continue") -> Stopped:
        self.session.resume(command)
        return self.session.wait_stop()

    def address(self, expression: str) -> int:
        return int(self.session.evaluate(f"(unsigned long) {expression}"))

    def instructions(self) -> int:
        return self.served.call(lambda: self.served.machine.instructions)

    def opened(self) -> str:
        """The file that is about to be opened, at the entry of do_sys_openat2."""
        return self.session.execute(f"x/s {self.path}").split('"')[1]

    def source(self, folder: Path, *lines: str) -> None:
        """Commands that have a body."""
        file = folder / "commands.gdb"
        file.write_text("\n".join(lines))
        self.session.execute(f"source {file}")


@pytest.fixture(scope="module")
def attached(gdb: str, bits: int) -> Iterator[Shell]:
    """One kernel and one gdb for the tests of this file."""

    with serve(another(LINUX[bits])) as served, gdb_session(served.address, gdb=gdb) as session:
        yield Shell(served, session, bits)


@pytest.fixture
def shell(attached: Shell) -> Iterator[Shell]:
    """The same, with nothing of a test left in it."""
    assert not attached.busy, "a test before this one has failed half-way"
    yield attached
    if not attached.busy:
        attached.session.execute("delete")


@contextmanager
def cat(shell: Shell, printed: str = r"^Linux version") -> Iterator[None]:
    """Inside, `cat` is about to open the first of FILES; afterwards it goes on, and `printed` is what comes of it."""
    shell.session.execute("tbreak *do_sys_openat2")
    shell.session.resume()
    shell.served.type("cat " + " ".join(FILES))
    assert shell.session.wait_stop().function == "do_sys_openat2"
    assert shell.opened() == FILES[0]
    shell.busy = True
    yield
    shell.session.execute("delete")
    with shell.served.printing(PROMPT), shell.served.printing(printed):
        shell.session.resume()
    shell.session.interrupt()
    shell.busy = False


def test_memory_is_searched_saved_compared_and_put_back(shell: Shell, tmp_path: Path):
    """find, dump, compare-sections, set var, restore: over a page of the kernel's text, which runs again afterwards."""
    session, start = shell.session, shell.address("do_sys_openat2")
    pattern = session.read_memory(start + 16, 8)
    found = session.execute(f"find {start:#x}, +64, " + ", ".join(f"(char) {byte}" for byte in pattern))
    assert f"{start + 16:#x}" in found
    page, binary, file = start & -PAGE, tmp_path / "page.bin", tmp_path / "page.elf"
    session.execute(f"dump binary memory {binary} {page:#x} {page + PAGE:#x}")
    data = binary.read_bytes()
    assert data[start - page + 16 :].startswith(pattern)
    file.write_bytes(build_elf(shell.bits, [Load(page, page, data)], page, symbols=[("page", page, 1)]))
    session.execute(f"exec-file {file}")
    assert "matched." in session.execute("compare-sections")
    session.execute(f'set var {{char [6]}} {start:#x} = "LINUX"')
    assert '"LINUX"' in session.execute(f"x/s {start:#x}")
    assert "MIS-MATCHED!" in session.execute("compare-sections")
    session.execute(f"restore {binary} binary {page:#x}")
    assert "matched." in session.execute("compare-sections")
    session.execute("exec-file")


def test_return_makes_a_system_call_fail(shell: Shell):
    """do_sys_openat2 is left before its first instruction, with an error of the user's choice; `cat` reports it."""
    with cat(shell, rf"^cat: can't open '{FILES[0]}': Permission denied"):
        before = shell.instructions()
        shell.session.execute("return (long) -13")
        assert shell.instructions() == before


def test_a_program_opens_what_the_user_writes_into_its_memory(shell: Shell):
    """`set var` on a string in ring 3."""
    with cat(shell, r"^\d+\.\d+ \d+\.\d+"):
        name = FILES[1].ljust(len(FILES[0]))[: len(FILES[0])].rstrip()
        shell.session.execute(f'set var {{char [{len(name) + 1}]}} {shell.path} = "{name}"')
        assert shell.opened() == FILES[1]


def test_a_kernel_function_is_called_in_the_middle_of_a_system_call(shell: Shell):
    """By value and result; the program goes on as if nothing had been."""
    with cat(shell):
        names = shell.served.machine.registers.arch.names
        before = shell.served.call(lambda: shell.served.machine.registers.read_many(names))
        if shell.bits == 64:
            assert shell.session.evaluate("((unsigned (*)(unsigned)) jiffies_to_msecs)(25)") == "100"
        else:  # arguments in registers, which gdb does not know
            assert int(shell.session.evaluate("((unsigned (*)(void)) get_random_u32)()")) >= 0
        assert shell.served.call(lambda: shell.served.machine.registers.read_many(names)) == before


def test_a_jump_to_a_breakpoint_is_a_hit_and_takes_no_time(shell: Shell):
    """From the third instruction back to the first, which then runs again."""
    with cat(shell):
        start = shell.address("do_sys_openat2")
        shell.ran("stepi")
        before = shell.instructions()
        shell.session.execute("break *do_sys_openat2")
        stop = shell.ran(f"jump *{start:#x}")
        assert (stop.reason, stop.pc, shell.instructions()) == ("breakpoint-hit", start, before)


def test_hbreak_advance_until_and_finish_go_where_they_say(shell: Shell):
    """Through the kernel function that prints /proc/version."""
    with cat(shell):
        shell.session.execute("thbreak *version_proc_show")
        stop = shell.ran()
        assert (stop.reason, stop.function) == ("breakpoint-hit", "version_proc_show")
        assert shell.ran("advance *seq_printf").function == "seq_printf"
        assert shell.ran("finish").function == "version_proc_show"
        after = int(shell.session.execute("x/2i $pc").splitlines()[1].split()[0], 16)
        stop = shell.ran(f"until *{after:#x}")
        assert (stop.reason, stop.pc) == ("location-reached", after)


def test_ignored_hits_count_and_commands_are_carried_out(shell: Shell, tmp_path: Path):
    """`ignore` lets the second file pass; commands at another place run and go on; a dprintf counts every open."""
    with cat(shell, r"^\d+\.\d+ \d+\.\d+ \d+\.\d+ \d+/\d+"):
        session = shell.session
        session.execute("set var $seen = 0")
        session.execute("break *do_sys_openat2")
        number = session.evaluate("$bpnum")
        session.execute(f"ignore {number} 1")
        shell.source(
            tmp_path, "break *version_proc_show", "commands", "silent", "set var $seen = $seen + 1", "continue", "end"
        )
        session.execute(f'dprintf *do_sys_openat2,"open %s\\n",(char *) {shell.path}')
        session.resume()
        stop = session.wait_stop()
        while stop.function != "do_sys_openat2":  # gdb tells of the silent one too, and goes on
            stop = session.wait_stop()
        assert (stop.function, shell.opened()) == ("do_sys_openat2", FILES[2])
        assert session.evaluate("$seen") == "1"
        shown = session.execute("info breakpoints")
        assert len(re.findall("already hit 2 times", shown)) == 2


@pytest.mark.parametrize("size", [1, 3, 8, 13, 64])
def test_a_piece_of_a_kernel_stack_is_watched(shell: Shell, size: int):
    """From an odd address below the frame, which what is called next writes. `-l`: without it the expression has a
    register, and gdb steps."""
    with cat(shell):
        shell.session.execute(f"watch -l *(char (*)[{size}])($sp - {size - 1} - sizeof(long))")
        assert shell.ran().reason == "watchpoint-trigger"


@pytest.mark.parametrize("size", [1, 13])
@pytest.mark.parametrize(
    ("command", "reason"), [("rwatch", "read-watchpoint-trigger"), ("awatch", "access-watchpoint-trigger")]
)
def test_the_kernel_is_seen_reading_a_programs_memory(shell: Shell, command: str, reason: str, size: int):
    """Any part of the file name, at any address: nobody writes it, and the kernel copies it."""
    with cat(shell):
        shell.session.execute(f"watch -l *(char (*)[{size}])({shell.path} + 1)")
        shell.session.execute(f"{command} -l *(char (*)[{size}])({shell.path} + 1)")
        assert shell.ran().reason == reason


def test_info_registers_all_has_those_of_the_whole_processor(shell: Shell):
    """x87, SSE and control registers, in the kernel."""
    shown = {line.split()[0] for line in shell.session.execute("info registers all").splitlines() if line.strip()}
    assert {"rip" if shell.bits == 64 else "eip", "eflags", "st7", "mxcsr", "xmm7", "fctrl", "cs", "cr3"} <= shown


def test_nonstop_looks_at_a_kernel_that_runs(gdb: str, linux: Served):
    """A breakpoint comes as a notification; memory is read, and a breakpoint set, while the guest runs."""
    with connected(gdb, linux, "set non-stop on") as session:
        session.execute("tbreak *do_sys_openat2")
        session.resume()
        linux.type("cat /proc/version")
        assert session.wait_stop().function == "do_sys_openat2"
        session.resume()
        assert "<do_sys_openat2>" in session.execute("x/i do_sys_openat2")
        session.execute("break *do_sys_openat2")
        linux.type("cat /proc/uptime")
        assert session.wait_stop().function == "do_sys_openat2"
        session.execute("delete")
        session.resume()
        assert session.interrupt().signal in ("0", "SIGINT")
