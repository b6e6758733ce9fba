"""perf probe's form of a definition, as the kernel's own lines.

    [[GROUP:]EVENT=]FUNC[@SRC][+OFF|%return|:RLN] [ARG]...
    ARG = [NAME=]VAR{->FIELD|.FIELD|[N]}[:TYPE] | $params | $vars | [NAME=]%REG|$retval|@SYM...[:TYPE]

Rules: pure translation; what a line means is for `spec`. Lines, sources and local variables need DWARF (see `dwarf`);
without it the rest works, parameters by the kernel's BTF. Names of events are perf's: group `probe`, FUNC, FUNC_L3,
FUNC__return. Source: perf-probe(1), tools/perf/util/probe-event.c, Linux 6.12. Lazy patterns (;PTN) match the text of
sources, which a guest does not have.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from probes.dwarf import BrokenDwarf, Dwarf, Function, Place, Unavailable
from probes.errors import ProbeError
from probes.lookup import did_you_mean
from probes.scope import KernelText

_KERNEL: Final = re.compile(r"[#!-]|[preft]\d*(?::|\Z)")
_FORM: Final = re.compile(
    r"(?:(?:(?P<group>[A-Za-z_]\w*):)?(?P<event>[A-Za-z_]\w*)=)?(?P<function>[A-Za-z_][\w.]*)(?:@(?P<source>[^:+%;]+))?"
    r"(?:\+(?P<offset>0[xX][0-9a-fA-F]+|\d+)|(?P<returns>%return)|:(?P<line>\d+)|;(?P<pattern>.*))?\Z"
)
_ARG: Final = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<body>.*?)(?::(?P<type>[A-Za-z]\w*))?\Z")
_VARIABLE: Final = re.compile(r"([A-Za-z_]\w*)((?:->[A-Za-z_]\w*|\.[A-Za-z_]\w*|\[\d+\])*)\Z")
_STEP: Final = re.compile(r"(->|\.)([A-Za-z_]\w*)|\[(\d+)\]")
_ALL: Final = ("$params", "$vars")
_STRINGS: Final = ("string", "ustring")


@dataclass(frozen=True, slots=True)
class _Form:
    group: str
    event: str
    function: str
    source: str | None
    offset: int
    line: int | None
    returns: bool
    args: tuple[str, ...]


def is_perf_form(text: KernelText, definition: str, *, has_dwarf: bool) -> bool:
    """Whether it begins as perf's do and not as the kernel's: with a function, or what only perf has behind one. With
    DWARF functions need no symbol: they may be inlined."""
    words = definition.split()
    if not words or _KERNEL.match(words[0]):
        return False
    form = _FORM.fullmatch(words[0])
    if form is None:
        return False
    return has_dwarf or bool(text.symbols.lookup(form["function"])) or form["function"] != words[0]


def kernel_lines(text: KernelText, definition: str, image: bytes) -> list[str]:
    """The definition as lines of kprobe_events, one for each body of a function that is inlined.

    `image` is the guest's ELF file, empty where there is none. ProbeError as a person should read it.
    """
    try:
        return _kernel_lines(text, _parse(definition), image)
    except BrokenDwarf as error:
        raise ProbeError(errno.EINVAL, str(error)) from error


def _kernel_lines(text: KernelText, form: _Form, image: bytes) -> list[str]:
    try:
        dwarf = Dwarf(image) if image else None
        reason = "this guest was not loaded from an ELF file with DWARF"
    except ValueError as error:
        dwarf, reason = None, str(error)
    symbols = text.symbols.lookup(form.function)
    near = symbols[0].address if symbols else None
    bodies = dwarf.functions(form.function, form.source, near) if dwarf is not None else []
    if dwarf is None or not bodies:
        if dwarf is not None:
            reason = f"DWARF knows no function {form.function}" + (f" in {form.source}" if form.source else "")
        return [_without_dwarf(text, form, reason)]
    if form.returns:
        bodies = [body for body in bodies if body.die.tag == "DW_TAG_subprogram"]
        if not bodies:
            raise ProbeError(errno.EINVAL, f"{form.function} is inlined everywhere: it has no return")
    places = [(body, pc) for body in bodies for pc in _addresses(form, dwarf, body)]
    if not places:
        nearest = sorted({line - bodies[0].line for _, line in dwarf.lines(bodies[0])})
        known = ", ".join(str(line) for line in nearest if line >= 0)
        raise ProbeError(errno.ENOENT, f"line {form.line} of {form.function} has no code; there is some in {known}")
    common = set.intersection(*({name for name, _ in dwarf.variables(body, pc)} for body, pc in places))
    for body, pc in places:
        common &= _fetchable(form, dwarf, body, pc)
    return [_line(text, form, dwarf, body, pc, common) for body, pc in places]


def _parse(definition: str) -> _Form:
    first, *args = definition.split()
    match = _FORM.fullmatch(first)
    assert match is not None  # is_perf_form said so
    if match["pattern"] is not None:
        raise ProbeError(errno.EOPNOTSUPP, "lazy patterns are not available because the guest has no source text")
    line = None if match["line"] is None else int(match["line"][:9])
    returns = match["returns"] is not None
    event = match["event"] or re.sub(r"\W", "_", match["function"]) + (
        "__return" if returns else f"_L{line}" if line else ""
    )
    offset = int(match["offset"] or "0", 0)
    function, source = match["function"], match["source"]
    return _Form(match["group"] or "probe", event, function, source, offset, line, returns, tuple(args))


def _without_dwarf(text: KernelText, form: _Form, reason: str) -> str:
    if not text.symbols.lookup(form.function):
        hint = did_you_mean(text, form.function)
        raise ProbeError(errno.ENOENT, f"no function {form.function}", hint=hint)
    if form.line is not None or form.source is not None:
        raise ProbeError(errno.EOPNOTSUPP, f"lines and sources are not available because {reason}")
    args = ["$arg*" if arg in _ALL else arg for arg in form.args]
    place = f"{form.function}{f'+{form.offset}' if form.offset else ''}{'%return' if form.returns else ''}"
    return " ".join([f"p:{form.group}/{form.event}", place, *args])


def _addresses(form: _Form, dwarf: Dwarf, body: Function) -> Sequence[int]:
    """The addresses in one body that the form means."""
    if form.line:
        return dwarf.places(body, body.line + form.line)
    named = any(_names_variable(arg) for arg in form.args)
    return [dwarf.behind_prologue(body) if named and not form.offset and not form.returns else body.low + form.offset]


def _names_variable(arg: str) -> bool:
    match = _ARG.fullmatch(arg)
    return arg in _ALL or (match is not None and _VARIABLE.fullmatch(match["body"]) is not None)


def _line(text: KernelText, form: _Form, dwarf: Dwarf, body: Function, pc: int, common: set[str]) -> str:
    """`common`: the variables that can be fetched wherever the event is, which $vars and $params mean."""
    around = text.symbols.find(pc)
    if around is None:
        raise ProbeError(errno.ENOENT, f"{form.function} is at {pc:#x}, where the guest has no symbol")
    symbol, offset = around
    args: list[str] = []
    for arg in form.args:
        if arg in _ALL:
            shown = dict(dwarf.variables(body, pc))  # a name in an inner block hides one outside
            names = [name for name, parameter in shown.items() if name in common and (parameter or arg == "$vars")]
            args += [_argument(form, dwarf, body, pc, name) for name in names]
        else:
            args.append(_argument(form, dwarf, body, pc, arg))
    place = f"{symbol.name}{f'+{offset}' if offset else ''}{'%return' if form.returns else ''}"
    return " ".join([f"p:{form.group}/{form.event}", place, *args])


def _fetchable(form: _Form, dwarf: Dwarf, body: Function, pc: int) -> set[str]:
    """The variables that one argument can be made of there; as with perf, $vars leaves the others out."""
    found = set()
    for name, _ in dwarf.variables(body, pc):
        try:
            dwarf.fetch_type(_place(form, dwarf, body, pc, name))
            found.add(name)
        except (Unavailable, ValueError, KeyError):
            continue
    return found


def _place(form: _Form, dwarf: Dwarf, body: Function, pc: int, name: str) -> Place:
    return dwarf.argument(body, name) if form.returns else dwarf.place(body, name, pc)


def _argument(form: _Form, dwarf: Dwarf, body: Function, pc: int, text: str) -> str:
    match = _ARG.fullmatch(text)
    variable = _VARIABLE.fullmatch(match["body"]) if match is not None else None
    if match is None or variable is None:
        return text  # %REG, $retval, @SYM and the like are the kernel's own
    try:
        place = _place(form, dwarf, body, pc, variable[1])
        for step in _STEP.finditer(variable[2]):
            if step[3] is not None:
                place = dwarf.element(place, int(step[3]))
            else:
                place = dwarf.member(place, step[2], through=step[1] == "->")
        return _shown(dwarf, place, match["name"] or re.sub(r"\W+", "_", match["body"]).strip("_"), match["type"])
    except KeyError:
        known = ", ".join(name for name, _ in dwarf.variables(body, pc)) or "none"
        reason = f"{body.name} has no variable {variable[1]} at {pc:#x}; there are {known}"
        raise ProbeError(errno.ENOENT, reason) from None
    except Unavailable as error:
        raise ProbeError(errno.ENOENT, f"{variable[1]} is not available at {pc:#x} because {error}") from error
    except BrokenDwarf:
        raise
    except ValueError as error:
        raise ProbeError(errno.EINVAL, f"{match['body']}: {error}") from error


def _shown(dwarf: Dwarf, place: Place, name: str, kind: str | None) -> str:
    """One argument of the kernel's: a string is what is pointed to, an array its address."""
    if kind in _STRINGS:
        if dwarf.is_array(place):
            return f"{name}={place.fetch}:{kind}"
        return f"{name}=+0({place.fetch}):{kind}"
    return f"{name}={place.fetch}:{kind or dwarf.fetch_type(place)}"
