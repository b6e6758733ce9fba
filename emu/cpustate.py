"""The CPU state image: everything the registers API of the engine cannot reach.

Rules: a `CpuState` is a view on the processor itself, where the engine keeps it: a number written is in force at once,
but for what the engine must be told besides (`Engine.flush_tlb`, and `Engine.continue_at` in a PC hook). While the
engine runs, arithmetic flags and DF live apart from EFLAGS; `eflags` is always the architectural value.
Layout: `layouts.CpuImage`, checked by `find_image` at start.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from emu.engine import Engine, version
from emu.iface import EngineMismatch
from emu.layouts import CpuImage, ErrorImage, SegmentCache, offsets
from emu.paging import Tables
from emu.ram import Ram

CF, ZF, TF, IF, DF, NT, RF, VM, AC = 1, 0x40, 0x100, 0x200, 0x400, 0x4000, 0x10000, 0x20000, 0x40000
_ARITHMETIC = 0x8D5  # OF SF ZF AF PF CF
_CC_OP_EFLAGS = 1
NO_EXCEPTION = 0xFFFFFFFF  # in `old_exception`

ES, CS, SS, DS, FS, GS = range(6)
SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs")

# QEMU 5.0.1 target/i386/cpu.h, HF_*
HF_CPL = 3
HF_INHIBIT_IRQ = 1 << 3
HF_CS32, HF_SS32, HF_ADDSEG, HF_PE = 1 << 4, 1 << 5, 1 << 6, 1 << 7
HF_MP_EM_TS = 7 << 9
HF_LMA, HF_CS64, HF_OSFXSR = 1 << 14, 1 << 15, 1 << 22

# descriptor attributes: the second dword of a descriptor, SDM vol. 3, 3.4.5
DESC_P, DESC_S, DESC_B, DESC_L, DESC_G = 1 << 15, 1 << 12, 1 << 22, 1 << 21, 1 << 23
FLAT_CODE64 = 0x00AF9B00
FLAT_CODE32 = 0x00CF9B00
FLAT_DATA = 0x00CF9300

MSR_EFER, MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_FMASK = 0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084
MSR_KERNEL_GS_BASE, MSR_TSC_AUX = 0xC0000102, 0xC0000103
MSR_SYSENTER_CS, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP = 0x174, 0x175, 0x176
_TRACKED_MSRS = (MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_FMASK, MSR_KERNEL_GS_BASE, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP)
_SYSENTER_CS_BEFORE_ESP = 8  # it keeps 16 bits, too few to search for: taken as its neighbour's neighbour, and checked

_AT = offsets(CpuImage)
_ERROR_AT = offsets(ErrorImage)
_SEGMENT_AT = offsets(SegmentCache)
_SEGMENT_SIZE: int = SegmentCache.sizeof()
_SEGMENTS_AT = tuple(_AT["segments"] + index * _SEGMENT_SIZE for index in range(len(SEGMENT_NAMES)))
_SELECTORS_AT = tuple(at // 4 for at in _SEGMENTS_AT)  # as 4-byte numbers


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """Where in the state image the parts found by value lie."""

    error: int
    efer: int
    msrs: tuple[tuple[int, int], ...]


@functools.cache
def find_image() -> ImageLayout:
    """Calibrate: write known values through the registers API and look for them in the engine's state.

    EngineMismatch, naming the engine's version and the field, where one is not where `layouts.CpuImage` says.
    """
    engine = Engine(Ram(2 << 20), _NoHooks(), long_mode=True)
    debug = [0x7172737475767000 + i for i in range(4)]
    for i, value in enumerate(debug):
        engine.write_register(f"DR{i}", value)
    msrs = {index: 0x51525354 + (index << 32) for index in _TRACKED_MSRS}
    for index, value in msrs.items():
        engine.write_msr(index, value)
    engine.write_msr(MSR_SYSENTER_CS, 0x4748)
    engine.write_msr(MSR_EFER, 0x801)
    singles = {"pc": ("RIP", 0x1234567890), "cr3": ("CR3", 0x7A5A5000), "cr2": ("CR2", 0x6B6B6B6B)}
    for name, value in singles.values():
        engine.write_register(name, value)
    tables = {"gdt": ("GDTR", 0x11223344), "idt": ("IDTR", 0x22334455)}
    for name, base in tables.values():
        engine.write_register(name, (0, base, 0x77, 0))
    engine.write_register("FS_BASE", 0x33445566)
    blob = bytes(engine.state)

    def only(needle: bytes, what: str) -> int:
        at = blob.find(needle)
        if at < 0 or blob.find(needle, at + 1) >= 0:
            raise EngineMismatch(f"{version()}: cannot find {what} in its CPU state; 2.1.4 is known to work")
        return at

    error = only(struct.pack("<4Q", *debug), "the debug registers") - _ERROR_AT["dr"]
    expected = {
        _AT["pc"]: singles["pc"][1],
        _AT["cr"] + 8 * 3: singles["cr3"][1],
        _AT["cr"] + 8 * 2: singles["cr2"][1],
        _AT["gdt"] + _SEGMENT_AT["base"]: tables["gdt"][1],
        _AT["idt"] + _SEGMENT_AT["base"]: tables["idt"][1],
        _AT["segments"] + FS * _SEGMENT_SIZE + _SEGMENT_AT["base"]: 0x33445566,
    }
    for at, value in expected.items():
        if struct.unpack_from("<Q", blob, at)[0] != value:
            raise EngineMismatch(f"{version()}: its CPU state differs at byte {at}; 2.1.4 is known to work")
    found = {index: only(struct.pack("<Q", value), f"MSR {index:#x}") for index, value in msrs.items()}
    sysenter_cs = found[MSR_SYSENTER_ESP] - _SYSENTER_CS_BEFORE_ESP
    if struct.unpack_from("<I", blob, sysenter_cs)[0] != 0x4748:
        raise EngineMismatch(f"{version()}: cannot find MSR 0x174 in its CPU state; 2.1.4 is known to work")
    found[MSR_SYSENTER_CS] = sysenter_cs
    efer = only(struct.pack("<Q", engine.read_msr(MSR_EFER)), "EFER")
    return ImageLayout(error, efer, tuple(found.items()))


class _NoHooks:
    """For the calibration engine, which executes nothing of a guest."""

    def on_interrupt(self, vector: int) -> None: ...

    def on_invalid(self) -> None: ...

    def on_syscall(self) -> None: ...

    def on_sysenter(self) -> None: ...

    def on_timestamp(self, with_processor: bool) -> None: ...

    def on_in(self, port: int, size: int) -> int:
        return 0

    def on_out(self, port: int, size: int, value: int) -> None: ...

    def on_translated(self, pc: int, code: bytes) -> None: ...


@dataclass(slots=True)
class Segment:
    """A segment register with its hidden part. `flags` is the second dword of its descriptor."""

    selector: int
    base: int
    limit: int
    flags: int


@dataclass(frozen=True, slots=True)
class Kept:
    """What `CpuState.set_aside` took."""

    image: bytes
    running: bool


class CpuState:
    """The processor's state as numbers; see the module's rules. Implements iface.Cpu."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        layout = find_image()
        self._bytes = engine.state
        even = len(engine.state) // 8 * 8
        # As numbers of 8 and of 4 bytes, with the indices of some, for those in the hurry of every trap.
        self.words = self._bytes[:even].cast("Q")
        self.dwords = self._bytes[:even].cast("I")
        self.gpr = self.words[:16]
        self.pc_at, self.eflags_at, self.hflags_at = _AT["pc"] // 8, _AT["eflags"] // 8, _AT["hflags"] // 4
        self.cs_base_at = (_SEGMENTS_AT[CS] + _SEGMENT_AT["base"]) // 8
        self._cc_src, self._cc_op, self._df = _AT["cc_src"] // 8, _AT["cc_op"] // 4, _AT["df"] // 4
        self._cr = _AT["cr"] // 8
        self._efer = layout.efer // 8
        self.control_at = (self._cr, self._cr + 3, self._cr + 4, self._efer)  # CR0, CR3, CR4, EFER
        self._error_at = layout.error
        self._debug_at = layout.error + _ERROR_AT["dr"]
        self._breaks = slice(layout.error + _ERROR_AT["breaks"], layout.error + _ERROR_AT["old_exception"])
        self.old_exception_at = (layout.error + _ERROR_AT["old_exception"]) // 4
        self._msrs = dict(layout.msrs)
        self.running = False  # the engine is inside `run`

    # ---------------------------------------------------------------------------------------------------- registers

    @property
    def pc(self) -> int:
        """RIP, EIP or IP: the offset into the code segment."""
        return self.words[self.pc_at]

    @pc.setter
    def pc(self, value: int) -> None:
        self.words[self.pc_at] = value

    @property
    def linear_pc(self) -> int:
        """Where the instruction at `pc` is fetched from."""
        pc: int = self.words[self.pc_at]
        if self.dwords[self.hflags_at] & HF_CS64:
            return pc
        return (pc + self.words[self.cs_base_at]) & 0xFFFFFFFF

    @property
    def eflags(self) -> int:
        return self._engine.read_eflags() if self.running else self.words[self.eflags_at]

    @eflags.setter
    def eflags(self, value: int) -> None:
        if self.running:
            self.words[self._cc_src] = value & _ARITHMETIC
            self.dwords[self._cc_op] = _CC_OP_EFLAGS
            self.dwords[self._df] = 0xFFFFFFFF if value & DF else 1
            value &= ~(_ARITHMETIC | DF)
        self.words[self.eflags_at] = value | 2

    @property
    def system_flags(self) -> int:
        """EFLAGS without the arithmetic flags and DF, which take the engine a while to put together."""
        return self.words[self.eflags_at] & ~(_ARITHMETIC | DF)

    @system_flags.setter
    def system_flags(self, value: int) -> None:
        at = self.eflags_at
        self.words[at] = (self.words[at] & (_ARITHMETIC | DF)) | (value & ~(_ARITHMETIC | DF))

    def integer_state(self) -> bytes:
        """General registers, pc and flags as the engine has them now: to see whether a handler has changed any."""
        return self._bytes[: _AT["hflags"]].tobytes()

    @property
    def hflags(self) -> int:
        return self.dwords[self.hflags_at]

    @hflags.setter
    def hflags(self, value: int) -> None:
        self.dwords[self.hflags_at] = value

    @property
    def cpl(self) -> int:
        return self.dwords[self.hflags_at] & HF_CPL

    @property
    def bits(self) -> int:
        hflags = self.dwords[self.hflags_at]
        return 64 if hflags & HF_CS64 else 32 if hflags & HF_CS32 else 16

    @property
    def long_mode(self) -> bool:
        """IA-32e mode is active (64-bit or compatibility)."""
        return bool(self.dwords[self.hflags_at] & HF_LMA)

    @property
    def interrupt_shadow(self) -> bool:
        return bool(self.dwords[self.hflags_at] & HF_INHIBIT_IRQ)

    def cr(self, index: int) -> int:
        """CR0, CR2, CR3 or CR4."""
        return self.words[self._cr + index]

    def set_cr(self, index: int, value: int) -> None:
        """The number alone: call `recompute_hflags` after CR0 or CR4, and have the engine forget its page walks."""
        self.words[self._cr + index] = value

    @property
    def cr3(self) -> int:
        return self.words[self._cr + 3]

    @property
    def efer(self) -> int:
        return self.words[self._efer]

    @efer.setter
    def efer(self, value: int) -> None:
        self.words[self._efer] = value

    def tables(self) -> Tables:
        q, cr = self.words, self._cr
        return Tables(q[cr], q[cr + 3], q[cr + 4], q[self._efer])

    def msr(self, index: int) -> int:
        """One of the MSRs that system-call entry needs; 32-bit ones zero-extended."""
        at = self._msrs[index]
        return int(self.dwords[at // 4] if index == MSR_SYSENTER_CS else self.words[at // 8])

    def set_msr(self, index: int, value: int) -> None:
        """Of one of those."""
        at = self._msrs[index]
        if index == MSR_SYSENTER_CS:
            self.dwords[at // 4] = value & 0xFFFFFFFF
        else:
            self.words[at // 8] = value

    # ----------------------------------------------------------------------------------------------------- segments

    def segment(self, index: int) -> Segment:
        """ES, CS, SS, DS, FS or GS."""
        return self._read_segment(_SEGMENTS_AT[index])

    def set_segment(self, index: int, selector: int, base: int, limit: int, flags: int) -> None:
        """Load visible and hidden parts; call `recompute_hflags` when all are loaded."""
        self._write_segment(_SEGMENTS_AT[index], selector, base, limit, flags)

    def system_segment(self, name: str) -> Segment:
        """ "ldt", "tr", "gdt" or "idt"."""
        return self._read_segment(_AT[name])

    def table(self, name: str) -> tuple[int, int]:
        """(base, limit) of "ldt", "tr", "gdt" or "idt": what a trap needs of it."""
        at = _AT[name] // 4
        return self.words[at // 2 + 1], self.dwords[at + 4]

    def set_system_segment(self, name: str, selector: int, base: int, limit: int, flags: int = 0) -> None:
        self._write_segment(_AT[name], selector, base, limit, flags)

    def selector(self, index: int) -> int:
        return self.dwords[_SELECTORS_AT[index]]

    def segment_base(self, name: str) -> int:
        """Base address of "es" "cs" "ss" "ds" "fs" "gs"."""
        return self.segment(SEGMENT_NAMES.index(name)).base

    def _read_segment(self, at: int) -> Segment:
        d, i = self.dwords, at // 4
        return Segment(d[i], self.words[(at + 8) // 8], d[i + 4], d[i + 5])

    def _write_segment(self, at: int, selector: int, base: int, limit: int, flags: int) -> None:
        d, i = self.dwords, at // 4
        d[i] = selector
        self.words[(at + 8) // 8] = base
        d[i + 4] = limit
        d[i + 5] = flags

    def end_shadow(self) -> None:
        """Interrupts are held off by no MOV SS or STI any more."""
        self.dwords[self.hflags_at] &= ~HF_INHIBIT_IRQ

    def recompute_hflags(self) -> None:
        """Derive the engine's cached flags from CR0, CR4, EFER and the segments (QEMU: cpu_x86_load_seg_cache, ...)."""
        cr0, cr4 = self.cr(0), self.cr(4)
        cs, ss = self.segment(CS), self.segment(SS)
        h = (cr0 & 1) * HF_PE | ((cr0 << 8) & HF_MP_EM_TS)
        h |= HF_OSFXSR if cr4 & 0x200 else 0
        if self.efer & 0x400:
            h |= HF_LMA
        if h & HF_LMA and cs.flags & DESC_L:
            h |= HF_CS32 | HF_SS32 | HF_CS64
        else:
            h |= HF_CS32 if cs.flags & DESC_B else 0
            h |= HF_SS32 if ss.flags & DESC_B else 0
            bases = self.segment(DS).base | self.segment(ES).base | ss.base
            if not cr0 & 1 or self.system_flags & VM or not h & HF_CS32 or bases:
                h |= HF_ADDSEG
        if cr0 & 1:
            h |= 3 if self.system_flags & VM else (ss.flags >> 13) & 3
        keep = HF_INHIBIT_IRQ
        self.hflags = (self.hflags & keep) | h

    # ---------------------------------------------------------------------------------- what an exception leaves

    @property
    def error_code(self) -> int:
        return self.dwords[self._error_at // 4]

    @property
    def software_interrupt(self) -> bool:
        """The last INTR hook is for `int n`, int3 or into."""
        return bool(self.dwords[self._error_at // 4 + 1])

    def forget_exception(self) -> None:
        """The engine never does: without it the next fault counts as nested."""
        self.dwords[self.old_exception_at] = NO_EXCEPTION

    @contextlib.contextmanager
    def hidden_faults(self) -> Iterator[None]:
        """Around removing a hook: the engine looks up what it hooked through the guest's tables, and a fault of that,
        from user mode to a kernel page say, is left in the processor as if the guest had had it."""
        cr2 = self.cr(2)
        yield
        self.set_cr(2, cr2)
        self.forget_exception()

    def debug_register(self, index: int) -> int:
        return self.words[self._debug_at // 8 + index]

    def set_debug_register(self, index: int, value: int) -> None:
        self.words[self._debug_at // 8 + index] = value
        if index == 7:
            self._forget_breaks()

    def _forget_breaks(self) -> None:
        """The engine follows its pointers, by what kind DR7 says they are, when the guest writes DR7 next. Where they
        are not of this engine, or not of that kind, it may find none. (What it leaves behind never triggers.)"""
        self._bytes[self._breaks] = bytes(self._breaks.stop - self._breaks.start)

    # ------------------------------------------------------------------------------------------------ set aside, inside

    def set_aside(self) -> Kept:
        """The state as it is, so that the processor can do something else in between: it counts as not running."""
        kept, flags = Kept(bytes(self._bytes), self.running), self.eflags
        self.running = False
        self.eflags = flags
        return kept

    def put_back(self, kept: Kept, keep_system: bool) -> bool:
        """The state set aside. `keep_system`: but control registers, tables and MSRs stay as they are.

        So do debug registers in any case, which the engine's pointers must go with.

        -> whether page walks must be forgotten.
        """
        now = {at: bytes(self._bytes[at : at + size]) for at, size in self._system_parts()}
        debug = bytes(self._bytes[self._debug_at : self._breaks.stop])
        self._bytes[:] = kept.image
        self._bytes[self._debug_at : self._breaks.stop] = debug
        self.running = kept.running
        changed = any(self._bytes[at : at + len(data)] != data for at, data in now.items())
        if keep_system and changed:
            for at, data in now.items():
                self._bytes[at : at + len(data)] = data
            self.recompute_hflags()
        return changed

    def _system_parts(self) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of LDTR, TR, GDTR, IDTR, CR0, CR3, CR4, EFER and the MSRs; CR2 is a fault handler's own."""
        yield _AT["ldt"], 4 * _SEGMENT_SIZE
        for index in (0, 3, 4):
            yield (self._cr + index) * 8, 8
        yield self._efer * 8, 8
        for at in self._msrs.values():
            yield at, 8

    # ------------------------------------------------------------------------------------------------------ as bytes

    def image(self) -> bytes:
        """The whole image between runs, for snapshots, without what is this process's alone.

        Only an engine of the same layout can take it back.
        """
        whole = bytearray(self._bytes)
        whole[self._breaks] = bytes(self._breaks.stop - self._breaks.start)
        return bytes(whole)

    def load_image(self, data: bytes) -> None:
        if len(data) != len(self._bytes):
            raise EngineMismatch(f"{version()}: a CPU state of {len(data)} bytes, {len(self._bytes)} expected")
        self._bytes[:] = data
        self._forget_breaks()  # of a file that somebody else has made
