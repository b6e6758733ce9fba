"""The kinds of probes, and what is to be had of a probe whatever its kind: counts, switch, a line of a list.

Rules: reads only. The list's format is that of report_probe() (kernel/kprobes.c, Linux 6.12), by address:
`ADDRESS  k|r|j  SYMBOL+OFFSET  MODULE [GONE][DISABLED]`, the module a space where there is none. [OPTIMIZED] and
[FTRACE] are never said: how we arm a probe is neither. A uprobe's line is `OFFSET  u  PATH:OFFSET` likewise.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from emu.iface import Machine
from probes.jprobe import Jprobe
from probes.kprobe import Kprobe
from probes.kretprobe import Kretprobe
from probes.uprobe import Uprobe

KernelProbe: TypeAlias = Kprobe | Kretprobe | Jprobe
Probe: TypeAlias = KernelProbe | Uprobe


def kernel_list(machine: Machine, probes: Iterable[Probe]) -> list[str]:
    """A line for each probe that stands somewhere; a kernel's first. Those that wait for a module are not listed."""
    kernel, programs = [], []
    for probe in probes:
        if isinstance(probe, Uprobe):
            programs += _in_program(machine, probe)
        elif kprobe_of(probe).address is not None:
            kernel.append((kprobe_of(probe).address or 0, _in_kernel(machine, probe)))
    return [line for _, line in sorted(kernel, key=lambda row: row[0])] + sorted(programs)


def kprobe_of(probe: KernelProbe) -> Kprobe:
    """What stands at the address: the probe itself, or that of a return probe or jprobe."""
    return probe if isinstance(probe, Kprobe) else probe.kp


def switched(probe: Probe) -> Kprobe | Uprobe:
    """What is enabled and disabled."""
    return probe if isinstance(probe, Uprobe) else kprobe_of(probe)


def hits_of(probe: Probe) -> int:
    """As kprobe_profile counts: an event of a return probe happens at the return."""
    if isinstance(probe, Uprobe):
        return probe.hits if probe.ret_handler is None else probe.ends.returned
    return probe.returned if isinstance(probe, Kretprobe) else kprobe_of(probe).hits


def missed_of(probe: Probe) -> int:
    """Likewise."""
    if isinstance(probe, Uprobe):
        return probe.ends.missed
    return probe.missed if isinstance(probe, Kretprobe) else kprobe_of(probe).nmissed


def check_kind(probe: object) -> None:
    """TypeError for what is no probe."""
    if not isinstance(probe, Kprobe | Kretprobe | Jprobe | Uprobe):
        raise TypeError(f"a probe is a Kprobe, Kretprobe, Jprobe or Uprobe, not {probe!r}")


def _in_kernel(machine: Machine, probe: KernelProbe) -> str:
    kprobe = kprobe_of(probe)
    kind = "r" if isinstance(probe, Kretprobe) else "j" if isinstance(probe, Jprobe) else "k"
    address = kprobe.address or 0
    found = machine.symbols.find(address)
    module, colon, name = found[0].name.rpartition(":") if found is not None else ("", "", "")
    where = f"{address:#x}" if found is None else f"{name}+{found[1]:#x}"
    state = "[GONE]" if kprobe.gone else "[DISABLED]" if kprobe.disabled else ""
    return f"{address:0{machine.bits // 4}x}  {kind}  {where}  {module if colon else ' '} {state}"


def _in_program(machine: Machine, probe: Uprobe) -> list[str]:
    offsets = [place.offset for place in probe.places] or ([] if probe.symbol is not None else [probe.offset])
    width, state = machine.bits // 4, "[DISABLED]" if probe.disabled else ""
    return [f"{offset:0{width}x}  u  {probe.path}:{offset:#x}    {state}" for offset in offsets]
