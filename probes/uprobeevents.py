"""Events of uprobes: a definition of uprobe_events becomes a `Uprobe` whose hits an event takes.

Rules: as `traceevents`; knows files only by what the definition says and the probe finds out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from emu.iface import Cpu
from probes.arch import Convention
from probes.eventoptions import Options, task_filter
from probes.fetch import EntryValues, FetchContext
from probes.planting import user_arm
from probes.programs import ProgramFile
from probes.regs import Regs
from probes.spec import UprobeSpec
from probes.traceevents import TraceEvent
from probes.uprobe import Uprobe
from probes.uprobes import Uprobes
from probes.uretprobe import UserReturn


class ProgramScope:
    """Implements spec.FileScope. `open` gives the guest's file of a path."""

    def __init__(self, convention: Convention, open: Callable[[str], ProgramFile | None]) -> None:
        self.convention = convention
        self._open = open

    def is_regular(self, path: str) -> bool:
        """A file that is not there yet may be a regular one when it comes."""
        file = self._open(path)
        return file is None or file.regular


def make_uprobe(
    event: TraceEvent, spec: UprobeSpec, context: FetchContext, uprobes: Uprobes, options: Options
) -> Uprobe:
    """The probe of a definition. What a program has not touched yet is read of its file, as far as that is there."""
    base = 0

    def file_base(cpu: Cpu) -> int:
        return base

    own = replace(
        context, ip_offset=0, entry=EntryValues(), file_base=file_base, read=uprobes.read, absent=uprobes.absent_text
    )
    take, wanted = event.taker(spec, own), task_filter(options, context.tasks)

    def is_wanted(up: Uprobe, regs: Regs) -> bool:
        return wanted is None or wanted(regs.cpu)

    def handler(up: Uprobe, regs: Regs) -> None:
        nonlocal base
        base = regs.ip - (up.place.offset if up.place is not None else 0)
        take(regs, regs.ip)

    def ret_handler(call: UserReturn, regs: Regs) -> None:
        nonlocal base
        base = call.function - call.offset
        take(regs, call.function, call.ret_addr, call.at_ns)

    place = spec.place
    return Uprobe(
        place.path,
        place.symbol if place.symbol is not None else place.offset,
        handler if not spec.is_return else None,
        ret_handler if spec.is_return else None,
        is_wanted if wanted is not None else None,
        offset=place.offset if place.symbol is not None else 0,
        ref_ctr_offset=place.reference,
        arm=user_arm(options.get("arm", "auto")),
    )
