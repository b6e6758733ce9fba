"""The language of kprobe_events and uprobe_events: a line becomes a spec, or the kernel's own error with its caret.

Rules: pure; what it must know of the guest comes through `KernelScope` and `FileScope`. The reference is Linux 6.12
(trace_kprobe_create() and trace_uprobe_create(), kernel/trace), with the order of checks, texts and columns measured on
a running 6.12.117. Definitions come from strangers: every line ends in a spec or a ProbeError.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn, Protocol, TypeAlias

from probes import rawtext
from probes.arch import Convention
from probes.btf import Btf, BtfError
from probes.errors import ProbeError
from probes.expr import IDENTIFIER, Context, Fault, parse_argument
from probes.fetchargs import FetchArg
from probes.numbers import NumberError, kstrtol, kstrtoul, simple_strtoul
from probes.refusals import Refusal

MAX_LINE: Final = 4095  # WRITE_BUFSIZE - 1, of one write without a newline
MAX_ARGS: Final = 128
MAX_MAXACTIVE: Final = 4096  # KRETPROBE_MAXACTIVE_MAX
MAX_NAME: Final = 64  # MAX_EVENT_NAME_LEN, with the null
_MAX_PARAMETERS: Final = 128  # MAX_BTF_ARGS_LEN: bytes of the names $arg* stands for
KPROBES: Final = "kprobes"
UPROBES: Final = "uprobes"

_SPACE: Final = re.compile(r"[ \t\n\v\f\r]+")  # isspace(), without what Python takes for a space
_GROUP: Final = re.compile(
    rf"[A-Za-z_{rawtext.LATIN1_LETTERS}][A-Za-z0-9_{rawtext.LATIN1_LETTERS}-]*\Z"
)  # is_good_system_name(), kernel/trace/trace.h
_FUNCTION: Final = re.compile(r"[A-Za-z_.$]")  # how a symbol begins
_DENTRY: Final = re.compile(r":%p([dD])\Z")
_OTHER_SYSTEMS: Final = {
    "e": ("eprobes", "event probes (attached to another event)"),
    "f": ("fprobes", "function probes (fprobe)"),
    "t": ("tracepoints", "tracepoint probes"),
}
"""Of dynamic_events: letter -> default group, and what it stands for."""


class KernelScope(Protocol):
    """What the parser asks of the guest's kernel."""

    @property
    def convention(self) -> Convention: ...

    @property
    def names(self) -> bool:
        """Whether the language knows names of arguments: Linux 6.5 and later. Before, it was smaller in other ways."""
        ...

    @property
    def types(self) -> Btf | None:
        """The kernel's BTF."""
        ...

    @property
    def no_types(self) -> str | None:
        """Where there is none: why, for a person."""
        ...

    def count(self, symbol: str) -> int:
        """How many symbols have that name."""
        ...

    def is_entry(self, symbol: str, offset: int) -> bool | None:
        """Whether a function starts there, or its ENDBR ends there; None where no symbol covers the place."""
        ...


class FileScope(Protocol):
    """What the parser asks of the guest's files."""

    @property
    def convention(self) -> Convention: ...

    def is_regular(self, path: str) -> bool:
        """Whether `path`, links followed, is a regular file; ProbeError with its errno where there is nothing."""
        ...


# ------------------------------------------------------------------------------------------------------------ results


@dataclass(frozen=True, slots=True)
class Place:
    """Where to probe the kernel: a symbol with an offset, in a module or not, or an address."""

    symbol: str | None
    offset: int
    address: int | None
    module: str | None = None

    @property
    def name(self) -> str | None:
        """The symbol, with its module."""
        return self.symbol if self.module is None else f"{self.module}:{self.symbol}"

    def __str__(self) -> str:
        if self.symbol is None:
            return f"0x{self.address:x}"
        return f"{self.name}" + (f"+{self.offset}" if self.offset else "")


@dataclass(frozen=True, slots=True)
class FilePlace:
    """Where to probe a program: an offset into a file, or from `symbol`; `reference` is the offset of a counter to hold
    up, or 0."""

    path: str
    offset: int
    reference: int = 0
    word: int = 8
    symbol: str | None = None

    def __str__(self) -> str:
        counter = f"(0x{self.reference:x})" if self.reference else ""
        if self.symbol is not None:
            return f"{self.path}:{self.symbol}" + (f"+{self.offset}" if self.offset else "") + counter
        return f"{self.path}:0x{self.offset:0{2 * self.word}x}{counter}"


@dataclass(frozen=True, slots=True)
class ProbeSpec:
    """A kprobe_events definition, understood. `definition` is the line with single spaces, as error logs show it."""

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
        return _listing(kind, self)


@dataclass(frozen=True, slots=True)
class UprobeSpec:
    """A uprobe_events definition, understood; as ProbeSpec."""

    definition: str
    is_return: bool
    group: str
    event: str
    place: FilePlace
    args: tuple[FetchArg, ...]

    @property
    def name(self) -> str:
        return f"{self.group}/{self.event}"

    def listing(self) -> str:
        """The line uprobe_events prints for it."""
        return _listing("r" if self.is_return else "p", self)


Spec: TypeAlias = ProbeSpec | UprobeSpec


def _listing(kind: str, spec: Spec) -> str:
    return " ".join([f"{kind}:{spec.name} {spec.place}", *(f"{arg.name}={arg.text}" for arg in spec.args)])


@dataclass(frozen=True, slots=True)
class Deletion:
    """A `-:` line: every event it names goes. `group` None is any; `event` empty is any; `words` restrict place and
    arguments, as texts to compare."""

    definition: str
    group: str | None
    event: str
    words: tuple[str, ...]


# ------------------------------------------------------------------------------------------------------------ parsing


def split(line: str) -> list[str]:
    """The words of a line without its comment; ProbeError for one that is too long. Empty where nothing is defined."""
    if len(line) > MAX_LINE:
        raise ProbeError(errno.EINVAL, f"a definition has at most {MAX_LINE} characters")
    return [word for word in _SPACE.split(line.split("#", 1)[0]) if word]


def is_uprobe(line: str) -> bool:
    """Whether a definition means a file: no kernel symbol has a slash."""
    words = split(line)
    return len(words) > 1 and "/" in words[1]


def parse(line: str, scope: KernelScope, *, default_group: str = KPROBES, waits: bool = False) -> ProbeSpec:
    """A `p` or `r` line of kprobe_events; ProbeError with errno, text, caret and the kernel's token. `waits`: with the
    type ustring! too, which Linux has not."""
    return _KprobeParser(_definition(line, "SYMBOL[+OFFSET]|ADDRESS"), scope, default_group, waits).parse()


def parse_uprobe(line: str, scope: FileScope, *, default_group: str = UPROBES, symbols: bool = False) -> UprobeSpec:
    """A `p` or `r` line of uprobe_events; ProbeError. `symbols`: PATH:SYMBOL[+OFFSET] and ustring! too, which Linux
    has not."""
    return _UprobeParser(_definition(line, "PATH:OFFSET"), scope, default_group, symbols).parse()


def parse_deletion(line: str) -> Deletion:
    """A `-:[GROUP/][EVENT] [PLACE [ARG]...]` line; ProbeError EINVAL, of which the kernel logs nothing."""
    words = split(line)
    definition = " ".join(words)
    group, slash, event = words[0][2:].partition("/")
    if not slash:
        group, event = "", group
    if not words[0].startswith("-:") or not (slash or event):
        raise ProbeError(errno.EINVAL, "a deletion is -:[GROUP/]EVENT [PLACE [ARG]...]")
    return Deletion(definition, group if slash else None, event, tuple(words[1:]))


def _definition(line: str, place: str) -> list[str]:
    """The words of a `p` or `r` line; what the kernel refuses without a word in its log is told by us."""
    words = split(line)
    kind = words[0][0] if words else ""
    if words and _other_system(words[0]):
        reason = f"{kind}: {_OTHER_SYSTEMS[kind][1]} are another system of the kernel's; probes are p and r lines"
        raise ProbeError(errno.EINVAL, reason, definition=" ".join(words), column=0)
    if kind not in ("p", "r") or len(words) < 2:
        raise ProbeError(errno.EINVAL, f"a definition is p|r[MAXACTIVE][:[GROUP/][EVENT]] {place} [ARG]...")
    if len(words) - 2 > MAX_ARGS:
        raise ProbeError(errno.E2BIG, f"a probe has at most {MAX_ARGS} arguments")
    return words


def _other_system(head: str) -> bool:
    return re.match(r"[eft]\d*(:|\Z)", head) is not None


def other_system_event(words: Sequence[str]) -> str | None:
    """GROUP/EVENT that an `e`, `f` or `t` line names: refused here, but in dynamic_events it would exist."""
    head, _, name = words[0].partition(":")
    if not _other_system(words[0]) or not name:
        return None
    group, slash, event = name.partition("/")
    return f"{group}/{event}" if slash else f"{_OTHER_SYSTEMS[head[0]][0]}/{group}"


class _Parser:
    """The state of one line: its words, into which carets point."""

    def __init__(self, words: list[str], default_group: str) -> None:
        self._words = words
        self._default_group = default_group

    def _fail(self, index: int, offset: int, refusal: Refusal, errno: int | None = None) -> NoReturn:
        raise refusal.at(self._words, index, offset, errno)

    def _name(self, name: str, column: int) -> tuple[str, str]:
        """traceprobe_parse_event_name(): group and event, which is empty where only a group is given."""
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
        if not IDENTIFIER.match(event):
            self._fail(0, column, Refusal.BAD_EVENT_NAME)
        return group, event

    def _args(self, texts: Sequence[str], context: Context) -> tuple[FetchArg, ...]:
        args: list[FetchArg] = []
        for index, text in enumerate(texts, start=1):
            used = {arg.name for arg in args}
            try:
                args.append(parse_argument(text, index, context, used, sum(arg.type.field_size for arg in args)))
            except Fault as fault:
                if fault.refusal is Refusal.NEED_STRING_TYPE and not context.names:
                    raise ProbeError(errno.EINVAL, fault.refusal.text) from None  # of which it logs nothing
                error = fault.refusal.at(self._words, index + 1, fault.offset, fault.errno)
                error.hint = fault.hint
                raise error from None
            except BtfError as error:
                self._fail_types(index + 1, error)
        return tuple(args)

    def _fail_types(self, index: int, error: BtfError) -> NoReturn:
        """BTF that contradicts itself."""
        refused = Refusal.BAD_BTF_TID.at(self._words, index)
        refused.hint = f"the kernel's BTF is damaged: {error}"
        raise refused from error


class _KprobeParser(_Parser):
    def __init__(self, words: list[str], scope: KernelScope, default_group: str, waits: bool) -> None:
        super().__init__(words, default_group)
        self._waits = waits
        self._scope = scope

    def parse(self) -> ProbeSpec:
        head, colon, name = self._words[0].partition(":")
        is_return = head[0] == "r"
        maxactive = self._maxactive(head)
        place, suffixed = self._place(self._words[1])
        is_return = is_return or suffixed
        entry = None if place.symbol is None else self._scope.is_entry(_symbol(place), place.offset)
        if is_return and place.symbol is not None and entry is False:
            self._fail(1, 0, Refusal.BAD_RETPROBE)
        group, event = self._name(name, len(head) + 1) if colon else (self._default_group, "")
        fetches = len(self._words) > 2
        known = Context(
            self._scope.convention,
            is_entry=bool(entry),
            is_return=is_return and place.symbol is not None,
            types=self._scope.types if fetches else None,
            no_types=self._scope.no_types if fetches else None,
            names=self._scope.names,
            waits=self._waits,
            function=None if place.symbol is None else _symbol(place),
        )
        texts = self._with_dentries(self._expanded(known)) if known.names else self._words[2:]
        args = self._args(texts, known)
        definition = " ".join(self._words)
        return ProbeSpec(definition, is_return, maxactive, group, event or _auto_name(place, is_return), place, args)

    def _maxactive(self, head: str) -> int:
        if not "0" <= head[1:2] <= "9":
            return 0  # the kernel looks no further
        if head[0] == "p":
            self._fail(0, 1, Refusal.BAD_MAXACT_TYPE if self._scope.names else Refusal.MAXACT_NO_KPROBE)
        try:
            value = kstrtoul(head[1:], 32) if len(head) <= MAX_NAME else 0
        except NumberError:
            value = 0
        if not value:
            self._fail(0, 1, Refusal.BAD_MAXACT)
        if value > MAX_MAXACTIVE:
            self._fail(0, 1, Refusal.MAXACT_TOO_BIG)
        return value

    def _place(self, text: str) -> tuple[Place, bool]:
        """The place and whether it ends in %return."""
        try:
            return Place(None, 0, kstrtoul(text, self._scope.convention.bits)), False
        except NumberError:
            pass
        if "/" in text and ":" in text:
            raise ProbeError(errno.EINVAL, "this place is a file's: uprobe_events takes it, kprobe_events does not")
        symbol, percent, suffix = text.partition("%")
        if percent and suffix != "return":
            self._fail(1, len(symbol), Refusal.BAD_ADDR_SUFFIX)
        return self._symbol_place(symbol), bool(percent)

    def _symbol_place(self, text: str) -> Place:
        offset = 0
        signed = re.search(r"[+-]", text)
        if signed is not None:
            try:
                offset = kstrtol(text[signed.start() :], self._scope.convention.bits)
            except NumberError:
                offset = -1
            if not 0 <= offset <= 0xFFFF_FFFF:
                self._fail(1, 0, Refusal.BAD_PROBE_ADDR)
            text = text[: signed.start()]
        module, colon, symbol = text.partition(":")
        if colon:
            return Place(symbol, offset, None, module)  # no module is loaded here; the kernel waits for it
        found = self._scope.count(text)
        if found > 1:
            self._fail(1, 0, Refusal.NON_UNIQ_SYMBOL, None if self._scope.names else errno.EADDRNOTAVAIL)
        if not found:
            self._fail(1, 0, Refusal.BAD_PROBE_ADDR, None if self._scope.names else errno.ENOENT)
        return Place(text, offset, None)

    def _expanded(self, context: Context) -> list[str]:
        """traceprobe_expand_meta_args(): $arg* and $argN as the parameters' names, where BTF has them."""
        texts = self._words[2:]
        star = self._find_star(texts, context)
        if not any(text.startswith("$arg") for text in texts):
            return texts
        try:
            parameters = [parameter.name for parameter in context.parameters()]
        except BtfError as error:
            self._fail_types(1, error)
        if not parameters:
            if star is not None:
                last = max(index for index, text in enumerate(texts) if text.startswith("$arg"))
                refused = Refusal.NOSUP_BTFARG.at(self._words, last + 2, errno=errno.EOPNOTSUPP)
                refused.hint = context.no_types or "BTF knows no parameters of this function"
                raise refused
            return texts
        expanded: list[str] = []
        used = 0
        for index, text in enumerate(texts):
            if index == star:
                names = parameters
            elif text.startswith("$arg"):
                names = [self._parameter(text, index, parameters)]
            else:
                expanded.append(text)
                continue
            for name in names:
                used += len(name) + 1
                if used > _MAX_PARAMETERS:
                    self._fail(index + 2, 0, Refusal.ARGS_2LONG)
                expanded.append(name)
        if len(expanded) > MAX_ARGS:
            raise ProbeError(errno.E2BIG, f"a probe has at most {MAX_ARGS} arguments")
        return expanded

    def _find_star(self, texts: Sequence[str], context: Context) -> int | None:
        """The index of $arg*; what else begins with $arg must be $argN."""
        star = None
        for index, text in enumerate(texts):
            if not text.startswith("$arg"):
                continue
            if not (context.at_entry or context.at_return):
                self._fail(index + 2, 0, Refusal.NOFENTRY_ARGS)
            if "0" <= text[4:5] <= "9":
                continue
            if text[4:5] != "*":
                self._fail(index + 2, 0, Refusal.BAD_VAR)
            if star is not None:
                self._fail(index + 2, 0, Refusal.DOUBLE_ARGS)
            star = index
        return star

    def _parameter(self, text: str, index: int, parameters: Sequence[str]) -> str:
        """$argN[:TYPE] with the parameter's name in the place of $argN."""
        number, rest = simple_strtoul(text[4:], 10)
        if rest and not rest.startswith(":"):
            self._fail(index + 2, 0, Refusal.BAD_VAR, errno.ENOENT)
        number = (number + 0x8000_0000) % (1 << 32) - 0x8000_0000  # an int
        if number < 1:
            self._fail(index + 2, 0, Refusal.BAD_ARG_NUM)
        if number > len(parameters):
            self._fail(index + 2, 0, Refusal.NO_BTFARG)
        return parameters[number - 1] + rest

    def _with_dentries(self, texts: list[str]) -> list[str]:
        """traceprobe_expand_dentry_args(): :%pd and :%pD as what they fetch. The error log shows them so, too, where
        no $arg was replaced."""
        types = self._scope.types
        own = texts == self._words[2:]
        for index, text in enumerate(texts):
            found = _DENTRY.search(text)
            if found is None:
                continue
            if types is None:
                error = Refusal.BAD_TYPE.at(self._words, index + 2, found.start() + 1)
                error.hint = self._scope.no_types
                raise error
            try:
                steps = [types.offset("dentry", "d_name.name")]
                if found[1] == "D":
                    steps.append(types.offset("file", "f_path.dentry"))
            except BtfError as error:
                self._fail_types(index + 2, error)
            name, equals, body = text[: found.start()].partition("=")
            if not equals:
                name, body = "", name
            for step in reversed(steps):
                body = f"+{step:#x}({body})"
            texts[index] = f"{name}{equals}+0x0({body}):string"
            if own:
                self._words[index + 2] = texts[index]
        return texts


def _symbol(place: Place) -> str:
    return place.symbol or "" if place.module is None else f"{place.module}:{place.symbol}"


class _UprobeParser(_Parser):
    def __init__(self, words: list[str], scope: FileScope, default_group: str, symbols: bool) -> None:
        super().__init__(words, default_group)
        self._scope = scope
        self._symbols = symbols

    def parse(self) -> UprobeSpec:
        head, text = self._words[0], self._words[1]
        path, colon, rest = text.rpartition(":")
        named = self._symbols and _FUNCTION.match(rest) is not None
        if "/" not in text or not colon or not ("0" <= rest[:1] <= "9" or named):
            raise ProbeError(errno.EINVAL, "a uprobe's place is PATH:OFFSET, with a / in it and a number behind the :")
        try:
            regular = self._scope.is_regular(path)
        except ProbeError as error:
            self._fail(1, 0, Refusal.FILE_NOT_FOUND, error.errno)
        if not regular:
            self._fail(1, 0, Refusal.NO_REGULAR_FILE)
        place, suffixed = self._place(path, rest)
        is_return = head[0] == "r" or suffixed
        # Unlike kprobe_events, the colon must be the second character.
        group, event = self._name(head[2:], 2) if head[1:2] == ":" else (self._default_group, "")
        if not event:
            stem = re.split(r"[.\-_]", path.rpartition("/")[2], maxsplit=1)[0]
            event = f"p_{stem}_0x{place.offset:x}"
            if place.symbol is not None:
                event = re.sub(r"\W", "_", f"{head[0]}_{place.symbol}_{place.offset}", flags=re.ASCII)
            event = event[: MAX_NAME - 1]
        known = Context(self._scope.convention, kernel=False, is_return=is_return, waits=self._symbols)
        args = self._args(self._words[2:], known)
        return UprobeSpec(" ".join(self._words), is_return, group, event, place, args)

    def _place(self, path: str, rest: str) -> tuple[FilePlace, bool]:
        """OFFSET[%return][(REFERENCE)] behind the last colon."""
        start, bits = len(path) + 1, self._scope.convention.bits
        text, brace, counter = rest.partition("(")
        reference = 0
        if brace:
            inner, closing, beyond = counter.partition(")")
            at = start + len(text) + 1
            if not closing:
                self._fail(1, at + len(counter), Refusal.REFCNT_OPEN_BRACE)
            if beyond:
                self._fail(1, at + len(inner) + 1, Refusal.BAD_REFCNT_SUFFIX)
            try:
                reference = kstrtoul(inner, bits)
            except NumberError as error:
                self._fail(1, at, Refusal.BAD_REFCNT, error.errno)
        digits, percent, suffix = text.partition("%")
        if percent and suffix != "return":
            self._fail(1, start + len(digits), Refusal.BAD_ADDR_SUFFIX)
        symbol = None
        if not "0" <= digits[:1] <= "9":
            symbol, plus, digits = digits.partition("+")
            start += len(symbol) + len(plus)
            digits = digits if plus else "0"
        try:
            offset = kstrtoul(digits, bits)
        except NumberError as error:
            self._fail(1, start, Refusal.BAD_UPROBE_OFFS, error.errno)
        return FilePlace(path, offset, reference, self._scope.convention.word, symbol), bool(percent)


def _auto_name(place: Place, is_return: bool) -> str:
    """The kernel's: p_SYM_OFF or p_0xADDR, with what is no identifier made one."""
    kind = "r" if is_return else "p"
    if place.symbol is None:
        return f"{kind}_0x{place.address:x}"
    return re.sub(r"[.:]", "_", f"{kind}_{_symbol(place)}_{place.offset}"[: MAX_NAME - 1])
