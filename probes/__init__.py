"""The probe engine: kprobes, return probes and trace events on a machine, from outside the guest."""

from probes.core import Kprobe
from probes.errors import ProbeError
from probes.kretprobe import Kretprobe, ReturnInstance
from probes.manager import Manager
from probes.regs import Regs

__all__ = ["Kprobe", "Kretprobe", "Manager", "ProbeError", "Regs", "ReturnInstance"]
