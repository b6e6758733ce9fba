"""The language of kprobe_events: a line becomes a `ProbeSpec`, or the kernel's own error with its caret.

Rules: pure; what it must know of the guest comes through `Scope`. The reference is Linux 6.12
(Documentation/trace/kprobetrace.rst), with the order of checks, texts and columns measured on a running 6.12.117.
Definitions come from strangers: every line ends in a spec or a ProbeError.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NoReturn, Protocol

from probes.arch import Convention
from probes.errors import ProbeError
from probes.expr import Body, FetchArg, Refusal, parse_body, parse_number

MAX_LINE: Final = 4094
MAX_ARGS: Final = 128
MAX_MAXACTIVE: Final = 4096  # KRETPROBE_MAXACTIVE_MAX
MAX_NAME: Final = 64
MAX_ARG_NAME: Final = 32
DEFAULT_GROUP: Final = "kprobes"

RESERVED_NAMES: Final = frozenset(
    (
        *("common_type", "common_flags", "common_preempt_count", "common_pid", "common_tgid"),
        *("__probe_ip", "__probe_ret_ip", "__probe_func"),
    )
)
_IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_GROUP: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*\Z")
_SYMBOL_OFFSET: Final = re.compile(r"[+-]")


class Scope(Protocol):
    """What the parser asks of the guest."""

    convention: Convention

    def count(self, symbol: str) -> int:
        """How many symbols have that name."""
        ...

    def is_entry(self, symbol: str, offset: int) -> bool:
        """Whether arguments are still in place there: at the function's start, or right after its ENDBR."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where to probe: a symbol with an offset, in a module or not, or an address."""

    symbol: str | None
    offset: int
    address: int | None
    module: str | None = None

    def __str__(self) -> str:
        if self.symbol is None:
            return f"0x{self.address:x}"
        module = "" if self.module is None else f"{self.module}:"
        return f"{module}{self.symbol}" + (f"+{self.offset}" if self.offset else "")


@dataclass(frozen=True, slots=True)
class ProbeSpec:
    """One definition, understood. `definition` is the line with single spaces, as error logs show it."""

    definition: str
    is_return: bool
    maxactive: int
    group: str
    event: str
    place: Place
    args: tuple[FetchArg, ...]

    @property
    def name(self) -> str:
        return f"{self.group}/{self.event}"

    def listing(self) -> str:
        """The line kprobe_events prints for it."""
        kind = f"r{self.maxactive}" if self.is_return and self.maxactive else "r" if self.is_return else "p"
        return " ".join([f"{kind}:{self.name} {self.place}", *(f"{arg.name}={arg.text}" for arg in self.args)])


def parse(line: str, scope: Scope, *, default_group: str = DEFAULT_GROUP) -> ProbeSpec:
    """A `p` or `r` line; ProbeError with errno, text, caret and the kernel's token where it is refused."""
    if len(line) > MAX_LINE:
        raise ProbeError(errno.EINVAL, f"a definition has at most {MAX_LINE} characters")
    words = line.split("#", 1)[0].split()
    if not words or words[0][0] not in "pr" or len(words) < 2:
        raise ProbeError(
            errno.EINVAL, "a definition is p|r[MAXACTIVE][:[GROUP/][EVENT]] SYMBOL[+OFFSET]|ADDRESS [ARG]..."
        )
    if len(words) - 2 > MAX_ARGS:
        raise ProbeError(errno.E2BIG, f"a probe has at most {MAX_ARGS} arguments")
    return _Parser(words, scope, default_group).parse()


class _Parser:
    """The state of one line: its words, and which is being read, from which carets are computed."""

    def __init__(self, words: Sequence[str], scope: Scope, default_group: str) -> None:
        self._words = words
        self._scope = scope
        self._default_group = default_group
        self._definition = " ".join(words)

    def parse(self) -> ProbeSpec:
        head, _, name = self._words[0].partition(":")
        named = ":" in self._words[0]
        is_return = head[0] == "r"
        maxactive = self._maxactive(head)
        place, suffixed = self._place(self._words[1], is_return)
        is_return = is_return or suffixed
        group, event = self._default_group, ""
        if named:
            group, event = self._name(name, len(head) + 1)
        if not event:
            event = _auto_name(place, is_return)
        is_entry = place.symbol is not None and (not place.offset or self._scope.is_entry(place.symbol, place.offset))
        args = self._args(is_entry, is_return)
        return ProbeSpec(self._definition, is_return, maxactive, group, event, place, args)

    def _fail(self, word: int, column: int, refusal: Refusal) -> NoReturn:
        start = sum(len(text) + 1 for text in self._words[:word])
        raise ProbeError(
            refusal.errno, refusal.text, definition=self._definition, column=start + column, token=refusal.name
        )

    def _maxactive(self, head: str) -> int:
        if len(head) == 1:
            return 0
        if head[0] == "p":
            self._fail(0, 1, Refusal.MAXACT_NO_KPROBE)
        if not head[1].isdigit():
            return 0  # the kernel looks no further
        value = parse_number(head[1:])
        if value is None or value == 0:
            self._fail(0, 1, Refusal.BAD_MAXACT)
        if value > MAX_MAXACTIVE:
            self._fail(0, 1, Refusal.MAXACT_TOO_BIG)
        return value

    def _place(self, text: str, is_return: bool) -> tuple[Place, bool]:
        address = parse_number(text)
        if address is not None:
            if is_return:
                self._fail(1, 0, Refusal.BAD_RETPROBE)
            return Place(None, 0, address), False
        suffixed = False
        percent = text.find("%")
        if percent >= 0:
            if text[percent:] != "%return":
                self._fail(1, percent, Refusal.BAD_ADDR_SUFFIX)
            text, suffixed = text[:percent], True
        place = self._symbol_place(text)
        if (is_return or suffixed) and place.offset:
            self._fail(1, 0, Refusal.BAD_RETPROBE)
        return place, suffixed

    def _symbol_place(self, text: str) -> Place:
        offset = 0
        split = _SYMBOL_OFFSET.search(text)
        if split is not None:
            parsed = parse_number(text[split.start() :].removeprefix("+"))
            if parsed is None or parsed < 0:
                self._fail(1, 0, Refusal.BAD_PROBE_ADDR)
            text, offset = text[: split.start()], parsed
        module, colon, symbol = text.rpartition(":")
        if colon:
            return Place(symbol, offset, None, module)
        found = self._scope.count(symbol)
        if found > 1:
            self._fail(1, 0, Refusal.NON_UNIQ_SYMBOL)
        if not found:
            self._fail(1, 0, Refusal.BAD_PROBE_ADDR)
        return Place(symbol, offset, None)

    def _name(self, name: str, column: int) -> tuple[str, str]:
        group, event = self._default_group, name
        slash = name.find("/")
        if slash < 0:
            slash = name.find(".")
        if slash >= 0:
            if slash == 0:
                self._fail(0, column, Refusal.NO_GROUP_NAME)
            if slash >= MAX_NAME:
                self._fail(0, column, Refusal.GROUP_TOO_LONG)
            group, event = name[:slash], name[slash + 1 :]
            if not _GROUP.match(group):
                self._fail(0, column, Refusal.BAD_GROUP_NAME)
            column += slash + 1
            if not event:
                return group, ""
        if not event:
            self._fail(0, column, Refusal.NO_EVENT_NAME)
        if len(event) >= MAX_NAME:
            self._fail(0, column, Refusal.EVENT_TOO_LONG)
        if not _IDENTIFIER.match(event):
            self._fail(0, column, Refusal.BAD_EVENT_NAME)
        return group, event

    def _args(self, is_entry: bool, is_return: bool) -> tuple[FetchArg, ...]:
        for index, text in enumerate(self._words[2:]):
            if text == "$arg*":
                refusal = Refusal.NOSUP_BTFARG if is_entry or is_return else Refusal.NOFENTRY_ARGS
                self._fail(index + 2, 0, refusal)
        args: list[FetchArg] = []
        for index, text in enumerate(self._words[2:], start=1):
            body = Body(text, is_entry=is_entry, is_return=is_return, convention=self._scope.convention)
            args.append(self._arg(index, body, {arg.name for arg in args}))
        return tuple(args)

    def _arg(self, index: int, body: Body, used: set[str]) -> FetchArg:
        word = index + 1
        name, equals, text = body.text.partition("=")
        column = 0
        if equals:
            if len(name) > MAX_ARG_NAME:
                self._fail(word, 0, Refusal.ARG_NAME_TOO_LONG)
            if not name:
                self._fail(word, 0, Refusal.NO_ARG_NAME)
            column = len(name) + 1
        else:
            name, text = f"arg{index}", body.text
        if not _IDENTIFIER.match(name):
            self._fail(word, 0, Refusal.BAD_ARG_NAME)
        if name in RESERVED_NAMES or name in used:
            self._fail(word, 0, Refusal.USED_ARG_NAME)
        try:
            parsed = parse_body(replace(body, text=text), name)
        except ProbeError as error:
            start = sum(len(before) + 1 for before in self._words[:word])
            raise error.at(self._definition, start + column + (error.column or 0)) from None
        for symbol in parsed.symbols:
            if not self._scope.count(symbol):
                # The kernel's quirk: data symbols are looked up at registration, which blames the probe point.
                raise ProbeError(
                    errno.ENOENT,
                    Refusal.BAD_PROBE_ADDR.text,
                    definition=self._definition,
                    column=len(self._words[0]) + 1,
                    token=Refusal.BAD_PROBE_ADDR.name,
                )
        return parsed


def _auto_name(place: Place, is_return: bool) -> str:
    """The kernel's: p_SYM_OFF or p_0xADDR, with what is no identifier made one."""
    kind = "r" if is_return else "p"
    if place.symbol is None:
        return f"{kind}_0x{place.address:x}"
    module = "" if place.module is None else f"{place.module}_"
    return re.sub(r"[.:]", "_", f"{kind}_{module}{place.symbol}_{place.offset}")[: MAX_NAME - 1]
