"""Unicorn, and nothing of it beyond this file.

Rules: the only module that imports unicorn. It knows how to run to an exact instruction, how to be stopped safely, how
to drop translated code and how to call hooks; it knows nothing of traps, devices or Linux. Everything here belongs to
the thread that runs the guest. The facts it rests on (Unicorn 2.1.4):

- The processor's state lies in one structure, which context save and restore copy as it is. Found by calibration, it is
  read and written in place: hooks find it complete, and the engine goes on from what they leave there.
- `emu_start(count=N)` counts each instruction in a 64-bit field of the engine and stops *before* the one that exceeds
  a second field. Both are calibrated too, so that the count is exact inside hooks and a deadline is one store.
- `emu_stop` from another thread or `timeout=` repeats instructions that have already stored; neither is used here.
- Writing guest memory from outside drops no translated code: `drop_code` does.
- UC_HOOK_EDGE_GENERATED is called for each block translated, whatever led to it, before the block first runs; the one
  exception is the first block of an engine's life. A boot to init translates 49,000.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import unicorn
from unicorn import x86_const as reg
from unicorn.unicorn_py3.unicorn import uclib as _binding_library

from emu.iface import EngineMismatch, MachineError
from emu.ram import PAGE, WINDOW_SIZE, Ram

FOREVER = 1 << 62
_HANDLE_SPAN = 0x1000  # how much of the engine structure calibration looks through
_PROCESSOR_SPAN = 0x20000  # ... and of what its pointers lead to; the processor's object has its state at 0x8a50
_MMIO_END = 1 << 46
_GENERAL: Final = ("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *(f"R{number}" for number in range(8, 16)))

_lib = ctypes.CDLL(_binding_library._name)
for _name, _arguments in {
    "uc_emu_start": (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t),
    "uc_emu_stop": (ctypes.c_void_p,),
    "uc_reg_read": (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p),
    "uc_reg_read_batch": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
    "uc_reg_write": (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p),
    "uc_mem_map_ptr": (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_void_p),
    "uc_vmem_translate": (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p),
    "uc_hook_del": (ctypes.c_void_p, ctypes.c_size_t),
}.items():
    getattr(_lib, _name).argtypes = _arguments

_INTR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32)  # and what it was registered with, which we don't use
_CODE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p)
_INSN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_VOID = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
_MEM = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
)
_OUT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p)
_IN = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p)


class _Block(ctypes.Structure):
    """uc_tb: a translated block."""

    _fields_ = (("pc", ctypes.c_uint64), ("instructions", ctypes.c_uint16), ("size", ctypes.c_uint16))


_TRANSLATED = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(_Block), ctypes.c_void_p, ctypes.c_void_p)


class EngineError(MachineError):
    """`emu_start` gave up: Unicorn's own words."""


class FetchError(EngineError):
    """The pc is at a physical address where no RAM is."""


class Hooks(Protocol):
    """What the engine calls while the guest runs. An exception that escapes one ends the run; see `Engine.failure`."""

    def on_interrupt(self, vector: int) -> None: ...

    def on_invalid(self) -> None: ...

    def on_syscall(self) -> None: ...

    def on_sysenter(self) -> None: ...

    def on_timestamp(self, with_processor: bool) -> None: ...

    def on_in(self, port: int, size: int) -> int: ...

    def on_out(self, port: int, size: int, value: int) -> None: ...

    def on_translated(self, pc: int, code: bytes) -> None:
        """The instructions `code` at linear address `pc` are about to run for the first time as they are now."""
        ...


@dataclass(frozen=True, slots=True)
class Fields:
    """Where in the structure behind the engine's handle things are, in bytes.

    `counter`, `limit`: the instruction counter and its limit. `processor`: a pointer to the processor's object, which
    at `state` has a pointer to the `state_size` bytes of its state, general registers first.
    """

    counter: int
    limit: int
    processor: int
    state: int
    state_size: int


def version() -> str:
    return f"Unicorn {unicorn.__version__}"


def _scratch() -> unicorn.Uc:
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    uc.ctl_set_cpu_model(reg.UC_CPU_X86_NEHALEM)
    uc.mem_map(0x1000, 0x10000)
    return uc


@functools.cache
def find_fields() -> Fields:
    """Calibrate: run small programs with known lengths and limits and see which fields hold them.

    EngineMismatch where no such pair of fields exists.
    """
    uc = _scratch()
    slots = (ctypes.c_uint64 * (_HANDLE_SPAN // 8)).from_address(uc._uch.value)
    counters, limits = set(range(len(slots))), set(range(len(slots)))
    for nops, limit in ((5, 1000), (3, 777), (17, 123_456)):
        uc.mem_write(0x1000, b"\x90" * nops + b"\xf4")
        uc.ctl_remove_cache(0x1000, 0x1100)
        uc.emu_start(0x1000, 0, count=limit)
        counters = {i for i in counters if slots[i] == nops + 1}
        limits = {i for i in limits if slots[i] == limit}
    if len(counters) != 1 or len(limits) != 1:
        raise EngineMismatch(f"{version()}: cannot find its instruction counter; 2.1.4 is known to work")
    return Fields(counters.pop() * 8, limits.pop() * 8, *_find_state())


def _find_state() -> tuple[int, int, int]:
    """See `Fields`. By known values in the general registers; the handle's pointers may lead anywhere."""
    uc = _scratch()
    values = [0x2122334455660000 + i for i in range(16)]
    for name, value in zip(_GENERAL, values, strict=True):
        uc.reg_write(getattr(reg, f"UC_X86_REG_{name}"), value)
    needle = struct.pack("<16Q", *values)
    context = uc.context_save()
    header = ctypes.string_at(context.context, context.size).find(needle)
    found = []
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        for index, start in enumerate(_words_at(uc._uch.value, _HANDLE_SPAN // 8)):
            try:
                data = os.pread(memory.fileno(), _PROCESSOR_SPAN, start)
            except (OSError, OverflowError):
                continue  # no pointer
            state = data.find(needle)
            pointer = data.find(struct.pack("<Q", start + state)) if state > 0 else -1
            if pointer >= 0 and pointer % 8 == 0:
                found.append((state, index * 8, pointer))
    if header < 0 or not found:
        raise EngineMismatch(f"{version()}: cannot find its CPU state; 2.1.4 is known to work")
    _, processor, pointer = min(found)  # the nearest: others lead to what lies before the object
    return processor, pointer, context.size - header


@functools.cache
def self_test() -> tuple[str, ...]:
    """What this engine computes wrongly, each named; the machine hides it from the guest."""
    uc = _scratch()
    uc.mem_write(0x1000, bytes.fromhex("c5e9fecb") + b"\xf4")  # vpaddd xmm1, xmm2, xmm3
    uc.reg_write(reg.UC_X86_REG_CR4, 0x600)  # OSFXSR, OSXMMEXCPT
    uc.reg_write(reg.UC_X86_REG_XMM1, 1)
    uc.reg_write(reg.UC_X86_REG_XMM2, 2)
    uc.reg_write(reg.UC_X86_REG_XMM3, 4)
    try:
        uc.emu_start(0x1000, 0, count=2)
    except unicorn.UcError:
        return ("VEX: vpaddd xmm is not decoded",)
    return () if uc.reg_read(reg.UC_X86_REG_XMM1) == 6 else ("VEX: vpaddd xmm1,xmm2,xmm3 ignores xmm2",)


def _words_at(address: int, count: int) -> memoryview:
    """64-bit words of the engine's own memory, signed; quicker to index than a ctypes array."""
    return memoryview((ctypes.c_uint64 * count).from_address(address)).cast("B").cast("q")


class Engine:
    """One Unicorn over one Ram.

    `counter` and `limit` are live, index 0 of each is the engine's own field; so is `state`, the processor's.
    """

    def __init__(self, ram: Ram, hooks: Hooks, *, long_mode: bool) -> None:
        fields = find_fields()
        self._uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        # neither has AVX or RDRAND; the second has no long mode
        self._uc.ctl_set_cpu_model(reg.UC_CPU_X86_NEHALEM if long_mode else reg.UC_CPU_X86_PENTIUM3)
        self._handle = self._uc._uch
        self.hooks = hooks
        self.failure: BaseException | None = None
        self.failure_text = ""
        self._ram = ram
        self._keep: list[object] = []
        self._pc_hooks: dict[int, tuple[ctypes.c_size_t, object]] = {}
        span = ram.size + WINDOW_SIZE
        self._check(_lib.uc_mem_map_ptr(self._handle, 0, span, unicorn.UC_PROT_ALL, ram.address))
        self._uc.mmio_map(span, _MMIO_END - span, lambda *_: (1 << 64) - 1, None, lambda *_: None, None)
        self._uc.ctl_exits_enabled(True)
        self._uc.ctl_set_exits([])
        base = self._handle.value
        self.counter = _words_at(base + fields.counter, 1)
        self.limit = _words_at(base + fields.limit, 1)
        state = _words_at(_words_at(base + fields.processor, 1)[0] + fields.state, 1)[0]
        self.state = memoryview((ctypes.c_ubyte * fields.state_size).from_address(state)).cast("B")
        self._check_state()
        self._word = ctypes.c_uint64(0)
        self._word_pointer = ctypes.addressof(self._word)
        self._run_first_block()
        self._add_hooks()

    # ------------------------------------------------------------------------------------------------------ running

    def run(self, pc: int, limit: int) -> tuple[int, bool]:
        """Execute from `pc` until `limit` instructions are done, a hook calls `stop_here`, or HLT.

        -> (instructions retired, True if HLT ended it). `limit[0]` may be changed while it runs. EngineError, with the
        count still in `counter`.
        """
        error = _lib.uc_emu_start(self._handle, pc, 0, 0, FOREVER if limit <= 0 else limit)
        counted = self.counter[0]
        if error:
            kind = FetchError if error == unicorn.UC_ERR_FETCH_PROT else EngineError
            raise kind(f"{version()}: {unicorn.UcError(error)}")
        if counted > self.limit[0]:
            return counted - 1, False  # the count includes the instruction that was not executed
        return counted, True

    def _run_first_block(self) -> None:
        """No block is reported before one has run to its end: jmp to the next instruction, hlt, and zeros again."""
        code = b"\xeb\x00\xf4"
        self._ram.write(0, code)
        self.run(0, len(code))
        self._ram.write(0, bytes(len(code)))
        self.flush()
        self.counter[0] = 0

    def stop_here(self) -> None:
        """From a hook: stop before the next instruction (in a PC hook: before this one, see `break_here`)."""
        self.limit[0] = 0

    def continue_at(self, pc: int) -> None:
        """From a PC hook: do not execute the instruction it stands on, though it stays counted; go on at `pc`.

        Without this a state restored in the hook loses its pc and flags: the engine puts its own back.
        """
        self._word.value = pc
        _lib.uc_reg_write(self._handle, reg.UC_X86_REG_RIP, self._word_pointer)

    def break_here(self) -> None:
        """From a PC hook: stop before the instruction it stands on. In the engine's own thread, where this is exact."""
        self.limit[0] = 0
        _lib.uc_emu_stop(self._handle)  # a hook is running, so this is the engine's own thread

    # -------------------------------------------------------------------------------------------------------- state

    def _check_state(self) -> None:
        """`state` is where the registers are: calibration was another engine's."""
        for number, name in enumerate(_GENERAL):
            self.write_register(name, 0x3132333435360000 + number)
        if struct.unpack_from("<16Q", self.state) != tuple(0x3132333435360000 + number for number in range(16)):
            raise EngineMismatch(f"{version()}: its CPU state is not where it was; 2.1.4 is known to work")
        self.state[:128] = bytes(128)

    def read_eflags(self) -> int:
        """Architectural EFLAGS; while the engine runs, the state image holds them in parts only."""
        _lib.uc_reg_read(self._handle, reg.UC_X86_REG_EFLAGS, self._word_pointer)
        return self._word.value & 0xFFFF_FFFF  # 32 bits are written; above them stands what was read before

    def write_register(self, name: str, value: Any) -> None:
        """By Unicorn's name, for calibration and the registers outside the state image's described part."""
        self._uc.reg_write(getattr(reg, f"UC_X86_REG_{name}"), value)

    def read_register(self, name: str) -> Any:
        return self._uc.reg_read(getattr(reg, f"UC_X86_REG_{name}"))

    def reader(self, names: Sequence[str]) -> Callable[[], dict[str, int]]:
        """A call that reads these registers, of 16 bytes at most, by Unicorn's names: 33 in 15 us, not in 300."""
        numbers = (ctypes.c_int * len(names))(*(getattr(reg, f"UC_X86_REG_{name}") for name in names))
        values = (ctypes.c_uint64 * (2 * len(names)))()
        first = ctypes.addressof(values)
        places = (ctypes.c_void_p * len(names))(*range(first, first + ctypes.sizeof(values), 16))

        def read() -> dict[str, int]:
            self._check(_lib.uc_reg_read_batch(self._handle, numbers, places, len(names)))
            words = values[:]
            return {name: low | high << 64 for name, low, high in zip(names, words[::2], words[1::2], strict=True)}

        return read

    def read_msr(self, index: int) -> int:
        return int(self._uc.msr_read(index))

    def write_msr(self, index: int, value: int) -> None:
        self._uc.msr_write(index, value)

    # --------------------------------------------------------------------------------------------- translated code

    def fetch(self, vaddr: int, size: int) -> bytes:
        """Code as the processor fetches it in its present state, from a hook; less than `size` where a page is missing.

        The engine answers from its cache of page walks, so for code that just ran nothing in the guest changes.
        """
        code = b""
        while size and not _lib.uc_vmem_translate(self._handle, vaddr, unicorn.UC_PROT_EXEC, self._word_pointer):
            paddr = self._word.value
            part = min(size, PAGE - (paddr & 0xFFF))
            code += self._ram.map[paddr : paddr + part]  # nothing beyond RAM: a block of a device's all ones
            vaddr, size = vaddr + part, size - part
        return code

    def drop_code(self, vaddr: int, size: int, reachable: bool) -> None:
        """Forget translations of [vaddr, vaddr+size).

        `reachable`: the range is mapped and executable in the mode the processor is in now. Unicorn translates the
        address through the guest's tables and would raise a hidden fault in the guest otherwise, so everything goes.
        """
        if reachable:
            self._uc.ctl_remove_cache(vaddr, vaddr + size)
        else:
            self._uc.ctl_flush_tb()

    def flush(self) -> None:
        """Forget every translation and every cached page walk: after RAM was replaced."""
        self._uc.ctl_flush_tb()
        self.flush_tlb()

    def flush_tlb(self) -> None:
        """Forget every cached page walk: after control registers or tables were changed from outside."""
        self._uc.ctl(unicorn.UC_CTL_TLB_FLUSH, unicorn.UC_CTL_IO_WRITE)

    # -------------------------------------------------------------------------------------------------------- hooks

    def add_pc_hook(self, vaddr: int, call: Callable[[], None]) -> None:
        """Call before each execution of the instruction at `vaddr` (each iteration of a rep). Caller drops old code."""
        callback = _CODE(lambda *_: self._guard(call))
        self._pc_hooks[vaddr] = (self._hook(unicorn.UC_HOOK_CODE, callback, vaddr, vaddr), callback)

    def remove_pc_hook(self, vaddr: int) -> None:
        handle, _ = self._pc_hooks.pop(vaddr)
        self._check(_lib.uc_hook_del(self._handle, handle))

    def add_memory_hook(self, write: bool, first: int, last: int, call: Callable[[bool, int, int], None]) -> object:
        """`call(write, paddr, size)` before each store, or each load, that begins at physical `first` to `last`.

        Of 8 bytes at most (wider ones come in parts); one that crosses a page comes once, with where it begins. Also
        for one that then faults. Code translated while there was no hook of this direction has no calls.
        -> what `remove_memory_hook` takes. Not from a hook.
        """
        callback = _MEM(lambda _u, _kind, paddr, size, _v, _d: self._guard(call, write, paddr, size))
        kind = unicorn.UC_HOOK_MEM_WRITE if write else unicorn.UC_HOOK_MEM_READ
        return self._hook(kind, callback, first, last), callback

    def remove_memory_hook(self, hook: object) -> None:
        assert isinstance(hook, tuple)  # opaque to everybody else
        self._check(_lib.uc_hook_del(self._handle, hook[0]))

    def _guard(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except BaseException as error:  # noqa: BLE001  # a C frame lies above: keep it and stop; `machine` reports it
            self._fail(error)
            return 0

    def _fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure, self.failure_text = error, traceback.format_exc()
        self.limit[0] = 0
        _lib.uc_emu_stop(self._handle)  # in the engine's own thread: a hook of it has just raised

    def _hook(self, kind: int, callback: object, begin: int = 1, end: int = 0, instruction: int = 0) -> ctypes.c_size_t:
        handle = ctypes.c_size_t()
        # uc_hook_add is variadic and the binding refuses RDTSC: call it plainly
        self._check(
            _lib.uc_hook_add(
                self._handle,
                ctypes.byref(handle),
                ctypes.c_int(kind),
                callback,
                ctypes.c_void_p(0),
                ctypes.c_uint64(begin),
                ctypes.c_uint64(end),
                ctypes.c_int(instruction),
            )
        )
        return handle

    def _add_hooks(self) -> None:
        guard, hooks = self._guard, self.hooks

        def invalid(*_: object) -> int:
            guard(hooks.on_invalid)
            return 1

        def timestamp(with_processor: bool) -> Callable[..., int]:
            def call(*_: object) -> int:
                guard(hooks.on_timestamp, with_processor)
                return 1

            return call

        def tracked(kind: int, callback: object, instruction: int = 0) -> None:
            self._keep.append(callback)
            self._hook(kind, callback, instruction=instruction)

        on_interrupt = hooks.on_interrupt

        def interrupt(_uc: int, vector: int) -> None:
            try:  # `_guard` without a call more
                on_interrupt(vector)
            except BaseException as error:  # noqa: BLE001  # a C frame lies above here too
                self._fail(error)

        tracked(unicorn.UC_HOOK_INTR, _INTR(interrupt))
        tracked(unicorn.UC_HOOK_INSN_INVALID, _INSN(invalid))
        for callback, instruction in (
            (_IN(lambda _u, port, size, _d: guard(hooks.on_in, port, size)), reg.UC_X86_INS_IN),
            (_OUT(lambda _u, port, size, value, _d: guard(hooks.on_out, port, size, value)), reg.UC_X86_INS_OUT),
            (_VOID(lambda *_: guard(hooks.on_syscall)), reg.UC_X86_INS_SYSCALL),
            (_VOID(lambda *_: guard(hooks.on_sysenter)), reg.UC_X86_INS_SYSENTER),
            (_INSN(timestamp(False)), reg.UC_X86_INS_RDTSC),
            (_INSN(timestamp(True)), reg.UC_X86_INS_RDTSCP),
        ):
            tracked(unicorn.UC_HOOK_INSN, callback, instruction)
        if self_test():
            tracked(unicorn.UC_HOOK_EDGE_GENERATED, _TRANSLATED(lambda _u, at, *_: guard(self._translated, at[0])))

    def _translated(self, block: _Block) -> None:
        pc = block.pc
        self.hooks.on_translated(pc, self.fetch(pc, block.size))

    @staticmethod
    def _check(error: int) -> None:
        if error:
            raise EngineError(f"{version()}: {unicorn.UcError(error)}")
