"""What the stub, the command line and Python users call: probes as objects, and trace events as definitions.

Rules: belongs to the thread that runs the machine. Text in, lines out for events; refusals are ProbeErrors. Probes of
every kind are `registry`'s, what an event does with a hit is `traceevents`'; here is what has a name and a definition.
"""

from __future__ import annotations

import errno
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from emu.iface import Guest, Machine
from probes.awaited import Awaited
from probes.btf import Btf
from probes.discovery import linux_says, spread
from probes.errors import ProbeError
from probes.eventoptions import KINDS, Options, checked, maxactive
from probes.export import Unfinished
from probes.fetch import FetchContext, TaskInfo
from probes.jprobe import Jprobe
from probes.kinds import KernelProbe, Probe, hits_of, kprobe_of, missed_of, switched
from probes.kprobe import Arm, register_together
from probes.kprobeevents import KprobeMaker
from probes.kretprobe import Kretprobe
from probes.limits import NOTRACE, FtraceList
from probes.linux import Linux
from probes.lookup import did_you_mean
from probes.programs import Copies
from probes.refusals import Refusal
from probes.registry import Registry
from probes.scope import GuestScope, older_scope
from probes.spec import Deletion, ProbeSpec, Spec, UprobeSpec, parse, parse_deletion, parse_uprobe
from probes.table import admit, matches
from probes.trace import TraceRing
from probes.traceevents import Events, TraceEvent
from probes.uprobe import Uprobe
from probes.uprobeevents import ProgramScope, make_uprobe
from probes.uprobes import Uprobes

_MAX_SHOWN: Final = 10  # definitions of a glob in one answer


@dataclass(frozen=True, slots=True)
class EventStatus:
    """One event in numbers, for listings and summaries."""

    name: str
    kind: str
    symbol: str
    hits: int
    missed: int
    enabled: bool


@dataclass(slots=True)
class _Event:
    """A named event: one definition per place it stands on, each with its probe."""

    trace: TraceEvent
    parts: list[tuple[Spec, Probe]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.trace.name

    @property
    def kind(self) -> str:
        return {Kretprobe: "kretprobe", Jprobe: "jprobe", Uprobe: "uprobe"}.get(type(self.parts[0][1]), "kprobe")

    @property
    def hits(self) -> int:
        return sum(hits_of(probe) for _, probe in self.parts)

    @property
    def missed(self) -> int:
        return sum(missed_of(probe) for _, probe in self.parts)

    @property
    def enabled(self) -> bool:
        return self.trace.enabled and not all(switched(probe).disabled for _, probe in self.parts)


class Manager:
    """All probes of one machine.

    `arm` is the default back end; `settled` says the guest no longer patches its own code (see `Kprobes`); `tasks`
    knows the current task. Both are left to the machine's guest where it knows. `copies` opens copies of the guest's
    programs. Being made, it becomes the machine's trap client.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        arm: Arm = "auto",
        settled: bool | None = None,
        tasks: TaskInfo | None = None,
        linux_limits: bool = False,
        copies: Copies | None = None,
    ) -> None:
        self.trace = TraceRing()
        self._machine = machine
        self._linux_limits = linux_limits
        self._arm = arm
        probes = Registry(machine, arm=arm, settled=settled, linux_limits=linux_limits, copies=copies)
        self._probes, convention = probes, probes.convention
        self.objects, self.guest = probes.objects, probes.guest
        awaited = Awaited(machine, lambda: self.uprobes.programs, probes.register, probes.unregister)
        self._context = FetchContext(machine, convention, tasks or probes.task_info, awaited=awaited.text)
        self._unknown_tasks = probes.unknown_tasks if tasks is None else None
        guest: Guest | None = getattr(machine, "guest", None)
        self._scope = GuestScope(machine, convention, guest.btf if guest is not None else bytes)
        self._older = older_scope(machine, convention, getattr(guest, "title", ""))
        self._ftrace = FtraceList(machine)
        self._maker = KprobeMaker(machine, self._context, self.guest, shadow=probes.tasks.is_linux)
        self.events = Events(machine, self.trace, self._context, self._scope, awaited)
        self._events: dict[str, _Event] = {}

    @property
    def settled(self) -> bool:
        """The guest no longer patches its own code."""
        return self._probes.settled

    @settled.setter
    def settled(self, value: bool) -> None:
        self._probes.settled = value

    @property
    def types(self) -> Btf | None:
        """The kernel's BTF; None where it has none."""
        return self._scope.types

    @property
    def linux(self) -> Linux:
        """The guest's operating system. NotAvailable (a ProbeError) where it is no Linux whose types are known."""
        return self._probes.linux

    @property
    def uprobes(self) -> Uprobes:
        """Probes on programs. ProbeError where nobody knows the guest's operating system."""
        return self._probes.uprobes

    # ----------------------------------------------------------------------------------------------- probes as objects

    def register(self, probe: Probe, *, ours: bool = False) -> None:
        """ProbeError with the kernel's errno where it is refused; nothing has changed then.

        `ours`: it serves something that knows when to end it; lists do not show it and `reset` leaves it.
        """
        self._probes.register(probe, ours=ours)

    def register_many(self, probes: Iterable[Probe]) -> None:
        """All or nothing, as register_kprobes() and register_kretprobes(); EINVAL for none at all."""
        register_together(probes, self.register, self.unregister)

    def unregister(self, probe: Probe) -> None:
        self._probes.unregister(probe)

    def load_object(self, data: bytes, name: str) -> list[str]:
        """Take in a relocatable object; its functions can be guest handlers. -> the names it offers.

        ProbeError ENOEXEC, ENOENT, ENOMEM, ERANGE.
        """
        return self.objects.load(data, name)

    # ------------------------------------------------------------------------------------------------- events by name

    def add(self, kind: str, definition: str, options: Options | None = None) -> list[str]:
        """Define an event from the kernel's own line and arm it; the answer says what was made.

        `kind` is "kprobe" for a `p` or an `r` line, "kretprobe" for one that means a return, "jprobe" for a `p` line,
        "uprobe" for a line of uprobe_events, which may name a function: PATH:SYMBOL[+OFF].
        Options: arm (auto, int3, hook), disabled, pid, comm (a glob); of return probes maxactive, and shadow or
        trampoline. Guest code, by symbol: pre and post, which are a return probe's entry_handler and handler, and a
        jprobe's entry. A glob in the place of a symbol means every function it matches: those where the line cannot be
        defined are named in a note.
        """
        if kind not in KINDS:
            raise ProbeError(errno.EOPNOTSUPP, f"{kind} is not available")
        lines = [definition] if kind == "uprobe" else spread(self._machine, definition)
        if len(lines) == 1:
            return self._add(kind, lines[0], options)
        said: list[str] = []
        refused: list[tuple[str, ProbeError]] = []
        for line in lines:
            try:
                said.append(self._add(kind, line, options)[0])
            except ProbeError as error:
                refused.append((line.split(" ")[1], error))
        if not said:
            raise refused[0][1]
        more = [f"... {len(said)} in all"] if len(said) > _MAX_SHOWN else []
        notes = [f"note: not on {place}: {error.reason}" for place, error in refused[:_MAX_SHOWN]]
        more_notes = [f"note: not on {len(refused) - _MAX_SHOWN} more"] if len(refused) > _MAX_SHOWN else []
        return [*said[:_MAX_SHOWN], *more, *notes, *more_notes]

    def _add(self, kind: str, definition: str, options: Options | None) -> list[str]:
        if kind == "uprobe":
            return self._add_uprobe(definition, {"arm": self._arm, **checked(options or {}, kind, self._unknown_tasks)})
        spec = self._parse(definition)
        if kind == "kretprobe" and not spec.is_return:
            raise ProbeError(errno.EINVAL, "this line is no return probe", definition=spec.definition, column=0)
        if kind == "jprobe" and spec.is_return:
            raise ProbeError(errno.EINVAL, "this line is no jprobe", definition=spec.definition, column=0)
        chosen = checked(options or {}, "kretprobe" if spec.is_return else kind, self._unknown_tasks)

        def make(event: TraceEvent) -> KernelProbe:
            made = self._maker.make(kind, event, spec, chosen)
            kprobe_of(made).waits = self._probes.modules.missing(spec.place.module)
            return made

        return self._define(spec, chosen, make)

    def _add_uprobe(self, definition: str, options: Options) -> list[str]:
        spec = parse_uprobe(definition, ProgramScope(self._context.convention, self.uprobes.open), symbols=True)

        def make(event: TraceEvent) -> Uprobe:
            return make_uprobe(event, spec, self._context, self.uprobes, options)

        return self._define(spec, options, make)

    def _define(self, spec: Spec, options: Options, make: Callable[[TraceEvent], Probe]) -> list[str]:
        """Have the event of a definition, a new one or one that takes a further place, and register what `make` makes
        for it. -> its listing, and notes."""
        event = self._event_for(spec)
        armed = event.trace.armed if event.parts else not options.get("disabled")
        try:
            probe = make(event.trace)
            switched(probe).disabled = not armed
            self._register_for(spec, probe)
        except ProbeError:
            if not event.parts:
                self._forget(event)
            raise
        event.trace.armed = armed
        if isinstance(probe, Kretprobe) and isinstance(spec, ProbeSpec):
            spec = replace(spec, maxactive=probe.maxactive)
            if "maxactive" in options and not maxactive(options["maxactive"]):
                probe.notes += (f"--maxactive 0 leaves it to the definition or the kernel: it is {probe.maxactive}",)
        event.parts.append((spec, probe))
        if not isinstance(probe, Uprobe) and not any("Linux" in note for note in probe.notes):
            noted = probe if isinstance(probe, Kretprobe) else kprobe_of(probe)
            noted.notes += linux_says(self._ftrace, self._older, spec.definition, kprobe_of(probe).address or 0)
        return [spec.listing(), *(f"note: {note}" for note in probe.notes)]

    def _event_for(self, spec: Spec) -> _Event:
        """The one of that name, which takes a further place if it is of the same shape, or a new one."""
        admit(spec, [known for other in self._events.values() for known, _ in other.parts])
        return self._events.get(spec.name) or self._new_event(spec)

    def _new_event(self, spec: Spec) -> _Event:
        def arm(on: bool) -> None:
            self._arm_parts(event, on)

        event = self._events[spec.name] = _Event(self.events.add(spec, arm))
        return event

    def _arm_parts(self, event: _Event, on: bool) -> None:
        """All of them, or on error none."""
        done: list[Probe] = []
        try:
            for _, probe in event.parts:
                self._probes.switch(probe, on)
                done.append(probe)
        except ProbeError:
            for probe in done:
                self._probes.switch(probe, not on)
            raise

    def _register_for(self, spec: Spec, probe: Probe) -> None:
        place = spec.definition, spec.definition.index(" ") + 1
        try:
            self.register(probe)
        except ProbeError as error:
            raise error.at(*place) from None
        if not self._linux_limits or isinstance(probe, Uprobe):
            return
        if self._ftrace.is_notrace(kprobe_of(probe).address or 0):
            self.unregister(probe)
            raise ProbeError(errno.EINVAL, f"Linux refuses this place: {NOTRACE}").at(*place)

    def _forget(self, event: _Event) -> None:
        del self._events[event.name]
        self.events.remove(event.trace)

    def status(self) -> list[EventStatus]:
        """Every event in numbers, in the order of definition."""
        return [
            EventStatus(event.name, event.kind, str(event.parts[0][0].place), event.hits, event.missed, event.enabled)
            for event in self._events.values()
        ]

    def info(self, name: str) -> list[str]:
        """What is known of one event: definitions, counts, how each place is armed."""
        lines = []
        for event in self._matching(name):
            state = "enabled" if event.enabled else "disabled"
            lines.append(f"{event.name}: {state}, {event.hits} hits, {event.missed} missed")
            for spec, probe in event.parts:
                lines += [f"  {spec.listing()}", *(f"    {line}" for line in self._probes.info(probe))]
        return lines

    def enable(self, target: Probe | str) -> list[str]:
        """A probe, or every event whose name matches: EVENT, GROUP/EVENT, a glob, or "all"."""
        return self._switch(target, on=True)

    def disable(self, target: Probe | str) -> list[str]:
        return self._switch(target, on=False)

    def delete(self, pattern: str) -> list[str]:
        """Remove matching events; their probes' bytes are restored."""
        gone = self._matching(pattern)
        for event in gone:
            self._forget(event)
            for _, probe in event.parts:
                self.unregister(probe)
        return [event.name for event in gone]

    def kernel_list(self) -> Sequence[str]:
        """Every probe of every kind, as the kernel's kprobes/list shows its own (see `kinds`)."""
        return self._probes.lines()

    def reset(self) -> Sequence[str]:
        """Remove every event and every probe that was registered; the answer says how many there were."""
        count = len(self._probes.registered)
        self.delete("all")
        for probe in self._probes.registered:
            self.unregister(probe)
        return [f"{count} probes removed"]

    def undefine(self, line: str, kind: str | None = None) -> None:
        """A `-:` line of kprobe_events: what it names goes, if nothing uses it. ProbeError ENOENT, EBUSY.

        `kind` "kprobe" or "uprobe" limits it to these; None is any. `!` before a definition means the same.
        """
        if line.startswith("!"):
            head, _, rest = line[1:].strip().partition(" ")
            line = f"-:{head.partition(':')[2]} {rest}"
        wanted = parse_deletion(line)
        found = [event for event in self._of_kind(kind) if _names(wanted, event)]
        if not found:
            raise ProbeError(errno.ENOENT, f"no event is meant by {wanted.definition}")
        self._check_idle(found)
        for event in found:
            for part in [part for part in event.parts if matches(wanted, part[0])]:
                self.unregister(part[1])
                event.parts.remove(part)
            if not event.parts:
                self._forget(event)

    def undefine_all(self, kind: str | None = None) -> None:
        """All events of `kind`, or none of them: ProbeError EBUSY where one is in use."""
        found = self._of_kind(kind)
        self._check_idle(found)
        for event in found:
            self.delete(event.name)

    def _of_kind(self, kind: str | None) -> Iterable[_Event]:
        wanted = {"kprobe": ProbeSpec, "uprobe": UprobeSpec}
        known = list(self._events.values())
        return known if kind is None else [event for event in known if isinstance(event.parts[0][0], wanted[kind])]

    def _check_idle(self, events: Iterable[_Event]) -> None:
        for event in events:
            if event.trace.armed:
                raise ProbeError(errno.EBUSY, f"{event.name} is in use: disable it and remove its triggers first")

    def listings(self, kind: str | None = None) -> Sequence[str]:
        """Definitions as kprobe_events ("kprobe") or uprobe_events ("uprobe") list them."""
        return [spec.listing() for event in self._of_kind(kind) for spec, _ in event.parts]

    def profile(self, kind: str) -> Sequence[tuple[Spec, int, int]]:
        """(what it is, hits, missed) of every probe, as kprobe_profile and uprobe_profile count."""
        return [
            (spec, hits_of(probe), missed_of(probe)) for event in self._of_kind(kind) for spec, probe in event.parts
        ]

    def unfinished(self) -> Sequence[Unfinished]:
        """The calls that events of return probes follow and that have not returned, for a trace's end."""
        found = []
        for event in self._events.values():
            for spec, probe in event.parts:
                for ri in self._probes.instances(probe) if isinstance(probe, Kretprobe) else ():
                    found.append(Unfinished(event.trace.event, str(spec.place), ri.task, ri.at_ns))
        return found

    # ------------------------------------------------------------------------------------------------------- internals

    def _parse(self, definition: str) -> ProbeSpec:
        try:
            spec = parse(definition, self._scope, waits=True)
        except ProbeError as error:
            words = definition.split()
            if error.token == Refusal.BAD_PROBE_ADDR.name and len(words) > 1:
                error.hint = did_you_mean(self._machine, words[1].partition("+")[0])
            raise
        for arg in spec.args:
            symbol = arg.symbol
            if symbol is not None and not (self._machine.symbols.lookup(symbol.symbol) and symbol.offset is not None):
                # Linux looks data up when it registers the probe, and so blames the probe point.
                number = errno.ENOENT if symbol.offset is not None else errno.EINVAL
                refusal = Refusal.BAD_PROBE_ADDR if symbol.offset is not None else Refusal.FAIL_REG_PROBE
                refused = refusal.at(spec.definition.split(" "), 1, errno=number)
                refused.hint = did_you_mean(self._machine, symbol.symbol)
                raise refused
        self._probes.modules.check(spec.place.module)
        return spec

    def _matching(self, pattern: str) -> list[_Event]:
        if pattern == "all":
            return list(self._events.values())
        found = [
            event
            for event in self._events.values()
            if fnmatch.fnmatchcase(event.name if "/" in pattern else event.name.partition("/")[2], pattern)
        ]
        if not found:
            raise ProbeError(errno.ENOENT, f"no event matches {pattern}")
        return found

    def _switch(self, target: Probe | str, *, on: bool) -> list[str]:
        if not isinstance(target, str):
            self._probes.switch(target, on)
            return []
        events = self._matching(target)
        for event in events:
            for _, probe in event.parts if on and event.enabled else ():
                self._probes.switch(probe, on)  # nothing changes, but one that is GONE is refused
            event.trace.enable(on)
        return [event.name for event in events]

    # Last, because from here on `list` means this method in the class's annotations.
    def list(self) -> list[str]:
        """Every event as kprobe_events lists it."""
        return [spec.listing() for event in self._events.values() for spec, _ in event.parts]


def _names(wanted: Deletion, event: _Event) -> bool:
    return any(matches(wanted, spec) for spec, _ in event.parts)
