"""Fetch arguments at a hit: a `FetchArg` compiled once into a closure from `Cpu` to a value.

Rules: runs in the engine's thread inside a trap; never raises for what the guest's memory holds or lacks. A failed
string is None ("(fault)"), a failed number 0, as on Linux 6.12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, assert_never

from emu.iface import Cpu, Machine, MemoryFault
from probes import rawtext
from probes.arch import Convention
from probes.fetchargs import (
    Argument,
    Comm,
    Deref,
    FetchArg,
    FileOffset,
    Immediate,
    ImmediateText,
    Node,
    Register,
    ReturnValue,
    StackPointer,
    StackWord,
    SymbolAddress,
)
from probes.fetchtypes import FetchType
from probes.regs import PATH_MAX, read_string

Scalar: TypeAlias = int | str | None
Value: TypeAlias = Scalar | tuple[Scalar, ...]
Fetcher: TypeAlias = Callable[[Cpu], Value]
_Number: TypeAlias = Callable[[Cpu], int]
_Store: TypeAlias = Callable[[int], Scalar]

_TASK_SIZE_64 = 1 << 47


@dataclass(frozen=True, slots=True)
class Task:
    """Who runs: `comm` as the guest has it, `pid` its thread's number.

    `flags` are those of ftrace's enum trace_flag_type that the guest's memory tells; of `preempt_count` the low four
    bits say how often preemption, the high four how often migration is disabled.
    """

    comm: str
    pid: int
    flags: int = 0
    preempt_count: int = 0


class TaskInfo(Protocol):
    """Where the current task is known, this tells it; asked at every recorded hit."""

    def current(self, cpu: Cpu) -> Task: ...


class UnknownTask:
    """The TaskInfo of a guest whose tasks nobody knows; ftrace's name for one it has lost."""

    _task = Task("<...>", 0)

    def current(self, cpu: Cpu) -> Task:
        return self._task


class EntryValues:
    """Arguments by number as they were at the entry of the call whose return is being recorded."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: dict[int, int] = {}


def _no_memory(address: int) -> str | None:
    return None


def _no_file(cpu: Cpu) -> int:
    raise MemoryFault(cpu.pc)


@dataclass(frozen=True, slots=True)
class FetchContext:
    """What closures are compiled against.

    `ip_offset` is what %ip shows beyond pc: 1 in a breakpoint's frame. `entry` is set by the handler of a return
    before it fetches. `file_base` gives the address where offset 0 of a uprobe's file would lie; MemoryFault if none.
    `read` is of memory, as Memory.read, which it is where this is None.
    `absent` knows strings that are mapped and not in memory; None where nothing is mapped. `awaited` is the same for
    those whose record waits for the page.
    """

    machine: Machine
    convention: Convention
    tasks: TaskInfo
    ip_offset: int = 1
    entry: EntryValues = field(default_factory=EntryValues)
    file_base: Callable[[Cpu], int] = _no_file
    read: Callable[[int, int], bytes] | None = None
    absent: Callable[[int], str | None] = _no_memory
    awaited: Callable[[int], str | None] = _no_memory

    @property
    def reader(self) -> Callable[[int, int], bytes]:
        """(address, size) -> bytes; MemoryFault."""
        return self.read or self.machine.memory.read

    def describe(self, address: int) -> str:
        """%pS: `name+0xoffset/0xsize`, with ` [module]` where it is one's, or the bare address."""
        found = self.machine.symbols.find(address)
        if found is None:
            return f"0x{address:x}"
        symbol, offset = found
        module = f" [{symbol.module}]" if symbol.module else ""
        return f"{symbol.name}+0x{offset:x}/0x{symbol.size:x}{module}"


def compile_fetch(arg: FetchArg, context: FetchContext) -> Fetcher:
    """A closure that gives `arg`'s value: int, str, None for a failed string, or a tuple of them for an array."""
    node = arg.node
    if isinstance(node, Comm):
        return lambda cpu: context.tasks.current(cpu).comm
    if isinstance(node, ImmediateText):
        text = node.text
        return lambda cpu: text
    if isinstance(node, Deref):
        return _memory(node, arg.type, context)
    number = _number(node, context)
    if arg.type.name in ("string", "ustring"):
        return _array_or_scalar(number, _string_store(context, context.absent), FetchType("string", 0), None)
    convert = _converter(arg.type, context)
    return lambda cpu: _or_zero(number, cpu, convert)


def compile_entry(args: Iterable[FetchArg], context: FetchContext) -> Callable[[Cpu], dict[int, int]] | None:
    """What a return event calls at the function's entry for the arguments it will show; None where it shows none."""
    numbers = {arg.saved_argument for arg in args} - {None}
    readers = {number: _argument(number, context) for number in numbers if number is not None}
    if not readers:
        return None

    def save(cpu: Cpu) -> dict[int, int]:
        values = {}
        for number, read in readers.items():
            try:
                values[number] = read(cpu)
            except MemoryFault:
                values[number] = 0
        return values

    return save


def _or_zero(number: _Number, cpu: Cpu, convert: Callable[[int], Scalar]) -> Scalar:
    try:
        return convert(number(cpu))
    except MemoryFault:
        return convert(0)


# ----------------------------------------------------------------------------------------------------------- addresses


def _number(node: Node, context: FetchContext) -> _Number:
    """A node as a machine word; the closure raises MemoryFault where a dereference fails."""
    convention, mask = context.convention, context.convention.mask
    match node:
        case Register(name):
            return _register(name, context)
        case StackPointer():
            pointer = convention.stack_pointer
            return lambda cpu: cpu.gpr[pointer] & mask
        case StackWord(number):
            return _stack_word(number, context)
        case Argument(number, saved):
            if not saved:
                return _argument(number, context)
            entry = context.entry
            return lambda cpu: entry.values.get(number, 0)
        case ReturnValue():
            returned = convention.return_register
            return lambda cpu: cpu.gpr[returned] & mask
        case Immediate(value):
            return lambda cpu: value
        case SymbolAddress(symbol, offset):
            # Looked up at each hit: a module may have come since.
            beyond = offset or 0
            return lambda cpu: _symbol_address(context, symbol) + beyond & mask
        case FileOffset(position):
            base = context.file_base
            return lambda cpu: base(cpu) + position & mask
        case Deref(inner, offset, user):
            address = _address(inner, offset, user, context)
            read, word = context.reader, convention.word
            return lambda cpu: int.from_bytes(read(address(cpu), word), "little")
        case Comm() | ImmediateText():
            raise AssertionError("text has no address; the parser refuses this")
        case _:
            assert_never(node)


def _register(name: str, context: FetchContext) -> _Number:
    convention, mask = context.convention, context.convention.mask
    if name in convention.registers:
        register = convention.registers[name]
        return lambda cpu: cpu.gpr[register] & mask
    if name == "ip":
        beyond = context.ip_offset
        return lambda cpu: cpu.pc + beyond & mask
    if name == "flags":
        return lambda cpu: cpu.eflags
    if name == "orig_ax":
        return lambda cpu: mask
    return lambda cpu: context.machine.registers.read(name)


def _stack_word(number: int, context: FetchContext) -> _Number:
    convention, read = context.convention, context.reader
    pointer, mask, word = convention.stack_pointer, convention.mask, convention.word
    offset = number * word
    return lambda cpu: int.from_bytes(read(cpu.gpr[pointer] + offset & mask, word), "little")


def _argument(number: int, context: FetchContext) -> _Number:
    registers, mask = context.convention.argument_registers, context.convention.mask
    if number > len(registers):
        return _stack_word(number - len(registers), context)
    register = registers[number - 1]
    return lambda cpu: cpu.gpr[register] & mask


def _symbol_address(context: FetchContext, name: str) -> int:
    found = context.machine.symbols.lookup(name)
    if not found:
        raise MemoryFault(0)
    return found[0].address


def _address(inner: Node, offset: int, user: bool, context: FetchContext) -> _Number:
    base, mask = _number(inner, context), context.convention.mask
    if not user or context.convention.bits != 64:
        return lambda cpu: base(cpu) + offset & mask

    def checked(cpu: Cpu) -> int:
        address = base(cpu) + offset & mask
        if address >= _TASK_SIZE_64:
            raise MemoryFault(address)  # access_ok() refuses kernel addresses in user reads
        return address

    return checked


# -------------------------------------------------------------------------------------------------------------- values


def _memory(node: Deref, fetch_type: FetchType, context: FetchContext) -> Fetcher:
    """What lies at the outermost dereference, read as the type says."""
    user = node.user or fetch_type.name == "ustring"
    address = _address(node.inner, node.offset, user, context)
    if fetch_type.name in ("string", "ustring"):
        if fetch_type.count:
            return _string_array(address, fetch_type.count, context)
        absent = context.awaited if fetch_type.waits else context.absent
        return _array_or_scalar(address, _string_store(context, absent), fetch_type, None)
    convert, read = _converter(fetch_type, context), context.reader
    size = context.convention.word if fetch_type.name == "symstr" else fetch_type.size

    def store(at: int) -> Scalar:
        return convert(int.from_bytes(read(at, size), "little"))

    return _array_or_scalar(address, store, fetch_type, convert(0))


def _array_or_scalar(address: _Number, store: _Store, fetch_type: FetchType, failed: Scalar) -> Fetcher:
    """`count` elements side by side, or one value; `failed` stands for each that cannot be read."""

    def element(at: int) -> Scalar:
        try:
            return store(at)
        except MemoryFault:
            return failed

    def scalar(cpu: Cpu) -> Value:
        try:
            return store(address(cpu))
        except MemoryFault:
            return failed

    count, size = fetch_type.count, fetch_type.size
    if not count:
        return scalar

    def array(cpu: Cpu) -> Value:
        try:
            first = address(cpu)
        except MemoryFault:
            return (failed,) * count
        return tuple(element(first + index * size) for index in range(count))

    return array


def _string_array(address: _Number, count: int, context: FetchContext) -> Fetcher:
    """Strings through an array of pointers, as string[N] means on Linux."""
    store, word, read = _string_store(context, context.absent), context.convention.word, context.reader

    def follow(at: int) -> Scalar:
        return store(int.from_bytes(read(at, word), "little"))

    return _array_or_scalar(address, follow, FetchType("string", word, count=count), None)


def _string_store(context: FetchContext, absent: Callable[[int], str | None]) -> _Store:
    machine = context.machine

    def store(at: int) -> Scalar:
        try:
            return rawtext.decode(read_string(machine, at, PATH_MAX - 1))
        except MemoryFault:
            return absent(at)

    return store


def _converter(fetch_type: FetchType, context: FetchContext) -> Callable[[int], Scalar]:
    """Cut a word to the type: width, sign, bitfield, or the symbol it names."""
    name, bits = fetch_type.name, fetch_type.size * 8
    mask = (1 << bits) - 1
    if name in ("symbol", "symstr"):
        return lambda raw: context.describe(raw & context.convention.mask)
    if fetch_type.width:
        low, field = fetch_type.low, (1 << fetch_type.width) - 1
        return lambda raw: raw >> low & field
    if name.startswith("s"):
        sign = 1 << (bits - 1)
        return lambda raw: ((raw & mask) ^ sign) - sign
    return lambda raw: raw & mask
