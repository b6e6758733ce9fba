"""What can be probed, and named in definitions: symbols by glob, with prototypes and what Linux thinks of them.

Rules: reads only; lines of text for a person.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from emu.iface import Guest, Symbol
from probes.btf import Btf, BtfError, Kind
from probes.errors import ProbeError
from probes.limits import NOTRACE, FtraceList
from probes.lookup import did_you_mean
from probes.perfprobe import is_perf_form, kernel_lines
from probes.scope import KernelText
from probes.spec import KernelScope, parse, split

MAX_SPREAD: Final = 500
_CODE: Final = "TtWw"
_SETS: Final = re.compile(r"\[!?\]?[^]]*\]")  # as fnmatch reads them
_GLOB_PLACE: Final = re.compile(r"([^%+]*[*?\[][^%+]*)(.*)")


@dataclass(frozen=True, slots=True)
class Matches:
    """`lines` show what was found or, where `count` is 0, what a person may have meant."""

    count: int
    lines: tuple[str, ...]


def find_symbols(
    text: KernelText,
    pattern: str,
    *,
    types: Btf | None = None,
    refusal: Callable[[Symbol], str | None] | None = None,
    limit: int | None = None,
) -> Matches:
    """One line a symbol: address, size, name; of functions the prototype where `types` knows it, and why Linux would
    not have a probe there where `refusal` says so. At most `limit` of them, and a line that says how many more."""
    found = text.symbols.glob(pattern)
    if not found:
        hint = _wrong_with(pattern) or did_you_mean(text, pattern.strip("*?"))
        return Matches(0, (f"no symbol matches {pattern!r}" + (f"; {hint}" if hint else ""),))
    shown = found if limit is None else found[:limit]
    lines = [_line(symbol, types, refusal) for symbol in shown]
    if len(found) > len(shown):
        lines.append(f"... and {len(found) - len(shown)} more")
    return Matches(len(found), tuple(lines))


def _wrong_with(pattern: str) -> str:
    """What keeps a pattern from matching anything, empty for one that is well made."""
    if not pattern:
        return "* matches all"
    return "a [ has its ] behind it" if "[" in _SETS.sub("", pattern) else ""


def functions(text: KernelText, pattern: str) -> Sequence[str]:
    """Names of functions that match and that a definition can mean: those there is only one of, no parts of others."""
    names = dict.fromkeys(symbol.name for symbol in text.symbols.glob(pattern) if symbol.kind in _CODE)
    return [name for name in names if "." not in name and len(text.symbols.lookup(name)) == 1]


def spread(text: KernelText, definition: str) -> list[str]:
    """A definition whose place is a glob, as one definition a function; perf probe's form as the kernel's lines; any
    other one as it is, without the quotes that a shell would have taken off.

    ProbeError ENOENT where nothing matches, E2BIG where more than MAX_SPREAD do.
    """
    if len(definition) > 1 and definition[0] == definition[-1] and definition[0] in "'\"":
        definition = definition[1:-1]
    guest: Guest | None = getattr(text, "guest", None)
    image = guest.debug_image() if guest is not None else b""
    if is_perf_form(text, definition, has_dwarf=bool(image)):
        return kernel_lines(text, definition, image)
    words = split(definition)
    place = _GLOB_PLACE.fullmatch(words[1]) if len(words) > 1 and "/" not in words[1] else None
    if place is None:
        return [definition]
    names = functions(text, place[1])
    if not names:
        raise ProbeError(
            errno.ENOENT, f"no function matches {place[1]!r}", hint=did_you_mean(text, place[1].strip("*?"))
        )
    if len(names) > MAX_SPREAD:
        raise ProbeError(errno.E2BIG, f"{place[1]!r} matches {len(names)} functions, at most {MAX_SPREAD} at a time")
    return [" ".join([words[0], f"{name}{place[2]}", *words[2:]]) for name in names]


def linux_says(ftrace: FtraceList, older: KernelScope | None, definition: str, address: int) -> tuple[str, ...]:
    """Why the guest's own kprobe_events would not take a definition that we have; `older` is its smaller language."""
    notes = []
    if ftrace.is_notrace(address):
        notes.append(f"Linux's kprobe_events would refuse: EINVAL, {NOTRACE}")
    if older is not None:
        try:
            parse(definition, older)
        except ProbeError as error:
            notes.append(f"Linux before 6.5, as here, would refuse: {error.name}, {error.reason}")
    return tuple(notes)


def prototype(types: Btf, name: str) -> str | None:
    """As C declares the function; None where the types do not know it."""
    try:
        function = types.find(name, Kind.FUNC)
        if function is None:
            return None
        signature = types.prototype(function)
        parameters = [
            f"{types.spell(parameter.type_id)} {parameter.name}".rstrip().replace("* ", "*")
            if parameter.type_id
            else "..."
            for parameter in types.parameters(signature)
        ]
        result = types.spell(signature.target)
        space = "" if result.endswith("*") else " "
        return f"{result}{space}{name}({', '.join(parameters) or 'void'})"
    except BtfError:
        return None


def _line(symbol: Symbol, types: Btf | None, refusal: Callable[[Symbol], str | None] | None) -> str:
    line = f"{symbol.address:016x} {symbol.size:6d} {symbol.name}"
    if symbol.kind not in _CODE:
        return line
    declared = prototype(types, symbol.name) if types is not None else None
    reason = refusal(symbol) if refusal is not None else None
    return line + (f"  {declared}" if declared else "") + (f"  [Linux refuses: {reason}]" if reason else "")
