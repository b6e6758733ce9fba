"""Probes: what a hit of each kind costs, what arming costs, and what probes cost that are never hit.

Rules: the yardstick is a Python callback that bare Unicorn calls at one address, as its own manual says.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import unicorn

from emu.machine import Machine
from probes import Jprobe, Kprobe, Kretprobe, Manager
from tests.bench.guests import MIXED, bare, loop
from tests.bench.row import Effort, Row, interleaved, seconds
from tests.support.trapping import CODE

_CALLS = "l: call f; jmp l; f: add rax, rbx; ret"
_FUNCTION = CODE + 7  # f: after a 5-byte call and a 2-byte jmp
_ROUND = 4  # instructions
_HITS = 20_000
_ARMED = 10_000
_NEVER_HIT = 1_000
_INSTRUCTIONS = 3_000_000
_UNSEEN = 0x10000  # from the loop to the code that never runs

AGAINST = "bare UC_HOOK_CODE, Python"


def hits(effort: Effort) -> Iterator[Row]:
    """Each with an empty handler."""
    cases: dict[str, tuple[str, Callable[[], float]]] = {
        "kprobe hit, boosted": ("4", _probed([_kprobe()])),
        "kprobe hit, stepped for a post-handler": ("8", _probed([_kprobe(post_handler=_nothing)])),
        "kprobe hit, PC hook": ("", _probed([_kprobe(arm="hook")])),
        "kprobe hit, aggregate of 4": ("", _probed([_kprobe() for _ in range(4)])),
        "kretprobe, entry and return, trampoline": ("", _probed([_kretprobe(shadow=False)])),
        "kretprobe, entry and return, shadow": ("", _probed([_kretprobe(shadow=True)])),
        "jprobe, 2 arguments": ("", _probed([Jprobe(kp=Kprobe(addr=_FUNCTION), entry=_entry)])),
    }
    sides = [side for _, side in cases.values()]
    *ours, theirs = interleaved(effort.rounds, *sides, bare_hits())
    for (what, (limit, _)), value in zip(cases.items(), ours, strict=True):
        yield Row(what, value, "us", theirs, AGAINST, limit)


def bare_hits() -> Callable[[], float]:
    """The yardstick: microseconds of each of its hits."""
    yardstick = bare(_CALLS)
    yardstick.hook_add(unicorn.UC_HOOK_CODE, _nothing, begin=_FUNCTION, end=_FUNCTION)
    return _runs(lambda: yardstick.emu_start(CODE, 0, count=_HITS * _ROUND))


def _nothing(*_: object) -> None: ...


def _entry(first: int, second: int) -> None: ...


def _kprobe(**how: object) -> Kprobe:
    return Kprobe(addr=_FUNCTION, pre_handler=_nothing, **how)  # type: ignore[arg-type]


def _kretprobe(shadow: bool) -> Kretprobe:
    return Kretprobe(kp=Kprobe(addr=_FUNCTION), handler=_nothing, shadow=shadow)


def _probed(probes: Sequence[Kprobe | Kretprobe | Jprobe]) -> Callable[[], float]:
    machine = loop(_CALLS)
    Manager(machine).register_many(probes)
    return _runs(lambda: machine.run(_HITS * _ROUND))


def _runs(call: Callable[[], object]) -> Callable[[], float]:
    """Microseconds a hit of a `call` that makes _HITS."""
    return lambda: seconds(call) / _HITS * 1e6


def arming(effort: Effort) -> Iterator[Row]:
    """Many probes at once, by int3, each on an instruction of its own."""

    def arm() -> float:
        machine = _with_unseen(_ARMED)
        probes = _unseen_probes(_ARMED)
        manager = Manager(machine)
        return seconds(lambda: manager.register_many(probes))

    yield Row(f"arming {_ARMED:,} kprobes", interleaved(effort.rounds, arm)[0], "s", limit="2")
    ours, theirs = _with_unseen(_NEVER_HIT), _with_unseen(_NEVER_HIT)
    Manager(ours).register_many(_unseen_probes(_NEVER_HIT))
    sides = [lambda machine=machine: seconds(lambda: machine.run(_INSTRUCTIONS)) for machine in (ours, theirs)]  # type: ignore[misc]
    pairs = [(sides[0](), sides[1]()) for _ in range(4 * effort.rounds)]
    mine, bare_time = (statistics.median(side) * 1e9 / _INSTRUCTIONS for side in zip(*pairs, strict=True))
    what = f"an instruction with {_NEVER_HIT:,} kprobes armed and never hit"
    yield Row(what, mine, "ns", bare_time, "the same without", limit="1.02")


def _with_unseen(count: int) -> Machine:
    """The loop runs; behind it lie `count` instructions of three bytes that do not."""
    machine = loop(MIXED)
    machine.memory.write(CODE + _UNSEEN, b"\x48\x89\xd8" * count)  # mov rax, rbx
    return machine


def _unseen_probes(count: int) -> list[Kprobe]:
    return [Kprobe(addr=CODE + _UNSEEN + 3 * index, pre_handler=_nothing) for index in range(count)]
