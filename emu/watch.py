"""Watchpoints: data accesses of the guest that a debugger asked to stop after.

Rules: the machine's thread only. Nothing here changes the guest or its time: an access that counts is kept as `hit` and
the engine stops before the next instruction, as a processor's data breakpoints are traps (SDM vol. 3, 17.2.5); the run
loop makes a stop of it. The cost, all loads or all stores two to eight times as slow (measured), is there only while a
watchpoint of that kind is.

A watchpoint is on linear addresses, in whatever address space is in force. The engine tells physical ones, so ranges
are translated when the guest is about to run, and again when it has written an entry of the page tables on the way or a
control register. An access counts by whichever mapping it was made: memory that changes is memory that changes. Page
walks, instruction fetches and calls of ours into the guest are no accesses; what delivery of an interrupt reads and
pushes is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from emu.cpustate import CpuState
from emu.engine import Engine
from emu.iface import BackEnd, MachineError
from emu.insn import spans
from emu.paging import EFER_LMA, Tables, entries_are_wide, entry_addresses, walk
from emu.ram import PAGE, Ram
from emu.stops import WatchKind
from emu.text import ArmedText
from emu.traps import Traps

MAX_SIZE = 256 << 20
"""Bytes of one watchpoint: one walk for each of their pages is made whenever tables change."""

_REACH = 7  # bytes before a range where an access of 8, the engine's widest, may begin and reach into it
_MAX_HOOKS = 32  # of one kind: the engine asks each at every access, so ranges that lie close share one
_MAX_PLACES = 64  # PC hooks on control register writes; the oldest goes, and comes back when it is translated again
_UNSTABLE = 0x60  # accessed and dirty: the processor sets them in a page-table entry by itself

Watch = tuple[WatchKind, int, int]


class Hit(NamedTuple):
    """An access that counts; `address` is the first watched byte of it."""

    kind: WatchKind
    address: int


class _Span(NamedTuple):
    """Consecutive bytes where an access may begin: physical `first` to `last`, the former at linear `vaddr`."""

    first: int
    last: int
    vaddr: int
    watch: Watch


class WatchedMemory:
    """The watchpoints of one machine. `owner` is what the PC hooks on control register writes belong to."""

    def __init__(self, ram: Ram, cpu: CpuState, engine: Engine, text: ArmedText, traps: Traps, owner: object) -> None:
        self._ram = ram
        self._cpu = cpu
        self._engine = engine
        self._text = text
        self._traps = traps
        self._owner = owner
        self.hit: Hit | None = None
        self.muted = False  # a call of ours into the guest is under way
        self._watches: dict[Watch, None] = {}
        self._stale = False  # the watchpoints have changed since `prepare`
        self._tables: Tables | None = None  # that the translations below are of
        self._entries: dict[int, int] = {}  # the page-table entries they came from, by physical address
        self._spans: dict[int, list[_Span]] = {}  # by physical page
        self._hooks: dict[tuple[bool, int, int], object] = {}  # (writes, first, last) -> the engine's
        self._places: dict[int, None] = {}  # control register writes, in the order they were found
        self._found: list[int] = []

    # ----------------------------------------------------------------------------------------------------- the debugger

    def insert(self, kind: WatchKind, vaddr: int, size: int) -> None:
        """Idempotent; where nothing is mapped yet, it waits until something is. MachineError for an impossible size."""
        if not 1 <= size <= MAX_SIZE:
            raise MachineError(f"a watchpoint has 1 to {MAX_SIZE} bytes, not {size}")
        self._watches[kind, vaddr, size] = None
        self._changed()

    def remove(self, kind: WatchKind, vaddr: int, size: int) -> None:
        """No error where there is none."""
        self._watches.pop((kind, vaddr, size), None)
        self._changed()

    def clear(self) -> None:
        self._watches.clear()
        self._changed()

    def _changed(self) -> None:
        self._stale = True
        self._traps.on_access = self._accessed if self._watches else None  # without any, deliveries are not held up

    def forget(self) -> None:
        """The instruction that made the access has not happened: it faulted, or the machine is another moment's."""
        self.hit = None

    # ----------------------------------------------------------------------------------------------------- the run loop

    def prepare(self) -> None:
        """Before the engine is entered: have it call for what the watchpoints are on now."""
        if self.muted:
            return  # and this is inside a hook
        if not self._watches:
            if self._stale:
                self._stale = False
                self._retire()
            return
        tables = self._cpu.tables()
        if self._stale or tables != self._tables or self._entries_changed():
            self._stale, self._tables = False, tables
            self._translate(tables)

    def look(self, pc: int, code: bytes) -> None:
        """From the engine, about a new block: where it writes control registers, stop before its first instruction."""
        if not self._watches or (b"\x0f\x22" not in code and b"\x0f\x01" not in code):
            return
        for start, end in spans(code, self._cpu.bits):
            if pc + start not in self._places and _loads_control_register(code[start:end]):
                self._found.append(pc + start)
        if self._found:
            self._engine.stop_here()

    def arm(self) -> bool:
        """After a run: put hooks on what `look` found; False where it found nothing."""
        found, self._found = self._found, []
        for vaddr in found:
            if len(self._places) >= _MAX_PLACES:
                oldest = next(iter(self._places))
                del self._places[oldest]
                self._text.disarm(oldest, self._owner)
            self._text.arm(vaddr, self._owner, BackEnd.HOOK)
            self._places[vaddr] = None
        return bool(found)

    # -------------------------------------------------------------------------------------------------------- internals

    def _accessed(self, vaddr: int, size: int, write: bool) -> None:
        """The processor's own access, made by us: of descriptors, gates and stacks while an interrupt is delivered."""
        for watch in self._watches:
            self._judge(watch, vaddr, size, write)

    def _entries_changed(self) -> bool:
        return any(self._entry(at) != value for at, value in self._entries.items())

    def _entry(self, at: int) -> int:
        assert self._tables is not None
        return (self._ram.words[at >> 3] if entries_are_wide(self._tables) else self._ram.dwords[at >> 2]) & ~_UNSTABLE

    def _retire(self) -> None:
        for vaddr in self._places:
            self._text.disarm(vaddr, self._owner)
        self._places.clear()
        self._entries.clear()
        self._spans.clear()
        self._tables = None
        self._update_hooks(set())

    def _translate(self, tables: Tables) -> None:
        self._spans.clear()
        self._entries.clear()
        ranges: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        for watch in self._watches:
            for span in self._spans_of(watch, tables):
                for page in range(span.first // PAGE, span.last // PAGE + 1):
                    self._spans.setdefault(page, []).append(span)
                for write in (False, True):
                    if watch[0] in _COUNTS[write]:
                        ranges[write].append((span.first, span.last))
        width = 8 if entries_are_wide(tables) else 4
        ranges[True] += [(at, at + width - 1) for at in self._entries]
        self._update_hooks({(write, *part) for write, parts in ranges.items() for part in _joined(parts)})

    def _spans_of(self, watch: Watch, tables: Tables) -> Iterator[_Span]:
        """Where accesses that reach `watch` may begin; notes the page-table entries that decide it."""
        mask = (1 << 64) - 1 if tables.efer & EFER_LMA else (1 << 32) - 1
        at, end = watch[1] - _REACH, watch[1] + watch[2]
        while at < end:
            vaddr = at & mask
            page = walk(self._ram, tables, vaddr)
            size = page.size if page is not None else PAGE
            count = min(end - at, size - (vaddr & (size - 1)))
            if page is not None and page.paddr < self._ram.size:
                yield _Span(page.paddr, page.paddr + count - 1, vaddr, watch)
            if tables.paged:
                for entry in entry_addresses(self._ram, tables, vaddr):
                    self._entries[entry] = self._entry(entry)
            at += count

    def _update_hooks(self, wanted: set[tuple[bool, int, int]]) -> None:
        before = {write for write, _, _ in self._hooks}
        for key in self._hooks.keys() - wanted:
            with self._cpu.hidden_faults():
                self._engine.remove_memory_hook(self._hooks.pop(key))
        for write, first, last in wanted - self._hooks.keys():
            hook = self._engine.add_memory_hook(write, first, last, self._on_access)
            self._hooks[write, first, last] = hook
        if before != {write for write, _, _ in self._hooks}:
            self._engine.drop_code(0, 0, False)  # code is translated with calls for loads, for stores, or without

    def _on_access(self, write: bool, paddr: int, size: int) -> None:
        """From the engine, before a load or store of 1 to 8 bytes; of one that crosses a page, the first part's."""
        if self.muted:
            return
        for span in self._spans.get(paddr // PAGE, ()):
            if span.first <= paddr <= span.last:
                self._judge(span.watch, span.vaddr + paddr - span.first, size, write)
        if write and (paddr & ~7 in self._entries or paddr & ~3 in self._entries):
            self._engine.stop_here()  # `prepare` looks at it before the next instruction

    def _judge(self, watch: Watch, vaddr: int, size: int, write: bool) -> None:
        kind, first, length = watch
        if kind not in _COUNTS[write] or vaddr >= first + length or vaddr + size <= first:
            return
        if self.hit is None or _RANK[kind] < _RANK[self.hit.kind]:
            self.hit = Hit(kind, max(vaddr, first))
        if self._cpu.running:
            self._engine.stop_here()


_COUNTS = {False: (WatchKind.READ, WatchKind.ACCESS), True: (WatchKind.WRITE, WatchKind.ACCESS)}
_RANK = {WatchKind.WRITE: 0, WatchKind.ACCESS: 1, WatchKind.READ: 2}  # which of one instruction's is told


def _loads_control_register(insn: bytes) -> bool:
    """MOV to CR0 .. CR4, or LMSW (SDM vol. 2: 0F 22 /r, 0F 01 /6); those of CR8 count for nothing."""
    at = insn.find(b"\x0f")
    if at < 0 or at + 2 >= len(insn):
        return False
    return insn[at + 1] == 0x22 or (insn[at + 1] == 0x01 and insn[at + 2] >> 3 & 7 == 6)


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """`ranges` (first, last) in at most _MAX_HOOKS pieces that cover them: those with the least between them joined."""
    pieces: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if pieces and first <= pieces[-1][1] + 1:
            pieces[-1] = (pieces[-1][0], max(last, pieces[-1][1]))
        else:
            pieces.append((first, last))
    if len(pieces) <= _MAX_HOOKS:
        return pieces
    gaps = sorted(range(1, len(pieces)), key=lambda i: pieces[i][0] - pieces[i - 1][1], reverse=True)
    cuts = [0, *sorted(gaps[: _MAX_HOOKS - 1]), len(pieces)]
    return [(pieces[start][0], pieces[end - 1][1]) for start, end in pairwise(cuts)]
