"""The same loop under three stubs, spoken to by the same client: ours, qemu-system's and gdbserver's.

Rules: standard library and the suite's builders; a stub that is not installed is left out by name. Ours and QEMU run
one boot sector, gdbserver a program of the same instructions.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gdbstub.rsp import expand
from tests.bench.client import Client
from tests.bench.row import Effort, Row, Skipped, interleaved
from tests.support.images import Load, build_elf

_LOOP = bytes.fromhex("31c9 ffc1 90 ebfb")  # xor ecx, ecx; again: inc ecx; nop; jmp again: the same in 16 and 64 bits
_NOP, _SIZE = 4, 7
_NEVER = b"X3,220027"  # an agent expression: const8 0, end
_READS, _STEPS, _HITS = 100, 1000, 100
_COUNTED_S = 0.2  # the counter has 16 bits in the boot sector


@dataclass(frozen=True, slots=True)
class Stub:
    """One that runs the loop. `counter` is where ecx lies in a `g` reply, in bytes; `block` bytes it reads at once, by
    its PacketSize; `conditions`: it evaluates them."""

    name: str
    client: Client
    port: int
    base: int
    counter: int
    block: int
    conditions: bool = True


@contextlib.contextmanager
def _process(command: list[str], listening: str | None = None) -> Iterator[str]:
    """-> what `listening` matched first on its standard error."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            found = None
            while listening is not None and found is None:
                line = process.stderr.readline()
                assert line, f"{command[0]} ended"
                found = re.search(listening, line)
            yield found[1] if found else ""
        finally:
            process.kill()


@contextlib.contextmanager
def _ours(folder: Path) -> Iterator[Stub]:
    sector = [
        "load",
        str(folder / "boot.bin"),
        "--bits",
        "16",
        "--console",
        "none",
        "--listen",
        "127.0.0.1:0",
        "--wait",
    ]
    with _process([sys.executable, "-m", "gdbstub", *sector], r"listening on 127\.0\.0\.1:(\d+)") as port:
        yield Stub("gdbstub", Client(int(port)), int(port), 0x7C00, 4, 0xFF00)


@contextlib.contextmanager
def _qemu(folder: Path) -> Iterator[Stub]:
    port = _free_port()
    image = f"format=raw,if=floppy,file={folder / 'boot.bin'}"
    command = ["qemu-system-x86_64", "-display", "none", "-nodefaults", "-S", "-gdb", f"tcp:127.0.0.1:{port}"]
    with _process([*command, "-drive", image]):
        client = Client(port, patience=10)
        client.ask(b"Z1,7c00,1")
        client.ask(b"vCont;c")
        client.ask(b"z1,7c00,1")
        yield Stub("qemu-system", client, port, 0x7C00, 16, 0x7FF, conditions=False)


@contextlib.contextmanager
def _gdbserver(folder: Path) -> Iterator[Stub]:
    program = folder / "loop"
    with _process(["gdbserver", "127.0.0.1:0", str(program)], r"Listening on port (\d+)") as port:
        client = Client(int(port))
        client.ask(b"?")
        client.ask(b"Hg0")
        yield Stub("gdbserver", client, int(port), 0x400078, 16, 0x1FFF)


_SIDES = {"gdbstub": _ours, "qemu-system-x86_64": _qemu, "gdbserver": _gdbserver}


def stubs(effort: Effort) -> Iterator[Row | Skipped]:
    """Memory, steps, conditions, attaching: each side in turn, several times."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        (folder / "boot.bin").write_bytes(_LOOP.ljust(510, b"\0") + b"\x55\xaa" + bytes(1440 * 1024 - 512))
        program_at = 0x400078  # behind the headers, as the segment's place in the file and in memory must agree
        (folder / "loop").write_bytes(build_elf(64, [Load(program_at, program_at, _LOOP + bytes(0x2000))], program_at))
        (folder / "loop").chmod(0o755)
        sides = []
        for program, start_side in _SIDES.items():
            if program != "gdbstub" and shutil.which(program) is None:
                yield Skipped(f"stubs against {program}", f"{program} is not installed")
            else:
                sides.append(stack.enter_context(start_side(folder)))
        for what, unit, measure, limit in (
            ("m, in blocks as large as the stub takes", "MB/s", _reads, "ratio 1"),
            ("single steps", "1/s", _steps, "10,000"),
            ("a range step of three instructions", "1/s", _range_steps, ""),
            ("a breakpoint's condition, false", "1/s", _conditions, "ratio 1"),
        ):
            taken = interleaved(effort.rounds, *(partial(measure, side) for side in sides))
            yield from _rows(what, unit, taken, sides, limit)
        yield from _attaching(
            effort, [side for side in sides if side.name != "gdbserver"]
        )  # which ends with its client


def _rows(what: str, unit: str, values: list[float], sides: list[Stub], limit: str) -> Iterator[Row]:
    for side, value in zip(sides[1:], values[1:], strict=True):
        must = limit if side.name == "qemu-system" else ""
        yield Row(f"RSP {what}", values[0], unit, value, side.name, limit=must)
    if len(sides) == 1:
        yield Row(f"RSP {what}", values[0], unit, limit=limit)


def _reads(side: Stub) -> float:
    start = time.perf_counter()
    for _ in range(_READS):
        reply = side.client.ask(b"m%x,%x" % (side.base, side.block))
        assert not reply.startswith(b"E"), (side.name, reply)
    return _READS * side.block / (time.perf_counter() - start) / 1e6


def _steps(side: Stub) -> float:
    start = time.perf_counter()
    for _ in range(_STEPS):
        assert side.client.ask(b"vCont;s")[:1] in (b"T", b"S")
    return _STEPS / (time.perf_counter() - start)


def _range_steps(side: Stub) -> float:
    """Of the whole loop, one time round: out of the range at its jump. Who has no range steps takes single ones."""
    start = time.perf_counter()
    rounds = _STEPS // 10
    ranged = side.conditions
    inside = b"vCont;r%x,%x" % (side.base + 2, side.base + _SIZE - 2)
    for _ in range(rounds):
        side.client.ask(inside if ranged else b"vCont;s")
        for _ in range(0 if ranged else 2):
            side.client.ask(b"vCont;s")
        if ranged:
            side.client.ask(b"vCont;s")  # the jump
    return rounds / (time.perf_counter() - start)


def _conditions(side: Stub) -> float:
    """Evaluations: where the stub has none, as gdb does it, by a stop, a look, a step off the breakpoint and on."""
    place, client = b"%x,1" % (side.base + _NOP), side.client
    if not side.conditions:
        start = time.perf_counter()
        for _ in range(_HITS):
            client.ask(b"Z0," + place)
            client.ask(b"vCont;c")
            client.ask(b"g")
            client.ask(b"z0," + place)
            client.ask(b"vCont;s")
        return _HITS / (time.perf_counter() - start)
    client.ask(b"Z0," + place + b";" + _NEVER)
    before = _counter(side)
    start = time.perf_counter()
    client.send(b"vCont;c")
    time.sleep(_COUNTED_S)
    client.interrupt()
    seconds = time.perf_counter() - start
    client.ask(b"z0," + place)
    return ((_counter(side) - before) & 0xFFFF) / seconds


def _counter(side: Stub) -> int:
    registers = bytes.fromhex(expand(side.client.ask(b"g")).decode("ascii").replace("x", "0"))
    return int.from_bytes(registers[side.counter : side.counter + 2], "little")


def _attaching(effort: Effort, sides: list[Stub]) -> Iterator[Row | Skipped]:
    """From the start of a gdb to its end, over `target remote` and a detach."""
    gdb = shutil.which("gdb")
    if gdb is None:
        yield Skipped("attach", "gdb is not installed")
        return
    for side in sides:
        side.client.close()

    def attach(side: Stub) -> float:
        start = time.perf_counter()
        command = [gdb, "--nx", "-batch", "-ex", f"target remote 127.0.0.1:{side.port}"]
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        return time.perf_counter() - start

    taken = interleaved(effort.rounds, *(partial(attach, side) for side in sides))
    yield from _rows("attach and detach, gdb's start included", "s", taken, sides, "")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
