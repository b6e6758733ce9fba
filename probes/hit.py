"""One hit of an event, as filters, triggers, histograms and the trace see it.

Rules: made in the engine's thread inside a trap and used there only; what is kept of it is a trace record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from probes.fetch import Task, TaskInfo, Value
from probes.layout import Field, Layout
from probes.regs import Regs
from probes.trace import IRQS_OFF

_EFLAGS_IF: Final = 0x200


class Hit:
    """`values` are the arguments in order, `ip` the probed address, of a return the function's; `ret_ip` where it
    returned to. `entered_ns` is when the call that returns began, -1 for an entry. `cpu` is the processor's number.
    `skip`: a trigger has set where the guest goes on."""

    __slots__ = (
        *("_flags", "_task", "_tasks", "at_ns", "cpu", "entered_ns"),
        *("instructions", "ip", "regs", "ret_ip", "skip", "values"),
    )

    def __init__(
        self,
        regs: Regs,
        tasks: TaskInfo,
        values: tuple[Value, ...],
        at_ns: int,
        instructions: int,
        ip: int,
        ret_ip: int = 0,
        entered_ns: int = -1,
    ) -> None:
        self.regs = regs
        self.values = values
        self.at_ns = at_ns
        self.instructions = instructions
        self.ip = ip
        self.ret_ip = ret_ip
        self.entered_ns = entered_ns
        self.cpu = 0
        self.skip = False
        self._tasks = tasks
        self._task: Task | None = None
        self._flags: int | None = None

    @property
    def task(self) -> Task:
        """Who runs; read from the guest when first asked for."""
        if self._task is None:
            self._task = self._tasks.current(self.regs.cpu)
        return self._task

    @property
    def flags(self) -> int:
        """enum trace_flag_type: what the task has, and whether the processor takes interrupts."""
        if self._flags is not None:
            return self._flags
        return self.task.flags | (0 if self.regs.cpu.eflags & _EFLAGS_IF else IRQS_OFF)

    def keep(self) -> None:
        """It will be recorded later: what is read of the processor and its task is read now."""
        self._flags = self.flags


Getter: TypeAlias = Callable[[Hit], Value]


@dataclass(frozen=True, slots=True)
class Variable:
    """Something a filter, a histogram or an expression can name: a field of the event, or one every event has.

    `get` reads it from a hit; a number is cut to the field's size and sign already.
    """

    field: Field
    get: Getter

    @property
    def name(self) -> str:
        return self.field.name


# trace_define_generic_fields(), kernel/trace/trace_events.c: they are in no record and no format file
_STAMP: Final = Field("common_timestamp", "u64", 0, 8, signed=False)
_GENERIC: Final = ("CPU", "cpu", "COMM", "comm", "stacktrace", "STACKTRACE")


def variables(layout: Layout, type_number: int) -> dict[str, Variable]:
    """All that can be named of an event with this layout; its own fields come before those every event has."""
    word = layout.word
    found = {
        "common_type": Variable(layout.common[0], lambda hit: type_number),
        "common_flags": Variable(layout.common[1], lambda hit: hit.flags),
        "common_preempt_count": Variable(layout.common[2], lambda hit: hit.task.preempt_count),
        "common_pid": Variable(layout.common[3], lambda hit: hit.task.pid),
    }
    for name in _GENERIC:
        if name.lower() == "cpu":
            found[name] = Variable(Field(name, "int", 0, 4, signed=True), lambda hit: hit.cpu)
        elif name.lower() == "stacktrace":
            found[name] = Variable(Field(name, "char *", 0, word, signed=False), lambda hit: 0)
        else:
            found[name] = Variable(Field(name, "char *", 0, word, signed=False, text=True), lambda hit: hit.task.comm)
    found["common_cpu"] = Variable(Field("common_cpu", "int", 0, 4, signed=True), lambda hit: hit.cpu)
    found["common_timestamp"] = Variable(_STAMP, lambda hit: hit.at_ns)
    own = list(layout.fields)
    if layout.is_return:
        found[own[0].name] = Variable(own[0], lambda hit: hit.ip)
        found[own[1].name] = Variable(own[1], lambda hit: hit.ret_ip)
        own = own[2:]
    else:
        found[own[0].name] = Variable(own[0], lambda hit: hit.ip)
        own = own[1:]
    for index, field in enumerate(own):
        found[field.name] = Variable(field, _argument(index, field))
    return found


def _argument(index: int, field: Field) -> Getter:
    if field.text and field.parts == 1:
        return lambda hit: hit.values[index]
    if field.text:
        return lambda hit: _first(hit.values[index])
    if field.parts > 1 or field.array:
        # Linux compares an array as one number of its whole size
        size = field.size // field.parts
        mask = (1 << 8 * size) - 1

        def joined(hit: Hit) -> int:
            value = hit.values[index]
            parts = value if isinstance(value, tuple) else (value,)
            raw = b"".join((part & mask if isinstance(part, int) else 0).to_bytes(size, "little") for part in parts)
            return int.from_bytes(raw, "little")

        return joined
    return lambda hit: hit.values[index]


def _first(value: Value) -> Value:
    return value[0] if isinstance(value, tuple) else value
