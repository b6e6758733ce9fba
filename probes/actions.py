"""Triggers: what else a hit does, written to `events/GRP/EV/trigger` as with Linux, and actions that no kernel has.

    traceon traceoff snapshot stacktrace [:N] [if FILTER]
    enable_event|disable_event|enable_hist|disable_hist:GRP:EV[:N] [if FILTER]
    hist:keys=... [if FILTER]
    stop[:N]  dump:ADDR,SIZE[:N]  set:REG=EXPR[:N]  set:ADDR[:TYPE]=EXPR[:N]  return:VALUE[:N]  each with [if FILTER]

Rules: parsed between runs, carried out in the engine's thread inside a trap. What a trigger works on is `Actor`.
Source: kernel/trace/trace_events_trigger.c, Linux 6.12; its refusals have an errno and no text, so the texts are ours.
"""

from __future__ import annotations

import difflib
import errno
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from emu.iface import MemoryFault
from probes.errors import ProbeError
from probes.filters import Predicate
from probes.hist import Guest, HistError, Histogram, parse_histogram
from probes.hit import Hit, Variable
from probes.numbers import number

MAX_TRIGGERS: Final = 64  # of one event
MAX_DUMP: Final = 4096
_ROW: Final = 16
_UNLIMITED: Final = -1
_MOST: Final = (1 << 63) - 1  # a count is a long
_KERNEL: Final = ("traceon", "traceoff", "snapshot", "stacktrace")
_ON_EVENTS: Final = ("enable_event", "disable_event")
_ON_HISTS: Final = ("enable_hist", "disable_hist")
_OURS: Final = ("stop", "dump", "set", "return")
COMMANDS: Final = (*_KERNEL, *_ON_EVENTS, *_ON_HISTS, "hist", *_OURS)
_IF: Final = re.compile(r"(?:\A|\s)if(?=\s|\Z)")
_ERROR_NAME: Final = re.compile(r"-[A-Za-z]\w*\Z")
_KERNEL_ERRORS: Final = ("ERESTARTSYS", "ERESTARTNOINTR", "ERESTARTNOHAND", "ENOIOCTLCMD", "ERESTART_RESTARTBLOCK")
_ERRORS: Final[Mapping[str, int]] = {
    **{name: number for name, number in vars(errno).items() if isinstance(number, int)},
    # include/linux/errno.h: what never leaves the kernel
    **{name: number for number, name in enumerate(_KERNEL_ERRORS, start=512)},
    "EPROBE_DEFER": 517,
    "ENOTSUPP": 524,
}
_SIZES: Final = {f"{kind}{bits}": bits // 8 for kind in "usx" for bits in (8, 16, 32, 64)}


class Switchable(Protocol):
    """An event as the triggers of another one see it."""

    soft_disabled: bool

    def soft_mode(self, on: bool, /) -> None:
        """Keep it armed without recording, for as many users as have asked; ProbeError where it cannot be."""
        ...

    @property
    def histograms(self) -> list[Histogram]: ...


class Actor(Protocol):
    """What the triggers of one event work on."""

    variables: Mapping[str, Variable]

    @property
    def guest(self) -> Guest: ...

    def filter(self, text: str, /) -> Predicate:
        """FilterError as of the filter file."""
        ...

    def find(self, group: str, event: str, /) -> Switchable | None: ...

    def tracing(self, on: bool | None, /) -> bool:
        """Recording as it was, before it is switched."""
        ...

    def snapshot(self) -> None: ...

    def write_down(self, hit: Hit, title: str, lines: tuple[int, ...] | bytes, start: int, /) -> None:
        """A record of its own: a stack's addresses, or memory from `start` on."""
        ...

    def value(self, text: str, /) -> Callable[[Hit], int]:
        """A number, or a fetch argument as one; ProbeError where it is neither."""
        ...

    def place(self, text: str, /) -> Callable[[Hit], int]:
        """The address that `+8($arg1)`, `@SYM`, a number or a register's contents mean; MemoryFault when asked."""
        ...

    def leave(self) -> Callable[[Hit, int], None]:
        """What makes a function return a value; ProbeError where the event is not at its entry or return."""
        ...

    def register(self, name: str, /) -> Callable[[Hit, int], None]:
        """What sets a register; ProbeError where there is none of that name."""
        ...


@dataclass(slots=True, eq=False)
class Trigger:
    """One line of the trigger file. `act` does it and says whether that counts; `left` is -1 for no limit.

    `after`: it comes after the record; `last`: after all others, as it changes what they see. `key` is what a second
    one may not have. `start` is called when it is taken in, and may raise ProbeError; `undo` when it is taken away.
    """

    command: str
    text: str
    key: str
    act: Callable[[Hit], bool]
    left: int = _UNLIMITED
    filter_text: str = ""
    accepts: Predicate | None = None
    after: bool = False
    last: bool = False
    histogram: Histogram | None = None
    start: Callable[[], None] | None = None
    undo: Callable[[], None] | None = None

    @property
    def conditional(self) -> bool:
        """It must see the record: Linux then calls all triggers of the event when the record is complete."""
        late = self.after or self.last
        return late or self.accepts is not None or self.histogram is not None

    def fire(self, hit: Hit) -> None:
        if self.histogram is not None:
            self.histogram.update(hit)
        elif self.left and (self.accepts is None or self.accepts(hit)) and self.act(hit) and self.left > 0:
            self.left -= 1

    def line(self) -> str:
        """As `cat trigger` shows it."""
        if self.histogram is not None:
            return self.histogram.text()
        count = "unlimited" if self.left < 0 else f"count={self.left}"
        return f"{self.text}:{count}" + (f" if {self.filter_text}" if self.filter_text else "")


class TriggerError(ProbeError):
    """A refused trigger."""

    def __init__(self, reason: str, number: int = errno.EINVAL) -> None:
        super().__init__(number, reason)


class Triggers:
    """The triggers of one event, in the order they are shown and fired."""

    def __init__(self, actor: Actor, changed: Callable[[], None]) -> None:
        self._actor = actor
        self._changed = changed
        self.all: list[Trigger] = []
        self.conditional = False

    @property
    def histograms(self) -> list[Histogram]:
        return [trigger.histogram for trigger in self.all if trigger.histogram is not None]

    def write(self, line: str, *, append: bool) -> None:
        """A line written to the file; `!LINE` takes a trigger away. ProbeError with the kernel's errno.

        Opening the file to write it anew, which `append` does not, takes the event's histograms away.
        """
        if not append:
            for trigger in [one for one in self.all if one.histogram is not None]:
                self._take_away(trigger)
        line = line.strip()
        removing = line.startswith("!")
        line = line.removeprefix("!")
        command = re.split(r"[: \t]", line, maxsplit=1)[0]
        if command not in COMMANDS:
            known = f"{', '.join(COMMANDS)}"
            raise TriggerError(f"no trigger {command!r}; there are {known}" if command else f"triggers are {known}")
        condition = _IF.search(line, len(command))
        params = (line[len(command) : condition.start()] if condition else line[len(command) :]).strip()
        filter_text = line[condition.end() :].strip() if condition else ""
        if condition is not None and not filter_text and not removing:
            raise TriggerError("`if` needs a filter")
        if command == "hist":
            self._write_histogram(f"hist{params}", filter_text, removing)
        elif removing:
            self._remove(self._key(command, params))
        else:
            self._add(self._parse(command, params), filter_text)

    def lines(self) -> list[str]:
        """What `cat trigger` shows."""
        return [trigger.line() for trigger in self.all] or ["# Available triggers:", f"# {' '.join(COMMANDS)}"]

    def clear(self) -> None:
        for trigger in list(self.all):
            self._take_away(trigger)

    def drop_target(self, group: str, event: str) -> None:
        """That event is gone: triggers that switch it go, too."""
        for trigger in list(self.all):
            if trigger.key in (f"event {group}:{event}", f"hist {group}:{event}"):
                self._take_away(trigger)

    def _add(self, trigger: Trigger, filter_text: str) -> None:
        if filter_text:
            trigger.accepts, trigger.filter_text = self._actor.filter(filter_text), filter_text
        known = next((one for one in self.all if one.key == trigger.key), None)
        if known is not None:
            there = known.line()
            reason = f"the event has this trigger already: {there}; take that away with '!{known.text}'"
            raise TriggerError(reason, errno.EEXIST)
        if len(self.all) >= MAX_TRIGGERS:
            raise TriggerError(f"an event has at most {MAX_TRIGGERS} triggers", errno.ENOSPC)
        if trigger.start is not None:
            trigger.start()
        self.all.insert(len(self.all) if trigger.histogram is not None else 0, trigger)
        self._update()

    def _remove(self, key: str) -> None:
        """As in the kernel, what is not there is gone already."""
        for trigger in self.all:
            if trigger.key == key:
                self._take_away(trigger)
                return

    def _take_away(self, trigger: Trigger) -> None:
        self.all.remove(trigger)
        if trigger.undo is not None:
            trigger.undo()
        self._update()

    def _update(self) -> None:
        self.conditional = any(trigger.conditional for trigger in self.all)
        self._changed()

    # --------------------------------------------------------------------------------------------------- histograms

    def _write_histogram(self, command: str, filter_text: str, removing: bool) -> None:
        made, asked = parse_histogram(command, self._actor.variables, self._actor.guest)
        if filter_text:
            made.accepts, made.filter_text = self._actor.filter(filter_text), filter_text
        known = next(
            (one for one in self.all if one.histogram is not None and one.histogram.shape() == made.shape()), None
        )
        if removing:
            if known is not None:
                self._take_away(known)
            return
        if known is not None and known.histogram is not None:
            if not asked:
                raise HistError(errno.EEXIST, "Hist trigger already exists", command)
            if asked == "clear":
                known.histogram.clear()
            else:
                known.histogram.paused = asked == "pause"
            return
        if asked in ("cont", "clear"):
            reason = "Can't clear or continue a nonexistent hist trigger"
            raise HistError(errno.ENOENT, reason, command)
        self._add(Trigger("hist", "hist", f"hist {id(made)}", lambda hit: True, histogram=made), "")

    # ------------------------------------------------------------------------------------------------- the others

    def _key(self, command: str, params: str) -> str:
        """`params` as they follow the command, the colon and a count included."""
        if command in _ON_EVENTS or command in _ON_HISTS:
            kind = "event" if command in _ON_EVENTS else "hist"
            return f"{kind} {':'.join(params.split(':')[1:3])}"
        if command in _KERNEL or command in ("stop", "return"):
            return command
        return _own_key(command, _body(params[1:])[0])

    def _parse(self, command: str, params: str) -> Trigger:
        if params and not params.startswith(":"):
            raise TriggerError(f"{command}{params}: what follows is {command}[:COUNT] [if FILTER]")
        params = params[1:]
        if command in _ON_EVENTS or command in _ON_HISTS:
            return self._parse_switch(command, params)
        if command in _KERNEL or command == "stop":
            trigger = self._plain(command)
            trigger.left = _count(params) if params else _UNLIMITED
            return trigger
        body, left = _body(params)
        made = {"dump": self._dump, "set": self._set, "return": self._return}[command](body)
        made.left = left
        return made

    def _plain(self, command: str) -> Trigger:
        actor = self._actor

        def switch(hit: Hit) -> bool:
            return actor.tracing(command == "traceon") is not (command == "traceon")

        def snapshot(hit: Hit) -> bool:
            actor.snapshot()
            return True

        def stacktrace(hit: Hit) -> bool:
            actor.write_down(hit, "stack trace", actor.guest.stack(hit), 0)
            return True

        def stop(hit: Hit) -> bool:
            hit.regs.stop = True
            return True

        acts = {"snapshot": snapshot, "stacktrace": stacktrace, "stop": stop}
        act = acts.get(command, switch)
        return Trigger(command, command, command, act, after=command == "stacktrace")

    def _parse_switch(self, command: str, params: str) -> Trigger:
        group, _, rest = params.partition(":")
        event, colon, count = rest.partition(":")
        target = self._actor.find(group, event) if event else None
        if target is None:
            raise TriggerError(
                f"{command}:GROUP:EVENT[:COUNT]" + (f", and there is no event {params}" if event else "")
            )
        on = command.startswith("enable")
        left = _count(count) if colon else _UNLIMITED
        key = self._key(command, f":{params}")
        text = f"{command}:{group}:{event}"
        if command in _ON_HISTS:
            if not target.histograms:
                raise TriggerError(f"{group}:{event} has no histogram", errno.ENOENT)

            def pause(hit: Hit) -> bool:
                changed = [one for one in target.histograms if one.paused is on]
                for one in changed:
                    one.paused = not on
                return bool(changed)

            return Trigger(command, text, key, pause, left)

        def switch(hit: Hit) -> bool:
            changed = target.soft_disabled is on
            target.soft_disabled = not on
            return changed

        start, undo = functools.partial(target.soft_mode, True), functools.partial(target.soft_mode, False)
        return Trigger(command, text, key, switch, left, start=start, undo=undo)

    def _dump(self, body: str) -> Trigger:
        place, comma, size_text = body.rpartition(",")
        size = number(size_text) if comma else None
        if size is None or not 0 < size <= MAX_DUMP:
            raise TriggerError(f"dump:ADDRESS,SIZE[:COUNT] [if FILTER], with a size up to {MAX_DUMP}")
        address_of, actor = self._actor.place(place), self._actor

        def dump(hit: Hit) -> bool:
            try:
                address = address_of(hit)
                data = hit.regs.read(address, size)
            except MemoryFault as fault:
                address, data = fault.address, b""
            actor.write_down(hit, "dump", data, address)
            return True

        return Trigger("dump", f"dump:{body}", _own_key("dump", body), dump, after=True)

    def _set(self, body: str) -> Trigger:
        target, equals, expression = body.partition("=")
        if not equals or not target or not expression:
            raise TriggerError("set:REGISTER=VALUE or set:ADDRESS[:TYPE]=VALUE, then [:COUNT] [if FILTER]")
        value = self._actor.value(expression)
        if target[0] in "@+-" or target[0].isdigit():
            place, _, kind = target.partition(":")
            size = _SIZES.get(kind or "u32")
            if size is None:
                raise TriggerError(
                    f"no type {kind!r} for a number in memory; there are u8 to u64, s8 to s64, x8 to x64"
                )
            store = _storing(self._actor.place(place), size)
        else:
            store = self._actor.register(target.removeprefix("%"))

        def assign(hit: Hit) -> bool:
            try:
                store(hit, value(hit))
            except MemoryFault:
                return False
            return True

        return Trigger("set", f"set:{body}", _own_key("set", body), assign, last=True)

    def _return(self, body: str) -> Trigger:
        if not body:
            raise TriggerError("return:VALUE[:COUNT] [if FILTER]")
        value = _error(body[1:]) if _ERROR_NAME.match(body) else self._actor.value(body)
        leave = self._actor.leave()

        def act(hit: Hit) -> bool:
            leave(hit, value(hit))
            return True

        return Trigger("return", f"return:{body}", "return", act, last=True)


def _own_key(command: str, body: str) -> str:
    """Of `dump` and `set`, of which an event may have several; a register is the same one with and without its %."""
    return f"{command} {body.removeprefix('%')}"


def _error(name: str) -> Callable[[Hit], int]:
    """What gives -ENOENT and the like; TriggerError for a name that no errno has."""
    number = _ERRORS.get(name)
    if number is None:
        near = difflib.get_close_matches(name.upper(), _ERRORS, 3, 0.5) or ["ENOENT", "EPERM", "EIO"]
        raise TriggerError(f"no error is called {name}; return:-NAME takes an errno's name, such as {', '.join(near)}")
    return lambda hit: -number


def _body(params: str) -> tuple[str, int]:
    """What an action of ours is told, and its count."""
    body, colon, count = params.rpartition(":")
    return (body, _count(count)) if colon and count[:1].isdecimal() else (params, _UNLIMITED)


def _count(text: str) -> int:
    count = number(text)
    if count is None or count > _MOST:
        raise TriggerError(f"{text!r} is no count: a decimal number, 0x and a hexadecimal or 0 and an octal one")
    return count


def _storing(place: Callable[[Hit], int], size: int) -> Callable[[Hit, int], None]:
    mask = (1 << 8 * size) - 1

    def store(hit: Hit, value: int) -> None:
        hit.regs.write(place(hit), (value & mask).to_bytes(size, "little"))

    return store


def dump_lines(data: bytes, start: int) -> tuple[str, ...]:
    """Memory as rows of 16 bytes, with what is printable beside; what could not be read says so."""
    if not data:
        return (f"{start:x}: (fault)",)
    rows = []
    for at in range(0, len(data), _ROW):
        piece = data[at : at + _ROW]
        shown = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in piece)
        rows.append(f"{start + at:x}: {piece.hex(' '):<{3 * _ROW - 1}}  {shown}")
    return tuple(rows)
