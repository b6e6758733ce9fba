"""`gdbstub check` and `gdbstub symbols`: what a kernel would say to probe definitions, and what can be probed in it.

Rules: a command line's work without a machine: nothing is booted. Text out by way of `write`; the answer is the exit
status.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from emu.images.cache import Progress
from emu.kernelfile import KernelFile, open_kernel
from gdbstub.commands import Check, Symbols
from gdbstub.guestfiles import GuestFiles, Lookup, fetched_initramfs, host_folder
from gdbstub.status import NOT_REACHED, SUCCESS, UsageError
from probes import rawtext
from probes.arch.x86 import convention_for
from probes.discovery import find_symbols
from probes.judge import Judge, Verdict
from probes.scope import NAMES_SINCE, GuestScope, release_of

Write = Callable[[str], object]


def check(command: Check, write: Write, progress: Progress) -> int:
    """Judge every line of a file; 1 if one is rejected. UsageError, ImageError, FetchError."""
    lines = _lines(command)
    kernel = open_kernel(command.kernel, progress)
    convention = convention_for(kernel.bits)
    files = GuestFiles(convention, _lookup(command, kernel))
    judge = Judge(kernel, scope_of(kernel), files)
    rejected = False
    for line in lines:
        if not line.strip():
            continue
        if command.each:
            judge.forget()
        verdict = judge.judge(line, command.kind)
        if verdict.error is not None:
            rejected = True
            verdict.error.hint = judge.suggestion(verdict.error) or verdict.error.hint
        for text in [json.dumps(_row(verdict), ensure_ascii=False)] if command.json else _text(verdict):
            write(f"{text}\n")
    return NOT_REACHED if rejected else SUCCESS


def scope_of(kernel: KernelFile) -> GuestScope:
    """What definitions of that kernel know."""
    return GuestScope(kernel, convention_for(kernel.bits), kernel.btf, names=release_of(kernel.banner) >= NAMES_SINCE)


def symbols(command: Symbols, write: Write, progress: Progress) -> int:
    """List what a glob matches; 1 if nothing does. ImageError, FetchError."""
    kernel = open_kernel(command.kernel, progress)
    convention = convention_for(kernel.bits)
    scope = GuestScope(kernel, convention, kernel.btf)  # whatever its definitions know, prototypes help
    judge = Judge(kernel, scope, GuestFiles(convention, None))
    found = find_symbols(kernel, command.glob, types=scope.types, refusal=judge.entry_refusal)
    show = write if found.count else progress
    for line in found.lines:
        show(f"{line}\n" if found.count else line)
    return SUCCESS if found.count else NOT_REACHED


def _lines(command: Check) -> list[str]:
    try:
        if command.file is None:
            data = sys.stdin.buffer.read()
        else:
            data = command.file.read_bytes()
    except OSError as error:
        raise UsageError(f"{command.file or '-'}: {(error.strerror or str(error)).lower()}") from error
    # Lines are the kernel's, which knows no other line ends, and need not be UTF-8.
    return [rawtext.decode(line) for line in data.split(b"\n")]


def _lookup(command: Check, kernel: KernelFile) -> Lookup | None:
    if command.sysroot is not None:
        if not command.sysroot.is_dir():
            raise UsageError(f"{command.sysroot}: not a folder")
        return host_folder(command.sysroot)
    return None if kernel.fetched is None else fetched_initramfs(kernel.fetched)


def _text(verdict: Verdict) -> list[str]:
    if verdict.error is None:
        return [f"ok: {verdict.listing}"] if verdict.listing else [f"ok: {verdict.definition.strip()}"]
    first, *more = verdict.error.lines()
    if verdict.error.definition is None:
        more = [f"  {verdict.definition.strip()}", *more]
    return [f"error: {first}", *more]


def _row(verdict: Verdict) -> dict[str, Any]:
    """`error` and `caret` are what the kernel's error_log holds, empty and null where it is silent; `note` is ours."""
    error, definition = verdict.error, rawtext.readable(verdict.definition)
    if error is None:
        return {
            "definition": definition,
            "verdict": "accept",
            "errno": "0",
            "error": "",
            "caret": None,
            "listing": rawtext.readable(verdict.listing),
            "note": "",
        }
    logged = error.definition is not None
    return {
        "definition": definition,
        "verdict": "reject",
        "errno": f"-{error.name}",
        "error": error.reason if logged else "",
        "caret": error.column if logged else None,
        "listing": "",
        "note": (error.hint or "") if logged else error.reason,
    }
