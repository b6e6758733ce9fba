"""Why a run of a machine ended: one frozen class a reason.

Rules: values only, and standard library only. Addresses are linear; `pc` is the instruction about to run.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Breakpoint:
    """The instruction at `pc` is about to run and a debugger's breakpoint stands on it."""

    pc: int
    hardware: bool = False


@dataclass(frozen=True, slots=True)
class ProbeStop:
    """A probe asked for it. About to execute the instruction at `pc`, where it stands."""

    pc: int


class WatchKind(enum.Enum):
    """Which accesses a watchpoint stops after, in GDB's words."""

    WRITE = "watch"
    READ = "rwatch"
    ACCESS = "awatch"


@dataclass(frozen=True, slots=True)
class Watchpoint:
    """The instruction before `pc`, or an interrupt that was delivered to `pc`, accessed memory that is watched.

    `address` is the first byte of the access that the watchpoint, of `kind`, is on.
    """

    pc: int
    kind: WatchKind
    address: int


@dataclass(frozen=True, slots=True)
class ExceptionRaised:
    """The guest is about to get exception `vector`, for the instruction at `pc` (a trap: for the one before it).

    The next run delivers it, unless the pc is changed. `code` is its error code, `address` what a page fault is about.
    """

    pc: int
    vector: int
    code: int | None = None
    address: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction was executed for a debugger; `pc` is the next one.

    With `left` none was: an interrupt came before the instruction there, and the guest went on elsewhere for so long
    that the step ends where it is.
    """

    pc: int
    left: int | None = None


@dataclass(frozen=True, slots=True)
class Interrupted:
    """`Machine.request_stop` was called."""

    pc: int


@dataclass(frozen=True, slots=True)
class Budget:
    """The instruction budget of this run is used up."""

    instructions: int


@dataclass(frozen=True, slots=True)
class ConsoleMatch:
    """The guest printed a line that the awaited pattern matches."""

    text: str


@dataclass(frozen=True, slots=True)
class GuestExit:
    """The command that `--exec` ran in the guest's shell ended with `status`."""

    status: int


@dataclass(frozen=True, slots=True)
class Reset:
    """The guest asked for a reset (keyboard controller, port 0xcf9)."""

    requested: bool = True


@dataclass(frozen=True, slots=True)
class PowerOff:
    """The guest switched the machine off."""


@dataclass(frozen=True, slots=True)
class Halted:
    """HLT and nothing can ever wake the processor; `reason` says why."""

    pc: int
    reason: str


@dataclass(frozen=True, slots=True)
class TripleFault:
    """A fault while delivering a double fault; `vector` is the first one."""

    pc: int
    vector: int


@dataclass(frozen=True, slots=True)
class Panic:
    """The guest kernel entered its `panic`; `message` is its format string, where it can be read."""

    pc: int
    message: str


@dataclass(frozen=True, slots=True)
class HandlerFailed:
    """A Python handler of a probe's user raised, for the instruction at `pc`; the guest is as if it had returned None.

    `where` is `FILE:LINE` of the handler's code, `error` the exception in a line, `report` its traceback from there.
    """

    pc: int
    where: str
    error: str
    report: str


@dataclass(frozen=True, slots=True)
class Defect:
    """A defect of ours: an exception escaped a hook. `report` is the traceback to send."""

    pc: int
    report: str


Stop: TypeAlias = (
    Breakpoint
    | ProbeStop
    | Watchpoint
    | ExceptionRaised
    | Step
    | Interrupted
    | Budget
    | ConsoleMatch
    | GuestExit
    | Reset
    | PowerOff
    | Halted
    | TripleFault
    | Panic
    | HandlerFailed
    | Defect
)
