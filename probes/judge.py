"""What a kernel would say to a definition, without running it: the whole way from the line to the registration.

Rules: reads a kernel's image through `KernelText`, writes nothing, arms nothing. The rules of the language are
`spec`'s, those of a table of events `table`'s; here is what register_kprobe() and register_kretprobe() look at on x86
(Linux 6.12, in their order): ftrace's list, the blacklists, the code. Refusals without a reason of the kernel's carry
ours.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

from emu.iface import MemoryFault, Symbol
from emu.insn import MAX_INSN_SIZE, InvalidInstruction, boundaries, decode
from probes.arch.x86_insn import classify
from probes.builtinevents import builtin_events
from probes.errors import ProbeError
from probes.kretprobe import DEFAULT_MAXACTIVE, NO_RETURN
from probes.limits import FtraceList, LinuxLimits
from probes.lookup import did_you_mean
from probes.refusals import Refusal
from probes.scope import ENDBR_SIZE, GuestScope, KernelText, starts_with_endbr
from probes.spec import (
    FileScope,
    ProbeSpec,
    Spec,
    is_uprobe,
    other_system_event,
    parse,
    parse_deletion,
    parse_uprobe,
    split,
)
from probes.table import admit, matches

Kind: TypeAlias = Literal["kprobe", "uprobe", "auto"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`error` is None for a line that is taken; `listing` is then how the kernel would list it, empty where it defines
    nothing (a comment, a deletion)."""

    definition: str
    listing: str = ""
    error: ProbeError | None = None


class _Deferred(Exception):
    """ENOENT that the kernel forgives: the place may come with a module."""


class Judge:
    """Lines of kprobe_events and uprobe_events against one kernel; they build on each other until `forget`."""

    def __init__(self, text: KernelText, scope: GuestScope, files: FileScope) -> None:
        self._text = text
        self._scope = scope
        self._files = files
        self._limits = LinuxLimits(text, static=True)
        self._ftrace = FtraceList(text)
        self._known: list[Spec] = []
        self._others: set[str] = set()  # events of other systems, which we do not judge but whose names are taken

    def forget(self) -> None:
        """Delete every event."""
        self._known.clear()
        self._others.clear()

    def judge(self, line: str, kind: Kind = "auto") -> Verdict:
        """One line, as one write of it to the file `kind` names would be taken; auto picks the file by the place."""
        try:
            return Verdict(line, self._judge(line, kind))
        except ProbeError as error:
            return Verdict(line, error=error)

    def _judge(self, line: str, kind: Kind) -> str:
        words = split(line)
        if line.startswith("-"):
            self._delete(line, kind)
            return ""
        if not words:
            return ""
        if (other := other_system_event(words)) is not None:
            self._others.add(other)
        spec: Spec
        if kind == "uprobe" or (kind == "auto" and is_uprobe(line)):
            spec = parse_uprobe(line, self._files)
            admit(spec, self._known, self._builtin | self._others)
        else:
            spec = parse(line, self._scope)
            admit(spec, self._known, self._builtin | self._others)
            spec = self._register(spec)
        self._known.append(spec)
        return spec.listing()

    def suggestion(self, error: ProbeError) -> str | None:
        """Names a person may have meant where a symbol is not known. Takes a moment: every symbol is looked at."""
        if error.token != Refusal.BAD_PROBE_ADDR.name or error.definition is None:
            return None
        _, place, *texts = error.definition.split(" ")
        names = [place, *re.findall(r"@([A-Za-z_][^\s+\-():]*)", " ".join(texts))]
        unknown = [name for name in (re.split(r"[+\-%]", name)[0] for name in names) if not self._scope.count(name)]
        return did_you_mean(self._text, unknown[0]) if unknown else None

    def _delete(self, line: str, kind: Kind) -> None:
        deletion = parse_deletion(line)
        wanted: tuple[bool, ...] = {"kprobe": (True,), "uprobe": (False,), "auto": (True, False)}[kind]
        gone = [spec for spec in self._known if isinstance(spec, ProbeSpec) in wanted and matches(deletion, spec)]
        if not gone:
            raise ProbeError(errno.ENOENT, "no such event is defined")
        self._known = [spec for spec in self._known if not any(spec is other for other in gone)]

    # -------------------------------------------------------------------------------------------------- registration

    def _register(self, spec: ProbeSpec) -> ProbeSpec:
        """`spec` as it is once registered; ProbeError as __trace_kprobe_create() reports it."""
        words = spec.definition.split(" ")
        try:
            refused = self._refusal(spec)
        except _Deferred:
            return spec
        if refused is None:
            return replace(spec, maxactive=spec.maxactive or DEFAULT_MAXACTIVE) if spec.is_return else spec
        number, reason = refused
        refusal = {errno.EILSEQ: Refusal.BAD_INSN_BNDRY, errno.ENOENT: Refusal.BAD_PROBE_ADDR}.get(
            number, Refusal.FAIL_REG_PROBE
        )
        error = refusal.at(words, 1, errno=number)
        error.hint = reason
        raise error

    def _refusal(self, spec: ProbeSpec) -> tuple[int, str] | None:
        """The errno of __register_trace_kprobe() with the reason for a person; _Deferred for a forgiven ENOENT."""
        place, symbols = spec.place, self._text.symbols
        named = () if place.symbol is None or place.module is not None else symbols.lookup(place.symbol)
        address = named[0].address + place.offset if named else place.address or 0
        forgiving = place.symbol is None or place.module is not None
        if address and self._ftrace.is_notrace(address):
            return errno.EINVAL, "ftrace does not trace this function, so events cannot be on it (notrace)"
        for arg in spec.args:
            data = arg.symbol
            if data is not None and data.offset is None:
                return errno.EINVAL, f"the offset from {data.symbol} is no number"
            if data is not None and not symbols.lookup(data.symbol):
                if forgiving:
                    raise _Deferred
                return errno.ENOENT, f"no symbol {data.symbol}"
        if place.symbol is None and not address:
            return errno.EINVAL, "0 is no address"
        found = symbols.find(address)
        if found is None:
            if forgiving:
                raise _Deferred
            return errno.ENOENT, "no symbol covers this address"
        return self._refuse_place(found[0].address, found[1], is_return=spec.is_return)

    def entry_refusal(self, symbol: Symbol) -> str | None:
        """Why the kernel would not have a probe at the start of a function; None where it would."""
        if self._ftrace.is_notrace(symbol.address):
            return "notrace"
        if len(self._text.symbols.lookup(symbol.name)) > 1:
            return "not the only one of this name; by address only"
        refused = self._refuse_place(symbol.address, 0, is_return=False)
        return None if refused is None else refused[1]

    def _refuse_place(self, function: int, offset: int, *, is_return: bool) -> tuple[int, str] | None:
        address = function + offset
        is_entry = offset == 0
        if offset in (0, ENDBR_SIZE) and starts_with_endbr(self._text, function):
            address, is_entry = function + ENDBR_SIZE, True
        if is_return and not is_entry:
            return errno.EINVAL, "a return probe stands on a function's entry"
        if is_return and any(s.address == function for n in NO_RETURN for s in self._text.symbols.lookup(n)):
            return errno.EINVAL, "this function returns in another task"
        return self._limits.refusal(address, init_freed=True) or self._refuse_code(address, function)

    def _refuse_code(self, address: int, function: int) -> tuple[int, str] | None:
        """arch_prepare_kprobe(), where ftrace's own call is not the place."""
        if self._ftrace.calls(address, address):
            return None
        read, bits = self._text.memory.read, self._text.bits
        try:
            *_, last = (function, *boundaries(read, function, address, bits)) if function != address else (address,)
            if last != address and last + decode(read(last, MAX_INSN_SIZE), last, bits).size != address:
                return errno.EILSEQ, "the address is inside an instruction"
            return classify(decode(read(address, MAX_INSN_SIZE), address, bits)).linux
        except (MemoryFault, InvalidInstruction) as error:
            return errno.EILSEQ, str(error)

    @cached_property
    def _builtin(self) -> frozenset[str]:
        return builtin_events(self._text)
