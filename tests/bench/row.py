"""What a benchmark gives: rows of the table, and how a number is taken.

Rules: standard library only. A ratio is taken in one run: both sides measured in turn, several times, the medians
divided. What one thread does alone is measured in its CPU time, so that a busy host does not count; what waits for
another process or thread, in wall time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `ours` and `theirs` are in `unit`; `limit` is what the project must reach, as text."""

    what: str
    ours: float
    unit: str
    theirs: float | None = None
    against: str = ""
    limit: str = ""

    def cells(self) -> tuple[str, ...]:
        ratio = "" if self.theirs is None else f"{self.ours / self.theirs:.2f}"
        theirs = "" if self.theirs is None else _number(self.theirs)
        return self.what, _number(self.ours), self.unit, theirs, self.against, ratio, self.limit


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that cannot be had here, and why."""

    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure: `rounds` of each short measurement, `boots` of each kernel on each side."""

    rounds: int
    boots: int


HEADINGS = ("what", "ours", "unit", "theirs", "against", "ratio", "must reach")


def table(rows: list[Row]) -> str:
    """Aligned columns with a heading."""
    lines = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    right = {1, 3, 5}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def interleaved(rounds: int, *sides: Callable[[], float]) -> list[float]:
    """Each side measured `rounds` times, in turn, so that a busy host hits all alike. -> the median of each."""
    taken: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, values in zip(sides, taken, strict=True):
            values.append(side())
    return [statistics.median(values) for values in taken]


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of this thread that `call` takes."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 10 else f"{value:.1f}"
