"""The machine alone: instructions, traps, ticks and stops, on small guests.

Rules: the yardsticks are bare Unicorn, used as its own manual says: here and in `hits` are the places outside
emu.engine that import it.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator

import unicorn
from unicorn import x86_const as reg

from emu import boot_embedded
from emu.machine import Machine
from emu.stops import ConsoleMatch
from tests.bench.row import Effort, Row, interleaved, seconds
from tests.support.assemble import assemble
from tests.support.trapping import CODE, MEMORY, trapping_image

MIXED = "l: add rax, rbx; xor rbx, rax; mov [rsi], rax; mov rdx, [rsi]; add rdx, rax; jmp l"
_R13 = 13  # where the trapping image counts
_INSTRUCTIONS = 20_000_000
_TRAPPED = 60_000  # instructions of the trap loops


def loop(source: str, skip: int = 0, ring: int = 0) -> Machine:
    machine = Machine(MEMORY)
    machine.power_on(trapping_image(assemble(source, 64, CODE), skip, ring))
    machine.run(100)
    machine.cpu.gpr[6] = 0x20000
    return machine


def bare(source: str) -> unicorn.Uc:
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    uc.mem_map(0, MEMORY)
    uc.mem_write(CODE, assemble(source, 64, CODE))
    uc.reg_write(reg.UC_X86_REG_RSI, 0x20000)
    uc.reg_write(reg.UC_X86_REG_RSP, 0x30000)
    return uc


def speed(effort: Effort) -> Iterator[Row]:
    """A loop of arithmetic, loads and stores: ours, which always counts, and bare Unicorn both ways."""
    ours, counted = loop(MIXED), bare(MIXED)
    rounds = _INSTRUCTIONS // 6
    plain_source = f"mov rcx, {rounds}; " + MIXED.replace("jmp l", "dec rcx; jnz l")
    plain, end = bare(plain_source), CODE + len(assemble(plain_source, 64, CODE))
    taken = interleaved(
        effort.rounds,
        lambda: seconds(lambda: ours.run(_INSTRUCTIONS)) / _INSTRUCTIONS,
        lambda: seconds(lambda: counted.emu_start(CODE, 0, count=_INSTRUCTIONS)) / _INSTRUCTIONS,
        lambda: seconds(lambda: plain.emu_start(CODE, end)) / (rounds * 7),
    )
    ns = [value * 1e9 for value in taken]
    yield Row("an instruction of a tight loop", ns[0], "ns", ns[1], "bare Unicorn, count=")
    yield Row("an instruction of a tight loop", ns[0], "ns", ns[2], "bare Unicorn, no count")


def traps(effort: Effort) -> Iterator[Row]:
    """From ring 3 through the guest's handler and back, by 4-level tables of 4 KiB pages."""
    for what, source, limit in (
        ("page fault, to the handler and back", "l: mov rax, [rbx]; jmp l", "25"),
        ("SYSCALL, to the handler and back", "l: syscall; jmp l", "25"),
        ("#UD (ud2), to the handler and back", "l: ud2; nop; jmp l", ""),
        ("#UD (VEX), to the handler and back", "l: .byte 0xc4, 0xe2, 0xfb, 0xf6, 0xc1; jmp l", ""),
    ):
        skip = 5 if "VEX" in what else 3
        machine = loop(source, skip, ring=3)

        def each(machine: Machine = machine) -> float:
            before = machine.cpu.gpr[_R13]
            duration = seconds(lambda: machine.run(_TRAPPED))
            return duration / (machine.cpu.gpr[_R13] - before) * 1e6

        yield Row(what, interleaved(effort.rounds, each)[0], "us", limit=limit)
    yield _idle_tick(effort)


def _idle_tick(effort: Effort) -> Row:
    machine = boot_embedded(64, "idle")
    machine.run(2_000_000)
    jiffies = machine.symbols.lookup("jiffies")[0].address

    def each() -> float:
        before = int.from_bytes(machine.memory.read(jiffies, 8), "little")
        duration = seconds(lambda: machine.run(60_000))
        return duration / (int.from_bytes(machine.memory.read(jiffies, 8), "little") - before) * 1e6

    return Row("timer tick of an idle guest: wake, handler, HLT", interleaved(effort.rounds, each)[0], "us")


def embedded(effort: Effort) -> Iterator[Row]:
    """Our own guest from nothing to its last boot message."""
    for bits in (64, 32):

        def start(bits: int = bits) -> None:
            machine = boot_embedded(bits)
            machine.console.expect("embedded: ready", lambda match: ConsoleMatch(match.string))
            assert isinstance(machine.run(10_000_000), ConsoleMatch)

        taken = interleaved(effort.rounds, lambda start=start: seconds(start))  # type: ignore[misc]
        yield Row(f"embedded guest to its prompt, {bits} bits, assembled before", taken[0], "s", limit="0.5")


def interrupts(effort: Effort) -> Iterator[Row]:
    """Ctrl-C: `request_stop` from another thread while the guest computes."""
    machine = boot_embedded(64, "loop")
    machine.run(2_000_000)
    taken = []
    for index in range(8 * effort.rounds):
        asked: list[float] = []

        def ask(asked: list[float] = asked) -> None:
            asked.append(time.perf_counter())
            machine.request_stop()

        timer = threading.Timer(0.02 + 0.003 * (index % 7), ask)
        timer.start()
        machine.run()
        taken.append(time.perf_counter() - asked[0])
        timer.join()
    yield Row("Ctrl-C in a computing guest, until it stands", statistics.median(taken) * 1000, "ms", limit="50")
