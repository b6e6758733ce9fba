"""Whose error it is that came out of a handler: a user's, who is told where, or one of ours.

Rules: asked when a handler has raised, never before; the guest goes on as if the handler had returned None. kprobes.rst
lets a handler only return; ours are Python, and a wrong one must not cost the run it looks at.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Final

from emu.iface import Machine
from emu.stops import HandlerFailed

_OURS: Final = ("emu", "probes", "gdbstub")
_LIBRARIES: Final = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def ask(machine: Machine, pc: int, handler: Callable[..., object], *arguments: object) -> object:
    """What a handler says of the hit at `pc`; None where it raises."""
    try:
        return handler(*arguments)
    except Exception as error:  # noqa: BLE001  # the boundary to a user's code
        end_run_of(machine, pc, error)
        return None


def end_run_of(machine: Machine, pc: int, error: Exception) -> None:
    """The run ends with HandlerFailed. Raises `error` again where it did not come out of a user's code."""
    top = error.__traceback__
    while top is not None and _package(top) in _OURS:
        top = top.tb_next
    if top is None or top.tb_frame.f_code.co_filename.startswith(_LIBRARIES):
        raise error  # a library that we called
    file = top.tb_frame.f_code.co_filename
    line = [step.lineno for step in traceback.extract_tb(top) if step.filename == file][-1]
    reason = f"{type(error).__name__}: {error}".rstrip(": ")
    report = "".join(traceback.format_exception(type(error), error, top))
    machine.end_run(HandlerFailed(pc, f"{file}:{line}", reason, report))


def _package(step: TracebackType) -> str:
    name: str = step.tb_frame.f_globals.get("__name__", "")
    return name.partition(".")[0]
