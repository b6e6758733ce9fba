"""The lock-step oracle: a body of code on the real machine, bare and probed, must end in the same state.

A body is a list of `hex ; assembly` lines. It runs at CODE in ring 0, with a stack, a page of data at DATA, and an IDT
whose gates either return (traps, and #PF after mapping the page again) or halt (the other faults). Code made of cells
has handlers that skip the rest of the cell instead.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from emu.images.plan import Image, Segment, flat_start
from emu.insn import boundaries, decode
from emu.machine import Machine
from emu.stops import Halted, Stop
from emu.symbols import SymbolTable
from probes import Kprobe, Manager
from probes.arch.x86_insn import is_repeated

MEMORY = 4 << 20
CODE, HANDLERS, IDT, IDTR, GDT, DATA, STACK = 0x100000, 0x108000, 0x10A000, 0x10B000, 0x10C000, 0x200000, 0x1F8000
RETURN, FAULT, PAGE_FAULT, SKIP = HANDLERS, HANDLERS + 0x10, HANDLERS + 0x20, HANDLERS + 0x40
CELL, CODE_SIZE = 16, 0x1000
_RF = 0x10000
RETURNING = (3, 4, 0x20, 0x80)
ERROR_CODES = (8, 10, 11, 12, 13, 14, 17)


@dataclass(frozen=True)
class Body:
    """Code for `bits`, assembled by hand. `cells`: it is made of pieces of CELL bytes, aligned so."""

    name: str
    bits: int
    text: str
    cells: bool = False

    @property
    def code(self) -> bytes:
        lines = (line.partition(";")[0] for line in self.text.strip().splitlines())
        return bytes.fromhex("".join(lines))

    @property
    def budget(self) -> int:
        """Instructions it may take; what hypothesis made need not end."""
        return 3_000 if self.cells else 20_000

    @property
    def offsets(self) -> list[int]:
        code = self.code
        found = boundaries(lambda vaddr, size: code[vaddr - CODE :][:size], CODE, CODE + len(code), self.bits)
        return [address - CODE for address in found]


@dataclass(frozen=True)
class End:
    """Everything of a finished run that a guest could tell apart."""

    stop: Stop
    instructions: int
    registers: tuple[tuple[str, int], ...]
    memory: str


def build(body: Body) -> Machine:
    """A machine about to run `body`; gates are in place, interrupts are off."""
    segments = [
        Segment(CODE, (_load_idt(body.bits) + body.code + b"\xf4").ljust(CODE_SIZE, b"\xf4")),
        Segment(0, b"\xf4" * 0x1000),  # for a guest that is lost
        Segment(CODE - CELL, b"\xf4" * CELL),
        Segment(HANDLERS, _skipping_handlers(body.bits) if body.cells else _handlers(body.bits)),
        Segment(IDT, b"".join(_gate(vector, body) for vector in range(256))),
        Segment(IDTR, struct.pack("<HQ", 0xFFF, IDT)),
        Segment(DATA, bytes(range(256)) * 16),
    ]
    own, start = flat_start("body", segments, CODE, body.bits)
    stack = "rsp" if body.bits == 64 else "esp"
    start = replace(start, registers={**start.registers, stack: STACK})
    image = Image("body", "flat", (*segments, *own), start)
    machine = Machine(MEMORY, symbols=SymbolTable(()), long_mode=body.bits == 64)
    machine.power_on(image)
    if body.bits == 64:
        _touch_window(machine)
    if not body.cells:
        _patch_handlers(machine, body.bits)
    assert machine.run(1) is not None  # lidt
    return machine


def place(body: Body, offset: int) -> int:
    """The address of the instruction at `offset` in the body."""
    return CODE + len(_load_idt(body.bits)) + offset


def finish(machine: Machine, budget: int) -> End:
    """Run to the body's hlt, or the fault handler's; code made of cells may come to another end."""
    stop = machine.run(budget)
    names = [*machine.registers.arch.names, "cr0", "cr2", "cr3"]
    # The engine leaves RF as an iret set it until it happens to look; hardware clears it with the next instruction.
    registers = tuple((n, machine.registers.read(n) & (~_RF if n == "eflags" else -1)) for n in names)
    return End(stop, machine.clock.instructions, registers, machine.ram_sha256())


def run_bare(body: Body) -> End:
    end = finish(build(body), body.budget)
    assert body.cells or isinstance(end.stop, Halted), end.stop
    return end


def run_probed(
    body: Body, offsets: Sequence[int], arm: str, post: bool, short: bool = True
) -> tuple[End, list[tuple[int, int]]]:
    """-> the end, and (hits, post-handler runs) of each probe. `short` False: first hits have no shortcut."""
    machine = build(body)
    counts = probe_all(machine, body, offsets, arm, post)
    if not short:
        machine.shortcuts.clear()
    return finish(machine, body.budget), counts()


def probe_all(
    machine: Machine, body: Body, offsets: Sequence[int], arm: str, post: bool
) -> Callable[[], list[tuple[int, int]]]:
    """Probes at `offsets`, whose (hits, post-handler runs) the result tells."""
    manager = Manager(machine)
    after = dict.fromkeys(offsets, 0)

    def count(offset: int) -> None:
        after[offset] += 1

    probes = [
        Kprobe(
            addr=place(body, offset),
            pre_handler=lambda p, regs: None,
            post_handler=(lambda p, regs, at=offset: count(at)) if post else None,
            arm=arm,  # type: ignore[arg-type]
        )
        for offset in offsets
    ]
    manager.register_many(probes)
    return lambda: [(probe.hits, after[offset]) for probe, offset in zip(probes, offsets, strict=True)]


def cut(machine: Machine, size: int) -> list[tuple[int, ...]]:
    """Run in pieces of `size` instructions to the body's end: clock, pc and counters at the end of each."""
    seen = []
    while not machine.halted and len(seen) < 5000:
        machine.run(size)
        cpu = machine.cpu
        seen.append((machine.clock.instructions, cpu.pc, cpu.eflags & ~_RF, *(cpu.gpr[index] for index in range(8))))
    return seen


def executions(body: Body) -> Counter[int]:
    """How often each instruction runs, counted by stepping a bare machine; a rep's iterations are one execution."""
    machine = build(body)
    counts: Counter[int] = Counter()
    before = -1
    for _ in range(5000):
        if machine.halted:
            break
        pc = machine.cpu.pc
        repeats = pc == before and is_repeated(decode(machine.memory.read(pc, 15), pc, body.bits))
        counts[pc] += not repeats
        before = pc
        machine.step()
    return counts


def _load_idt(bits: int) -> bytes:
    displacement = IDTR.to_bytes(4, "little")
    return bytes.fromhex("0f011c25" if bits == 64 else "0f011d") + displacement


def _handlers(bits: int) -> bytes:
    iret = b"\x48\xcf" if bits == 64 else b"\xcf"
    return iret.ljust(0x10, b"\xf4") + b"\xf4".ljust(0x10, b"\xf4") + b"\x90" * 0x20


def _touch_window(machine: Machine) -> None:
    """The slots lie right after RAM, under a table entry of the body's own: its accessed bit is not what is tested."""
    entry = machine.cpu.cr3 + 0x2000 + (MEMORY >> 21) * 8
    machine.memory.write(entry, bytes([machine.memory.read(entry, 1)[0] | 0x20]))


def _patch_handlers(machine: Machine, bits: int) -> None:
    """The #PF handler sets the present bit of DATA's page directory entry, drops the error code and returns."""
    if bits == 32:
        return  # unpaged
    entry = (machine.cpu.cr3 + 0x2000 + (DATA >> 21) * 8).to_bytes(4, "little")
    code = bytes.fromhex("800c25") + entry + b"\x01" + bytes.fromhex("4883c40848cf")  # or [entry],1; add rsp,8; iretq
    machine.memory.write(PAGE_FAULT, code)


def _skipping_handlers(bits: int) -> bytes:
    """At RETURN as ever, at FAULT for vectors that push an error code, at SKIP for the others: on to the next cell.

    Whatever pc was saved, a cell begins where the guest goes. Arithmetic flags are saved as 0: after a fault in the
    middle of a block the engine has not always kept them.
    """
    wide = "48" if bits == 64 else ""
    flags = f"{wide}816424{bits // 4:02x}2a770000"  # and [flags],~0x8d5
    skip = f"{wide}812424f00f0000 {wide}81042410001000 {wide}cf"  # and [sp],0xff0; add [sp],CODE+CELL; iret
    drop = f"{wide}83c4{bits // 8:02x}"  # add sp,word
    code = bytes.fromhex(f"{wide}cf").ljust(FAULT - RETURN, b"\xf4") + bytes.fromhex(drop + flags + skip)
    return code.ljust(SKIP - RETURN, b"\xf4") + bytes.fromhex(flags + skip)


def _gate(vector: int, body: Body) -> bytes:
    handler = RETURN if vector in RETURNING else FAULT
    if body.cells:
        handler = RETURN if vector in (1, *RETURNING) else FAULT if vector in ERROR_CODES else SKIP
    elif vector == 14 and body.bits == 64:
        handler = PAGE_FAULT
    low, high = handler & 0xFFFF, handler >> 16
    short = struct.pack("<HHBBH", low, 0x10, 0, 0x8E, high)
    return short + bytes(8) if body.bits == 64 else short
