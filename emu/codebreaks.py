"""Breakpoints in the translation of the guest's code: memory keeps the guest's bytes and nothing else slows.

Rules: the machine's thread only. When the engine has translated a block that covers an armed address, it is stopped
before the block's first instruction; the block is dropped and translated again over an int3 that stands in RAM for
just that long. The guest meets the int3 and never finds it: no load, no checksum and no other address space sees it.

At a hit the instruction itself must run once without the int3. It is entered with RF and the interrupt shadow set,
which no guest ever has together: the engine keeps a translation of its own for that state, of this one instruction,
and leaves the state behind it. RF is what x86 has for this; what faults push and what a guest can read is as ever.
An instruction that faults and starts anew is one hit. A string instruction under rep, which the engine counts otherwise
in that state, is met by a PC hook instead, before each iteration.

An int3 that stands in memory for good (`planted`) is answered the same way: its instruction's own translation is made
while the guest's byte is back for just that long. So it needs no slot in anybody's address space, runs at its own
address, and what it faults with, pushes or is interrupted at is as ever.

Owners say through `BreakClient.stands` in which address spaces an address is meant.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from emu.addresses import AddressSet
from emu.covered import INT3
from emu.cpustate import DESC_B, HF_INHIBIT_IRQ, RF, SS, VM, CpuState
from emu.engine import Engine
from emu.iface import BreakClient
from emu.insn import MAX_INSN_SIZE, InvalidInstruction, decode, spans
from emu.memory import reachable
from emu.paging import walk
from emu.planted import PlantedBytes
from emu.ram import Ram
from emu.traps import Traps

_MAX_RESTARTS: Final = 4096  # faults under way; a thread that dies in its fault leaves one behind
_MAX_PLACED: Final = 1 << 16
_SP: Final = 4
_PUSHF: Final = 0x9C
_INT3: Final = bytes((INT3,))
_PAUSE: Final = b"\xf3\x90"
_PREFIX: Final = rb"[\x66\x67\x26\x2e\x36\x3e\x64\x65]*"
REPEATED: Final = re.compile(_PREFIX + rb"[\xf2\xf3]" + _PREFIX + rb"[\x40-\x4f]?[\x6c-\x6f\xa4-\xa7\xaa-\xaf]")


class CodeBreaks:
    """Implements iface.CodeBreaks."""

    def __init__(self, ram: Ram, cpu: CpuState, engine: Engine, planted: PlantedBytes) -> None:
        self._ram = ram
        self._cpu = cpu
        self._engine = engine
        self._planted = planted
        self.client: BreakClient | None = None
        self._armed = AddressSet()
        self._found: tuple[int, list[int]] | None = None  # a block without its int3s, and where they belong
        self._pending: tuple[int, list[int]] | None = None  # ... for when the processor is at the block again
        self._poked: list[tuple[int, int]] = []  # (physical address, byte) of what stands otherwise in RAM now
        self._covered: int | None = None  # an instruction to resume that was translated with its planted int3
        self._uncover: int | None = None  # ... for when the processor is there again
        self._repeats: list[int] = []  # string instructions that `look` has found
        self._hooked: set[int] = set()  # ... those that have a hook
        self.hook: Callable[[int, bool], None] = lambda vaddr, on: None  # has the client asked by a PC hook, or not
        self._placed: set[int] = set()  # addresses whose translation may have an int3
        self._resumed = (-1, -1)  # address and instruction count of the hit whose instruction runs now
        self._kept_rf = 0  # RF as the guest had it there
        self._passed = (-1, -1)  # ... of one whose instruction has not run yet, though its owners have been asked
        self._restarts: OrderedDict[tuple[int, int], int] = OrderedDict()  # (cr3, sp) -> address that has faulted
        self.lifted: int | None = None  # an address where no int3 may come for now

    # ------------------------------------------------------------------------------------------- arming and disarming

    def arm(self, vaddr: int, *, fresh: bool = False) -> None:
        """Idempotent. `fresh`: nothing there can have run yet where `stands` is true, so no translation is stale."""
        if self._armed.add(vaddr) and not fresh:
            self.refresh(vaddr)

    def disarm(self, vaddr: int) -> None:
        """No error where it is not armed. A translation with the int3 goes when it is met."""
        self._armed.discard(vaddr)
        if vaddr in self._hooked:
            self._hooked.discard(vaddr)
            self.hook(vaddr, False)

    def refresh(self, vaddr: int | None = None) -> None:
        """The answer of `stands` has changed for code that may have run: translate it anew. None: for any code."""
        page = None if vaddr is None else walk(self._ram, self._cpu.tables(), vaddr)
        self._engine.drop_code(vaddr or 0, 1, vaddr is not None and reachable(self._cpu, page))

    @property
    def armed(self) -> list[int]:
        """Every armed address."""
        return list(self._armed)

    def is_armed(self, vaddr: int) -> bool:
        return vaddr in self._armed

    def forget(self) -> None:
        """The machine has gone to another moment; every translation is gone already."""
        self._found = self._pending = self._covered = self._uncover = None
        self._placed.clear()
        self._resumed = self._passed = (-1, -1)
        self._restarts.clear()

    # ----------------------------------------------------------------------------------------- around a translation

    def look(self, pc: int, code: bytes) -> None:
        """From the engine, about a new block: where it lacks an int3, stop before its first instruction."""
        if self._poked:
            self._take_out()  # what was translated has them now
            return
        if code[:1] == _INT3 and self._is_resuming() and self._planted.at(pc) is not None:
            self._covered = pc
            self._engine.stop_here()
            return
        covered = self._armed.within(pc, pc + len(code))
        if not covered or self.client is None:
            return
        wanted = []
        for vaddr in covered:
            if vaddr == self.lifted or vaddr in self._hooked or (vaddr == pc and self._is_resuming()):
                continue
            if self.client.stands(vaddr):
                wanted.append(vaddr)
        if wanted:
            starts = {pc}  # an int3 inside an instruction would change it; the last may be one only the engine knows
            starts.update(pc + end for _, end in spans(code, self._cpu.bits))
            wanted = [vaddr for vaddr in wanted if vaddr in starts]
        if wanted:
            self._repeats = [vaddr for vaddr in wanted if REPEATED.match(code, vaddr - pc)]
            self._found = (pc, [vaddr for vaddr in wanted if vaddr not in self._repeats])
            self._engine.stop_here()

    def reclaim(self) -> bool:
        """After a run: drop the block that `look` has found; False where it has found none."""
        covered, self._covered = self._covered, None
        if covered is not None:
            self.refresh(covered)
            self._uncover = covered
            return True
        found, self._found = self._found, None
        if found is None:
            return False
        if len(self._placed) > _MAX_PLACED:
            self._placed.clear()
            self.refresh()
        if found[1]:
            self.refresh(found[0])  # by its first byte: others that cover the same int3, from further on, have it
        for vaddr in self._repeats:
            self._hooked.add(vaddr)
            self.hook(vaddr, True)
            self.refresh(vaddr)
        self._pending = found if found[1] else None
        return True

    def put_in(self) -> None:
        """Right before a run: if it begins with the block that was found, have it translated with its int3s."""
        uncover, self._uncover = self._uncover, None
        if uncover is not None and uncover == self._cpu.linear_pc == self._passed[0]:
            self._put_back(uncover)
        pending, self._pending = self._pending, None
        if pending is None or pending[0] != self._cpu.linear_pc:
            return
        for vaddr in pending[1]:
            page = walk(self._ram, self._cpu.tables(), vaddr)
            if page is not None and page.paddr < self._ram.size:
                self._placed.add(vaddr)
                self._poked.append((page.paddr, self._ram.map[page.paddr]))
                self._ram.map[page.paddr] = INT3

    def _put_back(self, vaddr: int) -> None:
        """Go on with the instruction under a planted int3, whose owners have been asked, from the guest's own byte."""
        paddr = self._planted.at(vaddr)
        original = None if paddr is None else self._planted.original(paddr)
        if paddr is None or original is None:
            return
        now, self._passed = self._passed[1], (-1, -1)
        self.resume(vaddr, now)
        self._poked.append((paddr, self._ram.map[paddr]))
        self._ram.map[paddr] = original

    def take_out(self) -> None:
        """Right after a run, and where its first instruction could not be translated: RAM is as the guest knows it."""
        if self._poked:
            self._take_out()

    def _take_out(self) -> None:
        for paddr, byte in self._poked:
            self._ram.map[paddr] = byte
        self._poked.clear()

    def _is_resuming(self) -> bool:
        return bool(self._cpu.hflags & HF_INHIBIT_IRQ and self._cpu.system_flags & RF)

    # --------------------------------------------------------------------------------------------------------- hits

    def is_translated(self, vaddr: int) -> bool:
        """The int3 that was executed at `vaddr` may be in the translation only."""
        return vaddr in self._placed

    def in_memory(self, vaddr: int) -> bool:
        """... and is in the guest's memory, so its own."""
        page = walk(self._ram, self._cpu.tables(), vaddr)
        return page is None or page.paddr >= self._ram.size or self._ram.map[page.paddr] == INT3

    def is_hit(self, vaddr: int, now: int) -> bool:
        """Whether the instruction at `vaddr` has been reached for the first time, `now` instructions in."""
        if self._passed == (vaddr, now):
            self._passed = (-1, -1)
            return False
        faulted = self._restarts.pop((self._cpu.cr3, self._cpu.gpr[_SP]), None)
        return faulted != vaddr or not self._cpu.system_flags & RF

    def resume(self, vaddr: int, now: int) -> None:
        """At a hit, with pc there: have the instruction run. The caller pushes the state."""
        self._kept_rf = self._cpu.system_flags & RF
        self._cpu.system_flags |= RF
        self._cpu.hflags |= HF_INHIBIT_IRQ
        self._resumed = (vaddr, now)

    def emulate(self, vaddr: int, now: int, traps: Traps) -> bool:
        """At a hit: do what stands there, if it is an instruction that cannot be resumed; else False. GuestFault.

        `pushf` would show RF; at `pause` the engine leaves the block before it takes our state back.
        """
        cpu = self._cpu
        code = self._engine.fetch(vaddr, MAX_INSN_SIZE)
        if (paddr := self._planted.at(vaddr)) is not None:
            code = bytes((self._planted.original(paddr) or 0,)) + code[1:]
        if code[:2] == _PAUSE:
            cpu.pc += len(_PAUSE)
            return True
        if _PUSHF not in code[:3]:
            return False
        try:
            insn = decode(code, vaddr, cpu.bits)
        except InvalidInstruction:
            return False
        if not insn.mnemonic.startswith("pushf"):
            return False
        self._resumed = (vaddr, now)
        size = {"pushfq": 8, "pushfd": 4}.get(insn.mnemonic, 2)
        stack = cpu.segment(SS)
        mask = (1 << 64) - 1 if cpu.bits == 64 else 0xFFFFFFFF if stack.flags & DESC_B else 0xFFFF
        sp = (cpu.gpr[_SP] - size) & mask
        base = 0 if cpu.bits == 64 else stack.base
        traps.write(
            base + sp, (cpu.eflags & ~(RF | VM)).to_bytes(4, "little").ljust(8, b"\0")[:size], user=cpu.cpl == 3
        )
        cpu.gpr[_SP] = (cpu.gpr[_SP] & ~mask) | sp
        cpu.system_flags &= ~RF
        cpu.pc += insn.size
        return True

    def pause(self, now: int) -> None:
        """After a run: where it ended between a hit and its instruction, that is not to be seen."""
        if self._cpu.hflags & HF_INHIBIT_IRQ and self._cpu.system_flags & RF:
            self._cpu.hflags &= ~HF_INHIBIT_IRQ
            self._cpu.system_flags = self._cpu.system_flags & ~RF | self._kept_rf
            self.passed(self._cpu.linear_pc, now)

    def passed(self, vaddr: int, now: int) -> None:
        """The owners have been asked, and the run ends before the instruction."""
        self._passed = (vaddr, now)

    def faulted(self, now: int) -> None:
        """A fault is about to be delivered: if it is of the instruction that a hit has let go, it will come again."""
        if self._poked:
            self._take_out()
        vaddr, then = self._resumed
        if vaddr != self._cpu.linear_pc or now - then > 1:
            return
        self._resumed = (-1, -1)
        if len(self._restarts) >= _MAX_RESTARTS:
            self._restarts.popitem(last=False)
        self._restarts[self._cpu.cr3, self._cpu.gpr[_SP]] = vaddr
