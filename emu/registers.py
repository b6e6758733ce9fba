"""Registers by GDB's names, over the state image where it has them and the engine's register calls for the rest.

Rules: the machine's thread, between runs. What a debugger writes acts as the processor's own instruction would: a
selector loads its descriptor, CR0, CR4 and EFER change the mode, control registers forget the page walks; and what the
instruction would refuse is a MachineError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from emu.arch import I386, I8086, X86_64, Arch
from emu.cpustate import (
    MSR_CSTAR,
    MSR_FMASK,
    MSR_KERNEL_GS_BASE,
    MSR_LSTAR,
    MSR_STAR,
    MSR_SYSENTER_CS,
    MSR_SYSENTER_EIP,
    MSR_SYSENTER_ESP,
    SEGMENT_NAMES,
    SS,
    CpuState,
)
from emu.engine import Engine
from emu.iface import MachineError
from emu.traps import GuestFault, Traps

_GPR64 = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{i}" for i in range(8, 16)))
_GPR32 = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
_X87 = {"fctrl": "FPCW", "fstat": "FPSW", "fiseg": "FCS", "fioff": "FIP", "foseg": "FDS", "fooff": "FDP", "fop": "FOP"}
_WHOLE = {"ftag": "FPTAG", "mxcsr": "MXCSR", **{f"xmm{index}": f"XMM{index}" for index in range(16)}}
_STACK = tuple(f"FP{index}" for index in range(8))
_CONTROL = {"cr0": 0, "cr2": 2, "cr3": 3, "cr4": 4}
_BASES = {f"{name}_base": index for index, name in enumerate(SEGMENT_NAMES)}
_TABLES = {"gdtr": "gdt", "idtr": "idt", "ldtr": "ldt", "tr": "tr"}  # the register, and its name in the state image
_MSRS = {
    "k_gs_base": MSR_KERNEL_GS_BASE,
    "star": MSR_STAR,
    "lstar": MSR_LSTAR,
    "cstar": MSR_CSTAR,
    "fmask": MSR_FMASK,
    "sysenter_cs": MSR_SYSENTER_CS,
    "sysenter_esp": MSR_SYSENTER_ESP,
    "sysenter_eip": MSR_SYSENTER_EIP,
}
_PE, _NW, _CD, _PG = 1, 1 << 29, 1 << 30, 1 << 31
_CR0_KNOWN = 0xE005003F  # SDM vol. 3, 2.5
_PAE = 1 << 5
_LME, _LMA = 1 << 8, 1 << 10
_DEBUG = frozenset(f"dr{index}" for index in (0, 1, 2, 3, 6, 7))
_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1

_Get = Callable[[], int]


class GuestRegisters:
    """Implements iface.Registers. `jumped` is called when the pc was changed."""

    def __init__(self, cpu: CpuState, engine: Engine, traps: Traps, jumped: Callable[[], None]) -> None:
        self._cpu = cpu
        self._jumped = jumped
        self._engine = engine
        self._traps = traps
        self._readers = self._make_readers()
        self._extended = engine.reader((*_X87.values(), *_WHOLE.values(), *_STACK))
        self._index64 = {name: i for i, name in enumerate(_GPR64)}
        self._index32 = {name: i for i, name in enumerate(_GPR32)}

    @property
    def arch(self) -> Arch:
        """What a debugger should be told the processor is now."""
        if self._cpu.long_mode:
            return X86_64
        return I386 if self._cpu.cr(0) & _PE else I8086

    def read(self, name: str) -> int:
        """The value, unsigned; KeyError for a name this processor does not have."""
        if (reader := self._readers.get(name)) is not None:
            return reader()
        return self._read_extended()[name]

    def read_many(self, names: Sequence[str]) -> list[int]:
        """All of the x87's and SSE's come with one call of the engine, so a `g` packet makes one for 33 registers."""
        readers = self._readers
        try:
            return [readers[name]() for name in names]
        except KeyError:
            extended = self._read_extended()
        return [readers[name]() if name in readers else extended[name] for name in names]

    def _make_readers(self) -> dict[str, _Get]:
        """A call for each register of the state image."""
        cpu = self._cpu

        def table(name: str, part: str) -> _Get:
            return lambda: int(getattr(cpu.system_segment(name), part))

        readers: dict[str, _Get] = {
            "rip": partial(cpu.words.__getitem__, cpu.pc_at),
            "eip": lambda: cpu.pc & _U32,
            "eflags": lambda: cpu.eflags & _U32,
            "efer": lambda: cpu.efer,
            "cr8": lambda: 0,  # the priority of a local APIC, which this machine does not have
        }
        readers |= {name: partial(cpu.gpr.__getitem__, index) for index, name in enumerate(_GPR64)}
        readers |= {name: partial(lambda index: cpu.gpr[index] & _U32, index) for index, name in enumerate(_GPR32)}
        readers |= {name: partial(cpu.selector, index) for index, name in enumerate(SEGMENT_NAMES)}
        readers |= {name: partial(lambda index: cpu.segment(index).base, index) for name, index in _BASES.items()}
        readers |= {name: partial(cpu.cr, index) for name, index in _CONTROL.items()}
        readers |= {name: partial(cpu.msr, index) for name, index in _MSRS.items()}
        readers |= {name: partial(cpu.debug_register, int(name[2:])) for name in _DEBUG}
        for name, field in _TABLES.items():
            readers[name] = table(field, "selector")
            readers |= {f"{name}_{part}": table(field, part) for part in ("base", "limit")}
        return readers

    def write(self, name: str, value: int) -> None:
        """KeyError as for `read`; MachineError for a selector whose descriptor cannot be loaded."""
        cpu = self._cpu
        if (index := self._index64.get(name)) is not None:
            cpu.gpr[index] = value & _U64
        elif (index := self._index32.get(name)) is not None:
            cpu.gpr[index] = value & _U32
        elif name in ("rip", "eip"):
            before, cpu.pc = cpu.pc, value & (_U64 if name == "rip" else _U32)
            if cpu.pc != before:
                self._jumped()
        elif name == "eflags":
            cpu.eflags = value & _U32
        elif name in SEGMENT_NAMES:
            self._write_selector(SEGMENT_NAMES.index(name), value & 0xFFFF)
        elif (index := _BASES.get(name)) is not None:
            part = cpu.segment(index)
            cpu.set_segment(index, part.selector, value & _U64, part.limit, part.flags)
            cpu.recompute_hflags()
        elif name in _CONTROL or name in ("efer", "cr8"):
            self._write_control(name, value & _U64)
        elif name in _MSRS:
            cpu.set_msr(_MSRS[name], value & _U64)
        elif name.partition("_")[0] in _TABLES:
            self._write_table(*name.split("_"), value=value)
        elif name in _DEBUG:
            cpu.set_debug_register(int(name[2:]), value & _U64)
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

    def _write_control(self, name: str, value: int) -> None:
        """CR0 .. CR8 and EFER: refuse what MOV and WRMSR answer with #GP (SDM vol. 3, 2.5, 4.1.2 and 10.8.5)."""
        cpu = self._cpu
        cr0, cr4, efer = cpu.cr(0), cpu.cr(4), cpu.efer
        if name == "cr8" and value:
            raise MachineError("cr8 stays 0: this machine has no local APIC")
        if name == "cr0":
            cr0 = value
            if value & ~_CR0_KNOWN or (value & _PG and not value & _PE) or (value & _NW and not value & _CD):
                raise MachineError(f"the processor does not take {value:#x} for cr0")
            efer = efer | _LMA if value & _PG and efer & _LME else efer & ~_LMA
        elif name == "cr4":
            cr4 = value
        elif name == "efer":
            efer = value & ~_LMA | efer & _LMA  # LMA follows from the others and is never written
            if (value ^ cpu.efer) & _LME and cr0 & _PG:
                raise MachineError("EFER.LME cannot change while paging is on")
        if efer & _LMA and not cr4 & _PAE:
            raise MachineError("long mode needs CR4.PAE")
        if name in _CONTROL:
            cpu.set_cr(_CONTROL[name], value)
        cpu.efer = efer
        cpu.recompute_hflags()
        self._engine.flush_tlb()

    def _write_table(self, register: str, part: str = "selector", *, value: int) -> None:
        """Of GDTR, IDTR, LDTR or TR one part alone, the hidden ones of a selector too: no descriptor is loaded."""
        cpu = self._cpu
        segment = cpu.system_segment(_TABLES[register])
        setattr(segment, part, value & (_U64 if part == "base" else _U32))
        cpu.set_system_segment(_TABLES[register], segment.selector, segment.base, segment.limit, segment.flags)

    # ------------------------------------------------------------------------------- x87 and SSE, by the engine's calls

    def _read_extended(self) -> dict[str, int]:
        """All of them, for those that this processor does not have are 0 and in no Arch of it."""
        values = self._extended()
        top = values["FPSW"] >> 11
        stack = {f"st{index}": values[f"FP{top + index & 7}"] for index in range(8)}
        whole = {name: values[theirs] for name, theirs in _WHOLE.items()}
        # The engine keeps 64 bits of where the last instruction was.
        return stack | whole | {name: values[theirs] & _U32 for name, theirs in _X87.items()}

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
