"""The options that stand before a definition: which there are for which kind of probe, and what they mean.

Rules: pure; ProbeError for what is unknown, out of place or no number.
"""

from __future__ import annotations

import errno
import fnmatch
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from emu.iface import Cpu
from probes.errors import ProbeError
from probes.fetch import TaskInfo
from probes.kprobe import Arm
from probes.spec import MAX_MAXACTIVE

Options: TypeAlias = Mapping[str, str | bool | int]

_COMMON: Final = frozenset(("arm", "disabled", "pid", "comm"))
_RETURNS: Final = frozenset(("maxactive", "shadow", "trampoline"))
_KINDS: Final = {
    "kprobe": {*_COMMON, "pre", "post"},
    "kretprobe": {*_COMMON, *_RETURNS, "pre", "post"},
    "jprobe": {*_COMMON, "entry"},
    "uprobe": {*_COMMON, "shadow"},
}
KINDS: Final = frozenset(_KINDS)


def checked(options: Options, kind: str, unknown_tasks: str | None = None) -> Options:
    """`options`, all of which are `kind`'s and fit together. `unknown_tasks`: why nobody can tell tasks apart."""
    known = set().union(*_KINDS.values())
    for name in options:
        if name not in known:
            raise ProbeError(errno.EINVAL, f"unknown option --{name}")
        if name not in _KINDS[kind]:
            raise ProbeError(errno.EOPNOTSUPP, f"--{name} is not available for this probe")
    if unknown_tasks is not None and ("pid" in options or "comm" in options):
        raise ProbeError(errno.EOPNOTSUPP, f"--pid and --comm are not available: {unknown_tasks}")
    pid = options.get("pid")
    if isinstance(pid, str) and not (pid.isascii() and pid.isdecimal()):
        raise ProbeError(errno.EINVAL, "--pid takes a number")
    if options.get("shadow") and options.get("trampoline"):
        raise ProbeError(errno.EINVAL, "--shadow and --trampoline are two ways of the same")
    return options


def task_filter(options: Options, tasks: TaskInfo) -> Callable[[Cpu], bool] | None:
    """Whether the task that runs is one whose hits are wanted; None where everybody's are."""
    pid, comm = options.get("pid"), options.get("comm")
    if pid is None and comm is None:
        return None
    number = None if pid is None else int(pid)
    pattern = None if comm is None else str(comm)

    def wanted(cpu: Cpu) -> bool:
        task = tasks.current(cpu)
        return number in (None, task.pid) and (pattern is None or fnmatch.fnmatchcase(task.comm, pattern))

    return wanted


def maxactive(value: str | bool | int | None) -> int:
    """The number that --maxactive gave; 0, as without it, is the default."""
    text = str(value or 0)
    if not (text.isascii() and text.isdecimal()) or int(text) > MAX_MAXACTIVE:
        raise ProbeError(errno.EINVAL, f"--maxactive takes a number up to {MAX_MAXACTIVE}, 0 for the default")
    return int(text)


def arm(value: str | bool | int) -> Arm:
    """What --arm gave."""
    match value:
        case "auto" | "int3" | "hook":
            return value
    raise ProbeError(errno.EINVAL, "--arm takes auto, int3 or hook")
