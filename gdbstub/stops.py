"""What each reason to stop is on the wire: an exit status, a signal of GDB's, a text.

Rules: pure functions over `emu.iface`'s stop reasons. Signals are GDB's numbers (include/gdb/signals.def), which are
not Linux's.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, assert_never

from emu.stops import (
    Breakpoint,
    Budget,
    ConsoleMatch,
    Defect,
    ExceptionRaised,
    GuestExit,
    Halted,
    HandlerFailed,
    Interrupted,
    Panic,
    PowerOff,
    ProbeStop,
    Reset,
    Step,
    Stop,
    TripleFault,
    Watchpoint,
)

SIGINT: Final = 2
SIGTRAP: Final = 5
SIGABRT: Final = 6
SIGSEGV: Final = 11
SIGILL, SIGFPE, SIGBUS = 4, 8, 10

EXCEPTIONS: Final = {
    0: ("divide error", SIGFPE),
    1: ("debug trap", SIGTRAP),
    3: ("breakpoint instruction", SIGTRAP),
    4: ("overflow", SIGSEGV),
    5: ("bound range exceeded", SIGSEGV),
    6: ("invalid opcode", SIGILL),
    7: ("device not available", SIGFPE),
    8: ("double fault", SIGSEGV),
    10: ("invalid TSS", SIGSEGV),
    11: ("segment not present", SIGBUS),
    12: ("stack fault", SIGBUS),
    13: ("general protection fault", SIGSEGV),
    14: ("page fault", SIGSEGV),
    16: ("x87 floating-point error", SIGFPE),
    17: ("alignment check", SIGBUS),
    19: ("SIMD floating-point error", SIGFPE),
}
"""Vector -> its name (SDM vol. 3, table 6-1) and the signal that Linux makes of it (arch/x86/kernel/traps.c)."""


def exit_status(stop: Stop | None) -> int | None:
    """The status that `W` reports for a stop after which there is no guest left to look at, None for the others.

    The numbers are the program's own exit statuses (`gdbstub --help`).
    """
    match stop:
        case None | Step() | Breakpoint() | ProbeStop() | Watchpoint() | ExceptionRaised() | Interrupted():
            return None
        case PowerOff() | ConsoleMatch():
            return 0
        case Budget():
            return 1
        case Reset(requested):
            return 0 if requested else 3
        case GuestExit(status):
            return status
        case Halted() | TripleFault() | Panic() | HandlerFailed() | Defect():
            return None
        case _:
            assert_never(stop)


def signal(stop: Stop | None) -> int:
    """GDB's number of the signal that comes nearest to a stop with the guest still there."""
    match stop:
        case None | Step() | Breakpoint() | Watchpoint():
            return SIGTRAP
        case Interrupted() | Halted():
            return SIGINT
        case Panic() | HandlerFailed() | Defect():
            return SIGABRT
        case TripleFault(_, vector) | ExceptionRaised(_, vector):
            return EXCEPTIONS.get(vector, ("", SIGSEGV))[1]
        case _:
            return SIGTRAP


def reason(stop: Stop | None, client: Collection[str]) -> str:
    """The fields of a `T` reply that tell why, in the words that a client which said these features may be sent."""
    match stop:
        case Breakpoint(_, hardware):
            word = "hwbreak" if hardware else "swbreak"
            return f"{word}:;" if f"{word}+" in client else ""
        case Watchpoint(_, kind, address):
            return f"{kind.value}:{address:x};"
        case _:
            return ""


def _name(vector: int) -> str:
    return f" ({EXCEPTIONS[vector][0]})" if vector in EXCEPTIONS else ""


def explain(stop: Stop) -> str:
    """What gdb's own message for a stop leaves out, as console text; empty where there is nothing to add."""
    match stop:
        case Step(_, None) | Breakpoint() | Watchpoint() | Interrupted():
            return ""
        case Step(_, left):
            return f"An interrupt led away from {left:#x} and the guest has not come back: the step ends here.\n"
        case ProbeStop(pc):
            return f"A probe at {pc:#x} stopped the guest.\n"
        case Budget(instructions):
            return f"The budget of {instructions} instructions is used up.\n"
        case ConsoleMatch(text):
            return f"The awaited line was printed: {text}\n"
        case GuestExit(status):
            return f"The guest's command ended with status {status}.\n"
        case Reset(requested):
            return "The guest reset the machine.\n" if requested else "The guest reset without being asked to.\n"
        case PowerOff():
            return "The guest switched the machine off.\n"
        case Halted(pc, reason):
            return f"The processor is halted at {pc:#x} for good: {reason}.\n"
        case TripleFault(pc, vector):
            return f"Triple fault at {pc:#x}; the first exception was vector {vector}{_name(vector)}.\n"
        case ExceptionRaised(_, vector, code, address):
            about = "" if code is None else f", error code {code:#x}"
            about += "" if address is None else f", address {address:#x}"
            return f"Exception {vector}{_name(vector)}{about}; the guest's handler is next.\n"
        case Panic(_, message):
            return f"The guest kernel panics: {message}\n"
        case HandlerFailed(pc, where, error):
            return f"A probe's handler failed at {pc:#x}: {where}: {error}\n"
        case Defect(pc, report):
            return f"A defect of this program stopped the guest at {pc:#x}; please report:\n{report}\n"
        case _:
            assert_never(stop)
