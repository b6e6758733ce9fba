"""Which definitions belong together: a further place of a known event, and what a deletion means.

Rules: pure; compares what `spec` has understood. Source: append_trace_kprobe() and trace_kprobe_match(),
kernel/trace/trace_kprobe.c, Linux 6.12, with the columns measured on 6.12.117.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from probes.errors import ProbeError
from probes.spec import Deletion, ProbeSpec


def is_meant(wanted: Deletion, spec: ProbeSpec) -> bool:
    """The place and the first arguments, as far as they are given, are those of the definition."""
    own = [str(spec.place), *(f"{arg.name}={arg.text}" for arg in spec.args)]
    return own[: len(wanted.words)] == list(wanted.words)


def check_same_shape(known: Sequence[ProbeSpec], spec: ProbeSpec) -> None:
    """A further definition under a known name adds a place; its arguments must be the same ([M] 6.12)."""
    if not known:
        return
    first = known[0]
    if first.is_return != spec.is_return:
        raise ProbeError(
            errno.EEXIST,
            "Probe type is different from existing probe",
            definition=spec.definition,
            column=0,
            token="DIFF_PROBE_TYPE",
        )
    for index, (old, new) in enumerate(zip(first.args, spec.args, strict=False)):
        if (old.name, old.type) != (new.name, new.type):
            raise _different(spec, index)
    if len(first.args) != len(spec.args):
        raise _different(spec, min(len(first.args), len(spec.args)))
    if any(other.place == spec.place and other.args == spec.args for other in known):
        raise ProbeError(
            errno.EEXIST,
            "There is already the exact same probe event",
            definition=spec.definition,
            column=0,
            token="SAME_PROBE",
        )


def _different(spec: ProbeSpec, index: int) -> ProbeError:
    return ProbeError(
        errno.EEXIST,
        "Argument type or name is different from existing probe",
        definition=spec.definition,
        column=_column(spec, index),
        token="DIFF_ARG_TYPE",
    )


def _column(spec: ProbeSpec, index: int) -> int:
    """Where argument `index` begins in the definition, or where a further one would."""
    words = spec.definition.split(" ")
    return min(sum(len(word) + 1 for word in words[: index + 2]), len(spec.definition))
