"""Registers by GDB's names, over the state image where it has them and the engine's register calls for the rest.

Rules: the machine's thread, between runs. A selector written by a debugger loads its descriptor, as MOV to the segment
register would; control registers take effect at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from emu.arch import I386, X86_64, Arch
from emu.cpustate import SEGMENT_NAMES, SS, CpuState
from emu.engine import Engine
from emu.iface import MachineError
from emu.traps import GuestFault, Traps

_GPR64 = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{i}" for i in range(8, 16)))
_GPR32 = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
_X87 = {"fctrl": "FPCW", "fstat": "FPSW", "fiseg": "FCS", "fioff": "FIP", "foseg": "FDS", "fooff": "FDP", "fop": "FOP"}
_CONTROL = {"cr0": 0, "cr2": 2, "cr3": 3, "cr4": 4}
_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1

_Get = Callable[[], int]
_Set = Callable[[int], None]


class GuestRegisters:
    """Implements iface.Registers."""

    def __init__(self, cpu: CpuState, engine: Engine, traps: Traps) -> None:
        self._cpu = cpu
        self._engine = engine
        self._traps = traps
        self._index64 = {name: i for i, name in enumerate(_GPR64)}
        self._index32 = {name: i for i, name in enumerate(_GPR32)}

    @property
    def arch(self) -> Arch:
        """What a debugger should be told the processor is now."""
        return X86_64 if self._cpu.long_mode else I386

    def read(self, name: str) -> int:
        """The value, unsigned; KeyError for a name this processor does not have."""
        cpu = self._cpu
        if (index := self._index64.get(name)) is not None:
            return int(cpu.gpr[index])
        if (index := self._index32.get(name)) is not None:
            return int(cpu.gpr[index]) & _U32
        if name in ("rip", "eip"):
            return cpu.pc if name == "rip" else cpu.pc & _U32
        if name == "eflags":
            return cpu.eflags & _U32
        if name in SEGMENT_NAMES:
            return cpu.selector(SEGMENT_NAMES.index(name))
        if name in ("fs_base", "gs_base"):
            return cpu.segment_base(name[:2])
        if name in _CONTROL:
            return cpu.cr(_CONTROL[name])
        if name == "efer":
            return cpu.efer
        return self._read_extended(name)

    def read_many(self, names: Sequence[str]) -> list[int]:
        return [self.read(name) for name in names]

    def write(self, name: str, value: int) -> None:
        """KeyError as for `read`; MachineError for a selector whose descriptor cannot be loaded."""
        cpu = self._cpu
        if (index := self._index64.get(name)) is not None:
            cpu.gpr[index] = value & _U64
        elif (index := self._index32.get(name)) is not None:
            cpu.gpr[index] = value & _U32
        elif name in ("rip", "eip"):
            cpu.pc = value & (_U64 if name == "rip" else _U32)
        elif name == "eflags":
            cpu.eflags = value & _U32
        elif name in SEGMENT_NAMES:
            self._write_selector(SEGMENT_NAMES.index(name), value & 0xFFFF)
        elif name in ("fs_base", "gs_base"):
            index = SEGMENT_NAMES.index(name[:2])
            part = cpu.segment(index)
            cpu.set_segment(index, part.selector, value & _U64, part.limit, part.flags)
        elif name in _CONTROL:
            cpu.set_cr(_CONTROL[name], value & _U64)
            cpu.recompute_hflags()
            self._engine.flush_tlb()
        elif name == "efer":
            cpu.efer = value & _U64
            cpu.recompute_hflags()
        else:
            self._write_extended(name, value)

    def write_many(self, values: Mapping[str, int]) -> None:
        """Those that change (a `G` packet names every register); KeyError before any is written."""
        changed = [(name, value) for name, value in values.items() if self.read(name) != value]
        for name, value in changed:
            self.write(name, value)

    def _write_selector(self, index: int, selector: int) -> None:
        cpu = self._cpu
        if cpu.selector(index) == selector:
            return
        if not cpu.cr(0) & 1:
            cpu.set_segment(index, selector, selector << 4, 0xFFFF, cpu.segment(index).flags)
        elif selector & ~3:
            try:
                found = self._traps.descriptor(selector)
            except GuestFault:
                raise MachineError(f"no descriptor for selector {selector:#x}") from None
            cpu.set_segment(index, selector, found.base, found.limit, found.flags)
        else:
            cpu.set_segment(index, selector, 0, 0, 0 if index != SS else cpu.cpl << 13)
        cpu.recompute_hflags()

    # ------------------------------------------------------------------------------- x87 and SSE, by the engine's calls

    def _read_extended(self, name: str) -> int:
        engine = self._engine
        if name.startswith("st") and name[2:].isdigit():
            mantissa, exponent = engine.read_register(self._stack_register(name))
            return int(mantissa) | int(exponent) << 64
        if name.startswith("xmm") and name[3:].isdigit():
            return int(engine.read_register(name.upper()))
        if name == "mxcsr":
            return int(engine.read_register("MXCSR"))
        if name == "ftag":
            return int(engine.read_register("FPTAG")) & 0xFFFF
        return int(engine.read_register(_X87[name])) & _U32

    def _write_extended(self, name: str, value: int) -> None:
        engine = self._engine
        if name.startswith("st") and name[2:].isdigit():
            engine.write_register(self._stack_register(name), (value & _U64, value >> 64))
        elif name.startswith("xmm") and name[3:].isdigit():
            engine.write_register(name.upper(), value)
        elif name == "mxcsr":
            engine.write_register("MXCSR", value & _U32)
        elif name == "ftag":
            engine.write_register("FPTAG", value & 0xFFFF)
        else:
            engine.write_register(_X87[name], value & _U32)

    def _stack_register(self, name: str) -> str:
        """The engine's name of st(i). Unicorn 2.1's own ST0 .. ST7 give 64 bits; FP0 .. FP7 are whole, but physical:
        st(i) is the i-th from TOP, bits 11 to 13 of the status word (SDM vol. 1, 8.1.2)."""
        top = int(self._engine.read_register("FPSW")) >> 11
        return f"FP{(top + int(name[2:])) & 7}"
