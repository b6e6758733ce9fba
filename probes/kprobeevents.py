"""Events of kprobes: a definition of kprobe_events becomes a probe whose hits an event takes.

Rules: as `uprobeevents`, its counterpart for programs. Nothing is registered here.
"""

from __future__ import annotations

import errno
from dataclasses import replace

from emu.iface import Machine
from probes.errors import ProbeError
from probes.eventoptions import Options, maxactive, task_filter
from probes.eventoptions import arm as arm_option
from probes.fetch import EntryValues, FetchContext, compile_entry
from probes.guest import GuestHandlers
from probes.jprobe import Jprobe
from probes.kinds import KernelProbe
from probes.kprobe import Kprobe
from probes.kretprobe import MAX_DATA_SIZE, Kretprobe, ReturnInstance
from probes.regs import Regs
from probes.scope import entry_shift
from probes.spec import ProbeSpec
from probes.traceevents import TraceEvent


class KprobeMaker:
    """Makes the probes of one machine's definitions. `shadow` is how returns are followed where nobody says.

    `guest` makes handlers of what --pre, --post and --entry name.
    """

    def __init__(self, machine: Machine, context: FetchContext, guest: GuestHandlers, *, shadow: bool) -> None:
        self._machine = machine
        self._context = context
        self._guest = guest
        self._shadow = shadow

    def make(self, kind: str, event: TraceEvent, spec: ProbeSpec, options: Options) -> KernelProbe:
        """The probe of a definition, ProbeError where the options name nothing."""
        probe = Kprobe(
            symbol=spec.place.name,
            offset=spec.place.offset,
            addr=spec.place.address,
            arm=arm_option(options.get("arm", "auto")),
        )
        if spec.is_return:
            return self._for_returns(event, spec, probe, options)
        return (self._for_entries if kind == "jprobe" else self._for_hits)(event, spec, probe, options)

    def _for_hits(self, event: TraceEvent, spec: ProbeSpec, probe: Kprobe, options: Options) -> Kprobe:
        """`probe` with the handler of an event."""
        take, accepts = event.taker(spec, self._context), task_filter(options, self._context.tasks)
        shift: int | None = None  # known at the first hit: then the code is there to see
        pre, post = (options.get(name) for name in ("pre", "post"))
        before = self._guest.pre(str(pre)) if pre else None
        after = self._guest.post(str(post)) if post else None
        wanted = False  # by --pid and --comm, at the hit under way

        def pre_handler(kp: Kprobe, regs: Regs) -> object:
            nonlocal wanted, take, shift
            wanted = accepts is None or accepts(regs.cpu)
            if not wanted:
                kp.hits -= 1
                return False
            if shift is None:
                shift = entry_shift(self._machine, kp.address or 0)
                if shift:
                    take = event.taker(spec, replace(self._context, ip_offset=1 + shift))
            if take(regs, (kp.address or 0) + shift).skip:
                return True
            return before(kp, regs) if before is not None else None

        def post_handler(kp: Kprobe, regs: Regs) -> None:
            if wanted and after is not None:
                after(kp, regs)

        probe.pre_handler, probe.post_handler = pre_handler, post_handler if after is not None else None
        return probe

    def _for_entries(self, event: TraceEvent, spec: ProbeSpec, probe: Kprobe, options: Options) -> Jprobe:
        """A jprobe on `probe` that makes a record before its guest entry is called."""
        entry = options.get("entry")
        if not entry:
            raise ProbeError(errno.EINVAL, "a jprobe needs --entry SYMBOL")
        accepts = task_filter(options, self._context.tasks)
        wanted = None if accepts is None else lambda kp, regs: accepts(regs.cpu)
        return Jprobe(kp=self._for_hits(event, spec, probe, options), entry=str(entry), filter=wanted)

    def _for_returns(self, event: TraceEvent, spec: ProbeSpec, probe: Kprobe, options: Options) -> Kretprobe:
        """A return probe on `probe` with the handler of an event; its place reads `RETURNED-TO <- FUNCTION`."""
        context = replace(self._context, ip_offset=0, entry=EntryValues())
        take, save = event.taker(spec, context), compile_entry(spec.args, context)
        accepts = task_filter(options, context.tasks)
        pre, post = (options.get(name) for name in ("pre", "post"))
        after = self._guest.returned(probe, str(post)) if post else None
        before = self._guest.returned(probe, str(pre)) if pre else None

        def entry_handler(ri: ReturnInstance, regs: Regs) -> object:
            if accepts is not None and not accepts(regs.cpu):
                return True  # declined, so that it takes no instance from the calls that are wanted
            if save is not None:
                ri.arguments = save(regs.cpu)
            return before(ri, regs) if before is not None else None

        def handler(ri: ReturnInstance, regs: Regs) -> None:
            context.entry.values = ri.arguments
            take(regs, probe.address or 0, ri.ret_addr, ri.at_ns)
            if after is not None:
                after(ri, regs)

        return Kretprobe(
            kp=probe,
            handler=handler,
            entry_handler=entry_handler if save or before or accepts else None,
            data_size=MAX_DATA_SIZE if pre or post else 0,
            maxactive=maxactive(options.get("maxactive")) or spec.maxactive,
            shadow=bool(options.get("shadow") or (self._shadow and not options.get("trampoline"))),
        )
