"""A summary of a trace: what was hit how often, how long calls took, and where from.

Rules: pure; records come as dictionaries, as `Record.as_dict` makes them. A flame graph is made of the records that the
stacktrace trigger writes.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

TOP: Final = 20
_BAR: Final = 40
_DEPTH: Final = 256  # frames, from the innermost, that count of a stack: twice what a kernel records
_WIDTH, _ROW = 1200, 16  # pixels
_CHARACTER: Final = 7
_LINE: Final = re.compile(
    r" *(?P<comm>.*?)-(?P<pid>\d+) +\[(?P<cpu>\d+)\] (?P<flags>\S{5}) +(?P<seconds>\d+)\.(?P<rest>\d{6}): (?P<what>.*)"
)
_PLACE: Final = re.compile(r"(?P<event>[\w.\\-]+): \((?P<where>.*?)\)(?: |$)")


def records_of(data: bytes) -> Iterator[Mapping[str, Any]]:
    """The records of a trace as JSON lines or ftrace's text; ValueError with the line that is neither."""
    lines = data.decode("utf-8", "backslashreplace").split("\n")
    first = next((line for line in lines if line.strip()), "")
    if first.startswith("{"):
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_record(number, line)
        return
    found: dict[str, Any] | None = None
    strange = 0  # the first line that is no record's; behind one it is a string's with a newline in it
    for number, line in enumerate(lines, start=1):
        if line.startswith("#") or not line.strip():
            continue
        if line.startswith(" => "):
            if found is not None:
                found.setdefault("lines", []).append(line[4:])
            continue
        match = _LINE.match(line)
        if match is None and found is None:
            strange = strange or number
        if match is not None:
            if found is not None:
                yield found
            found = _text_record(match)
    if found is not None:
        yield found
    elif strange:
        raise ValueError(f"line {strange} is neither ftrace's text nor JSON")


def _json_record(number: int, line: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} is no JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        raise ValueError(f"line {number} is no record of a trace")
    return record


def _text_record(match: re.Match[str]) -> dict[str, Any]:
    record: dict[str, Any] = {"comm": match["comm"].strip(), "pid": int(match["pid"])}
    record["timestamp_ns"] = int(match["seconds"]) * 10**9 + int(match["rest"]) * 1000
    place = _PLACE.match(match["what"])
    if place is None:
        return record | {"event": match["what"].strip("<>"), "where": ""}
    return record | {"event": place["event"], "where": place["where"]}


@dataclass
class Report:
    """What `records` add up to."""

    records: Iterable[Mapping[str, Any]]
    total: int = 0
    events: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    latencies: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    stacks: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """Outermost first."""

    def __post_init__(self) -> None:
        for record in self.records:
            event = str(record["event"]).strip("/")
            lines = record.get("lines")
            if isinstance(lines, list):
                if event == "stack trace":
                    self.stacks[tuple(str(frame) for frame in reversed(lines[:_DEPTH]))] += 1
                continue
            self.total += 1
            function = re.sub(r"^.* <- |\+0x.*$", "", str(record.get("where", "")))
            self.events[f"{event} {function}"] += 1
            self.tasks[f"{record.get('comm', '')}-{record.get('pid', '')}"] += 1
            if isinstance(record.get("duration_ns"), int):
                self.latencies[f"{event} {function}"].append(record["duration_ns"])

    def lines(self) -> list[str]:
        """The report as text."""
        shown = [f"{self.total:,} hits", "", "hits        event, function"]
        shown += [f"{count:>10,}  {name}" for name, count in self.events.most_common(TOP)]
        shown += ["", "hits        task"]
        shown += [f"{count:>10,}  {name}" for name, count in self.tasks.most_common(TOP)]
        for name, taken in sorted(self.latencies.items(), key=lambda item: -sum(item[1]))[:TOP]:
            shown += ["", *_latency(name, taken)]
        if self.stacks:
            shown += ["", "hits        stack, innermost first"]
            for stack, count in self.stacks.most_common(TOP):
                shown.append(f"{count:>10,}  {' <- '.join(reversed(stack))}")
        return shown

    def flame_graph(self) -> str:
        """An SVG: a box for each function below its caller, as wide as its share of the stacks."""
        total = sum(self.stacks.values())
        boxes = list(_boxes(self.stacks, (), 0.0, _WIDTH / max(total, 1)))
        depth = max((box[2] for box in boxes), default=0) + 1
        height = (depth + 1) * _ROW
        rows = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
            'font-family="monospace" font-size="11">'
        ]
        for name, left, level, width, count in boxes:
            label = html.escape(name)
            fits = max(int(width / _CHARACTER) - 1, 0)
            hue = sum(name.encode()) % 50
            top = height - (level + 1) * _ROW
            rows.append(
                f'<g><title>{label}: {count:,} of {total:,}</title><rect x="{left:.1f}" y="{top}" width="{width:.1f}" '
                f'height="{_ROW - 1}" fill="hsl({hue},80%,60%)"/><text x="{left + 2:.1f}" y="{top + 11}">'
                f"{html.escape(name[:fits])}</text></g>"
            )
        return "\n".join([*rows, "</svg>"]) + "\n"


def _latency(name: str, taken: Sequence[int]) -> list[str]:
    """Powers of two of nanoseconds, with a bar for each."""
    ordered = sorted(taken)
    middle, late = ordered[len(ordered) // 2], ordered[min(len(ordered) * 99 // 100, len(ordered) - 1)]
    shown = [f"{name}: {len(taken):,} calls, median {middle:,} ns, 99 % {late:,} ns, longest {ordered[-1]:,} ns"]
    buckets = Counter(max(value, 1).bit_length() - 1 for value in taken)
    top = max(buckets.values())
    for power in range(min(buckets), max(buckets) + 1):
        count = buckets[power]
        shown.append(f"{1 << power:>14,} ns  {count:>8,}  {'#' * -(-count * _BAR // top)}")
    return shown


def _boxes(
    stacks: Mapping[tuple[str, ...], int], path: tuple[str, ...], left: float, scale: float
) -> Iterator[tuple[str, float, int, float, int]]:
    """(function, left edge, level, width, hits) of everything called by `path`; at most _DEPTH deep."""
    level = len(path)
    callees: Counter[str] = Counter()
    for stack, count in stacks.items():
        if len(stack) > level and stack[:level] == path:
            callees[stack[level]] += count
    for name, count in sorted(callees.items()):
        yield name, left, level, count * scale, count
        yield from _boxes(stacks, (*path, name), left, scale)
        left += count * scale
