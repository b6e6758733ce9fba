"""What the guest's own kernel would refuse to probe because it probes itself, read from that kernel.

Rules: addresses and errnos only; what an instruction is refused for is the processor's (`Prepared.linux_refusal`). The
facts are those of check_kprobe_address_safe() in kernel/kprobes.c (Linux 6.1 to 6.12), in its order, and come from the
guest's symbols and memory: its `kprobe_blacklist` once it has filled it, the array it is filled from before. A guest
without such symbols refuses nothing here. Not read: addresses of alternatives' lock prefixes.
"""

from __future__ import annotations

import bisect
import errno
import functools
import struct
from collections.abc import Iterable, Iterator
from typing import Final, TypeAlias

from emu.iface import MemoryFault
from probes.scope import ENDBR_SIZE, KernelText, starts_with_endbr

Refusal: TypeAlias = tuple[int, str]
Range: TypeAlias = tuple[int, int]  # first address and the one behind the last

_SECTIONS: Final = ("kprobes", "noinstr", "entry")  # __NAME_text_start and __NAME_text_end
_PREAMBLES: Final = ("__pfx_", "__cfi_")
_BLACKLIST: Final = "in the kernel's kprobe blacklist"
_MAX_ENTRIES: Final = 20_000  # of a list in the guest's memory: 6.12 has 722
_JUMP_ENTRY: Final = "<iiq", "<iii"  # struct jump_entry: code and target relative to themselves, key; by word size
_CALL_SITE: Final = "<ii"  # struct static_call_site
_BUG_ENTRY: Final = "<iihh"  # struct bug_entry with CONFIG_DEBUG_BUGVERBOSE: the address is relative to the field
_SHORT: Final = (b"\xeb", b"\x66")
_LONG_SIZE: Final = 5
_FTRACE_NOPS: Final = (bytes.fromhex("0f1f440000"), bytes.fromhex("3e8d742600"))  # x86_nops[5] of amd64 and i386
_CALL: Final = 0xE8
NOTRACE: Final = "ftrace does not trace this function (notrace)"
_TRACED: Final = ("vfs_read", "vfs_write", "do_exit")


class LinuxLimits:
    """Refusals by address, `(errno, why)`. Read at the first question that finds the guest's tables there.

    `static`: an image that does not run, whose tables stay as they are.
    """

    def __init__(self, machine: KernelText, *, static: bool = False) -> None:
        self._machine = machine
        self._static = static
        self._word = machine.bits // 8
        self._tables: list[tuple[str, list[Range]]] | None = None

    def forget(self) -> None:
        """The machine has gone to another moment: its tables may not be filled yet."""
        self._tables = None

    def refusal(self, address: int, init_freed: bool) -> Refusal | None:
        """Why Linux would not take a kprobe at `address`. `init_freed`: the kernel has freed its .init.text."""
        if (reason := self._outside_text(address, init_freed)) is not None:
            return errno.EINVAL, reason
        tables = self._known()
        found = self._machine.symbols.find(address)
        base = self._base_function(found[0].name) if found is not None else None
        for name, ranges in tables:
            if _covers(ranges, address) or (name == _BLACKLIST and base is not None and _covers(ranges, base)):
                return errno.EINVAL, name
        if found is not None and found[0].name.startswith(_PREAMBLES):
            return errno.EINVAL, "bytes before a function"
        return None

    def in_init(self, address: int) -> bool:
        """In .init.text, which the kernel frees at the end of its boot and fills with int3."""
        start, end = self._symbol("_sinittext"), self._symbol("_einittext")
        return start is not None and end is not None and start <= address < end

    # ------------------------------------------------------------------------------------------------------- internals

    def _outside_text(self, address: int, init_freed: bool) -> str | None:
        start, end, image_end = self._symbol("_stext"), self._symbol("_etext"), self._symbol("_end")
        if start is None or end is None or start <= address < end:
            return None
        if self.in_init(address):
            return ".init.text is freed" if init_freed else None
        if address < start or (image_end is not None and address < image_end):
            return "not kernel text"
        return None  # a module's, perhaps

    def _base_function(self, name: str) -> int | None:
        """The function that a part of it, `name.cold` or `name.isra.0`, belongs to."""
        base, dot, _ = name.partition(".")
        return self._symbol(base) if dot and base else None

    def _known(self) -> list[tuple[str, list[Range]]]:
        if self._tables is not None:
            return self._tables
        listed = list(self._blacklist())
        tables = [
            (_BLACKLIST, _merged([*self._sections(), *(listed or self._blacklist_array())])),
            ("a static key's branch", _merged(self._branches())),
            ("a static call", _merged((at, at + _LONG_SIZE) for at in self._relative("static_call_sites", _CALL_SITE))),
            ("a BUG or WARN", _merged((at, at + 1) for at in self._relative("__bug_table", _BUG_ENTRY))),
        ]
        if listed or self._static or self._symbol("_stext") is None:  # the last: no Linux, nothing will come
            self._tables = tables
        return tables

    def _sections(self) -> Iterator[Range]:
        for name in _SECTIONS:
            start, end = self._symbol(f"__{name}_text_start"), self._symbol(f"__{name}_text_end")
            if start is not None and end is not None and start < end:
                yield start, end

    def _blacklist(self) -> Iterator[Range]:
        """The guest's list of struct kprobe_blacklist_entry, empty before it is made."""
        for head in self._heads():
            entries = self._entries(head)
            if entries:
                yield from entries
                return

    def _heads(self) -> Iterator[int]:
        """Where the list may begin. i386 kernels name no data: there the address stands in the code that lists it."""
        known = self._symbol("kprobe_blacklist")
        if known is not None:
            yield known
            return
        for symbol in self._machine.symbols.lookup("kprobe_blacklist_seq_start"):
            code = self._read(symbol.address, symbol.size)
            for at in range(max(len(code) - self._word + 1, 0)):
                yield int.from_bytes(code[at : at + self._word], "little")

    def _entries(self, head: int) -> list[Range]:
        """The list at `head`; empty where that is no such list: links that do not agree, ranges that are none."""
        text = self._symbol("_stext") or 0
        found: list[Range] = []
        before, at = head, self._words(head, 1)[0]
        while at != head and len(found) < _MAX_ENTRIES:
            following, previous, start, end = self._words(at, 4)
            if previous != before or not text <= start <= end:
                return []
            found.append((start, end))
            before, at = at, following
        return found

    def _blacklist_array(self) -> Iterator[Range]:
        start, end = self._symbol("__start_kprobe_blacklist"), self._symbol("__stop_kprobe_blacklist")
        if start is None or end is None:
            return
        for address in self._words(start, max(end - start, 0) // self._word):
            found = self._machine.symbols.find(address)
            if found is not None and found[1] == 0:
                yield address, address + found[0].size

    def _relative(self, table: str, layout: str) -> Iterator[int]:
        """The addresses in a table whose entries begin with one, relative to itself."""
        start, end = self._symbol(f"__start_{table}"), self._symbol(f"__stop_{table}")
        if start is None or end is None:
            return
        step = struct.calcsize(layout)
        data = self._read(start, max(end - start, 0) // step * step)
        for index, (distance, *_) in enumerate(struct.iter_unpack(layout, data)):
            yield start + index * step + distance

    def _branches(self) -> Iterator[Range]:
        """Static keys' branches: a short jump or the nop in its place where that reaches, else the long ones."""
        for address in self._relative("__jump_table", _JUMP_ENTRY[self._word == 4]):
            yield address, address + (2 if self._read(address, 1) in _SHORT else _LONG_SIZE)

    def _symbol(self, name: str) -> int | None:
        found = self._machine.symbols.lookup(name)
        return found[0].address if found else None

    def _words(self, address: int, count: int) -> tuple[int, ...]:
        """Zeros where there is no memory: the guest has not mapped it yet, or `address` is none."""
        size = count * self._word
        data = self._read(address, size).ljust(size, b"\0")
        return struct.unpack(f"<{count}{'Q' if self._word == 8 else 'I'}", data)

    def _read(self, address: int, size: int) -> bytes:
        try:
            return self._machine.memory.read(address, size)
        except MemoryFault:
            return b""


class FtraceList:
    """The functions that ftrace traces: within_notrace_func() of kernel/trace/trace_kprobe.c refuses events on others.

    From __mcount_loc, as an image has it; where no symbol names it, as on i386, or a running kernel has freed it, from
    what functions begin with. Where that says nothing of _TRACED, which every kernel traces, nothing is known.
    """

    def __init__(self, text: KernelText) -> None:
        self._text = text

    def is_notrace(self, address: int) -> bool:
        """The kernel surely refuses an event at `address`."""
        found = self._text.symbols.find(address)
        if found is None or not self._text.symbols.lookup("ftrace_location"):
            return False
        symbol = found[0]
        base, dot, _ = symbol.name.partition(".")
        parts = [symbol, *(self._text.symbols.lookup(base)[:1] if dot else ())]
        if self._table is not None:
            return not any(self.calls(part.address, part.address + part.size - 1) for part in parts)
        known = [traced for part in parts if (traced := self._begins_traced(part.address)) is not None]
        return bool(known) and not any(known) and self._recognized

    def calls(self, first: int, last: int) -> bool:
        """A call of ftrace's lies from `first` to `last`; False where there is no table."""
        table = self._table or []
        at = bisect.bisect_left(table, first)
        return at < len(table) and table[at] <= last

    @functools.cached_property
    def _table(self) -> list[int] | None:
        """Where functions call ftrace, sorted."""
        bounds = [self._text.symbols.lookup(f"__{end}_mcount_loc") for end in ("start", "stop")]
        if not all(bounds):
            return None
        (start, *_), (stop, *_) = bounds
        word = self._text.bits // 8
        try:
            data = self._text.memory.read(start.address, stop.address - start.address)
        except MemoryFault:
            return None
        calls = sorted(int.from_bytes(data[at : at + word], "little") for at in range(0, len(data), word))
        known = bool(calls) and all(self._text.symbols.find(call) is not None for call in (calls[0], calls[-1]))
        return calls if known and calls[-1] < start.address else None  # else other things lie there now

    @property
    def _recognized(self) -> bool:
        found = [self._text.symbols.lookup(name) for name in _TRACED]
        return any(self._begins_traced(symbols[0].address) for symbols in found if symbols)

    def _begins_traced(self, function: int) -> bool | None:
        """A call or the nop in its place stands there; None where no memory is mapped."""
        try:
            shift = ENDBR_SIZE if starts_with_endbr(self._text, function) else 0
            code = self._text.memory.read(function + shift, _LONG_SIZE)
        except MemoryFault:
            return None
        return code in _FTRACE_NOPS or code[0] == _CALL


def _merged(ranges: Iterable[Range]) -> list[Range]:
    """Sorted and disjoint, for `_covers`."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _covers(ranges: list[Range], address: int) -> bool:
    at = bisect.bisect_right(ranges, (address, 1 << 64)) - 1
    return at >= 0 and ranges[at][0] <= address < ranges[at][1]
