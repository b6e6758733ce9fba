"""Fetch arguments: `+0($arg2):string` becomes a small tree, or the kernel's error with its column.

Rules: pure; used by `probes.spec`, evaluated by `probes.fetch`. Limits and texts are Linux 6.12's.
"""

from __future__ import annotations

import enum
import errno as errno_module
from dataclasses import dataclass
from typing import Final, NoReturn, TypeAlias

from probes.arch import Convention
from probes.errors import ProbeError

MAX_TEXT: Final = 63  # MAX_ARGSTR_LEN
MAX_ARRAY: Final = 64  # MAX_ARRAY_LEN
# 16 fetch instructions, of which store and end take two: what is left for one load and its dereferences.
_MAX_OPS: Final = 15
_STACK_WORDS: Final = 16384  # THREAD_SIZE in bytes; $stackN and $argN stay inside it


class Refusal(enum.Enum):
    """The errors of kernel/trace/trace_probe.h that a kprobe definition can meet: text and errno."""

    MAXACT_NO_KPROBE = ("Maxactive is not for kprobe", errno_module.EINVAL)
    BAD_MAXACT = ("Invalid maxactive number", errno_module.EINVAL)
    MAXACT_TOO_BIG = ("Maxactive is too big", errno_module.EINVAL)
    BAD_PROBE_ADDR = ("Invalid probed address or symbol", errno_module.EINVAL)
    NON_UNIQ_SYMBOL = ("The symbol is not unique", errno_module.EINVAL)
    BAD_RETPROBE = ("Retprobe address must be an function entry", errno_module.EINVAL)
    BAD_ADDR_SUFFIX = ("Invalid probed address suffix", errno_module.EINVAL)
    NO_GROUP_NAME = ("Group name is not specified", errno_module.EINVAL)
    GROUP_TOO_LONG = ("Group name is too long", errno_module.EINVAL)
    BAD_GROUP_NAME = ("Group name must follow the same rules as C identifiers", errno_module.EINVAL)
    NO_EVENT_NAME = ("Event name is not specified", errno_module.EINVAL)
    EVENT_TOO_LONG = ("Event name is too long", errno_module.EINVAL)
    BAD_EVENT_NAME = ("Event name must follow the same rules as C identifiers", errno_module.EINVAL)
    EVENT_EXIST = ("Given group/event name is already used by another event", errno_module.EEXIST)
    RETVAL_ON_PROBE = ("$retval is not available on probe", errno_module.EINVAL)
    BAD_STACK_NUM = ("Invalid stack number", errno_module.EINVAL)
    BAD_ARG_NUM = ("Invalid argument number", errno_module.EINVAL)
    BAD_VAR = ("Invalid $-variable specified", errno_module.EINVAL)
    BAD_REG_NAME = ("Invalid register name", errno_module.EINVAL)
    BAD_MEM_ADDR = ("Invalid memory address", errno_module.EINVAL)
    BAD_IMM = ("Invalid immediate value", errno_module.EINVAL)
    IMMSTR_NO_CLOSE = ("String is not closed with '\"'", errno_module.EINVAL)
    FILE_ON_KPROBE = ("File offset is not available with kprobe", errno_module.EINVAL)
    TOO_MANY_OPS = ("Dereference is too much nested", errno_module.EINVAL)
    DEREF_NEED_BRACE = ("Dereference needs a brace", errno_module.EINVAL)
    BAD_DEREF_OFFS = ("Invalid dereference offset", errno_module.EINVAL)
    DEREF_OPEN_BRACE = ("Dereference brace is not closed", errno_module.EINVAL)
    COMM_CANT_DEREF = ("$comm can not be dereferenced", errno_module.EINVAL)
    BAD_FETCH_ARG = ("Invalid fetch argument", errno_module.EINVAL)
    ARRAY_NO_CLOSE = ("Array is not closed", errno_module.EINVAL)
    BAD_ARRAY_SUFFIX = ("Array has wrong suffix", errno_module.EINVAL)
    BAD_ARRAY_NUM = ("Invalid array size", errno_module.EINVAL)
    ARRAY_TOO_BIG = ("Array number is too big", errno_module.EINVAL)
    BAD_TYPE = ("Unknown type is specified", errno_module.EINVAL)
    BAD_STRING = ("String accepts only memory argument", errno_module.EINVAL)
    BAD_SYMSTRING = ("Symbol String doesn't accept data/userdata", errno_module.EINVAL)
    BAD_BITFIELD = ("Invalid bitfield", errno_module.EINVAL)
    ARG_NAME_TOO_LONG = ("Argument name is too long", errno_module.EINVAL)
    NO_ARG_NAME = ("Argument name is not specified", errno_module.EINVAL)
    BAD_ARG_NAME = ("Argument name must follow the same rules as C identifiers", errno_module.EINVAL)
    USED_ARG_NAME = ("This argument name is already used", errno_module.EINVAL)
    ARG_TOO_LONG = ("Argument expression is too long", errno_module.E2BIG)
    NO_ARG_BODY = ("No argument expression", errno_module.EINVAL)
    NOFENTRY_ARGS = ("$arg* can be used only on function entry or exit", errno_module.EINVAL)
    NOSUP_BTFARG = ("BTF is not available or not supported", errno_module.EOPNOTSUPP)

    @property
    def text(self) -> str:
        return self.value[0]

    @property
    def errno(self) -> int:
        return self.value[1]


# ---------------------------------------------------------------------------------------------------- the tree's nodes


@dataclass(frozen=True, slots=True)
class Register:
    name: str


@dataclass(frozen=True, slots=True)
class StackPointer:
    pass


@dataclass(frozen=True, slots=True)
class StackWord:
    number: int


@dataclass(frozen=True, slots=True)
class Argument:
    """`$argN`, from 1."""

    number: int


@dataclass(frozen=True, slots=True)
class ReturnValue:
    pass


@dataclass(frozen=True, slots=True)
class Comm:
    pass


@dataclass(frozen=True, slots=True)
class Immediate:
    value: int


@dataclass(frozen=True, slots=True)
class ImmediateText:
    text: str


@dataclass(frozen=True, slots=True)
class SymbolAddress:
    """Where `symbol` lies, plus an offset; memory is read through a Deref around it."""

    symbol: str
    offset: int


@dataclass(frozen=True, slots=True)
class Deref:
    """The memory at `inner` + `offset`; `user`: the program's, where the architecture tells the two apart."""

    inner: Node
    offset: int
    user: bool


Node: TypeAlias = (
    Register
    | StackPointer
    | StackWord
    | Argument
    | ReturnValue
    | Comm
    | Immediate
    | ImmediateText
    | SymbolAddress
    | Deref
)

# ----------------------------------------------------------------------------------------------------------- the types

STRINGS: Final = frozenset(("string", "ustring"))
_SIZES: Final = {f"{kind}{bits}": bits // 8 for kind in "usx" for bits in (8, 16, 32, 64)} | {"char": 1}


@dataclass(frozen=True, slots=True)
class FetchType:
    """How fetched bytes are read and shown.

    `name` is u8..x64, char, symbol, symstr, string or ustring; `size` is in bytes (a string's is 0). A bitfield is
    `width` bits from bit `low` of a container of `size` bytes; `count` is an array's length, 0 for a scalar.
    """

    name: str
    size: int
    width: int = 0
    low: int = 0
    count: int = 0


@dataclass(frozen=True, slots=True)
class FetchArg:
    """One argument: its name, its text after `NAME=`, its tree and its type."""

    name: str
    text: str
    node: Node
    type: FetchType

    @property
    def symbols(self) -> list[str]:
        """Data symbols it needs."""
        node = self.node
        while isinstance(node, Deref):
            node = node.inner
        return [node.symbol] if isinstance(node, SymbolAddress) else []


@dataclass(frozen=True, slots=True)
class Body:
    """An argument's text and what it may refer to."""

    text: str
    is_entry: bool
    is_return: bool
    convention: Convention


def parse_number(text: str) -> int | None:
    """kstrtol(base 0): 0x hexadecimal, leading 0 octal, else decimal; one sign; None for anything else."""
    digits = text[1:] if text[:1] in ("-", "+") else text
    lowered = digits.lower()
    base = 16 if lowered.startswith("0x") else 8 if lowered.startswith("0") and len(digits) > 1 else 10
    alphabet = "0123456789abcdef"[:base]
    body = lowered[2:] if base == 16 else lowered
    if not body or any(character not in alphabet for character in body):
        return None
    value = int(body, base)
    if value >= 1 << 64:
        return None
    return -value if text[0] == "-" else value


def parse_body(body: Body, name: str) -> FetchArg:
    """The part after `NAME=`; ProbeError whose column is relative to that part."""
    if len(body.text) > MAX_TEXT:
        _fail(0, Refusal.ARG_TOO_LONG)
    if not body.text:
        _fail(0, Refusal.NO_ARG_BODY)
    source, type_column, type_text, count = _split_type(body.text)
    if source in ("$comm", "$COMM") or source.startswith('\\"'):
        if count or type_text not in (None, "string"):
            _fail(type_column, Refusal.BAD_TYPE)
        fetch_type = FetchType("string", 0)
    else:
        fetch_type = _type(type_text, type_column, count, body.convention)
    node = _Expression(body).parse(source, 0, depth=0)
    _check_type(node, fetch_type, type_column)
    return FetchArg(name, body.text, node, fetch_type)


def _fail(column: int, refusal: Refusal, errno: int | None = None) -> NoReturn:
    raise ProbeError(errno or refusal.errno, refusal.text, column=column, token=refusal.name)


def _split_type(text: str) -> tuple[str, int, str | None, int]:
    """Expression, column of the type, type without its array suffix (None where absent), array length."""
    source, colon, type_text = text.partition(":")
    if not colon:
        return source, 0, None, 0
    column = len(source) + 1
    type_text, bracket, suffix = type_text.partition("[")
    if not bracket:
        return source, column, type_text, 0
    at = column + len(type_text) + 1
    number, closing, rest = suffix.partition("]")
    if not closing:
        _fail(at + len(suffix), Refusal.ARRAY_NO_CLOSE)
    if rest:
        _fail(at + len(number) + 1, Refusal.BAD_ARRAY_SUFFIX)
    count = parse_number(number)
    if count is None or count <= 0:
        _fail(at, Refusal.BAD_ARRAY_NUM)
    if count > MAX_ARRAY:
        _fail(at, Refusal.ARRAY_TOO_BIG)
    return source, column, type_text, count


def _type(text: str | None, column: int, count: int, convention: Convention) -> FetchType:
    if text is None:
        return FetchType(f"x{convention.bits}", convention.word, count=count)
    if text in STRINGS:
        return FetchType(text, 0, count=count)
    if text in ("symbol", "symstr"):
        return FetchType(text, convention.word, count=count)
    if text in _SIZES:
        return FetchType(text, _SIZES[text], count=count)
    if text.startswith("b") and "/" in text:
        return _bitfield(text, column, count)
    return _fail(column, Refusal.BAD_TYPE)


def _bitfield(text: str, column: int, count: int) -> FetchType:
    """b<width>@<offset>/<container>."""
    field, _, container_text = text[1:].partition("/")
    container = parse_number(container_text)
    if container not in (8, 16, 32, 64):
        _fail(column, Refusal.BAD_TYPE)
    width_text, at, low_text = field.partition("@")
    width, low = parse_number(width_text), parse_number(low_text)
    if not at or width is None or low is None or width <= 0 or low < 0 or width + low > container:
        _fail(column, Refusal.BAD_BITFIELD)
    return FetchType(f"u{container}", container // 8, width=width, low=low, count=count)


def _check_type(node: Node, fetch_type: FetchType, type_column: int) -> None:
    if fetch_type.name in STRINGS and not isinstance(node, Deref | Comm | Immediate | ImmediateText):
        _fail(type_column, Refusal.BAD_STRING)
    if fetch_type.count and not isinstance(node, Deref):
        # Arrays are read from memory only; the kernel says so with the string's words.
        _fail(type_column, Refusal.BAD_STRING)


class _Expression:
    """Recursive descent over one fetch expression; columns are within the argument's body."""

    def __init__(self, body: Body) -> None:
        self._body = body

    def parse(self, text: str, column: int, depth: int) -> Node:
        match text[:1]:
            case "$":
                return self._variable(text[1:], column)
            case "%":
                return self._register(text[1:], column)
            case "@":
                return self._memory(text[1:], column, depth)
            case "+" | "-":
                return self._dereference(text, column, depth)
            case "\\":
                return self._immediate(text[1:], column + 1)
            case first if first.isalpha() or first == "_":
                if self._body.is_entry or self._body.is_return:
                    _fail(column, Refusal.NOSUP_BTFARG)
                _fail(column, Refusal.NOSUP_BTFARG, errno_module.EINVAL)
        return _fail(column, Refusal.BAD_FETCH_ARG)

    def _variable(self, name: str, column: int) -> Node:
        if name.startswith("retval"):
            if not self._body.is_return:
                _fail(column, Refusal.RETVAL_ON_PROBE)
            return ReturnValue()
        if name in ("comm", "COMM"):
            return Comm()
        if name == "stack":
            return StackPointer()
        if name.startswith("stack") and name[5:].isdecimal() and name[5:].isascii():
            number = int(name[5:])
            if number > _STACK_WORDS // self._body.convention.word:
                _fail(column, Refusal.BAD_STACK_NUM)
            return StackWord(number)
        if name.startswith("arg"):
            return self._argument(name[3:], column)
        return _fail(column, Refusal.BAD_VAR)

    def _argument(self, digits: str, column: int) -> Node:
        if not (digits.isdecimal() and digits.isascii()):
            _fail(column, Refusal.BAD_VAR, errno_module.ENOENT)  # measured: EINVAL everywhere else
        number = int(digits)
        if not number or number > _STACK_WORDS // self._body.convention.word:
            _fail(column, Refusal.BAD_ARG_NUM)
        if not (self._body.is_entry or self._body.is_return):
            _fail(column, Refusal.NOFENTRY_ARGS)
        return Argument(number)

    def _register(self, name: str, column: int) -> Node:
        convention = self._body.convention
        if name not in convention.registers and name not in ("ip", "flags", "orig_ax", *convention.segments):
            _fail(column, Refusal.BAD_REG_NAME)
        return Register(name)

    def _memory(self, text: str, column: int, depth: int) -> Node:
        if text[:1].isdecimal():
            value = parse_number(text)
            if value is None:
                _fail(column, Refusal.BAD_MEM_ADDR)
            self._room(depth + 2, column)
            return Deref(Immediate(value), 0, user=False)
        if text.startswith("+"):
            _fail(column, Refusal.FILE_ON_KPROBE)
        self._room(depth + 3, column)
        sign = max(text.rfind("+"), text.rfind("-"))
        if sign < 0:
            return Deref(SymbolAddress(text, 0), 0, user=False)
        offset = parse_number(text[sign:])
        if offset is None:
            return Deref(SymbolAddress(text, 0), 0, user=False)  # refused when the symbol is looked up
        return Deref(SymbolAddress(text[:sign], offset), 0, user=False)

    def _dereference(self, text: str, column: int, depth: int) -> Node:
        user = text[1:2] == "u"
        digits_at = 2 if user else 1
        brace = text.find("(")
        if brace < 0:
            _fail(column, Refusal.DEREF_NEED_BRACE)
        offset = parse_number(text[digits_at:brace])
        if offset is None or text[digits_at : digits_at + 1] in ("+", "-"):
            _fail(column, Refusal.BAD_DEREF_OFFS)
        inner_column = column + brace + 1
        inner_text, closing, _ = text[brace + 1 :].rpartition(")")
        if not closing:
            _fail(inner_column + len(text) - brace - 1, Refusal.DEREF_OPEN_BRACE)
        inner = self.parse(inner_text, inner_column, depth + 1)
        if isinstance(inner, Comm | ImmediateText):
            _fail(inner_column, Refusal.COMM_CANT_DEREF)
        self._room(depth + 2, column)
        return Deref(inner, -offset if text[0] == "-" else offset, user)

    def _immediate(self, text: str, column: int) -> Node:
        if text.startswith('"'):
            if len(text) < 2 or not text.endswith('"'):
                _fail(column + len(text), Refusal.IMMSTR_NO_CLOSE)
            return ImmediateText(text[1:-1])
        value = parse_number(text)
        if value is None:
            _fail(column, Refusal.BAD_IMM)
        return Immediate(value & self._body.convention.mask)

    def _room(self, operations: int, column: int) -> None:
        """The kernel compiles into 16 fetch instructions; nesting beyond them is refused."""
        if operations > _MAX_OPS:
            _fail(column, Refusal.TOO_MANY_OPS)
