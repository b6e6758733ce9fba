"""Where probes of all kinds stand, as debugfs's kprobes/list shows it.

Rules: pure but for the symbols it asks; show_kprobe_addr() in report_probe(), kernel/kprobes.c (6.12), is the format.
"""

from __future__ import annotations

from emu.iface import SymbolTable
from probes.jprobe import Jprobe
from probes.kprobe import Kprobe
from probes.kretprobe import Kretprobe
from probes.spec import Spec
from probes.uprobe import Uprobe


def place_line(spec: Spec, probe: Kprobe | Kretprobe | Jprobe | Uprobe, symbols: SymbolTable, word: int) -> str:
    """`ADDRESS  k|r|j  SYMBOL+0xOFFSET  FLAGS`; a program's probe has `u` and the definition's place."""
    if isinstance(probe, Uprobe):
        return f"{'':{2 * word}}  u  {spec.place}  {'[DISABLED]' if probe.disabled else ''}".rstrip()
    kind = "r" if isinstance(probe, Kretprobe) else "j" if isinstance(probe, Jprobe) else "k"
    kprobe = probe if isinstance(probe, Kprobe) else probe.kp
    if kprobe.address is None:
        return f"{'':{2 * word}}  {kind}  {spec.place}  [WAITING]"
    found = symbols.find(kprobe.address)
    where = "" if found is None else f"{found[0].name}+{found[1]:#x}"
    flags = "[GONE]" * kprobe.gone + "[DISABLED]" * kprobe.disabled
    return f"{kprobe.address:0{2 * word}x}  {kind}  {where}  {flags}".rstrip()
