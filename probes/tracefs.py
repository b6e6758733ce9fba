"""The tree of /sys/kernel/tracing, as far as probes go: the names behind `echo`, `cat` and `ls`.

Rules: between runs, in the machine's thread; knows the manager and its events, no protocol. Each file is declared once,
in `_FILES` or `_EVENT_FILES`, with what reads and what writes it. Texts are those of Linux 6.12 (kernel/trace).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from probes.errors import ProbeError
from probes.filters import FilterError
from probes.hist import HistError
from probes.manager import Manager
from probes.numbers import number
from probes.perfprobe import is_perf_form
from probes.spec import UprobeSpec, is_uprobe, parse
from probes.trace import MAX_SIZE, MIN_SIZE
from probes.traceevents import TraceEvent

ROOTS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")
_GROUP_FILTER = """### global filter ###
# Use this to set filters for multiple events.
# Only events with the given fields will be affected.
# If no events are modified, an error message will be displayed here
"""
_NO_SNAPSHOT = """# tracer: nop
#
#
# * Snapshot is freed *
#
# Snapshot commands:
# echo 0 > snapshot : Clears and frees snapshot buffer
# echo 1 > snapshot : Allocates snapshot buffer, if not already allocated.
#                      Takes a snapshot of the main buffer.
# echo 2 > snapshot : Clears snapshot buffer (but does not allocate or free)
#                      (Doesn't have to be '2' works with any number that
#                       is not a '0' or '1')
"""
_KIB = 1024


@dataclass(frozen=True, slots=True)
class _File:
    """`read` gives its text, `write` takes what was written and whether it is appended; None: not permitted."""

    read: Callable[[], str] | None = None
    write: Callable[[str, bool], None] | None = None


class Tracefs:
    """Files by the path below the root. Everything raises ProbeError with the errno of the system call."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._events = manager.events
        self._ring = manager.trace
        self._notes: list[str] = []  # of the write in progress
        self._files: Mapping[str, _File] = {
            "available_events": _File(self._names),
            "buffer_size_kb": _File(lambda: f"{self._ring.size // _KIB}\n", self._resize),
            "dynamic_events": _File(self._definitions(None), self._define("dynamic")),
            "error_log": _File(lambda: "".join(self._events.log), self._clear_log),
            "kprobe_events": _File(self._definitions("kprobe"), self._define("kprobe")),
            "kprobe_profile": _File(self._kprobe_profile),
            "set_event": _File(self._enabled_names),
            "snapshot": _File(self._snapshot, self._write_snapshot),
            "trace": _File(lambda: _text(self._ring.lines()), self._clear_trace),
            "trace_clock": _File(lambda: "[local]\n"),
            "trace_pipe": _File(_no_pipe),
            "tracing_on": _File(lambda: f"{int(self._ring.enabled)}\n", self._switch_trace),
            "uprobe_events": _File(self._definitions("uprobe"), self._define("uprobe")),
            "uprobe_profile": _File(self._uprobe_profile),
        }

    def read(self, path: str) -> str:
        """The text of a file, as `cat` prints it."""
        file = self._find(path)
        if file.read is None:
            raise ProbeError(errno.EACCES, f"{path} cannot be read")
        return file.read()

    def write(self, path: str, text: str, *, append: bool) -> list[str]:
        """What `echo TEXT > path` does, and with `append` `>>`. -> notes, such as what Linux would have refused."""
        file = self._find(path)
        if file.write is None:
            raise ProbeError(errno.EACCES, f"{path} cannot be written")
        self._notes = []
        file.write(text, append)
        return self._notes

    # ------------------------------------------------------------------------------------------------------- the tree

    def _words(self, path: str) -> list[str]:
        for root in ROOTS:
            if path == root or path.startswith(f"{root}/"):
                path = path.removeprefix(root)
                break
        else:
            if path.startswith("/"):
                raise _absent(path)
        return [word for word in path.split("/") if word not in ("", ".")]

    def _find(self, path: str) -> _File:
        words = self._words(path)
        file = self._file(words)
        if file is not None:
            return file
        if self._directory(words) is not None:
            raise ProbeError(errno.EISDIR, f"{path or '/'} is a directory; `ls {path or '/'}` shows its files")
        for count in range(1, len(words)):
            if self._file(words[:count]) is not None:
                raise ProbeError(errno.ENOTDIR, f"{path}: {'/'.join(words[:count])} is a file, no directory")
        raise _absent(path)

    def _file(self, words: list[str]) -> _File | None:
        if len(words) == 1:
            return self._files.get(words[0])
        return self._event_file(words[1:]) if words[:1] == ["events"] and len(words) > 1 else None

    def _directory(self, words: list[str]) -> list[str] | None:
        """The names in one, None for what is none."""
        if not words:
            return [*self._files, "events"]
        groups = {event.group for event in self._events}
        match words:
            case ["events"]:
                return [*groups, "enable"]
            case ["events", group] if group in groups:
                return [*(event.event for event in self._events if event.group == group), "enable", "filter"]
            case ["events", group, event] if self._events.get(f"{group}/{event}") is not None:
                return [*_EVENT_FILES]
        return None

    def _event_file(self, words: list[str]) -> _File | None:
        if words == ["enable"]:
            return _File(lambda: _joint_state(self._events), self._enable(lambda: list(self._events)))
        group = [event for event in self._events if event.group == words[0]]
        if len(words) == 2 and group:
            if words[1] == "enable":
                return _File(lambda: _joint_state(group), self._enable(lambda: group))
            if words[1] == "filter":
                return _File(lambda: _GROUP_FILTER, lambda text, append: self._filter_group(group, text))
        event = self._events.get("/".join(words[:2])) if len(words) == 3 else None
        make = _EVENT_FILES.get(words[2]) if event is not None else None
        return make(self, event) if make is not None and event is not None else None

    # ----------------------------------------------------------------------------------------------------- definitions

    def _definitions(self, kind: str | None) -> Callable[[], str]:
        return lambda: _text(self._manager.listings(kind))

    def _define(self, kind: str) -> Callable[[str, bool], None]:
        """Each line in turn; without `append` what there was of this kind goes first, unless it is in use."""

        def write(text: str, append: bool) -> None:
            if not append:
                self._manager.undefine_all(None if kind == "dynamic" else kind)
            for line in text.split("\n"):
                if line.split("#", 1)[0].strip():
                    self._define_one(kind, line.strip())

        return write

    def _define_one(self, kind: str, line: str) -> None:
        if line.startswith(("-", "!")):
            self._manager.undefine(line, None if kind == "dynamic" else kind)
            return
        if kind == "dynamic":
            kind = "uprobe" if is_uprobe(line) else "kprobe"
        if kind == "kprobe" and is_perf_form(self._events.machine, line, has_dwarf=True):
            # The kernel takes `path_openat` for a p with letters behind it that mean nothing, if at all.
            line = " ".join([parse(line, self._events.scope).definition[0], *line.split()[1:]])
        try:
            said = self._manager.add(kind, line, {"disabled": True})
            self._notes += [text for text in said if text.startswith("note: ")]
        except ProbeError as error:
            if error.token is not None:
                self._events.log_error(f"trace_{kind}", error)
            raise

    def _kprobe_profile(self) -> str:
        rows = self._manager.profile("kprobe")
        return _text(f"  {spec.event:<44} {hits:>15} {missed:>15}" for spec, hits, missed in rows)

    def _uprobe_profile(self) -> str:
        rows = [(spec, hits) for spec, hits, _ in self._manager.profile("uprobe") if isinstance(spec, UprobeSpec)]
        return _text(f"  {spec.place.path} {spec.event:<44} {hits:>15}" for spec, hits in rows)

    # ------------------------------------------------------------------------------------------------------- the trace

    def _names(self) -> str:
        return _text(sorted(f"{event.group}:{event.event}" for event in self._events))

    def _enabled_names(self) -> str:
        return _text(f"{event.group}:{event.event}" for event in self._events if event.enabled)

    def _clear_trace(self, text: str, append: bool) -> None:
        if not append:
            self._ring.clear()

    def _clear_log(self, text: str, append: bool) -> None:
        if not append:
            self._events.log.clear()

    def _switch_trace(self, text: str, append: bool) -> None:
        self._ring.enabled = _unsigned(text) != 0

    def _resize(self, text: str, append: bool) -> None:
        kib = _unsigned(text)
        if not MIN_SIZE <= kib * _KIB <= MAX_SIZE:
            raise ProbeError(errno.EINVAL, f"buffer_size_kb is from {MIN_SIZE // _KIB} to {MAX_SIZE // _KIB}")
        self._ring.resize(kib * _KIB)

    def _snapshot(self) -> str:
        taken = self._ring.snapshot
        return _NO_SNAPSHOT if taken is None else _text(taken.lines())

    def _write_snapshot(self, text: str, append: bool) -> None:
        """0 frees it, 1 takes one, anything else empties it."""
        wanted = _unsigned(text)
        if wanted == 1:
            self._ring.take_snapshot()
        elif wanted == 0:
            self._ring.snapshot = None
        elif self._ring.snapshot is not None:
            self._ring.snapshot.clear()

    # ------------------------------------------------------------------------------------------------- files of events

    def _enable(self, events: Callable[[], list[TraceEvent]]) -> Callable[[str, bool], None]:
        def write(text: str, append: bool) -> None:
            if text.strip() not in ("0", "1"):
                raise ProbeError(errno.EINVAL, "an event is enabled by 1 and disabled by 0")
            for event in events():
                event.enable(text.strip() == "1")

        return write

    def enable_file(self, event: TraceEvent) -> _File:
        return _File(lambda: f"{event.state}\n", self._enable(lambda: [event]))

    def filter_file(self, event: TraceEvent) -> _File:
        def write(text: str, append: bool) -> None:
            try:
                event.set_filter(text)
            except FilterError as error:
                self._events.log_error("event filter parse error", error)
                raise

        return _File(lambda: f"{event.filter_text or 'none'}\n", write)

    def _filter_group(self, group: Iterable[TraceEvent], text: str) -> None:
        """Set where it fits; the others then have none, and say so in their files. As in Linux that is no error."""
        for event in group:
            try:
                event.set_filter(text, shared=True)
            except FilterError as error:
                self._events.log_error("event filter parse error", error)
                self._notes.append(f"note: {event.name} has no filter now: {error.reason}")

    def trigger_file(self, event: TraceEvent) -> _File:
        def write(text: str, append: bool) -> None:
            try:
                event.triggers.write(text, append=append)
            except FilterError as error:
                self._events.log_error("event filter parse error", error)
                raise
            except HistError as error:
                if error.logged:
                    self._events.log_error(f"hist:{event.group}:{event.event}", error)
                raise

        return _File(lambda: _text(event.triggers.lines()), write)

    def hist_file(self, event: TraceEvent) -> _File:
        def read() -> str:
            return "\n\n".join(_text(histogram.lines()) for histogram in event.histograms)

        return _File(read)

    def format_file(self, event: TraceEvent) -> _File:
        return _File(lambda: event.layout.format(event.event, event.number))

    def id_file(self, event: TraceEvent) -> _File:
        return _File(lambda: f"{event.number}\n")

    # Last, because from here on `list` means this method in the class's annotations.
    def list(self, path: str = "") -> list[str]:
        """The names in a directory; of a file its own."""
        names = self._directory(self._words(path))
        if names is None:
            self._find(path)
            return [path]
        return sorted(names)


_EVENT_FILES: Mapping[str, Callable[[Tracefs, TraceEvent], _File]] = {
    "enable": Tracefs.enable_file,
    "filter": Tracefs.filter_file,
    "format": Tracefs.format_file,
    "hist": Tracefs.hist_file,
    "id": Tracefs.id_file,
    "trigger": Tracefs.trigger_file,
}


def redirection(line: str) -> tuple[str, str, bool]:
    """`[-n] 'TEXT' > FILE` or `>> FILE`, quoted as in a shell. -> text, file, whether it is appended.

    ProbeError EINVAL.
    """
    text, quote, at = "", "", 0
    marks: list[tuple[int, int]] = []  # (place in `text`, place in `line`) of each unquoted >
    while at < len(line):
        character = line[at]
        if quote:
            quote = "" if character == quote else quote
            text += "" if not quote else character
        elif character in "'\"":
            quote = character
        else:
            if character == ">":
                marks.append((len(text), at))
            text += character
        at += 1
    if quote:
        raise ProbeError(errno.EINVAL, f"a {quote} is not closed")
    if not marks:
        raise ProbeError(errno.EINVAL, "echo 'TEXT' > FILE")
    split, place = marks[-1]
    append = len(marks) > 1 and marks[-2][1] == place - 1
    file = line[place + 1 :].strip().strip("'\"")
    if not file or " " in file:
        raise ProbeError(errno.EINVAL, "echo 'TEXT' > FILE: one file's name follows")
    said = text[: split - append].strip()
    option, _, rest = said.partition(" ")
    # without the newline, which no file here needs
    return (rest.lstrip() if option == "-n" else said), file, append


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _absent(path: str) -> ProbeError:
    return ProbeError(errno.ENOENT, f"{path}: no such file; `ls` and `ls DIR` show what there is")


def _no_pipe() -> str:
    reason = "nothing can be awaited inside a command: `trace stream on` shows records as they come, `cat trace` these"
    raise ProbeError(errno.EAGAIN, reason)


def _unsigned(text: str) -> int:
    value = number(text.strip())
    if value is None:
        raise ProbeError(errno.EINVAL, f"{text.strip()!r} is no number")
    return value


def _joint_state(events: Iterable[TraceEvent]) -> str:
    """0, 1 or X where some are enabled."""
    states = {event.enabled for event in events}
    return "X\n" if len(states) > 1 else f"{int(True in states)}\n"
