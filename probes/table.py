"""Definitions that build on each other: events with several places, names that are taken, deletions.

Rules: pure, over `spec`; the order of checks is that of register_trace_kprobe(), register_trace_uprobe() and
dyn_event_release() (kernel/trace, Linux 6.12). Used by whoever keeps a table of events.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Final

from probes.errors import ProbeError
from probes.expr import MAX_TEXT
from probes.refusals import Refusal
from probes.spec import Deletion, FilePlace, ProbeSpec, Spec, UprobeSpec

_UNKNOWN: Final = "unknown"  # trace_kprobe_symbol() of a probe on an address


def admit(spec: Spec, known: Iterable[Spec], taken: Iterable[str] = ()) -> None:
    """Whether `spec` may join the events `known`, under its own name or as a further place of one of them.

    `taken` are names of events (GROUP/EVENT) that are not definitions. ProbeError with the kernel's token.
    """
    known = list(known)
    words = spec.definition.split(" ")
    if isinstance(spec, UprobeSpec):
        _check_counter(spec, known)
    same = [other for other in known if other.name == spec.name]
    siblings = [other for other in same if type(other) is type(spec)]
    if not siblings:
        if same or spec.name in taken:
            raise Refusal.EVENT_EXIST.at(words, 0)
        return
    first = siblings[0]
    if first.is_return != spec.is_return:
        raise Refusal.DIFF_PROBE_TYPE.at(words, 0)
    different = _first_difference(spec, first)
    if different is not None:
        raise Refusal.DIFF_ARG_TYPE.at(words, different + 2)
    for other in siblings:
        if _where(other) == _where(spec) and [arg.text for arg in other.args] == [arg.text for arg in spec.args]:
            raise Refusal.SAME_PROBE.at(words, 0)


def matches(deletion: Deletion, spec: Spec) -> bool:
    """Whether a `-:` line means that definition."""
    if deletion.event not in ("", spec.event) or deletion.group not in (None, spec.group):
        return False
    if not deletion.words:
        return True
    place, *texts = deletion.words
    if place != str(spec.place) or len(texts) > len(spec.args):
        return False
    # The kernel compares in a buffer of 64 bytes.
    return all(f"{arg.name}={arg.text}"[:MAX_TEXT] == text for arg, text in zip(spec.args, texts, strict=False))


def _first_difference(spec: Spec, first: Spec) -> int | None:
    """The index of the argument that differs in name or type, or is there in one only."""
    if len(spec.args) != len(first.args):
        return min(len(spec.args), len(first.args))
    for index, (new, old) in enumerate(zip(spec.args, first.args, strict=True)):
        if new.name != old.name or not new.type.same_field(old.type):
            return index
    return None


def _where(spec: Spec) -> tuple[str, int]:
    if isinstance(spec, ProbeSpec):
        place = spec.place
        symbol = _UNKNOWN if place.symbol is None else f"{place.module or ''}:{place.symbol}"
        return symbol, place.offset
    return spec.place.path, spec.place.offset


def _check_counter(spec: UprobeSpec, known: Iterable[Spec]) -> None:
    for other in known:
        place = other.place
        if (
            isinstance(place, FilePlace)
            and (place.path, place.offset) == (spec.place.path, spec.place.offset)
            and place.reference != spec.place.reference
        ):
            raise ProbeError(errno.EINVAL, "another probe there has another reference counter")
