"""What the `monitor` commands work on: narrow protocols, and `Services`, which has one of each or None.

Rules: types only, for the machine's thread. Implemented by `services`, `scripts`, `threads` and `probes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from emu.iface import Machine
from gdbstub.threads import ThreadChoice
from probes.btf import Btf

OptionValues: TypeAlias = Mapping[str, "str | bool"]


class Probes(Protocol):
    """The probe engine as a person uses it. Every method answers with lines to show and may raise ProbeError."""

    def add(self, kind: str, definition: str, options: OptionValues, /) -> Sequence[str]:
        """Register a probe of `kind` ("kprobe" ...); `options` are the names without dashes, True for a bare one."""
        ...

    def list(self) -> Sequence[str]: ...

    def info(self, name: str, /) -> Sequence[str]: ...

    def enable(self, pattern: str, /) -> Sequence[str]:
        """`pattern` is a name, a glob or "all", here and below."""
        ...

    def disable(self, pattern: str, /) -> Sequence[str]: ...

    def delete(self, pattern: str, /) -> Sequence[str]: ...

    def kernel_list(self) -> Sequence[str]: ...

    def reset(self) -> Sequence[str]: ...


class Trace(Protocol):
    """The ring of records that probe hits are written to."""

    def lines(self, count: int | None, /) -> Sequence[str]:
        """The last `count` records (None: all), rendered as ftrace does, with its header."""
        ...

    def clear(self) -> None: ...

    def enable(self, on: bool, /) -> None:
        """Recording on or off; hits are counted either way."""
        ...

    def save(self, path: str, /) -> Sequence[str]:
        """Write all records to a host file; MachineError or ProbeError where that is refused or fails."""
        ...

    def stream(self, sink: Callable[[str], None] | None, /) -> None:
        """From now on give each record's line to `sink`, in the machine's thread; None ends it."""
        ...


class Inspector(Protocol):
    """What the machine can tell about itself."""

    def lines(self, topic: str, /) -> Sequence[str]:
        """`topic` is one of TOPICS; MachineError where this machine has no such part."""
        ...


class Snapshots(Protocol):
    """Named states of the machine. Every method answers with lines to show and may raise MachineError."""

    def save(self, name: str, /) -> Sequence[str]: ...

    def restore(self, name: str, /) -> Sequence[str]: ...

    def list(self) -> Sequence[str]: ...


class Scripts(Protocol):
    """Files of the host's that may be used. The methods answer with lines and may raise MachineError or ProbeError."""

    def run(self, name: str, /) -> Sequence[str]:
        """Execute a Python file; the lines are what it printed."""
        ...

    def load_object(self, name: str, /) -> Sequence[str]:
        """Put a relocatable object's code where the guest can be sent to it."""
        ...


class System(Protocol):
    """The guest's operating system, in lines. ProbeError says what is not available, and why."""

    def processes(self) -> Sequence[str]: ...

    def maps(self, pid: int, /) -> Sequence[str]: ...

    def files(self, pid: int, /) -> Sequence[str]: ...

    def modules(self) -> Sequence[str]: ...

    def log(self) -> Sequence[str]: ...

    def page_cache(self, path: str, /) -> Sequence[str]: ...


class Tracefs(Protocol):
    """The tree of /sys/kernel/tracing. Every method may raise ProbeError."""

    def read(self, path: str, /) -> str: ...

    def write(self, path: str, text: str, /, *, append: bool) -> Sequence[str]: ...

    def list(self, path: str = "", /) -> Sequence[str]: ...


TOPICS: Final = ("registers", "mem", "tlb", "pic", "timers", "stats")


@dataclass(frozen=True, slots=True)
class Services:
    """What the commands work on. `disassemble(paddr, count)` gives one line an instruction, `types` the kernel's own
    types; `quit` ends the program."""

    machine: Machine
    probes: Probes | None = None
    trace: Trace | None = None
    tracefs: Tracefs | None = None
    inspector: Inspector | None = None
    snapshots: Snapshots | None = None
    disassemble: Callable[[int, int], Sequence[str]] | None = None
    scripts: Scripts | None = None
    system: System | None = None
    types: Callable[[], Btf | None] | None = None
    threads: ThreadChoice | None = None
    quit: Callable[[], None] | None = None
