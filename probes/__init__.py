"""The probe engine: kprobes, jprobes, return probes and trace events on a machine, from outside the guest."""

from probes.abi import s8, s16, s32, s64, struct, u8, u16, u32, u64, ulong
from probes.errors import CallError, ProbeError
from probes.jprobe import Jprobe
from probes.kprobe import Kprobe
from probes.kretprobe import Kretprobe, ReturnInstance
from probes.manager import Manager
from probes.regs import Regs
from probes.uprobe import Uprobe

__all__ = [
    "CallError",
    "Jprobe",
    "Kprobe",
    "Kretprobe",
    "Manager",
    "ProbeError",
    "Regs",
    "ReturnInstance",
    "Uprobe",
    "s8",
    "s16",
    "s32",
    "s64",
    "struct",
    "u8",
    "u16",
    "u32",
    "u64",
    "ulong",
]
