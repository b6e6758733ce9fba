"""Event filters: `fl == 0x41 && (comm ~ "s*" || !(ret < 0))` becomes a closure over a hit, or the kernel's own error.

Rules: pure; what a name means comes as `Variable`s. Operators, their order of checks, texts, errno and carets are those
of Linux 6.12 (kernel/trace/trace_events_filter.c), measured on 6.12.117. Compiled once, so that a hit costs calls only.
"""

from __future__ import annotations

import errno
import operator
import re
from collections.abc import Callable, Mapping
from typing import Final, NoReturn, Protocol, TypeAlias

from probes import rawtext
from probes.errors import ProbeError
from probes.fetch import Value
from probes.hit import Getter, Hit, Variable
from probes.numbers import number

Predicate: TypeAlias = Callable[[Hit], bool]

MAX_OPERAND: Final = 23  # num_buf holds 24 with its NUL
MAX_STRING: Final = 255  # MAX_FILTER_STR_VAL is 256
MAX_FILTER: Final = 4095  # a write to the file is at most a page
MAX_DEPTH: Final = 200  # of parentheses; ours, so that evaluation cannot run out of stack
_OPERATORS: Final = ("~", "!=", "==", "<=", "<", ">=", ">", "&")
_COMPARE: Final[Mapping[str, Callable[[int, int], bool]]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "&": lambda left, right: bool(left & right),
}
_IN_NAME: Final = re.compile(rf"[A-Za-z0-9_{rawtext.LATIN1_LETTERS}]")
_SET: Final = re.compile(r"(!?)(\][^\]]*|[^\]!][^\]]*|![^\]]+)\]")
_SPACE: Final = " \t\n\r\v\f"

NO_ERROR: Final = "Error"
"""What error_log says of a refusal that has no text of its own."""


class Names(Protocol):
    """What a filter asks of the guest's symbols."""

    def span(self, function: str | int) -> range | None:
        """The addresses of the function of that name, or around that address; None where there is none."""
        ...


class FilterError(ProbeError):
    """A refused filter. `text` is what the kernel leaves in the filter file: the filter, a caret, the reason.

    `column` is where error_log has the caret, which may be behind the filter's end.
    """

    def __init__(self, number: int, filter_text: str, reason: str | None, at: int = 0) -> None:
        super().__init__(number, reason or NO_ERROR, definition=filter_text, column=at)
        if reason is None:
            self.text = f"{filter_text}\nError: (0)\n"
        else:
            self.text = f"{filter_text}\n{' ' * min(at, len(filter_text))}^\nparse_error: {reason}\n"


def compile_filter(text: str, variables: Mapping[str, Variable], names: Names) -> Predicate:
    """FilterError as the kernel would refuse it."""
    if len(text) > MAX_FILTER:
        raise FilterError(errno.E2BIG, text[:80], "Operand too long", 80)
    _check_balance(text)
    return _Parser(text, variables, names).parse()


def _check_balance(text: str) -> None:
    """calc_stack(): quotes and parentheses, before anything is understood."""
    opened: list[int] = []
    quote, quoted_at = "", 0
    for at, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote, quoted_at = character, at
        elif character == "(":
            opened.append(at)
        elif character == ")":
            if not opened:
                raise FilterError(errno.EPERM, text, "Too few '('", at)
            opened.pop()
    if quote:
        raise FilterError(errno.ESRCH, text, "Missing matching quote", quoted_at)
    if opened:
        raise FilterError(errno.ENOENT, text, "Too many '('", opened[-1])
    depth = max(_depths(text), default=0)
    if depth > MAX_DEPTH:
        raise FilterError(errno.EINVAL, text, "Too many '('", 0)


def _depths(text: str) -> list[int]:
    depth, found = 0, []
    for character in text:
        depth += (character == "(") - (character == ")")
        found.append(depth)
    return found


class _Parser:
    """predicate_parse(): predicates joined by && and ||, of which && binds closer; ! and parentheses before them."""

    def __init__(self, text: str, variables: Mapping[str, Variable], names: Names) -> None:
        self._text = text
        self._variables = variables
        self._names = names
        self._at = 0

    def parse(self) -> Predicate:
        """A stack of open parentheses: of each the alternatives so far, the conjunction under way, and its negation."""
        text = self._text
        stack: list[_Level] = [_Level(negated=False)]
        negate = False
        found = False
        while True:
            self._skip_space()
            if self._at >= len(text):
                if found:
                    self._fail(errno.EINVAL, "Meaningless filter expression", len(text))
                raise self._nothing(negate)
            character = text[self._at]
            if character == "(":
                stack.append(_Level(negate))
                negate = False
                self._at += 1
                continue
            if character == "!" and text[self._at + 1 : self._at + 2] not in ("=", "~"):
                negate = not negate
                self._at += 1
                continue
            if not (character.isalnum() or _IN_NAME.match(character)):
                raise FilterError(errno.EPERM if found or self._after_open() else errno.EINVAL, text, None)
            predicate = self._predicate()
            stack[-1].add(_not(predicate) if negate else predicate)
            negate, found = False, True
            if self._joint(stack):
                return stack[0].joined()

    def _nothing(self, negate: bool) -> FilterError:
        """No predicate at all: the kernel says so if it came to look for one."""
        if not self._text.strip(_SPACE) or not negate:
            return FilterError(errno.EINVAL, self._text, None)
        return FilterError(errno.EINVAL, self._text, "No filter found", len(self._text))

    def _after_open(self) -> bool:
        return self._text[self._at] not in ")&|" or self._at == 0

    def _joint(self, stack: list[_Level]) -> bool:
        """What follows a predicate: closing parentheses, then && or || (False), or the end (True)."""
        text = self._text
        while True:
            self._skip_space()
            rest = text[self._at : self._at + 2]
            if not rest:
                return True
            if rest[0] == ")":
                done = stack.pop()
                stack[-1].add(_not(done.joined()) if done.negated else done.joined())
                self._at += 1
                continue
            if rest not in ("&&", "||"):
                self._fail(errno.EPERM, "Too many terms in predicate expression", self._at)
            if rest == "||":
                stack[-1].alternative()
            self._at += 2
            return False

    def _skip_space(self) -> None:
        while self._at < len(self._text) and self._text[self._at] in _SPACE:
            self._at += 1

    def _fail(self, number: int, reason: str, at: int) -> NoReturn:
        raise FilterError(number, self._text, reason, at)

    # ------------------------------------------------------------------------------------------------ one predicate

    def _predicate(self) -> Predicate:
        """parse_pred(): FIELD OP VALUE. Most of its carets are one column beyond what they mean, as the kernel's."""
        text = self._text
        end = self._at
        while _IN_NAME.match(text, end):
            end += 1
        variable = self._variables.get(text[self._at : end])
        if variable is None:
            self._fail(errno.EINVAL, "Field not found", end + 1)
        self._at = end
        if text.startswith(".ustring", end):
            self._at = end = end + len(".ustring")
        is_function = text.startswith(".function", end)
        self._at += len(".function") if is_function else 0
        self._skip_space()
        sign = next((known for known in _OPERATORS if text.startswith(known, self._at)), None)
        if sign is None:
            self._fail(errno.EINVAL, "Invalid operator", self._at + 1)
        self._at += len(sign)
        self._skip_space()
        if is_function:
            return self._function(variable, sign)
        if text.startswith("CPUS", self._at):
            return self._cpus(variable, sign)
        if text[self._at : self._at + 1] in ("'", '"'):
            return self._string(variable, sign)
        if text[self._at : self._at + 1] == "-" or text[self._at : self._at + 1].isdigit():
            return self._number(variable, sign)
        raise FilterError(errno.EINVAL, text, "Invalid value (did you forget quotes)?", self._at + 1)

    def _operand(self) -> str:
        start = self._at
        while self._at < len(self._text) and self._text[self._at].isalnum():
            self._at += 1
        return self._text[start : self._at]

    def _function(self, variable: Variable, sign: str) -> Predicate:
        """FIELD.function == NAME: the address lies in that function."""
        text, field = self._text, variable.field
        if field.size != self._variables["comm"].field.size or field.text:  # a word, as a pointer to a name is
            self._fail(errno.EINVAL, "Illegal operation for field type", self._at + 1)
        if sign not in ("==", "!="):
            self._fail(errno.EINVAL, "Invalid operator", self._at + 1)
        if text[self._at : self._at + 1].isdigit():
            operand = self._operand()
            if len(operand) > MAX_OPERAND:
                self._fail(errno.EINVAL, "Operand too long", self._at + 1)
            address = number(operand)
            if address is None:
                self._fail(errno.EINVAL, "Invalid value (did you forget quotes)?", self._at + 1)
            span = self._names.span(address)
        else:
            start = self._at
            while self._at < len(text) and text[self._at] not in _SPACE:
                self._at += 1
            span = self._names.span(text[start : self._at])
        if span is None:
            self._fail(errno.EINVAL, "Function not found", self._at + 1)
        get, inside = variable.get, sign == "=="
        return lambda hit: (get(hit) in span) is inside

    def _cpus(self, variable: Variable, sign: str) -> Predicate:
        """FIELD == CPUS{LIST}: of a machine with one processor, so the list is 0."""
        text = self._text
        if variable.field.text or sign not in ("==", "!=", "&"):
            self._fail(errno.EINVAL, "Illegal operation for field type", self._at + 1)
        self._at += len("CPUS") + 1
        if text[self._at - 1 : self._at] != "{":
            self._fail(errno.EINVAL, "Missing '{'", self._at + 1)
        end = text.find("}", self._at)
        if end < 0:
            self._fail(errno.EINVAL, "Missing '}'", len(text) + 1)
        if text[self._at : end].strip() not in ("0", "0-0"):
            self._fail(errno.EINVAL, "Invalid cpulist", end + 1)
        self._at = end + 1
        get, equal = variable.get, sign != "!="
        return lambda hit: (get(hit) == 0) is equal

    def _string(self, variable: Variable, sign: str) -> Predicate:
        text, quote = self._text, self._text[self._at]
        if sign not in ("==", "!=", "~"):
            self._fail(errno.EINVAL, "Illegal operation for field type", self._at + 1)
        if not variable.field.text:
            self._fail(errno.EINVAL, "Expecting numeric field", self._at + 1)
        end = text.find(quote, self._at + 1)
        if end < 0:
            self._fail(errno.EINVAL, "Missing matching quote", len(text) + 1)
        wanted = text[self._at + 1 : end]
        if len(rawtext.bytewise(wanted)) > MAX_STRING:
            self._fail(errno.EINVAL, "Operand too long", end + 1)
        self._at = end + 1
        get = variable.get
        if sign != "~":
            equal = sign == "=="
            return lambda hit: ((get(hit) or "") == wanted) is equal
        return _glob(get, wanted)

    def _number(self, variable: Variable, sign: str) -> Predicate:
        text, field, start = self._text, variable.field, self._at
        if field.text:
            self._fail(errno.EINVAL, "Expecting string field", start + 1)
        if sign == "~":
            self._fail(errno.EINVAL, "Illegal operation for field type", start + 1)
        self._at += text[start] == "-"
        self._operand()
        operand = text[start : self._at]
        if len(operand) > MAX_OPERAND:
            self._fail(errno.EINVAL, "Operand too long", self._at + 1)
        value = number(operand, signed=field.signed)
        if value is None:
            # this one caret is where it means
            self._fail(errno.EINVAL, "Illegal integer value", start + 1)
        return _compare(variable, sign, value)


class _Level:
    """What is between two parentheses, so far."""

    def __init__(self, negated: bool) -> None:
        self.negated = negated
        self._alternatives: list[list[Predicate]] = [[]]

    def add(self, predicate: Predicate) -> None:
        self._alternatives[-1].append(predicate)

    def alternative(self) -> None:
        self._alternatives.append([])

    def joined(self) -> Predicate:
        return _any([_all(terms) for terms in self._alternatives])


def _all(terms: list[Predicate]) -> Predicate:
    if len(terms) == 1:
        return terms[0]
    return lambda hit: all(term(hit) for term in terms)


def _any(terms: list[Predicate]) -> Predicate:
    if len(terms) == 1:
        return terms[0]
    return lambda hit: any(term(hit) for term in terms)


def _not(predicate: Predicate) -> Predicate:
    return lambda hit: not predicate(hit)


def _compare(variable: Variable, sign: str, value: int) -> Predicate:
    """The value is cut to the field's size and sign; a field of another size than a number's matches nothing."""
    field, get, compare = variable.field, variable.get, _COMPARE[sign]
    if field.size not in (1, 2, 4, 8):
        return (lambda hit: True) if sign == "!=" else (lambda hit: False)
    mask = (1 << 8 * field.size) - 1
    value &= mask
    if field.signed and field.parts == 1:
        value -= (value >> (8 * field.size - 1)) << 8 * field.size
        if sign == "&":
            value &= mask
    if sign == "==":
        return lambda hit: get(hit) == value
    return lambda hit: compare(_int(get(hit)), value)


def _int(value: Value) -> int:
    return value if isinstance(value, int) else 0


def _glob(get: Getter, pattern: str) -> Predicate:
    """filter_parse_regex() and glob_match(): `*`, `?`, `[set]`, backslash; a leading ! turns it round."""
    wanted = True
    if pattern.startswith("!"):
        pattern, wanted = pattern[1:], False
    if pattern[:1].isdigit():
        return lambda hit: ((get(hit) or "") == pattern) is wanted
    match = re.compile(_expression(rawtext.bytewise(pattern)), re.DOTALL).fullmatch
    return lambda hit: (match(rawtext.bytewise(str(get(hit) or ""))) is not None) is wanted


def _expression(pattern: str) -> str:
    """lib/glob.c's patterns as a regular expression; a set that is not closed stands for itself.

    What stands between two stars is looked for once, from the left, in an atomic group: no pattern is slow.
    """
    pieces, at = [""], 0
    while at < len(pattern):
        character = pattern[at]
        at += 1
        if character == "*":
            pieces.append("")
        elif character == "?":
            pieces[-1] += "."
        elif character == "[" and (found := _SET.match(pattern, at)) is not None:
            pieces[-1] += f"[{'^' if found[1] else ''}{_set(found[2])}]"
            at = found.end()
        elif character == "\\" and at < len(pattern):
            pieces[-1] += re.escape(pattern[at])
            at += 1
        else:
            pieces[-1] += re.escape(character)
    if len(pieces) == 1:
        return pieces[0]
    first, *middle, last = pieces
    return first + "".join(f"(?>.*?{piece})" for piece in middle if piece) + ".*" + last


def _set(inner: str) -> str:
    """The inside of a [set], ranges kept; one that runs backwards matches its ends alone."""
    out, at = "", 0
    while at < len(inner):
        if inner[at + 1 : at + 2] == "-" and at + 2 < len(inner) and inner[at] <= inner[at + 2]:
            out += f"{re.escape(inner[at])}-{re.escape(inner[at + 2])}"
            at += 3
        else:
            out += re.escape(inner[at])
            at += 1
    return out
