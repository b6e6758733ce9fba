"""The names of the events a kernel is built with, which definitions cannot take.

Rules: reads a kernel's image (the table is in memory the running kernel has freed). The layout is that of struct
trace_event_call and struct trace_event_class (include/linux/trace_events.h, Linux 5.10 to 6.12).
"""

from __future__ import annotations

from typing import Final

from emu.iface import MemoryFault
from probes.scope import KernelText

_CLASS, _NAME, _SYSTEM = 2, 3, 0  # words from the start of trace_event_call, and of its class
_TRACEPOINT: Final = "__tracepoint_"
_MAX_NAME: Final = 64
_MAX_EVENTS: Final = 20_000  # 6.12 has 1,700


def builtin_events(text: KernelText) -> frozenset[str]:
    """GROUP/EVENT of each; empty for a kernel without events, or whose symbols do not name the table."""
    bounds = [text.symbols.lookup(f"__{end}_ftrace_events") for end in ("start", "stop")]
    if not all(bounds):
        return frozenset()
    word = text.bits // 8
    start, stop = (found[0].address for found in bounds)
    names = set()
    for at in range(start, min(stop, start + _MAX_EVENTS * word), word):
        try:
            names.add(_name(text, _word(text, at)))
        except MemoryFault:
            continue  # not a table of this layout
    return frozenset(names)


def _name(text: KernelText, call: int) -> str:
    word = text.bits // 8
    system = _word(text, _word(text, call + _CLASS * word) + _SYSTEM * word)
    named = _word(text, call + _NAME * word)
    found = text.symbols.find(named)
    if found is not None and found[1] == 0 and found[0].name.startswith(_TRACEPOINT):
        return f"{_string(text, system)}/{found[0].name.removeprefix(_TRACEPOINT)}"
    return f"{_string(text, system)}/{_string(text, named)}"


def _word(text: KernelText, address: int) -> int:
    return int.from_bytes(text.memory.read(address, text.bits // 8), "little")


def _string(text: KernelText, address: int) -> str:
    return text.memory.read(address, _MAX_NAME).partition(b"\0")[0].decode("ascii", "replace")
