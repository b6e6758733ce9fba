"""Events: what a definition's hits become, by filter, triggers and histograms, before and beside the trace.

Rules: hits come in the engine's thread inside a trap, everything else between runs. An event is switched as an ftrace
event file is (kernel/trace/trace_events.c, Linux 6.12): armed or not, and while armed silent or not, for triggers want
hits of events nobody has enabled. Knows probes only as what `arm` switches.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from emu.iface import Machine, MemoryFault
from probes.actions import Trigger, Triggers, dump_lines
from probes.awaited import Awaited
from probes.errors import ProbeError
from probes.fetch import FetchContext, Fetcher, Value, compile_fetch
from probes.fetchargs import Deref, FetchArg
from probes.fetchtypes import find_type
from probes.filters import FilterError, Predicate, compile_filter
from probes.hist import Histogram
from probes.hit import Hit, Variable, variables
from probes.layout import Layout
from probes.numbers import number as parse_number
from probes.regs import Regs
from probes.scope import release_of
from probes.spec import KernelScope, Spec, parse
from probes.trace import Record, Stored, TraceRing
from probes.unwind import Unwinder

_NO_SHARED_FIELD: Final = "Couldn't find or set field in one of a subsystem's events"
MAX_LOG: Final = 8  # TRACING_LOG_ERRS_MAX
_LINES_HEAD: Final = struct.Struct("<HBBiQ")  # common fields, and where a dump starts


class Taker(Protocol):
    """What a probe calls at a hit: with the registers, the address, of a return where to, and when it was entered."""

    def __call__(self, regs: Regs, ip: int, ret_ip: int = 0, entered_ns: int = -1) -> Hit: ...


@dataclass(frozen=True, slots=True)
class _Reader:
    """Implements trace.Kind for an event."""

    group: str
    event: str
    layout: Layout
    describe: Callable[[int], str]

    def record(self, stored: Stored, /) -> Record:
        layout, describe = self.layout, self.describe
        _, flags, preempt_count, pid, ip, *rest = layout.head(stored.payload)
        names = [(arg.name, arg.type.name) for arg in layout.args]
        values = layout.values(stored.payload)
        where, function = describe(ip), ""
        if layout.is_return:
            function = where.partition("+")[0]
            where = f"{describe(rest[0])} <- {function}"
        return Record(
            stored.timestamp_ns,
            stored.instructions,
            self.event,
            self.group,
            stored.comm,
            pid,
            stored.cpu,
            flags,
            preempt_count,
            rest[0] if layout.is_return else ip,
            where,
            tuple((name, kind, self._shown(kind, value)) for (name, kind), value in zip(names, values, strict=True)),
            stored.entered_ns,
            function,
        )

    def _shown(self, kind: str, value: Value) -> Value:
        if kind != "symbol":
            return value
        if isinstance(value, tuple):
            return tuple(self.describe(one) if isinstance(one, int) else one for one in value)
        return self.describe(value) if isinstance(value, int) else value


@dataclass(frozen=True, slots=True)
class _LinesReader:
    """Implements trace.Kind for what triggers write down: a stack where `word` is not 0, or memory."""

    title: str
    word: int
    describe: Callable[[int], str]

    def record(self, stored: Stored, /) -> Record:
        _, flags, preempt_count, pid, start = _LINES_HEAD.unpack_from(stored.payload)
        data = stored.payload[_LINES_HEAD.size :]
        if self.word:
            addresses = (data[at : at + self.word] for at in range(0, len(data), self.word))
            frames = tuple(self.describe(int.from_bytes(one, "little")).partition("+")[0] for one in addresses)
        else:
            frames = dump_lines(data, start)
        head = (stored.timestamp_ns, stored.instructions, self.title, "", stored.comm, pid, stored.cpu)
        return Record(*head, flags, preempt_count, start, "", (), frames=frames)


class Guest:
    """Implements hist.Guest and filters.Names over a machine."""

    def __init__(self, machine: Machine, context: FetchContext) -> None:
        self._machine = machine
        self.describe = context.describe
        self.word = context.convention.word
        self.release = release_of(getattr(getattr(machine, "guest", None), "title", ""))
        self._unwinder = Unwinder(machine, context.convention)

    def stack(self, hit: Hit, /) -> tuple[int, ...]:
        return self._unwinder.stack(hit.regs.cpu)

    def span(self, function: str | int, /) -> range | None:
        if isinstance(function, int):
            found = self._machine.symbols.find(function)
            symbol = found[0] if found is not None else None
        else:
            named = self._machine.symbols.lookup(function)
            symbol = named[0] if named else None
        return None if symbol is None else range(symbol.address, symbol.address + symbol.size)

    def syscall(self, number: int, /) -> str:
        """By the kernel's own table, whose entries are functions like __x64_sys_read."""
        table = self.span("sys_call_table")
        if table is not None and 0 <= number < len(table) // self.word:
            try:
                entry = self._machine.memory.read(table.start + number * self.word, self.word)
            except MemoryFault:
                return "unknown_syscall"
            name = self.describe(int.from_bytes(entry, "little")).partition("+")[0]
            if "sys_" in name and "ni_syscall" not in name:
                return "sys_" + name.partition("sys_")[2]
        return "unknown_syscall"


class TraceEvent:
    """One event: its record's layout, filter and triggers, and how it is switched. Implements actions.Actor.

    Several probes may stand under one name; `arm` switches all of them. `filter_text` is what `cat filter` shows.
    """

    def __init__(self, events: Events, spec: Spec, arm: Callable[[bool], None]) -> None:
        self.group = spec.group
        self.event = spec.event
        self.is_return = spec.is_return
        self._events = events
        self._spec = spec
        self._arm = arm
        self.layout = Layout(spec.args, spec.is_return, events.context.convention.word)
        self.number = events.ring.define(_Reader(spec.group, spec.event, self.layout, events.context.describe))
        self.variables: Mapping[str, Variable] = variables(self.layout, self.number)
        self.guest = events.guest
        self.filter_text: str | None = None
        self._accepts: Predicate | None = None
        self.triggers = Triggers(self, self._count_triggers)
        self.armed = False
        self.soft_disabled = False
        self._soft_users = 0
        self._triggered = False
        self._waits = False  # for pages

    @property
    def name(self) -> str:
        return f"{self.group}/{self.event}"

    @property
    def histograms(self) -> list[Histogram]:
        return self.triggers.histograms

    # ---------------------------------------------------------------------------------------------------- switching

    @property
    def enabled(self) -> bool:
        """Its hits are recorded."""
        return self.armed and not self.soft_disabled

    @property
    def state(self) -> str:
        """What `cat enable` shows: "0" or "1", with a star while a trigger needs it."""
        return f"{int(self.enabled)}{'*' if self._soft_users or self.soft_disabled else ''}"

    def enable(self, on: bool) -> None:
        """As `echo 1 > enable` and `echo 0 > enable`; ProbeError where a probe cannot be armed."""
        if on:
            if not self.armed:
                self._arm(True)
            self.armed, self.soft_disabled = True, False
        elif self._soft_users:
            self.soft_disabled = True
        else:
            if self.armed:
                self._arm(False)
            self.armed = self.soft_disabled = False

    def soft_mode(self, on: bool, /) -> None:
        """One more trigger, or one less, needs it armed."""
        self._soft_users += 1 if on else -1
        if on and not self.armed:
            try:
                self._arm(True)
            except ProbeError:
                self._soft_users -= 1
                raise
            self.armed = self.soft_disabled = True
        elif not on and not self._soft_users and self.soft_disabled:
            self._arm(False)
            self.armed = self.soft_disabled = False

    def _count_triggers(self) -> None:
        """The triggers have changed: having some is one use."""
        if bool(self.triggers.all) is not self._triggered:
            self._triggered = not self._triggered
            self.soft_mode(self._triggered)

    @property
    def busy(self) -> bool:
        """Linux does not delete an event that is in use."""
        return self.armed

    def close(self) -> None:
        """It is deleted; its records stay readable."""
        self.triggers.clear()
        self._events.ring.forget(self.number)

    # ------------------------------------------------------------------------------------------------------- filter

    def set_filter(self, text: str, *, shared: bool = False) -> None:
        """What `echo TEXT > filter` does; "0" takes it away. On FilterError the file says so, and there is none.

        `shared`: it is the group's, and what is wrong with it is said in general.
        """
        text = text.strip()
        self._accepts, self.filter_text = None, None
        if text == "0":
            return
        try:
            self._accepts, self.filter_text = self.filter(text), text
        except FilterError as error:
            said = FilterError(error.errno, text, _NO_SHARED_FIELD) if shared else error
            self.filter_text = said.text.removesuffix("\n") + "\n"
            raise said from error

    def filter(self, text: str, /) -> Predicate:
        return compile_filter(text, self.variables, self.guest)

    # --------------------------------------------------------------------------------------------------------- hits

    def taker(self, spec: Spec, context: FetchContext) -> Taker:
        """What a probe calls. ProbeError where a page is to be waited for and this guest does not tell of any."""
        if any(arg.type.waits for arg in spec.args):
            self._events.awaited.check()
            self._waits = True
        fetchers = [_fetcher(arg, context) for arg in spec.args]
        clock, tasks = context.machine.clock, context.tasks

        def take(regs: Regs, ip: int, ret_ip: int = 0, entered_ns: int = -1) -> Hit:
            cpu = regs.cpu
            values = tuple([fetch(cpu) for fetch in fetchers])
            hit = Hit(regs, tasks, values, clock.now_ns, clock.instructions, ip, ret_ip, entered_ns)
            self._on_hit(hit)
            return hit

        return take

    def _on_hit(self, hit: Hit) -> None:
        """In the order of Linux: triggers that need no record, or all but the late ones; the record; the late ones."""
        if not self.armed:
            return  # a call that began before it was disabled has returned
        triggers, ring = self.triggers, self._events.ring
        if triggers.all and not triggers.conditional:
            for trigger in list(triggers.all):
                trigger.fire(hit)
        recording = ring.enabled
        if triggers.conditional:
            for trigger in list(triggers.all):
                if not trigger.after and not trigger.last:
                    trigger.fire(hit)
        if recording and not self.soft_disabled and not (self._waits and self._events.awaited.defer(hit, self)):
            self.record(hit)
        if triggers.conditional:
            for trigger in sorted((one for one in triggers.all if one.after or one.last), key=_is_last):
                trigger.fire(hit)

    def record(self, hit: Hit) -> None:
        """Into the trace, where the filter lets it."""
        if self._accepts is not None and not self._accepts(hit):
            return
        task = hit.task
        places = (hit.ip, hit.ret_ip) if self.is_return else (hit.ip,)
        payload = self.layout.pack((self.number & 0xFFFF, hit.flags, task.preempt_count, task.pid, *places), hit.values)
        self._events.ring.append(self.number, hit.at_ns, hit.instructions, hit.entered_ns, hit.cpu, task.comm, payload)

    # ------------------------------------------------------------------------------------------------ actions.Actor

    def find(self, group: str, event: str, /) -> TraceEvent | None:
        return self._events.get(f"{group}/{event}")

    def tracing(self, on: bool | None, /) -> bool:
        was = self._events.ring.enabled
        if on is not None:
            self._events.ring.enabled = on
        return was

    def snapshot(self) -> None:
        self._events.ring.take_snapshot()

    def write_down(self, hit: Hit, title: str, lines: tuple[int, ...] | bytes, start: int, /) -> None:
        self._events.write_down(hit, title, lines, start)

    def value(self, text: str, /) -> Callable[[Hit], int]:
        constant = parse_number(text.removeprefix("\\"), signed=text.lstrip("\\").startswith("-"))
        if constant is not None:
            return lambda hit: constant
        arg = self._argument(text)
        if arg.type.is_string or arg.type.count:
            raise ProbeError(errno.EINVAL, f"{text} is no number")
        return _number_of(_fetcher(arg, self._events.context))

    def place(self, text: str, /) -> Callable[[Hit], int]:
        constant = parse_number(text)
        if constant is not None:
            return lambda hit: constant
        arg = self._argument(text)
        if not isinstance(arg.node, Deref):
            return self.value(text)
        word = self._events.context.convention.word
        plain = find_type(f"x{8 * word}", word)
        assert plain is not None  # every machine word is a type
        inner = _fetcher(replace(arg, node=arg.node.inner, type=plain), self._events.context)
        offset, mask = arg.node.offset, self._events.context.convention.mask
        base = _number_of(inner)
        return lambda hit: base(hit) + offset & mask

    def _argument(self, text: str) -> FetchArg:
        """A fetch argument in the place of this event's own."""
        line = f"{'r' if self.is_return else 'p'}:a/b {self._spec.place} v={text}"
        try:
            arg = parse(line, self._events.scope).args[0]
        except ProbeError as error:
            raise ProbeError(error.errno, f"{text}: {error.reason}") from None
        if arg.symbol is not None and self._events.guest.span(arg.symbol.symbol) is None:
            raise ProbeError(errno.ENOENT, f"{text}: no symbol {arg.symbol.symbol}")
        return arg

    def leave(self) -> Callable[[Hit, int], None]:
        if self.is_return:
            return _set_return_value
        place = self._spec.place
        if place.symbol is not None and place.offset and not self._events.scope.is_entry(place.symbol, place.offset):
            raise ProbeError(errno.EINVAL, "return: is for the entry of a function, or for its return")
        word = self._events.context.convention.word

        def leave(hit: Hit, value: int) -> None:
            regs = hit.regs
            try:
                regs.ip = int.from_bytes(regs.read(regs.sp, word), "little")
            except MemoryFault:
                return  # no way back is known: the function runs
            regs.retval = value
            regs.sp += word
            hit.skip = True

        return leave

    def register(self, name: str, /) -> Callable[[Hit, int], None]:
        convention = self._events.context.convention
        number = convention.registers.get(name)
        mask = convention.mask
        if number is not None:

            def set_general(hit: Hit, value: int) -> None:
                hit.regs.cpu.gpr[number] = value & mask

            return set_general
        if name == "flags":
            return _set_flags
        if name == "ip" and not self.is_return:
            return _set_ip
        known = ", ".join([*convention.registers, "ip", "flags"])
        raise ProbeError(errno.EINVAL, f"no register {name!r} can be set; there are {known}")


def _is_last(trigger: Trigger) -> bool:
    return trigger.last


def _set_return_value(hit: Hit, value: int) -> None:
    hit.regs.retval = value


def _set_flags(hit: Hit, value: int) -> None:
    hit.regs.flags = value


def _set_ip(hit: Hit, value: int) -> None:
    hit.regs.ip = value
    hit.skip = True


def _fetcher(arg: FetchArg, context: FetchContext) -> Fetcher:
    """As `fetch`, but a symbol stays its address: it is looked up when the record is read, as the kernel does."""
    if arg.type.name == "symbol":
        plain = find_type(f"x{8 * arg.type.size}", context.convention.word, arg.type.count)
        assert plain is not None  # every machine word is a type
        arg = replace(arg, type=plain)
    return compile_fetch(arg, context)


def _number_of(fetch: Fetcher) -> Callable[[Hit], int]:
    def number(hit: Hit) -> int:
        value = fetch(hit.regs.cpu)
        return value if isinstance(value, int) else 0

    return number


@dataclass(eq=False)
class Events:
    """All events of a machine, by GROUP/EVENT in the order of their definition, and what they share."""

    machine: Machine
    ring: TraceRing
    context: FetchContext
    scope: KernelScope
    awaited: Awaited
    log: list[str] = field(default_factory=list)
    """The newest entries of error_log, as they are printed there."""

    def __post_init__(self) -> None:
        self.guest = Guest(self.machine, self.context)
        self._by_name: dict[str, TraceEvent] = {}
        self._notes: dict[str, int] = {}

    def get(self, name: str) -> TraceEvent | None:
        return self._by_name.get(name)

    def __iter__(self) -> Iterator[TraceEvent]:
        return iter(list(self._by_name.values()))

    def add(self, spec: Spec, arm: Callable[[bool], None]) -> TraceEvent:
        event = self._by_name[spec.name] = TraceEvent(self, spec, arm)
        return event

    def remove(self, event: TraceEvent) -> None:
        """Triggers of others that switch it go with it."""
        for other in self:
            other.triggers.drop_target(event.group, event.event)
        del self._by_name[event.name]
        self.awaited.give_up(event)
        event.close()

    def write_down(self, hit: Hit, title: str, lines: tuple[int, ...] | bytes, start: int) -> None:
        """A record beside those of events, unless the trace is off."""
        if not self.ring.enabled:
            return
        word = self.context.convention.word
        stack = not isinstance(lines, bytes)
        number = self._notes.get(title)
        if number is None:
            number = self.ring.define(_LinesReader(title, word if stack else 0, self.context.describe))
            self._notes[title] = number
        data = lines if isinstance(lines, bytes) else b"".join(one.to_bytes(word, "little") for one in lines)
        task = hit.task
        head = _LINES_HEAD.pack(number & 0xFFFF, hit.flags, task.preempt_count, task.pid, start)
        self.ring.append(number, hit.at_ns, hit.instructions, -1, hit.cpu, task.comm, head + data)

    def log_error(self, who: str, error: ProbeError) -> None:
        """An entry of error_log, at the guest's time now; `who` is the part of the kernel that would complain."""
        now = self.machine.clock.now_ns
        seconds, rest = divmod(now // 1000, 1_000_000)
        caret = " " * (error.column or 0)
        self.log.append(
            f"[{seconds:5d}.{rest:06d}] {who}: error: {error.reason}\n"
            f"  Command: {error.definition or ''}\n           {caret}^\n"
        )
        del self.log[:-MAX_LOG]
