"""The probe engine: kprobes and trace events on a machine, from outside the guest."""

from probes.core import Kprobe
from probes.errors import ProbeError
from probes.manager import Manager
from probes.regs import Regs

__all__ = ["Kprobe", "Manager", "ProbeError", "Regs"]
