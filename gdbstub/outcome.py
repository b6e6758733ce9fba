"""How a run ended: the exit status, a line for the user, the summary.

Rules: between runs, in the machine's thread; nothing is opened or written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from emu import stops
from emu.boot import GuestMachine
from gdbstub.status import CRASHED, DEFECT, NOT_REACHED, SUCCESS, USAGE
from probes.manager import EventStatus


@dataclass(frozen=True, slots=True)
class Outcome:
    """`stop` is None where the user ended the run; `text` is empty where there is nothing to say."""

    stop: stops.Stop | None
    status: int
    text: str


def judge(stop: stops.Stop | None, crashed: bool) -> Outcome:
    """What a stop means for who started the run; `crashed`: the guest's kernel has entered its panic at some time."""
    status, text = _judge(stop)
    if crashed and not isinstance(stop, stops.ConsoleMatch | stops.GuestExit | stops.Defect):
        status = CRASHED
    return Outcome(stop, status, text)


def _judge(stop: stops.Stop | None) -> tuple[int, str]:
    match stop:
        case None:
            return SUCCESS, ""
        case stops.ConsoleMatch(text=text):
            return SUCCESS, f"matched: {text.strip()}"
        case stops.GuestExit(status=status):
            return status, f"the guest ended with status {status}"
        case stops.PowerOff():
            return SUCCESS, "the guest powered off"
        case stops.Reset(requested=requested):
            return (SUCCESS, "the guest reset the machine") if requested else (CRASHED, "the guest reset unasked")
        case stops.Panic(pc=pc, message=message):
            return CRASHED, f"the guest panicked at {pc:#x}: {message}"
        case stops.TripleFault(pc=pc, vector=vector):
            return CRASHED, f"triple fault at {pc:#x}, begun by vector {vector}"
        case stops.Budget(instructions=count):
            return NOT_REACHED, f"the budget is used up at instruction {count:,}"
        case stops.Halted(pc=pc, reason=reason):
            return NOT_REACHED, f"halted for good at {pc:#x}: {reason}"
        case stops.HandlerFailed(pc=pc, where=where, error=error):
            return USAGE, f"a probe's handler failed at {pc:#x}: {where}: {error}"
        case stops.Defect(report=report):
            return DEFECT, f"a defect of gdbstub; please report this:\n{report}"
        case (
            stops.Breakpoint(pc=pc)
            | stops.Watchpoint(pc=pc)
            | stops.Step(pc=pc)
            | stops.Interrupted(pc=pc)
            | stops.ProbeStop(pc=pc)
        ):
            return SUCCESS, f"stopped at {pc:#x}"
        case stops.ExceptionRaised(pc=pc, vector=vector):
            return SUCCESS, f"stopped at {pc:#x}, before exception {vector}"


def summary(machine: GuestMachine, probes: Sequence[EventStatus], outcome: Outcome) -> str:
    """The JSON of --summary. The processor is its general registers, program counter and flags, in hexadecimal."""
    names = machine.registers.arch.names
    names = names[: names.index("eflags") + 1]
    fields = {
        "stop": "user" if outcome.stop is None else type(outcome.stop).__name__,
        "exit": outcome.status,
        "instructions": machine.instructions,
        "virtual_ns": machine.clock.now_ns,
        "ram_sha256": machine.ram_sha256(),
        "cpu": {name: hex(value) for name, value in zip(names, machine.registers.read_many(names), strict=True)},
        "probes": [
            {"name": p.name, "kind": p.kind, "symbol": p.symbol, "hits": p.hits, "missed": p.missed} for p in probes
        ],
    }
    return json.dumps(fields, indent=1) + "\n"
