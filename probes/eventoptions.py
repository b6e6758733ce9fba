"""The options that stand before a definition: which there are for which kind of probe, and what they mean.

Rules: pure; ProbeError for what is unknown, out of place or no number.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Final, TypeAlias

from probes.errors import ProbeError
from probes.kprobe import Arm
from probes.spec import MAX_MAXACTIVE
from probes.traceevents import Limits

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


def checked(options: Options, kind: str) -> Options:
    """`options`, all of which are `kind`'s and fit together."""
    known = set().union(*_KINDS.values())
    for name in options:
        if name not in known:
            raise ProbeError(errno.EINVAL, f"unknown option --{name}")
        if name not in _KINDS[kind]:
            raise ProbeError(errno.EOPNOTSUPP, f"--{name} is not available for this probe")
    pid = options.get("pid")
    if isinstance(pid, str) and not pid.isdecimal():
        raise ProbeError(errno.EINVAL, "--pid takes a number")
    if options.get("shadow") and options.get("trampoline"):
        raise ProbeError(errno.EINVAL, "--shadow and --trampoline are two ways of the same")
    return options


def limits(options: Options) -> Limits:
    """Whose hits are recorded."""
    pid, comm = options.get("pid"), options.get("comm")
    return Limits(None if pid is None else int(pid), None if comm is None else str(comm))


def maxactive(value: str | bool | int | None) -> int:
    """The number that --maxactive gave, 0 without it."""
    if value is None:
        return 0
    text = str(value)
    if not text.isdecimal() or not 1 <= int(text) <= MAX_MAXACTIVE:
        raise ProbeError(errno.EINVAL, f"--maxactive takes a number from 1 to {MAX_MAXACTIVE}")
    return int(text)


def arm(value: str | bool | int) -> Arm:
    """What --arm gave."""
    match value:
        case "auto" | "int3" | "hook":
            return value
    raise ProbeError(errno.EINVAL, "--arm takes auto, int3 or hook")
