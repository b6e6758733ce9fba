"""A debugger's breakpoints: which ones it wants, and which of them stand.

Rules: the machine's thread only. Nothing is armed before the guest is about to run: a debugger takes all out at each
stop and puts the same in before each run, and nothing is done about these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from emu.cpustate import CpuState
from emu.iface import BackEnd, MemoryFault
from emu.insn import MAX_INSN_SIZE, InvalidInstruction, decode
from emu.memory import GuestMemory
from emu.text import ArmedText

Condition = Callable[[], bool]

FEW_HOOKS = 8  # PC hooks for breakpoints with conditions; each more slows every instruction


@dataclass(frozen=True, slots=True)
class Debugger:
    """What places of a debugger's belong to."""

    hardware: bool


class Breakpoints:
    """Those of one machine, by address and whether they are hardware breakpoints."""

    def __init__(self, cpu: CpuState, memory: GuestMemory, text: ArmedText) -> None:
        self._cpu = cpu
        self._memory = memory
        self._text = text
        self._owners = (Debugger(hardware=False), Debugger(hardware=True))
        self._wanted: dict[tuple[int, bool], None] = {}  # in the debugger's order
        self._conditions: dict[tuple[int, bool], Condition] = {}
        self._armed: dict[tuple[int, bool], bool] = {}  # those that stand; whether for good, where they belong
        self.unsettled = False
        """What is wanted and what is armed differ, or an address was not mapped."""

    @property
    def wanted(self) -> list[tuple[int, bool]]:
        return list(self._wanted)

    def insert(self, vaddr: int, hardware: bool, condition: Condition | None) -> None:
        """See Machine.insert_breakpoint."""
        self._conditions.pop((vaddr, hardware), None)
        if condition is not None:
            self._conditions[vaddr, hardware] = condition
        self._wanted.setdefault((vaddr, hardware))
        self.unsettled = True

    def remove(self, vaddr: int, hardware: bool) -> None:
        """No error where there is none."""
        self._wanted.pop((vaddr, hardware), None)
        self._conditions.pop((vaddr, hardware), None)
        self.unsettled = True

    def settle(self) -> None:
        """Before the guest runs: arm those that are wanted, and no others."""
        if not self.unsettled:
            return
        for vaddr, hardware in self._armed.keys() - self._wanted.keys():
            self._text.disarm(vaddr, self._owners[hardware])
            del self._armed[vaddr, hardware]
        self.unsettled = False
        for (vaddr, hardware), mapped in [(key, self._armed.get(key, False)) for key in self._wanted]:
            if mapped:
                continue
            mapped = hardware or self._memory.translate(vaddr) is not None
            self.unsettled |= not mapped  # looked at again before the next run
            if mapped or (vaddr, hardware) not in self._armed:
                self._arm(vaddr, hardware, mapped)

    def disarm(self) -> None:
        """Until the next `settle`: RAM is about to be another's."""
        for owner in self._owners:
            self._text.disarm_all(owner)
        self._armed.clear()
        self.unsettled = True

    def stands(self, vaddr: int) -> bool:
        """A software breakpoint is armed there."""
        return (vaddr, False) in self._armed

    def holds(self, vaddr: int, hardware: bool) -> bool:
        """The condition of the breakpoint there, if it has one, is met now."""
        condition = self._conditions.get((vaddr, hardware))
        return condition is None or condition()

    def _arm(self, vaddr: int, hardware: bool, mapped: bool) -> None:
        owner = self._owners[hardware]
        asked = (vaddr, hardware) in self._conditions and len(self._conditions) <= FEW_HOOKS
        in_engine = hardware or not mapped or (asked and not self._repeats(vaddr))
        self._text.disarm(vaddr, owner)
        self._text.arm(vaddr, owner, BackEnd.HOOK if in_engine else BackEnd.INT3)
        self._armed[vaddr, hardware] = mapped

    def _repeats(self, vaddr: int) -> bool:
        """A string instruction under rep stands there, before each iteration of which a PC hook would come."""
        try:
            insn = decode(self._memory.read(vaddr, MAX_INSN_SIZE), vaddr, self._cpu.bits)
        except (MemoryFault, InvalidInstruction):
            return False
        return insn.map == 0 and bool({0xF2, 0xF3}.intersection(insn.prefixes))
