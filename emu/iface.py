"""What the rooms above see of a machine: protocols and errors; `emu.stops` has the reasons a run ends.

Rules: standard library only; no behaviour lives here. Everything that crosses from `emu` to `probes` or `gdbstub`
is one of these names, so that both can be tested on a fake. Addresses are `vaddr` (linear, through the guest's page
tables) or `paddr` (physical); sizes are bytes; `instructions` are retired guest instructions since power-on.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from emu.stops import Stop, WatchKind

if TYPE_CHECKING:
    from emu.arch import Arch

# ------------------------------------------------------------------------------------------------------------- errors


class MachineError(Exception):
    """Base of every error `emu` raises on purpose; its text is one line a user can act on."""


class MemoryFault(MachineError):
    """No byte at `address` for that access. Raised for debugger reads and writes; never answered with zeros."""

    def __init__(self, address: int, access: str = "read") -> None:
        super().__init__(f"cannot {access} memory at {address:#x}")
        self.address = address
        self.access = access


class CallAborted(MachineError):
    """A call into the guest that was given up. `stop`: the machine stopped inside it, and the run ends with that."""

    def __init__(self, reason: str, stop: Stop | None = None) -> None:
        super().__init__(f"the call was given up: {reason}")
        self.reason = reason
        self.stop = stop


class ImageError(MachineError):
    """A file that cannot be loaded: what is wrong, in which file, at which byte offset (None: the file as a whole)."""

    def __init__(self, path: str, reason: str, offset: int | None = None) -> None:
        where = "" if offset is None else f", at offset {offset:#x}"
        super().__init__(f"{path}: {reason}{where}")
        self.path = path
        self.reason = reason
        self.offset = offset


class EngineMismatch(MachineError):
    """This Unicorn does not lay out its CPU state as we expect; the text names its version."""


# ---------------------------------------------------------------------------------------------------------- the parts


class Memory(Protocol):
    """The guest's memory as a debugger sees it: never an armed int3, always the bytes the guest wrote."""

    @property
    def size(self) -> int:
        """Bytes of RAM, from physical address 0 on."""
        ...

    def region(self, vaddr: int) -> tuple[int, int, str]:
        """(start, bytes, rights) of the range of equal mapping around `vaddr`; rights of "rwx", empty for a hole."""
        ...

    def read(self, vaddr: int, size: int) -> bytes:
        """`size` bytes; MemoryFault names the first address that has none."""
        ...

    def write(self, vaddr: int, data: bytes) -> None:
        """All or nothing across pages; armed places under it keep working."""
        ...

    def translate(self, vaddr: int, root: int | None = None) -> int | None:
        """The physical address `vaddr` maps to now, or None.

        `root`: by the tables with this top level (a physical address), not by those in force; nothing is mapped there
        as long as paging is off.
        """
        ...

    def storable(self, vaddr: int, root: int) -> int | None:
        """As `translate`, for a store by a program: None too where that would fault."""
        ...

    def read_physical(self, paddr: int, size: int) -> bytes: ...

    def write_physical(self, paddr: int, data: bytes) -> None: ...


class Registers(Protocol):
    """Registers by GDB's names ("rax", "eflags", "fs_base", "st0", "xmm0", "cr3" ...), values as unsigned integers."""

    @property
    def arch(self) -> Arch:
        """What a debugger should be told the processor is now; it changes with the mode."""
        ...

    def read(self, name: str) -> int:
        """KeyError for a name the current architecture does not have."""
        ...

    def write(self, name: str, value: int) -> None:
        """As the processor's own instruction would, with what follows from it. KeyError, or MachineError where the
        processor does not take the value."""
        ...

    def read_many(self, names: Sequence[str]) -> list[int]:
        """The values of `names` in their order, from one look at the processor: what a `g` packet is made of."""
        ...

    def write_many(self, values: Mapping[str, int]) -> None:
        """All of them in one go; KeyError before any is written."""
        ...


class Cpu(Protocol):
    """The processor's state inside a trap handler: what is written is in force when it returns.

    `gpr` holds 16 values in the encoding's order: ax cx dx bx sp bp si di r8..r15 (SDM vol. 2, table 2-2).
    """

    pc: int
    eflags: int
    system_flags: int  # eflags without the arithmetic flags and DF: cheaper

    @property
    def gpr(self) -> GprFile: ...

    @property
    def bits(self) -> int:
        """16, 32 or 64: the operand default of the code segment in force."""
        ...

    @property
    def cpl(self) -> int: ...

    @property
    def cr3(self) -> int: ...

    def segment_base(self, name: str) -> int:
        """Base of "es" "cs" "ss" "ds" "fs" "gs"."""
        ...

    def debug_register(self, index: int) -> int: ...

    def set_debug_register(self, index: int, value: int) -> None: ...


class GprFile(Protocol):
    def __getitem__(self, index: int, /) -> int: ...

    def __setitem__(self, index: int, value: int, /) -> None: ...


class BackEnd(enum.Enum):
    """How an address is armed. INT3 changes one byte of guest memory; HOOK changes none but slows the engine."""

    INT3 = "int3"
    HOOK = "hook"


class Verdict(enum.Enum):
    """What a TrapClient says of a trap."""

    NOT_MINE = 0  # ask the next in the chain
    HANDLED = 1  # the guest goes on at cpu.pc
    DELIVER = 2  # the guest must see this trap, with the state as it is now in `cpu`


class TrapClient(Protocol):
    """The probe engine, as the machine calls it: in the engine's thread, between instructions. It must not block."""

    def on_break(self, cpu: Cpu, pc: int, back_end: BackEnd) -> Verdict | Stop:
        """An armed place of ours at `pc` was reached. `cpu.pc == pc`: nothing of the instruction has happened."""
        ...

    def on_debug(self, cpu: Cpu) -> Verdict | Stop:
        """#DB from EFLAGS.TF; `cpu.pc` is the next instruction (or in the slot window)."""
        ...

    def on_fault(self, cpu: Cpu, vector: int) -> Verdict | Stop:
        """An exception or `int n` with pc inside the slot window, before delivery: `cpu.pc` must leave it.

        Also a fault in code that a handler calls.
        """
        ...

    def leave_slot(self, cpu: Cpu) -> bool:
        """The guest is to stop or be interrupted with pc in the slot window: True if it is out of it now.

        Its registers are then what its own instructions have made so far. False: one more instruction of ours first.
        """
        ...

    def on_rewritten(self) -> None:
        """The guest has patched its text, and int3s stand over what it has put there. Between runs."""
        ...

    def on_restore(self) -> None:
        """RAM and processor are those of another moment now: what was under way is not any more. Between runs."""
        ...


class BreakClient(Protocol):
    """Who owns breakpoints in translated code: asked in the engine's thread."""

    def stands(self, vaddr: int) -> bool:
        """Whether the address is meant in the address space in force; it must not touch the processor's state."""
        ...

    def on_code_break(self, cpu: Cpu, vaddr: int) -> Stop | None:
        """The instruction at `vaddr` is about to run, for the first time since the guest came to it.

        It runs next unless `cpu.pc` is changed. Asked too where `stands` is false, at an int3 that was planted.
        """
        ...


class CodeBreaks(Protocol):
    """Breakpoints that stand in no memory: the guest cannot see them, and they cost nothing where they are not met."""

    client: BreakClient | None

    def arm(self, vaddr: int, *, fresh: bool = False) -> None:
        """Idempotent; mapped or not. `fresh`: nothing there can have run yet in a space where `stands` is true."""
        ...

    def disarm(self, vaddr: int) -> None:
        """No error where it is not armed."""
        ...

    def refresh(self, vaddr: int | None = None) -> None:
        """Answers of `stands` have changed for code that may have run, there or (None) anywhere."""
        ...


class Planted(Protocol):
    """Int3s in guest memory by physical address. The guest sees them; who executes them comes to the BreakClient."""

    def plant(self, paddr: int, *, fresh: bool = False) -> None:
        """Idempotent. `fresh`: nothing of that page has been executed since its bytes came. MemoryFault beyond RAM."""
        ...

    def adopt(self, paddr: int, original: int) -> None:
        """The guest has copied a page with an int3 of ours: the copy's is ours too, and `original` the guest's byte."""
        ...

    def remove(self, paddr: int) -> None:
        """Put the guest's byte back, unless it has written another. No error where nothing was planted."""
        ...

    def forget_one(self, paddr: int) -> None:
        """The page is used for something else now: leave it alone."""
        ...

    def stands(self, paddr: int) -> bool:
        """It was planted and the guest has not written over it."""
        ...

    def original(self, paddr: int) -> int | None:
        """The guest's byte at a planted int3."""
        ...


class Text(Protocol):
    """Sole owner of armed places. An address may have several owners; its byte changes with the first and the last."""

    def arm(self, vaddr: int, owner: object, back_end: BackEnd) -> None:
        """MemoryFault where INT3 is asked for and `vaddr` is not mapped now. Idempotent per (vaddr, owner)."""
        ...

    def disarm(self, vaddr: int, owner: object) -> None:
        """No error where it is not armed."""
        ...

    def shorten(
        self, vaddr: int, owner: object, code: bytes, to: int, call: Callable[[], int | None], uncount: int
    ) -> None:
        """Have arrivals at the int3 of `vaddr` come to `call` at once, instead of the trap client's `on_break`.

        That is in ring 0, by flat segments, with TF clear, for as long as `owner` is alone there, the instruction there
        is `code`, it and `to` are mapped as now. `call` says where the guest goes on, usually at `to`, and `uncount`
        instructions are taken off the clock; or None, having done nothing, to have it the long way. Without effect
        where the usual way is not to be had now, and ended by every change of who owns the place.
        """
        ...

    def code(self, vaddr: int, size: int) -> bytes | None:
        """The guest's bytes at an armed int3, up to `size` and no further than the page: for a look at each hit.

        None where no int3 stands there now.
        """
        ...


class Window(Protocol):
    """Monitor RAM mapped into the guest, where instruction slots live: offsets below `size`, mapped read-execute.

    No debugger sees it, and no guest that does not look for it.
    """

    size: int
    text: range  # offsets of room for code that a user brings
    data: range  # ... and for data: writable, and never executed where the guest's tables can say so

    def address(self, offset: int) -> int:
        """Guest virtual address of a byte of the window, mapping it into the current address space where it must be."""
        ...

    def read(self, offset: int, size: int) -> bytes: ...

    def write(self, offset: int, data: bytes) -> None:
        """Put code into the window; translated code there is dropped."""
        ...

    def shorten(self, offset: int, call: Callable[[], int | None], uncount: int) -> None:
        """As Text.shorten, for an int3 that was written into the window; until something else is written there."""
        ...

    def contains(self, vaddr: int) -> bool: ...


class Word(Protocol):
    """A word of guest data that holds a value of ours. `guest` is the guest's own, as a debugger sees and writes it."""

    guest: bytes


class Words(Protocol):
    """Words of data that we have replaced, stacks' return addresses. The guest reads ours, everybody else its own."""

    def substitute(self, vaddr: int, ours: bytes) -> Word:
        """Where `ours` stands already, the same Word with one more user. MemoryFault where the word has no RAM."""
        ...

    def stands(self, word: Word) -> bool:
        """Our value is there still: the guest has not written over it."""
        ...

    def release(self, word: Word) -> None:
        """One user less; the last puts the guest's value back, where ours still stands."""
        ...

    def share(self, vaddr: int, size: int, change: int) -> Callable[[], None]:
        """Add to a count of the guest's, of `size` bytes, that the guest goes on changing. -> a call that undoes it.

        A hash and a snapshot have it without our share. MemoryFault where there is no RAM.
        """
        ...


class Clock(Protocol):
    @property
    def instructions(self) -> int:
        """Guest instructions retired since power-on, exact inside hooks too."""
        ...

    @property
    def now_ns(self) -> int:
        """Virtual nanoseconds since power-on: retired instructions plus time skipped in HLT."""
        ...


class Symbol(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def address(self) -> int:
        """Virtual address."""
        ...

    @property
    def size(self) -> int:
        """Bytes, 0 where nothing says."""
        ...

    @property
    def module(self) -> str:
        """The kernel module it is of, empty for the image itself."""
        ...

    @property
    def kind(self) -> str:
        """The letter nm prints: T and t text, W and w weak, ? where nothing says."""
        ...


class SymbolTable(Protocol):
    def lookup(self, name: str) -> Sequence[Symbol]:
        """Every symbol of that name, empty if none."""
        ...

    def find(self, vaddr: int) -> tuple[Symbol, int] | None:
        """The symbol that covers `vaddr` and the offset into it."""
        ...

    def glob(self, pattern: str) -> Sequence[Symbol]: ...

    def suggest(self, name: str) -> Sequence[str]:
        """Names a person may have meant, best first."""
        ...


class Guest(Protocol):
    """What is known of what runs in a machine; machines that `emu.boot` makes have one, as `guest`."""

    settled: bool

    def on_settled(self, call: Callable[[], None]) -> None:
        """Call once the guest no longer patches its own text; at once if it is so."""
        ...

    def btf(self) -> bytes:
        """The kernel's own type information, empty where there is none."""
        ...

    def debug_image(self) -> bytes:
        """The guest's ELF file, where it has DWARF; empty where there is none."""
        ...


class Machine(Protocol):
    """A processor with memory, devices and time. All but `request_stop` belongs to the one thread that runs it."""

    trap_client: TrapClient | None

    @property
    def memory(self) -> Memory: ...

    @property
    def registers(self) -> Registers: ...

    @property
    def text(self) -> Text: ...

    @property
    def breaks(self) -> CodeBreaks: ...

    @property
    def planted(self) -> Planted: ...

    @property
    def clock(self) -> Clock: ...

    @property
    def window(self) -> Window: ...

    @property
    def words(self) -> Words: ...

    @property
    def symbols(self) -> SymbolTable: ...

    @property
    def bits(self) -> int:
        """16, 32 or 64, as the processor is now."""
        ...

    @property
    def cpu(self) -> Cpu:
        """The state between runs; changes are written back at the next run."""
        ...

    def run(self, budget: int | None = None) -> Stop:
        """Run until something stops it; at most `budget` instructions."""
        ...

    def step(self, *, into_interrupts: bool = False) -> Stop:
        """One instruction, whatever stands on it; interrupts that are due are taken and finished first.

        `into_interrupts`: where one is due, the step is the way into its handler, and no instruction is executed.
        """
        ...

    def step_at_once(self) -> Stop | None:
        """`step` where that is one instruction and nothing else; None, having done nothing, where it may be more: an
        interrupt is due, the processor is in HLT, a breakpoint stands there."""
        ...

    def request_stop(self) -> None:
        """From any thread: the run in progress, or the next one, ends with Interrupted."""
        ...

    def end_run(self, stop: Stop) -> None:
        """Inside a trap handler: the run ends with `stop` as soon as the instruction under way is over."""
        ...

    def insert_breakpoint(
        self, vaddr: int, hardware: bool = False, condition: Callable[[], bool] | None = None
    ) -> None:
        """Idempotent; an address that is not mapped yet waits until it is.

        `condition` is asked at each hit, with the processor as it is there; False lets the guest go on. The last one
        given counts.
        """
        ...

    def remove_breakpoint(self, vaddr: int, hardware: bool = False) -> None: ...

    def watch(self, vaddr: int, call: Callable[[], Stop | None]) -> Callable[[], None]:
        """Have `call` asked each time the guest is about to execute `vaddr`; a Stop that it returns ends the run.

        MemoryFault where nothing is mapped there now. -> a call that ends the watch.
        """
        ...

    def insert_watchpoint(self, kind: WatchKind, vaddr: int, size: int) -> None:
        """Idempotent; any number, any length up to 256 MiB. What is not mapped yet waits until it is.

        It costs speed while it is there: every load or every store, as `kind` asks, is slower.
        """
        ...

    def remove_watchpoint(self, kind: WatchKind, vaddr: int, size: int) -> None:
        """Nothing happens where there is none."""
        ...

    def catch_exceptions(self, vectors: frozenset[int]) -> None:
        """Stop with ExceptionRaised before the guest's handler of one of these, and of no other any more."""
        ...

    @property
    def caught_exceptions(self) -> frozenset[int]: ...

    def call(self, target: int, gpr: Mapping[int, int], stack: bytes, budget: int) -> Sequence[int]:
        """In ring 0, inside a trap handler or between runs: run the guest function at `target` until it returns.

        `gpr`: registers to set first, by number; `stack`: what lies above the return address. -> the 16 general
        registers at the return. Interrupts are off and the call is off the clock; afterwards registers, flags, FPU and
        segments are what they were, while memory, devices, control registers and MSRs are as the callee left them.
        CallAborted where it would sleep, takes more than `budget` instructions or stops the machine: then control
        registers are put back too. Faults in the callee are the guest's to handle.
        """
        ...

    def before_entry(self, call: Callable[[], int | None] | None) -> None:
        """Ask `call` whenever the guest is about to leave ring 3, by a fault, an interrupt or a system call.

        It may name an address: where the program could not store there, it takes the page fault of such a store
        instead, and comes back to what it was about to do. None: nobody is asked any more.
        """
        ...

    def mask(self, call: Callable[[], Mapping[int, bytes]]) -> Callable[[], None]:
        """Snapshots and hashes of RAM have the bytes that `call` gives, by physical address, in place of the guest's.

        -> a call that ends it.
        """
        ...

    @property
    def call_exit(self) -> int:
        """Where a callee may also jump to, or return to, to end its call."""
        ...

    def follow(self, call: Callable[[], bool]) -> None:
        """From a trap handler: `call` is asked after each instruction, this one first, until it says False.

        The processor is between instructions then, as `registers` shows it; interrupts come as they would.
        """
        ...

    def uncount(self, instructions: int) -> None:
        """Inside a trap handler: take instructions of ours (an int3, a jump back) off the clock."""
        ...
