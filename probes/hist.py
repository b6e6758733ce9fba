"""Histograms of hits: `hist:keys=common_pid.execname:vals=count` counted and shown as Linux does.

Rules: pure; what a name means comes as `Variable`s, what an address is as `Describe`. Grammar, order of checks, texts,
carets and the printed table are those of Linux 6.12 (kernel/trace/trace_events_hist.c), measured on 6.12.117.
Expressions, variables and actions between histograms are not had.
"""

from __future__ import annotations

import errno
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

from probes import rawtext
from probes.errors import ProbeError
from probes.filters import Predicate
from probes.histsort import kernel_order
from probes.hit import Hit, Variable
from probes.numbers import number

DEFAULT_SIZE: Final = 2048
MIN_SIZE, MAX_SIZE = 128, 131072
MAX_KEYS: Final = 3
MAX_VALUES: Final = 3  # hitcount among them: TRACING_MAP_VALS_MAX
MAX_SORT: Final = 2
MAX_STRING: Final = 255
_STACK_DEPTH: Final = 64
_MASK: Final = (1 << 64) - 1
_BAR: Final = 20

Key: TypeAlias = int | str | tuple[int, ...]

_NOT_HAD: Final = "histogram variables, expressions and actions are not available"
_STACK: Final = "common_stacktrace"
_ALIASES: Final = {"cpu": "common_cpu", "CPU": "common_cpu", "stacktrace": _STACK, "STACKTRACE": _STACK}
"""parse_field() takes these for backward compatibility; the trigger is shown with the names they have now."""
_KEY_MODIFIERS: Final = ("hex", "sym", "sym-offset", "execname", "syscall", "log2", "usecs", "stacktrace")
_VALUE_MODIFIERS: Final = ("hex", "percent", "graph")
_NUMERIC_MODIFIERS: Final = ("hex", "sym", "sym-offset", "syscall")
"""These show a number, of a string the one that its first eight bytes are."""


class Guest(Protocol):
    """What a histogram asks of the guest. `word` is its machine word in bytes, `release` its kernel's, (6, 12); (0, 0)
    where it is not known."""

    @property
    def word(self) -> int: ...

    @property
    def release(self) -> tuple[int, int]: ...

    def describe(self, address: int, /) -> str:
        """`name+0xoffset/0xsize`, or the bare address."""
        ...

    def stack(self, hit: Hit, /) -> tuple[int, ...]:
        """Return addresses, innermost first."""
        ...

    def syscall(self, number: int, /) -> str:
        """`sys_read`, or `unknown_syscall`."""
        ...


class HistError(ProbeError):
    """A refused histogram. `logged` is whether the kernel would put it into error_log."""

    def __init__(self, number: int, reason: str, command: str, at: str | None = None, *, logged: bool = True) -> None:
        found = command.find(at) if at else 0
        super().__init__(number, reason, definition=command, column=max(found, 0))
        self.logged = logged


@dataclass(frozen=True, slots=True)
class Column:
    """A key or a value: the name it is printed by, the event's own name for it, and how it is shown."""

    name: str
    variable: Variable | None
    modifier: str = ""
    buckets: int = 0

    @property
    def text(self) -> str:
        shown = _ALIASES.get(self.name, self.name)
        if self.buckets:
            return f"{shown}.buckets={self.buckets}"
        return f"{shown}.{self.modifier}" if self.modifier else shown

    def packed(self, value: Key, whole: bool) -> bytes:
        """A key as the kernel's map compares it: a machine's number, cut to the field's size unless it is the `whole`
        of the key; a string or a stack in a field of its full size."""
        if isinstance(value, str):
            return rawtext.encode(value).ljust(MAX_STRING + 1, b"\0")
        if isinstance(value, tuple):
            return b"".join(one.to_bytes(8, "little") for one in value).ljust(8 * _STACK_DEPTH, b"\0")
        size = 8 if whole or self.variable is None else min(self.variable.field.size, 8)
        return (value & (1 << 8 * size) - 1).to_bytes(8, "little")


@dataclass(frozen=True, slots=True)
class Sort:
    """Index among hitcount, values and keys in that order; `name` is how it is shown."""

    column: int
    name: str
    descending: bool

    @property
    def text(self) -> str:
        return self.name + (".descending" if self.descending else "")


@dataclass(slots=True)
class _Row:
    key: tuple[Key, ...]
    sums: list[int]
    comm: str


@dataclass(slots=True, eq=False)
class Histogram:
    """One `hist` trigger. `filter_text` and `accepts` are its `if`; `hits` and `dropped` count as the kernel's map."""

    keys: tuple[Column, ...]
    values: tuple[Column, ...]
    sort: tuple[Sort, ...]
    size: int
    guest: Guest
    name: str = ""
    show_hitcount: bool = True
    paused: bool = False
    filter_text: str = ""
    accepts: Predicate | None = None
    hits: int = 0
    dropped: int = 0
    rows: dict[tuple[Key, ...], _Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._key_of = [_key_getter(column, self.guest) for column in self.keys]
        self._value_of = [_value_getter(column, self.guest) for column in self.values]
        self._wants_comm = any(column.modifier == "execname" for column in self.keys)

    _key_of: list[Callable[[Hit], Key]] = field(init=False, repr=False)
    _value_of: list[Callable[[Hit], int]] = field(init=False, repr=False)
    _wants_comm: bool = field(init=False, repr=False)

    def update(self, hit: Hit) -> None:
        """Count a hit, unless it is filtered or the histogram paused."""
        if self.paused or (self.accepts is not None and not self.accepts(hit)):
            return
        key = tuple([get(hit) for get in self._key_of])
        row = self.rows.get(key)
        if row is None:
            if len(self.rows) >= self.size:
                self.dropped += 1
                return
            comm = hit.task.comm if self._wants_comm else ""
            row = self.rows[key] = _Row(key, [0] * (1 + len(self.values)), comm)
        self.hits += 1
        sums = row.sums
        sums[0] += 1
        for index, get in enumerate(self._value_of, start=1):
            sums[index] = (sums[index] + get(hit)) & _MASK

    def clear(self) -> None:
        self.rows.clear()
        self.hits = self.dropped = 0

    # ------------------------------------------------------------------------------------------------------- as text

    def shape(self) -> tuple[object, ...]:
        """What no two histograms of an event have in common."""
        columns = [column.text for column in (*self.keys, *self.values)]
        return columns, len(self.keys), self.sort, self.name, self.filter_text

    def text(self) -> str:
        """The line the trigger file shows."""
        values = [*(["hitcount"] if self.show_hitcount else []), *(value.text for value in self.values)]
        name = f"name={self.name}:" if self.name else ""
        timed = any(column.name == "common_timestamp" for column in (*self.keys, *self.values))
        return (
            f"hist:{name}keys={','.join(key.text for key in self.keys)}:vals={','.join(values)}"
            f":sort={','.join(sort.text for sort in self.sort)}:size={self.size}{':clock=global' if timed else ''}"
            f"{'' if self.show_hitcount else ':nohitcount'}{f' if {self.filter_text}' if self.filter_text else ''}"
            f" [{'paused' if self.paused else 'active'}]"
        )

    def lines(self) -> list[str]:
        """What `cat hist` shows of it."""
        rows = self.sorted_rows()
        totals = [sum(row.sums[i] for row in rows) & _MASK for i in range(len(self.values) + 1)]
        tops = [max((row.sums[i] for row in rows), default=0) for i in range(len(self.values) + 1)]
        shown = ["# event histogram", "#", f"# trigger info: {self.text()}", "#", ""]
        shown += [self._row(row, totals, tops) for row in rows]
        return [
            *shown,
            "",
            "Totals:",
            f"    Hits: {self.hits}",
            f"    Entries: {len(rows)}",
            f"    Dropped: {self.dropped}",
        ]

    def sorted_rows(self) -> list[_Row]:
        """In the order that the kernel shows them."""
        whole = len(self.keys) == 1

        def packed(row: _Row) -> bytes:
            return b"".join(column.packed(key, whole) for column, key in zip(self.keys, row.key, strict=True))

        sorts = [(functools.partial(self._sorted_by, sort.column), sort.descending) for sort in self.sort]
        return kernel_order(self.rows.values(), packed, sorts, self.guest.release)

    def _sorted_by(self, column: int, row: _Row) -> int | bytes:
        """Keys compare as their fields do; a stack is not compared: tracing_map_cmp_none()."""
        if column < len(row.sums):
            return row.sums[column]
        value, key = row.key[column - len(row.sums)], self.keys[column - len(row.sums)]
        if isinstance(value, tuple):
            return 0
        if isinstance(value, str):
            return rawtext.encode(value)
        plain = key.variable if key.modifier != "log2" and not key.buckets else None
        if plain is None or not plain.field.signed:
            return value
        sign = 1 << 8 * plain.field.size - 1
        return ((value & 2 * sign - 1) ^ sign) - sign

    def _row(self, row: _Row, totals: Sequence[int], tops: Sequence[int]) -> str:
        keys = [self._shown_key(column, value, row) for column, value in zip(self.keys, row.key, strict=True)]
        end = "" if any(isinstance(value, tuple) for value in row.key) else " "
        parts = [f"{{ {', '.join(keys)}{end}}}"]
        if self.show_hitcount:
            parts.append(f" hitcount: {row.sums[0]:>10}")
        for index, column in enumerate(self.values, start=1):
            value = row.sums[index] if column.variable is not None else row.sums[0]
            total, top = (totals[index], tops[index]) if column.variable is not None else (totals[0], tops[0])
            parts.append(f"  {_shown_value(column, value, total, top)}")
        return "".join(parts)

    def _shown_key(self, column: Column, value: Key, row: _Row) -> str:
        name = column.name
        if isinstance(value, tuple):
            frames = "".join(f"{'':9}{self.guest.describe(address)}\n" for address in value)
            return f"{name}:\n{frames}"
        if isinstance(value, str):
            if column.modifier not in _NUMERIC_MODIFIERS:
                return f"{name}: {rawtext.padded(value, 50)}"
            value = int.from_bytes(rawtext.encode(value)[:8], "little")  # as hist_trigger_print_key() reads any key
        value &= _MASK
        if column.buckets:
            return f"{name}: ~ {value}-{value + column.buckets - 1}"
        match column.modifier:
            case "hex":
                return f"{name}: {value:x}"
            case "sym":
                return f"{name}: [{value:x}] {self._described(value).partition('+')[0]:<45}"
            case "sym-offset":
                return f"{name}: [{value:x}] {self._described(value):<55}"
            case "execname":
                return f"{name}: {rawtext.padded(row.comm, 16)}[{value:>10}]"
            case "syscall":
                return f"{name}: {self.guest.syscall(value):<30}[{value:>3}]"
            case "log2":
                return f"{name}: ~ 2^{value:<2}"
        return f"{name}: {value:>10}"

    def _described(self, address: int) -> str:
        return self.guest.describe(address & (1 << 8 * self.guest.word) - 1)


def _shown_value(column: Column, value: int, total: int, top: int) -> str:
    match column.modifier:
        case "percent":
            share = _share(value, total)
            if share is None:
                return f"{column.name} (%):[ERROR]"
            return f"{column.name} (%): {share // 100:>3}.{share % 100:02}"
        case "graph":
            share = _share(value, top)
            bar = "[ERROR]" if share is None else "#" * min(share * _BAR // 10000, _BAR)
            return f"{column.name}: {bar:<{_BAR}}"
        case "hex":
            return f"{column.name}: {value:>10x}"
    return f"{column.name}: {value:>10}"


def _share(value: int, total: int) -> int | None:
    """__get_percentage(): hundredths of a percent; None where sums have wrapped beyond sense."""
    if not total:
        return 0
    if value < _MASK // 10000:
        return value * 10000 // total
    return value // (total // 10000) if total >= 10000 else None


def _key_getter(column: Column, guest: Guest) -> Callable[[Hit], Key]:
    variable, buckets = column.variable, column.buckets
    if column.name == _STACK:
        return guest.stack
    if variable is None:  # hitcount
        return lambda hit: 1
    get = variable.get
    if variable.field.text:
        return lambda hit: rawtext.cut(str(get(hit) or ""), MAX_STRING)

    mask = _field_mask(column, guest)

    def counted(hit: Hit) -> int:
        value = get(hit)
        return value & mask if isinstance(value, int) else 0

    if column.modifier == "log2":
        # ilog2(roundup_pow_of_two(VALUE)) above the highest power of two has a shift by all bits in it: 64 on
        # Debian's amd64 kernel, 0 on its i386 one.
        bound = 32 if guest.word == 4 else 65
        return lambda hit: (max(counted(hit), 1) - 1).bit_length() % bound
    if buckets:
        return lambda hit: counted(hit) // buckets * buckets
    if column.modifier == "usecs" and column.name == "common_timestamp":
        return lambda hit: counted(hit) // 1000
    return counted


def _field_mask(column: Column, guest: Guest) -> int:
    """What hist_field_TYPE() leaves of a field: all of them go by way of `unsigned long`. Times do not."""
    return _MASK if column.name == "common_timestamp" else (1 << 8 * guest.word) - 1


def _value_getter(column: Column, guest: Guest) -> Callable[[Hit], int]:
    variable = column.variable
    if variable is None or variable.field.text:
        return lambda hit: 1 if variable is None else 0  # hitcount; the address of a string means nothing here
    get, unit = variable.get, 1000 if column.modifier == "usecs" else 1
    mask = _field_mask(column, guest)

    def counted(hit: Hit) -> int:
        value = get(hit)
        return (value & mask) // unit if isinstance(value, int) else 0

    return counted


def _is_for_values(name: str, modifier: str) -> bool:
    return modifier in ("", *_VALUE_MODIFIERS) or (name, modifier) == ("common_timestamp", "usecs")


# ------------------------------------------------------------------------------------------------------------ parsing


def parse_histogram(command: str, variables: Mapping[str, Variable], guest: Guest) -> tuple[Histogram, str]:
    """`hist:...` without its `if`. -> the histogram and "pause", "cont", "clear" or "" as the command says.

    HistError as the kernel would refuse it.
    """
    return _Parser(command, variables, guest).parse()


class _Parser:
    def __init__(self, command: str, variables: Mapping[str, Variable], guest: Guest) -> None:
        self._command = command
        self._variables = variables
        self._guest = guest
        self._keys: tuple[Column, ...] = ()
        self._values: tuple[Column, ...] = ()

    def parse(self) -> tuple[Histogram, str]:
        given, flags = self._attributes()
        if not given.get("keys"):
            raise HistError(errno.EINVAL, "A histogram needs keys=FIELD", self._command, logged=False)
        size = self._size(given["size"]) if "size" in given else DEFAULT_SIZE
        values = [
            self._column(text, key=False) for text in given.get("vals", "").split(",") if text not in ("", "hitcount")
        ]
        if "nohitcount" in flags and not values:
            raise HistError(errno.ENOENT, "Non-hitcount value is required for 'nohitcount'", self._command)
        keys = [self._column(text, key=True) for text in given["keys"].split(",")]
        if len(keys) > MAX_KEYS or len(values) >= MAX_VALUES:
            what = f"at most {MAX_KEYS} keys and {MAX_VALUES - 1} values"
            raise HistError(errno.EINVAL, f"A histogram has {what}", self._command, logged=False)
        self._keys, self._values = tuple(keys), tuple(values)
        sort = tuple(self._sorts(given["sort"])) if "sort" in given else (Sort(0, "hitcount", descending=False),)
        made = Histogram(
            self._keys,
            self._values,
            sort,
            size,
            self._guest,
            name=given.get("name", ""),
            show_hitcount="nohitcount" not in flags,
            paused="pause" in flags,
        )
        return made, next((flag for flag in ("pause", "cont", "clear") if flag in flags), "")

    def _attributes(self) -> tuple[dict[str, str], set[str]]:
        given: dict[str, str] = {}
        flags: set[str] = set()
        for part in self._command.split(":")[1:]:
            name, equals, value = part.partition("=")
            name = {"key": "keys", "val": "vals", "values": "vals"}.get(name, name)
            flag = {"continue": "cont", "NOHC": "nohitcount"}.get(part, part)
            if equals and name in ("keys", "vals", "sort", "size", "name", "clock"):
                if not value:
                    raise HistError(errno.EINVAL, "Empty assignment", self._command, part)
                given[name] = value
            elif flag in ("pause", "cont", "clear", "nohitcount"):
                flags.add(flag)
            elif part or not given:
                raise HistError(errno.EINVAL, _NOT_HAD, self._command, part, logged=False)
        return given, flags

    def _size(self, text: str) -> int:
        if not text.isdecimal() or len(text) > 9 or not MIN_SIZE <= int(text) <= MAX_SIZE:
            reason = f"size is a number from {MIN_SIZE} to {MAX_SIZE}"
            raise HistError(errno.EINVAL, reason, self._command, logged=False)
        return 1 << (int(text) - 1).bit_length()

    def _column(self, text: str, *, key: bool) -> Column:
        name, _, rest = text.partition(".")
        if "." in rest:  # SYSTEM.EVENT.FIELD
            raise HistError(errno.EINVAL, "Couldn't find field", self._command, rest.rpartition(".")[2])
        modifier, buckets = self._modifier(rest, key=key)
        if re.search(r"[-+*/]", name):
            raise HistError(errno.EINVAL, _NOT_HAD, self._command, name, logged=False)
        variable = self._find(name)
        stack = _ALIASES.get(name, name) == _STACK
        if not key and (stack or not _is_for_values(name, modifier)):
            raise self._bad_modifier(text)
        if key and (modifier in _VALUE_MODIFIERS[1:] or (modifier == "execname" and name != "common_pid")):
            raise self._bad_modifier(modifier)
        if modifier == "stacktrace":
            raise self._bad_modifier(text)
        if variable is not None and variable.field.text and (buckets or modifier == "log2"):
            # Linux counts by where in its own ring buffer the string lies, and by what is on the stack behind that.
            reason = f"{name} is a string, which has no {'buckets' if buckets else modifier}"
            raise HistError(errno.EINVAL, reason, self._command, text, logged=False)
        return Column(_STACK if stack else name, variable, modifier, buckets)

    def _modifier(self, text: str, *, key: bool) -> tuple[str, int]:
        """What stands behind a field's dot, or how wide its buckets are."""
        modifier, equals, count = text.partition("=")
        if modifier == "buckets" and key:
            buckets = number(count)
            if buckets is None or not 0 < buckets < 1 << 63:
                raise self._bad_modifier(count)
            return "", buckets
        if equals or modifier not in ("", *_KEY_MODIFIERS, *_VALUE_MODIFIERS, "buckets"):
            raise self._bad_modifier(modifier)
        return modifier, 0

    def _find(self, name: str) -> Variable | None:
        if name == "hitcount" or _ALIASES.get(name, name) == _STACK:
            return None
        known = None if name.lower() == "comm" else self._variables.get(name)
        if known is None:
            raise HistError(errno.EINVAL, "Couldn't find field", self._command, name)
        return known

    def _bad_modifier(self, at: str) -> HistError:
        return HistError(errno.EINVAL, "Invalid field modifier", self._command, at)

    def _sorts(self, text: str) -> list[Sort]:
        fields = text.split(",")
        if len(fields) > MAX_SORT and all(fields):
            raise HistError(errno.EINVAL, f"Too many sort fields (Max = {MAX_SORT})", self._command, "sort")
        return [self._sort(one) for one in fields]

    def _sort(self, text: str) -> Sort:
        if not text:
            raise HistError(errno.EINVAL, "Empty sort field", self._command, "sort")
        name, dot, order = text.partition(".")
        fields = (*self._values, *self._keys)
        columns = ["hitcount", *(field.name for field in fields)]
        if dot and order not in ("ascending", "descending"):
            raise HistError(errno.EINVAL, "Invalid sort modifier", self._command, order)
        if name not in columns:
            raise HistError(errno.EINVAL, "Sort field must be a key or a val", self._command, name)
        index = columns.index(name)
        return Sort(index, fields[index - 1].text if index else name, order == "descending")
