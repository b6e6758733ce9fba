"""`gdbstub report`: a trace file in, its summary out.

Rules: a command line's work without a machine. Text out by way of `write`; UsageError for a file that cannot be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gdbstub.commands import Report
from gdbstub.status import SUCCESS, UsageError
from probes.report import Report as Summary
from probes.report import records_of


def report(command: Report, write: Callable[[str], object]) -> int:
    """Print it, and write the flame graph where one is asked for."""
    try:
        summary = Summary(_records(command.file))
        if command.flame is not None and summary.stacks:
            command.flame.write_text(summary.flame_graph(), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{error.filename}: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise UsageError(f"{command.file}: {error}") from error
    for line in summary.lines():
        write(f"{line}\n")
    if command.flame is not None and not summary.stacks:
        reason = f"{command.file} has no stack traces: `echo stacktrace > events/GROUP/EVENT/trigger` makes them"
        raise UsageError(f"no {command.flame}: {reason}")
    return SUCCESS


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix in (".pftrace", ".parquet"):
        raise UsageError(f"{path}: a report is made of .jsonl or text; this is for other tools")
    return records_of(path.read_bytes())
