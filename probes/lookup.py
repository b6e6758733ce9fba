"""Names to addresses, for a person who may have misspelt one.

Rules: reads the machine's symbols and nothing else; imports nothing of `probes` but its errors.
"""

from __future__ import annotations

import errno

from emu.iface import Machine
from probes.errors import ProbeError


def resolve(machine: Machine, target: str | int) -> int:
    """The address that a symbol's name or an address means; ProbeError ENOENT with names a person may have meant."""
    if isinstance(target, int):
        return target
    found = machine.symbols.lookup(target)
    if found:
        return found[0].address
    raise ProbeError(errno.ENOENT, f"no symbol {target}", hint=did_you_mean(machine, target))


def did_you_mean(machine: Machine, name: str) -> str | None:
    """A line that names symbols like `name`, or None."""
    near = list(machine.symbols.suggest(name))[:3]
    return f"did you mean {', '.join(near)}?" if near else None
