"""`python -m tests.bench`: a table of ratios to paste into a note.

Rules: composition only. A row that cannot be measured here says why below the table; nothing is left out silently.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator

from emu.engine import version
from tests.bench.boots import boots
from tests.bench.events import events
from tests.bench.guests import embedded, interrupts, speed, traps
from tests.bench.hits import arming, hits
from tests.bench.remote import remote
from tests.bench.row import Effort, Row, Skipped, table
from tests.bench.stubs import stubs
from tests.bench.uprobes import uprobes

GROUPS: dict[str, Callable[[Effort], Iterator[Row | Skipped]]] = {
    "boot": boots,
    "speed": speed,
    "traps": traps,
    "hits": hits,
    "arming": arming,
    "events": events,
    "uprobes": uprobes,
    "embedded": embedded,
    "interrupt": interrupts,
    "remote": remote,
    "stubs": stubs,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.bench", description="Measure this machine against its yardsticks."
    )
    parser.add_argument("--only", choices=GROUPS, action="append", help="one group of rows (repeatable)")
    parser.add_argument("--quick", action="store_true", help="each number once, or three times where that is quick")
    given = parser.parse_args()
    effort = Effort(rounds=3, boots=1) if given.quick else Effort(rounds=5, boots=3)
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for name in given.only or GROUPS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        for found in GROUPS[name](effort):
            if isinstance(found, Row):
                rows.append(found)
            else:
                skipped.append(found)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{version()}, Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {load}; medians")
    print(table(rows))
    for missing in skipped:
        print(f"skipped: {missing.what}: {missing.reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
