"""Conditions and commands at the stub, as stock gdb uses them: both gdbs, both word sizes."""

from __future__ import annotations

from gdbstub.session import MAX_WAITING_LINES
from tests.support.kernels import another, type_line
from tests.support.tracing import every_gdb, every_size, open_world

# fib is called with 6 down to 0 and comes back through 1 and 0 many times
FIRST = ("rdi", "eax")
"""Where the first argument is."""


@every_gdb
@every_size
async def test_the_stub_evaluates_conditions(gdb: str, bits: int):
    """gdb says so, and is stopped only where the condition holds."""
    async with open_world(gdb, bits) as world:
        await world.attach()
        argument = world.register(*FIRST)
        await world.gdb.cli(f"break *fib if {argument} == 6")
        for _ in range(3):
            await world.resume()
            assert await world.gdb.value(argument) == "6"
        listed = await world.gdb.cli("info breakpoints")
        assert "target evals" in listed
        assert "breakpoint already hit 3 times" in listed


@every_gdb
@every_size
async def test_two_conditions_at_one_address(gdb: str, bits: int):
    """Either stops, and gdb counts the one that was meant."""
    async with open_world(gdb, bits) as world:
        await world.attach()
        argument = world.register(*FIRST)
        await world.gdb.cli(f"break *fib if {argument} == 6")
        await world.gdb.cli(f"break *fib if {argument} == 3 && $sp != 0")
        seen = []
        for _ in range(4):
            stop = await world.resume()
            seen.append((stop["bkptno"], await world.gdb.value(argument)))
        assert set(seen) == {("1", "6"), ("2", "3")}


@every_gdb
async def test_memory_arithmetic_and_logic(gdb: str):
    """What gdb compiles of a long condition is what it computes itself at the stop."""
    async with open_world(gdb, 64) as world:
        await world.attach()
        condition = (
            "(*(unsigned char *)$rip != 0 && $rdi * 3 - 1 == 11 && ($rdi << 4 | 1) == 65"
            " && -$rdi / 2 == -2 && !($rdi & 1)) || $rdi == 99"
        )
        await world.gdb.cli(f"break *fib if {condition}")
        await world.resume()
        assert "target evals" in await world.gdb.cli("info breakpoints")
        assert await world.gdb.value("$rdi") == "4"
        assert await world.gdb.value(condition) == "1"


@every_gdb
async def test_ignore_counts(gdb: str):
    """gdb counts hits of a condition that is true."""
    async with open_world(gdb, 64) as world:
        await world.attach()
        await world.gdb.cli("break *target")
        await world.resume()
        first = int(await world.gdb.value("$rdi"))
        await world.gdb.cli("delete")
        await world.gdb.cli(f"break *exercise if $rdi > {first}")
        await world.gdb.cli("ignore 2 2")
        await world.resume()
        assert await world.gdb.value("$rdi") == str(first + 3)


@every_gdb
async def test_a_condition_that_cannot_be_computed(gdb: str):
    """The guest stops, and the stub's reason is on the console beside gdb's own."""
    async with open_world(gdb, 64) as world:
        await world.attach()
        await world.gdb.cli("break *target if *(int *)8 == 1")
        stop = await world.resume()
        assert stop["frame"]["func"] == "target"
        assert "condition failed: invalid memory access at 0x8." in world.gdb.console
        assert "Cannot access memory at address 0x8" in world.gdb.console


@every_gdb
@every_size
async def test_dprintf_of_the_agent(gdb: str, bits: int):
    """The stub prints while the guest runs; gdb stops for nothing."""
    async with open_world(gdb, bits) as world:
        await world.attach()
        argument = world.register(*FIRST)
        await world.gdb.cli("set dprintf-style agent")
        await world.gdb.cli(f'dprintf *fib,"fib(%d) of %#lx\\n", {argument}, {world.register("rip", "eip")}')
        assert "agent-printf" in await world.gdb.cli("info breakpoints")
        await world.run_to("*exercise")
        await world.run_to("*exercise")
        place = await world.gdb.value("(long)&fib")
        lines = [line for line in world.gdb.console.splitlines() if line.startswith("fib(")]
        assert any(line.startswith("fib(6) of 0x") for line in lines)
        assert len(lines) >= 25
        assert int(place) & 0xFFF == int(lines[0].split()[-1], 16) & 0xFFF


@every_gdb
async def test_dprintf_and_breakpoint_at_one_address(gdb: str):
    """The guest stops there; the breakpoint is not lost to the commands."""
    async with open_world(gdb, 64) as world:
        await world.attach()
        await world.gdb.cli("set dprintf-style agent")
        await world.gdb.cli('dprintf *target,"here\\n"')
        await world.gdb.cli("break *target")
        stop = await world.resume()
        assert stop["frame"]["func"] == "target"


@every_gdb
async def test_linux(gdb: str):
    """A condition and a dprintf with a string of the guest's, on a stock kernel."""
    machine = another("amd64")
    type_line(machine, "cat /proc/version")
    async with open_world(gdb, 64, machine=machine) as world:
        await world.attach()
        await world.gdb.cli("set dprintf-style agent")
        await world.gdb.cli('dprintf *do_sys_openat2,"opens %s\\n", $rsi')
        await world.gdb.cli("break *version_proc_show if $rdi != 0 && *(unsigned char *)$rip != 0")
        stop = await world.resume()
        assert stop["frame"]["func"] == "version_proc_show"
        assert "target evals" in await world.gdb.cli("info breakpoints")
        assert "opens /proc/version\n" in world.gdb.console


@every_gdb
async def test_no_line_of_a_flood_is_lost(gdb: str):
    """More lines than the stub keeps: the guest waits while they are sent."""
    async with open_world(gdb, 64) as world:
        await world.attach()
        await world.gdb.cli("set dprintf-style agent")
        await world.run_to("*exercise")
        rounds = 200
        last = int(await world.gdb.value("$rdi")) + rounds
        await world.gdb.cli('dprintf *fib,"fib of %d\\n", $rdi')
        await world.gdb.cli(f"break *exercise if $rdi == {last}")
        await world.resume()
        assert world.gdb.console.count("fib of ") == 25 * rounds > MAX_WAITING_LINES
        assert "are lost" not in world.gdb.console
