"""Tracepoints as stock gdb uses them: both gdbs, both word sizes on the embedded guest, and Linux."""

from __future__ import annotations

import re
from pathlib import Path

from emu import boot_embedded
from gdbstub.automation import gdb_session
from gdbstub.serving import serve
from tests.gdb.conftest import LINUX
from tests.support.kernels import another, type_line
from tests.support.rsp_client import open_gdb
from tests.support.tracing import World, every_gdb, every_size, open_world

NAMES = {"first": ("rdi", "eax"), "sp": ("rsp", "esp"), "pc": ("rip", "eip")}


async def trace(world: World, definition: str, *actions: str) -> str:
    """A tracepoint with its actions. -> its number."""
    match = re.search(r"Tracepoint (\d+) at", await world.gdb.cli(f"trace {definition}"))
    assert match is not None
    await world.gdb.run(f"-break-commands {match[1]} " + " ".join(f'"{action}"' for action in actions))
    return match[1]


async def run(world: World, passes: int = 1) -> str:
    """Trace while the guest goes round its exercise, unless the trace ends before. -> what tstatus says then."""
    await world.gdb.cli("tstart")
    await world.run_to("*exercise", passes)
    if "Trace is running" in await world.gdb.cli("tstatus"):
        await world.gdb.cli("tstop")
    return await world.gdb.cli("tstatus")


def frames(status: str) -> int:
    """How many there are, of what tstatus says."""
    match = re.search(r"(?:Collected|Buffer contains) (\d+) trace frame", status)
    assert match is not None, status
    return int(match[1])


@every_gdb
@every_size
async def test_collecting_and_looking(gdb: str, bits: int):
    """trace, actions, tstart, tstop, tstatus, tfind, tdump: what is collected is what a breakpoint there sees."""
    async with open_world(gdb, bits) as world:
        await world.attach()
        first, sp = (world.register(*NAMES[name]) for name in ("first", "sp"))
        await world.run_to("*target2")
        at_the_breakpoint = [await world.gdb.value(text) for text in (first, sp, f"*(long *){sp}")]
        await world.run_to("*exercise")
        number = await trace(world, "*target2", "collect $regs", f"collect *(long *){sp}")
        status = await run(world)
        assert "Trace stopped by a tstop command" in status
        assert frames(status) > 0
        assert f"Found trace frame 0, tracepoint {number}" in await world.gdb.cli("tfind")
        in_the_frame = [await world.gdb.value(text) for text in (first, sp, f"*(long *){sp}")]
        assert int(in_the_frame[0], 0) == int(at_the_breakpoint[0], 0) + 1
        assert in_the_frame[1:] == at_the_breakpoint[1:]
        dump = await world.gdb.cli("tdump")
        assert f"Data collected at tracepoint {number}, trace frame 0" in dump
        assert f"*(long *){sp} = {in_the_frame[2]}" in dump
        assert await world.gdb.value(f"*(long *)({sp} + 64)") == "<unavailable>"
        await world.gdb.cli("tfind none")
        assert await world.gdb.value(f"*(long *)({sp} + 64)") != "<unavailable>"


@every_gdb
@every_size
async def test_only_what_was_asked_for(gdb: str, bits: int):
    """A vector register that was not collected is <unavailable>."""
    async with open_world(gdb, bits) as world:
        await world.attach()
        first = world.register(*NAMES["first"])
        await trace(world, "*target", f"collect {first}")
        await run(world)
        await world.gdb.cli("tfind")
        assert (await world.gdb.value(first)).isdecimal()
        assert "unavailable" in await world.gdb.cli("p $xmm0")


@every_gdb
@every_size
async def test_state_variables_count(gdb: str, bits: int):
    """teval changes one at each hit; frames have the value of their time."""
    async with open_world(gdb, bits) as world:
        await world.attach()
        await world.gdb.cli("tvariable $hits = 40")
        await trace(world, "*fib", "teval $hits = $hits + 1", "collect $hits")
        count = frames(await run(world))
        assert count >= 25
        assert re.search(rf"\$hits +40 +{40 + count}\b", await world.gdb.cli("info tvariables"))
        await world.gdb.cli("tfind 4")
        assert await world.gdb.value("$hits") == "45"


@every_gdb
@every_size
async def test_while_stepping(gdb: str, bits: int):
    """A frame for the hit and one for each of the steps, with the pc going on."""
    async with open_world(gdb, bits) as world:
        await world.attach()
        pc = world.register(*NAMES["pc"])
        await trace(world, "*fib", "collect $regs", "while-stepping 3", "collect $regs", "end")
        await world.gdb.cli("passcount 1 1")
        status = await run(world)
        assert "Trace stopped by tracepoint 1" in status
        assert "Collected 4 trace frames" in status
        pcs = []
        for number in range(4):
            await world.gdb.cli(f"tfind {number}")
            pcs.append(int(re.match(r"0x[0-9a-f]+", await world.gdb.value(f"(void *){pc}"))[0], 16))
        await world.gdb.cli("tfind none")
        listing = await world.gdb.cli("x/4i fib")
        assert [int(address, 16) for address in re.findall(r"(0x[0-9a-f]+) <fib", listing)] == pcs


@every_gdb
async def test_pass_counts_and_conditions(gdb: str):
    """The trace ends with the third hit for which the condition holds."""
    async with open_world(gdb, 64) as world:
        await world.attach()
        await trace(world, "*fib if $rdi == 4", "collect $regs")
        await world.gdb.cli("passcount 3 1")
        status = await run(world, 4)
        assert "Trace stopped by tracepoint 1" in status
        assert "Collected 3 trace frames" in status
        for number in range(3):
            await world.gdb.cli(f"tfind {number}")
            assert await world.gdb.value("$rdi") == "4"


@every_gdb
async def test_finding_frames(gdb: str):
    """tfind pc, tracepoint, range and outside."""
    async with open_world(gdb, 64) as world:
        await world.attach()
        await trace(world, "*target2", "collect $regs")
        await world.gdb.cli("trace *fib")
        await run(world, 4)
        await world.gdb.cli("tfind start")
        assert "tracepoint 2" in await world.gdb.cli("tfind tracepoint 2")
        assert "tracepoint 1" in await world.gdb.cli("tfind pc &target2")
        assert "tracepoint 2" in await world.gdb.cli("tfind outside &target2, &target2")
        assert "tracepoint 1" in await world.gdb.cli("tfind range &target2, &target2")
        assert (await world.gdb.result('-interpreter-exec console "tfind tracepoint 9"'))["message"] == "error"


@every_gdb
async def test_a_circular_buffer(gdb: str):
    """Small and circular: the trace goes on, the first frames are gone."""
    async with open_world(gdb, 64) as world:
        await world.attach()
        await world.gdb.cli("set circular-trace-buffer on")
        await world.gdb.cli("set trace-buffer-size 2048")
        await world.gdb.cli("tvariable $hits = 0")
        await trace(world, "*fib", "collect $regs", "teval $hits = $hits + 1", "collect $hits")
        status = await run(world, 2)
        assert re.search(r"Buffer contains [2-4] trace frames \(of \d\d created", status), status
        assert "Trace buffer is circular" in status
        await world.gdb.cli("tfind start")
        assert int(await world.gdb.value("$hits")) > 20


@every_gdb
@every_size
async def test_saving_a_trace(gdb: str, bits: int, tmp_path: Path):
    """tsave writes gdb's own file, which it reads back; on the stub's host nothing is written."""
    async with open_world(gdb, bits) as world:
        await world.attach()
        first = world.register(*NAMES["first"])
        await trace(world, "*fib", "collect $regs", f"collect *(long *){world.register(*NAMES['sp'])}")
        await run(world)
        await world.gdb.cli(f"tsave {tmp_path}/mine")
        on_the_host = await world.gdb.result(f'-interpreter-exec console "tsave -r {tmp_path}/theirs"')
        assert on_the_host["message"] == "error"
        assert "writes no file on its host" in world.gdb.console
        await world.gdb.cli("tfind 1")
        live = [await world.gdb.value(text) for text in (first, f"*(long *){world.register(*NAMES['sp'])}")]
        await world.gdb.cli("tfind none")
        await world.gdb.cli("disconnect")
        await world.gdb.cli(f"target tfile {tmp_path}/mine")
        await world.gdb.cli("tfind 1")
        assert [await world.gdb.value(text) for text in (first, f"*(long *){world.register(*NAMES['sp'])}")] == live
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@every_gdb
async def test_a_trace_that_outlives_its_debugger(gdb: str):
    """The next gdb finds it running, with the tracepoint and its actions."""
    async with open_world(gdb, 64) as world:
        await world.attach()
        await world.gdb.cli("set disconnected-tracing on")
        await trace(world, "*fib", "collect $regs")
        await world.gdb.cli("tstart")
        await world.gdb.cli("disconnect")
        async with open_gdb(gdb) as second:
            await second.run(f"-target-select remote 127.0.0.1:{world.port}")
            await second.wait_stop()
            assert "Trace is running on the target" in await second.cli("tstatus")
            listed = await second.cli("info tracepoints")
            assert "fib" in listed
            assert "collect $regs" in listed
            await second.cli("tstop")
            assert "Found trace frame 0" in await second.cli("tfind")


@every_gdb
@every_size
async def test_linux(gdb: str, bits: int):
    """File names that a stock kernel opens, as strings, without stopping it."""
    machine = another(LINUX[bits])
    type_line(machine, "cat /proc/version")
    path = "$rsi" if bits == 64 else "$edx"
    async with open_world(gdb, bits, machine=machine) as world:
        await world.attach()
        await trace(world, "*do_sys_openat2", "collect $regs", f"collect/s (char *){path}")
        await world.gdb.cli("tstart")
        await world.run_to("*version_proc_show")
        await world.gdb.cli("tstop")
        names = []
        for number in range(frames(await world.gdb.cli("tstatus"))):
            await world.gdb.cli(f"tfind {number}")
            names.append(await world.gdb.cli(f"x/s (char *){path}"))
        assert any('"/proc/version"' in name for name in names)


def test_a_script_looks_at_trace_frames(new_gdb: str):
    """`tfind none` has gdb 18 say `=traceframe-changed,end`, which is no record as pygdbmi knows them."""
    with serve(boot_embedded(64, "loop"), waiting=True) as served, gdb_session(served.address, gdb=new_gdb) as session:
        session.execute("trace do_timer")
        session.execute("tstart")
        session.execute("tbreak *do_timer")
        session.resume()
        session.wait_stop()
        session.resume("stepi")
        session.wait_stop()
        session.execute("tstop")
        assert "Found trace frame 0" in session.execute("tfind 0")
        session.execute("tfind none")
        assert session.execute("print 6 * 7") == "$1 = 42\n"
