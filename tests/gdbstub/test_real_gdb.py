"""Stock gdb against the server on the fake machine: the system's and the one from pip, both word sizes.

What it shows is that the target description and the whole attach sequence please both, and that what gdb makes of our
replies is what was meant.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from emu.arch import I386, X86_64, Arch
from emu.runner import open_runner
from gdbstub.address import Tcp
from gdbstub.files import FileTree
from gdbstub.monitor import Monitor
from gdbstub.monitorservices import Services
from gdbstub.server import Server
from gdbstub.session import Session
from tests.support.fake_machine import CODE, DATA, PROGRAM, FakeMachine
from tests.support.rsp_client import Gdb, open_gdb

PIP_GDB = str(Path(sys.executable).parent / "gdb")
GDBS = [gdb for gdb in dict.fromkeys((shutil.which("gdb", path="/usr/bin:/usr/local/bin"), PIP_GDB)) if gdb]


@dataclass
class World:
    machine: FakeMachine
    arch: Arch
    gdb: Gdb
    port: int

    async def attach(self) -> None:
        await self.gdb.run(f"-target-select remote 127.0.0.1:{self.port}")
        await self.gdb.wait_stop()

    async def is_running(self) -> None:
        start = self.machine.instructions
        with trio.fail_after(10):
            while self.machine.instructions == start:
                await trio.lowlevel.checkpoint()


@asynccontextmanager
async def open_world(gdb: str, arch: Arch, program: bytes = PROGRAM) -> AsyncIterator[World]:
    machine = FakeMachine(arch, program)
    monitor = Monitor(Services(machine))
    files = FileTree({"/vmlinux": lambda: _symbol_elf(arch)}, exec_file="/vmlinux")
    async with open_runner(machine) as runner, trio.open_nursery() as nursery, open_gdb(gdb) as client:
        server = Server(
            runner,
            lambda wake: Session(machine, arch, files=files, monitor=monitor, wake=wake),
            on_kill=nursery.cancel_scope.cancel,
            report=pytest.fail,
        )
        bound: Sequence[Tcp] = await nursery.start(server.serve, Tcp("127.0.0.1", 0))
        yield World(machine, arch, client, bound[0].port)
        nursery.cancel_scope.cancel()


def _symbol_elf(arch: Arch) -> bytes:
    """The smallest ELF with the fake machine's symbols: sections .text (no bits), .symtab, .strtab, .shstrtab."""
    wide = arch.word_size == 8
    word = arch.word_size

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, "little")

    def symbol(name: int, value: int, size: int) -> bytes:
        info = b"\x12\x00" + number(1 if name else 0, 2)  # global function in section 1
        if wide:
            return number(name, 4) + info + number(value, 8) + number(size, 8)
        return number(name, 4) + number(value, 4) + number(size, 4) + info

    names = b"\0start\0start_kernel\0"
    section_names = b"\0.text\0.symtab\0.strtab\0.shstrtab\0"
    entry = 24 if wide else 16
    symbols = bytes(entry) + symbol(1, CODE, 6) + symbol(7, CODE + 6, 2)
    header_size = 64 if wide else 52
    places = [header_size, header_size + len(symbols), header_size + len(symbols) + len(names)]
    table = places[2] + len(section_names)

    def section(name: int, kind: int, flags: int, address: int, offset: int, size: int, link: int, info: int) -> bytes:
        fields = (flags, address, offset, size)
        return (
            number(name, 4)
            + number(kind, 4)
            + b"".join(number(field, word) for field in fields)
            + number(link, 4)
            + number(info, 4)
            + number(1, word)
            + number(entry if kind == 2 else 0, word)
        )

    sections = (
        bytes(64 if wide else 40)
        + section(1, 8, 6, CODE, 0, 8, 0, 0)
        + section(7, 2, 0, 0, places[0], len(symbols), 3, 1)
        + section(15, 3, 0, 0, places[1], len(names), 0, 0)
        + section(23, 3, 0, 0, places[2], len(section_names), 0, 0)
    )
    header = b"\x7fELF" + bytes((2 if wide else 1, 1, 1)) + bytes(9)
    header += number(2, 2) + number(62 if wide else 3, 2) + number(1, 4)
    header += number(CODE, word) + number(0, word) + number(table, word) + number(0, 4)
    header += b"".join(number(value, 2) for value in (header_size, 0, 0, 64 if wide else 40, 5, 4))
    return header + symbols + names + section_names + sections


every_gdb = pytest.mark.parametrize("gdb", GDBS, ids=lambda gdb: "pip" if gdb == PIP_GDB else "system")
every_arch = pytest.mark.parametrize("arch", [I386, X86_64], ids=lambda arch: arch.name)


def test_the_gdb_from_pip_is_there():
    """The test extra brings it: without it half of this module would silently not run."""
    assert os.access(PIP_GDB, os.X_OK)


@every_gdb
@every_arch
async def test_attach_gives_registers_memory_and_symbols(gdb: str, arch: Arch):
    """No further command is needed: the description, the stop and the served symbols come with `target remote`."""
    async with open_world(gdb, arch) as world:
        await world.attach()
        assert arch.gdb_name in await world.gdb.cli("show architecture")
        pc = int((await world.gdb.value("(long)$pc")), 0)
        assert pc == world.machine.pc
        name = {0: "start", 6: "start_kernel"}.get(pc - CODE, f"start+{pc - CODE}")
        assert f"<{name}>" in await world.gdb.cli("x/i $pc")
        assert f"{CODE + 6:#x}" in await world.gdb.cli("info address start_kernel")
        assert await world.gdb.value(f"*(char*){DATA}") == "100 'd'"
        unmapped = await world.gdb.result('-data-evaluate-expression "*(int*)0xdead0000"')
        assert "Cannot access memory" in unmapped["payload"]["msg"]


@every_gdb
@every_arch
async def test_every_register_is_read_and_written_by_name(gdb: str, arch: Arch):
    """Integer, x87 and SSE registers land where the description says."""
    async with open_world(gdb, arch) as world:
        await world.attach()
        for name in ("eflags", "fctrl", "mxcsr", arch.names[3], arch.names[-1]):
            await world.gdb.cli(f"set var ${name} = 0x202")
            assert world.machine.registers.values[name] == 0x202
        await world.gdb.cli("set var $xmm3.uint128 = 77")
        assert world.machine.registers.values["xmm3"] == 77
        world.machine.registers.values["st1"] = 0x3FFF8000000000000000
        await world.gdb.cli(
            "flushregs" if "13." in await world.gdb.cli("show version") else "maintenance flush register-cache"
        )
        assert await world.gdb.value("$st1") == "1"


@every_gdb
@every_arch
async def test_break_step_continue_and_interrupt(gdb: str, arch: Arch):
    """Software and hardware breakpoints by symbol, a step, Ctrl-C in a busy loop."""
    async with open_world(gdb, arch) as world:
        await world.attach()
        await world.gdb.run("-break-insert start_kernel")
        await world.gdb.run("-exec-continue")
        stop = await world.gdb.wait_stop()
        assert (stop["reason"], int(stop["frame"]["addr"], 0)) == ("breakpoint-hit", CODE + 6)
        await world.gdb.run("-exec-step-instruction")
        stop = await world.gdb.wait_stop()
        assert (stop["reason"], int(stop["frame"]["addr"], 0)) == ("end-stepping-range", CODE)
        await world.gdb.run("-break-delete")
        await world.gdb.run(f"-break-insert -h *{CODE + 3}")
        await world.gdb.run("-exec-continue")
        assert (await world.gdb.wait_stop())["reason"] == "breakpoint-hit"
        await world.gdb.run("-break-delete")
        await world.gdb.run("-exec-continue")
        await world.is_running()
        await world.gdb.run("-exec-interrupt")
        stop = await world.gdb.wait_stop()
        assert stop["signal-name"] == "SIGINT"


@every_gdb
async def test_detach_and_attach_again(gdb: str):
    """The guest runs on in between, with no breakpoint left in it."""
    async with open_world(gdb, X86_64) as world:
        for _ in range(2):
            await world.attach()
            await world.gdb.run("-break-insert start_kernel")
            await world.gdb.run("-exec-continue")
            assert (await world.gdb.wait_stop())["reason"] == "breakpoint-hit"
            await world.gdb.run("-break-delete")
            await world.gdb.run("-target-detach")
            await world.is_running()
            assert world.machine.breakpoints == set()


@every_gdb
async def test_monitor_and_threads_as_the_user_sees_them(gdb: str):
    """Text comes out as text, a refusal too; the CPU is a thread with a name."""
    async with open_world(gdb, X86_64) as world:
        await world.attach()
        assert "start_kernel" in await world.gdb.cli("monitor symbols start_*")
        assert "did you mean symbols?" in await world.gdb.cli("monitor symbol")
        assert '"CPU 0"' in await world.gdb.cli("info threads")


@every_gdb
@pytest.mark.parametrize(
    ("program", "facts", "text"),
    [
        ("90 0f0b", {"signal-name": "SIGABRT"}, "The guest kernel panics"),
        ("90 fa", {"signal-name": "SIGILL"}, "Triple fault"),
        ("90 f4", {"signal-name": "SIGINT"}, "halted"),
        ("90 e600", {"reason": "exited-normally"}, "switched the machine off"),
        ("90 e615", {"reason": "exited", "exit-code": "05"}, "ended with status 5"),
    ],
)
async def test_why_the_guest_stopped_is_shown(gdb: str, program: str, facts: dict[str, str], text: str):
    """By gdb's own signal or exit, and in words."""
    async with open_world(gdb, X86_64, PROGRAM) as world:
        await world.attach()
        world.machine.memory.write(CODE + 0x100, bytes.fromhex(program))
        await world.gdb.cli(f"set var $pc = {CODE + 0x100}")
        await world.gdb.run("-exec-continue")
        stop = await world.gdb.wait_stop()
        assert {name: stop.get(name) for name in facts} == facts
        assert text in world.gdb.console


@every_gdb
async def test_a_second_gdb_is_told_who_is_first(gdb: str):
    """And the first is not disturbed."""
    async with open_world(gdb, X86_64) as world:
        await world.attach()
        async with open_gdb(gdb) as second:
            refusal = await second.result(f"-target-select remote 127.0.0.1:{world.port}")
            assert refusal["message"] == "error"
            assert "is debugging this machine already" in second.console
        await world.gdb.run("-exec-step-instruction")
        assert (await world.gdb.wait_stop())["reason"] == "end-stepping-range"
