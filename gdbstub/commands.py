"""What a command line asks for, as values: one class a command, and `RunOptions` for those that run a machine.

Rules: standard library and `gdbstub.address`; nothing of argparse, nothing is opened. Made by `options.parse`, carried
out by `cli` and `program`; scripts and tests may make them by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from gdbstub.address import Address, Tcp

if TYPE_CHECKING:  # to look at a command line takes no machine
    from probes.kprobe import Arm

ConsolePlace: TypeAlias = Literal["stdio", "none"] | Path | Tcp
TraceFormat: TypeAlias = Literal["txt", "jsonl", "pftrace", "parquet"]
LogTopic: TypeAlias = Literal["int", "syscall", "io", "rsp"]


@dataclass(frozen=True, slots=True)
class TraceTarget:
    """Where trace records go as they come; `path` None is standard output."""

    path: Path | None
    format: TraceFormat = "txt"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a machine is run, whatever it was made from. `listen` None lets no debugger in."""

    listen: Address | None = None
    observe: Address | None = None
    threads: Literal["cpus", "tasks"] = "cpus"
    wait: bool = False
    probes: tuple[str, ...] = ()
    probe_files: tuple[Path, ...] = ()
    objects: tuple[Path, ...] = ()
    """Files in `allow_scripts`."""
    allow_scripts: Path | None = None
    serve_dir: Path | None = None
    sysroot: Path | None = None
    early: bool = False
    arm: Arm = "auto"
    linux_limits: bool = False
    trace: TraceTarget | None = None
    trace_dir: Path | None = None
    console: ConsolePlace = "none"
    sends: tuple[tuple[str, bytes], ...] = ()
    """(regular expression to wait for, bytes to type), in order."""
    until: str | None = None
    budget: int | None = None
    pace: Literal["real", "none"] | None = None
    execute: str | None = None
    snapshot: Path | None = None
    restore: Path | None = None
    summary: str | None = None
    """A path, or "-" for standard output."""
    log: frozenset[LogTopic] = frozenset()
    log_file: Path | None = None
    log_rsp: Path | None = None
    words: tuple[str, ...] = ()
    """The command line, for a record that is to be replayed."""

    @property
    def has_goal(self) -> bool:
        """Whether the run ends by itself, with nobody there."""
        return self.until is not None or self.execute is not None or self.budget is not None


@dataclass(frozen=True, slots=True)
class Boot:
    """A Linux kernel: a file, or the name of one that can be fetched."""

    run: RunOptions
    kernel: str = "amd64"
    initrd: Path | None = None
    append: str = ""
    memory: int | None = None
    add: tuple[tuple[Path, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """Any other image; `embedded` and `embedded32` name our own small kernel. Empty where `run.restore` is given."""

    run: RunOptions
    image: str = ""
    base: int | None = None
    entry: int | None = None
    bits: int | None = None
    memory: int | None = None
    initrd: Path | None = None
    append: str = ""


@dataclass(frozen=True, slots=True)
class Fetch:
    """A kernel and BusyBox into the cache; `show` prints where they are, `debug` makes its type profile."""

    architecture: str = "amd64"
    package: str | None = None
    show: bool = False
    debug: bool = False


@dataclass(frozen=True, slots=True)
class DrgnShell:
    """drgn's own shell on the kernel in a snapshot."""

    snapshot: Path


@dataclass(frozen=True, slots=True)
class MonitorCommand:
    """A monitor command for the stub at `address`."""

    address: Address
    text: str = "help"


@dataclass(frozen=True, slots=True)
class Check:
    """Probe definitions, judged as a kernel would; `file` None is standard input. `each`: every line alone."""

    file: Path | None
    kernel: str = "amd64"
    kind: Literal["kprobe", "uprobe", "auto"] = "auto"
    sysroot: Path | None = None
    each: bool = False
    json: bool = False


@dataclass(frozen=True, slots=True)
class Symbols:
    """A kernel's symbols by glob."""

    glob: str
    kernel: str = "amd64"


@dataclass(frozen=True, slots=True)
class Report:
    """What a trace adds up to; `flame` is where its flame graph goes."""

    file: Path
    flame: Path | None = None


@dataclass(frozen=True, slots=True)
class Replay:
    """A record of `--log-rsp`, against a machine made as its own was."""

    file: Path


@dataclass(frozen=True, slots=True)
class Demo:
    """The guided main job, which takes no options."""


Work: TypeAlias = Boot | Load | Fetch | Check | Symbols | DrgnShell | Report | Replay | Demo
"""What takes more than talking to a stub that runs elsewhere."""
Command: TypeAlias = Work | MonitorCommand
