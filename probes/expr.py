"""Fetch arguments: `name=+0($arg2):string` becomes a small tree with a type, or the kernel's error with its column.

Rules: pure; used by `probes.spec`, evaluated by `probes.fetch`. The order of checks, the columns and the limits are
those of traceprobe_parse_probe_arg() and what it calls (kernel/trace/trace_probe.c, Linux 6.12): it compiles into 16
fetch instructions and reports at an offset it moves along, so both are followed here.
"""

from __future__ import annotations

import errno as numbers
import re
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Final, NoReturn

from probes import rawtext
from probes.arch import Convention
from probes.btf import Btf, Kind, Parameter, Type
from probes.fetchargs import (
    Argument,
    Comm,
    Deref,
    FetchArg,
    FileOffset,
    Immediate,
    ImmediateText,
    Node,
    Register,
    ReturnValue,
    StackPointer,
    StackWord,
    SymbolAddress,
)
from probes.fetchtypes import STRINGS, FetchType, find_type
from probes.numbers import NumberError, kstrtol, kstrtoul, simple_strtoul
from probes.refusals import Refusal

MAX_TEXT: Final = 63  # MAX_ARGSTR_LEN
MAX_ARG_NAME: Final = 32
MAX_ARRAY: Final = 64  # MAX_ARRAY_LEN
MAX_EVENT_SIZE: Final = 3072  # MAX_PROBE_EVENT_SIZE, bytes of all fields
_LAST_OP: Final = 15  # FETCH_INSN_MAX - 1, the end marker's place
_STACK_BYTES: Final = {64: 16384, 32: 8192}  # THREAD_SIZE; $stackN and $argN stay inside it
RESERVED_NAMES: Final = frozenset(
    (
        *("common_type", "common_flags", "common_preempt_count", "common_pid", "common_tgid"),
        *("__probe_ip", "__probe_ret_ip", "__probe_func"),
    )
)
_LETTERS: Final = f"A-Za-z_{rawtext.LATIN1_LETTERS}"
IDENTIFIER: Final = re.compile(rf"[{_LETTERS}][0-9{_LETTERS}]*\Z")  # is_good_name(), kernel/trace/trace.h
_LETTER: Final = re.compile(rf"[{_LETTERS}\u0080-\u05bf\u0600-\ud7ff\ue000-\U0010ffff]")
"""What the kernel takes for a letter, looking at the first byte of a character's UTF-8: 0xd7 is none."""


class Fault(Exception):
    """A refusal `offset` characters into the argument at hand; `spec` makes a ProbeError of it."""

    def __init__(self, refusal: Refusal, offset: int, errno: int | None = None, hint: str | None = None) -> None:
        super().__init__(refusal.text)
        self.refusal = refusal
        self.offset = offset
        self.errno = errno
        self.hint = hint


# ------------------------------------------------------------------------------------------------- what is known there


_WAITING: Final = "ustring!"


class Context:
    """What an argument may refer to at its probe point.

    `kernel` or a program (uprobe); at a function's entry, at its return, or neither. `types` is the kernel's BTF and
    `function` the name to look up there; where there is none, `no_types` says why, for a person. `names` False: the
    language before 6.5. `waits`: with the type ustring!, which Linux has not.
    """

    def __init__(
        self,
        convention: Convention,
        *,
        kernel: bool = True,
        is_entry: bool = False,
        is_return: bool = False,
        types: Btf | None = None,
        no_types: str | None = None,
        function: str | None = None,
        names: bool = True,
        waits: bool = False,
    ) -> None:
        self.waits = waits
        self.convention = convention
        self.names = names
        self.kernel = kernel
        self.is_return = is_return
        self.at_entry = kernel and is_entry and not is_return
        self.at_return = kernel and is_return
        self.types = types
        self.no_types = no_types
        self.function = function
        self._prototype: Type | None = None

    @property
    def asked(self) -> bool:
        """Whether the prototype has been asked for and found, which changes what the kernel says next."""
        return self._prototype is not None

    def prototype(self) -> Type | None:
        """The function's FUNC_PROTO, None where BTF does not know it."""
        if self._prototype is None and self.types is not None and self.function is not None:
            function = self.types.find(self.function, Kind.FUNC)
            found = None if function is None else self.types.prototype(function)
            self._prototype = found if found is not None and found.kind is Kind.FUNC_PROTO else None
        return self._prototype

    def parameters(self) -> list[Parameter]:
        prototype = self.prototype()
        return [] if prototype is None or self.types is None else self.types.parameters(prototype)


# --------------------------------------------------------------------------------------------------------- the parser


def parse_argument(text: str, index: int, context: Context, used: AbstractSet[str], size: int) -> FetchArg:
    """Argument `index` (from 1) of a definition; those before it have the names `used` and `size` bytes. Fault."""
    name, equals, body = text.partition("=")
    if equals:
        if len(name) > MAX_ARG_NAME:
            raise Fault(Refusal.ARG_NAME_TOO_LONG, 0)
        if not name:
            raise Fault(Refusal.NO_ARG_NAME, 0)
    else:
        body = text
        name = _own_name(text, index, context)
    if not IDENTIFIER.match(name):
        raise Fault(Refusal.BAD_ARG_NAME, 0)
    if name in RESERVED_NAMES or name in used:
        raise Fault(Refusal.USED_ARG_NAME, 0)
    return _Body(body, len(text) - len(body), context).parse(name, size)


def _own_name(text: str, index: int, context: Context) -> str:
    """A BTF variable's own name, else argN."""
    name = text.partition(":")[0]
    return name if context.types is not None and IDENTIFIER.match(name) else f"arg{index}"


class _Body:
    """One argument's expression and type.

    `offset` is ctx->offset, where the next error points; `_ops` counts fetch instructions from 0, as `code` points to
    them; the last type and bit position are those of the BTF variable or field that was read last.
    """

    def __init__(self, text: str, offset: int, context: Context) -> None:
        self._text = text
        self._offset = offset
        self._context = context
        self._convention = context.convention
        self._ops = 0
        self._last_type: Type | None = None
        self._bit_offset = 0
        self._bit_size = 0

    def parse(self, name: str, size: int) -> FetchArg:
        if len(self._text) > MAX_TEXT:
            self._fail(Refusal.ARG_TOO_LONG)
        if not self._text:
            self._fail(Refusal.NO_ARG_BODY)
        begin = self._offset
        source, type_text, count = self._split_type()
        fetch_type = self._type(source, type_text, count)
        node = self._expression(source)
        if not self._context.names:
            self._offset = begin
        if self._last_type is not None:
            if type_text is None:
                fetch_type = replace(self._type_of_variable(self._last_type), count=count)
            elif "string" in type_text:
                node = self._string_of_variable(node, self._last_type, type_text)
        if size + fetch_type.field_size > MAX_EVENT_SIZE:
            self._fail(Refusal.EVENT_TOO_BIG)
        fetch_type = self._finish(node, fetch_type, type_text, len(source) + 1)
        return FetchArg(name, self._text, node, fetch_type)

    def _fail(self, refusal: Refusal, beyond: int = 0, errno: int | None = None) -> NoReturn:
        raise Fault(refusal, self._offset + beyond, errno)

    def _next_op(self, errno: int | None = None) -> None:
        """++code, of which the last is taken."""
        self._ops += 1
        if self._ops == _LAST_OP:
            self._fail(Refusal.TOO_MANY_OPS, errno=errno)

    # --------------------------------------------------------------------------------------------------------- types

    def _split_type(self) -> tuple[str, str | None, int]:
        """Expression, type without its array suffix (None where absent), array length."""
        source, colon, type_text = self._text.partition(":")
        if not colon:
            return source, None, 0
        type_text, bracket, suffix = type_text.partition("[")
        if not bracket:
            return source, type_text, 0
        at = len(source) + 1 + len(type_text) + 1
        number, closing, rest = suffix.partition("]")
        if not closing:
            self._fail(Refusal.ARRAY_NO_CLOSE, at + len(suffix))
        if rest:
            self._fail(Refusal.BAD_ARRAY_SUFFIX, at + len(number) + 1)
        try:
            count = kstrtoul(number, 32)
        except NumberError:
            count = 0
        if not count:
            self._fail(Refusal.BAD_ARRAY_NUM, at)
        if count > MAX_ARRAY:
            self._fail(Refusal.ARRAY_TOO_BIG, at)
        return source, type_text, count

    def _type(self, source: str, text: str | None, count: int) -> FetchType:
        word, column = self._convention.word, 0 if text is None else len(source) + 1
        if source in ("$comm", "$COMM") or source.startswith('\\"'):
            if count or text not in (None, "string"):
                self._fail(Refusal.NEED_STRING_TYPE, column)
            text = "string"
        if text is None:
            return FetchType(f"x{self._convention.bits}", word, count=count)
        if not self._context.kernel and text in ("symbol", "symstr"):
            self._fail(Refusal.BAD_TYPE, column)
        if text == "char" and not self._context.names:
            self._fail(Refusal.BAD_TYPE, column)
        waits = self._context.waits and text == _WAITING and not count
        found = find_type(_container(text) if text.startswith("b") else text.removesuffix("!" * waits), word, count)
        if waits and found is not None:
            return replace(found, waits=True)
        if found is None:
            self._fail(Refusal.BAD_TYPE, column)
        return found

    def _finish(self, node: Node, fetch_type: FetchType, text: str | None, column: int) -> FetchType:
        """finalize_fetch_insn(): whether the type goes with what was fetched last, and room for what stores it."""
        stores_string = fetch_type.is_string
        if stores_string:
            self._check_string(node, fetch_type, column)
            if fetch_type.name == "symstr" or fetch_type.count or not isinstance(node, Deref):
                self._next_op()
        elif not isinstance(node, Deref):
            self._next_op(numbers.E2BIG)
        if text is not None and text.startswith("b"):
            fetch_type = self._bitfield(fetch_type, text, column)
        elif text is None and self._last_type is not None and (self._bit_size % 8 or self._bit_offset):
            self._next_op()
            fetch_type = replace(fetch_type, width=self._bit_size, low=self._bit_offset)
        if fetch_type.count:
            from_memory = isinstance(node, Deref) and (fetch_type.name in STRINGS or not (stores_string or node.user))
            if not from_memory and not (fetch_type.name in STRINGS and isinstance(node, Immediate)):
                self._fail(Refusal.BAD_STRING, column)
            self._next_op(numbers.E2BIG)
        return fetch_type

    def _check_string(self, node: Node, fetch_type: FetchType, column: int) -> None:
        if fetch_type.name == "symstr":
            fits = isinstance(node, Register | StackWord | ReturnValue) or (
                not node.saved if isinstance(node, Argument) else isinstance(node, Deref) and not node.user
            )
            if not fits:
                self._fail(Refusal.BAD_SYMSTRING, column)
        elif not isinstance(node, Deref | Immediate | Comm | ImmediateText):
            self._fail(Refusal.BAD_STRING, column)

    def _bitfield(self, fetch_type: FetchType, text: str, column: int) -> FetchType:
        """b<width>@<offset>/<container>."""
        width, rest = simple_strtoul(text[1:])
        low, end = simple_strtoul(rest[1:])
        bits = 8 * fetch_type.size
        self._ops += 1
        fits = (width + low) % (1 << 64) <= bits  # as unsigned long adds
        if not width or rest[:1] != "@" or end == rest[1:] or end[:1] != "/" or self._ops == _LAST_OP or not fits:
            self._fail(Refusal.BAD_BITFIELD, column)
        return replace(fetch_type, width=min(width, bits), low=min(low, bits))

    # --------------------------------------------------------------------------------------------------- expressions

    def _expression(self, text: str) -> Node:
        """parse_probe_arg(): recursive descent."""
        match text[:1]:
            case "$":
                return self._variable(text)
            case "%":
                return self._register(text[1:])
            case "@":
                return self._memory(text[1:])
            case "+" | "-":
                return self._dereference(text)
            case "\\":
                return self._immediate(text[1:])
            case first if _LETTER.match(first):
                if not self._context.names:
                    raise Fault(Refusal.BAD_FETCH_ARG, self._offset, hint=self._context.no_types)
                if not (self._context.at_entry or self._context.at_return):
                    self._fail(Refusal.NOSUP_BTFARG)
                return self._btf_variable(text)
        return self._fail(Refusal.BAD_FETCH_ARG)

    def _variable(self, text: str) -> Node:
        name, context = text[1:], self._context
        if name.startswith("retval") if context.names else name == "retval":
            if not context.is_return:
                self._fail(Refusal.RETVAL_ON_PROBE)
            return ReturnValue() if not context.kernel or context.types is None else self._btf_variable(text)
        if name == "stack":
            return StackPointer()
        if name.startswith("stack"):
            number = self._number_in(name[5:])
            if number > self._stack_words and context.kernel:
                self._fail(Refusal.BAD_STACK_NUM)
            return StackWord(number & 0xFFFF_FFFF)
        if name in ("comm", "COMM"):
            return Comm()
        if not name.startswith("arg"):
            self._fail(Refusal.BAD_VAR)
        if not context.names and (name == "arg*" or not context.at_entry):
            raise Fault(Refusal.BAD_VAR, self._offset, hint=context.no_types if name == "arg*" else None)
        number = self._number_in(name[3:].removeprefix("+"))
        if not 0 < number <= self._stack_words:
            self._fail(Refusal.BAD_ARG_NUM)
        if not (context.at_entry or context.at_return):
            self._fail(Refusal.NOFENTRY_ARGS)
        return Argument(number, saved=context.at_return)

    def _number_in(self, digits: str) -> int:
        """The decimal N of $stackN and $argN."""
        if not "0" <= digits[:1] <= "9":
            self._fail(Refusal.BAD_VAR)
        try:
            return kstrtoul(digits, self._convention.bits, 10)
        except NumberError:
            return self._fail(Refusal.BAD_VAR)

    @property
    def _stack_words(self) -> int:
        return _STACK_BYTES[self._convention.bits] // self._convention.word

    def _register(self, name: str) -> Node:
        convention = self._convention
        if name not in convention.registers and name not in ("ip", "flags", "orig_ax", *convention.segments):
            self._fail(Refusal.BAD_REG_NAME)
        return Register(name)

    def _memory(self, text: str) -> Node:
        """@ADDRESS, @+FILEOFFSET, @SYMBOL[+|-N]."""
        inner: Node
        bits = self._convention.bits
        if "0" <= text[:1] <= "9":
            try:
                inner = Immediate(kstrtoul(text, bits))
            except NumberError as error:
                self._fail(Refusal.BAD_MEM_ADDR, errno=error.errno)
        elif text.startswith("+"):
            if self._context.kernel:
                self._fail(Refusal.FILE_ON_KPROBE)
            try:
                inner = FileOffset(kstrtol(text[1:], bits))
            except NumberError as error:
                self._fail(Refusal.BAD_FILE_OFFS, errno=error.errno)
        else:
            if not self._context.kernel:
                self._fail(Refusal.SYM_ON_UPROBE)
            inner = _symbol_address(text, bits)
            self._next_op()
        self._next_op()
        return Deref(inner, 0, user=False)

    def _dereference(self, text: str) -> Node:
        user = text[1:2] == "u"
        if user:
            text = text[0] + text[2:]
        shown = text.removeprefix("+")
        number, brace, rest = shown.partition("(")
        if not brace:
            self._fail(Refusal.DEREF_NEED_BRACE)
        try:
            offset = kstrtol(number, self._convention.bits)
        except NumberError as error:
            self._fail(Refusal.BAD_DEREF_OFFS, errno=error.errno)
        # The kernel counts the sign it skipped, but neither the u nor a + before a -.
        self._offset += len(number) + 1 + (shown[:1] != "-")
        inner_text, closing, _ = rest.rpartition(")")
        if not closing:
            self._fail(Refusal.DEREF_OPEN_BRACE, len(rest))
        here = self._offset
        inner = self._expression(inner_text)
        self._offset = here
        if isinstance(inner, Comm | ImmediateText):
            self._fail(Refusal.COMM_CANT_DEREF)
        self._next_op()
        self._last_type = None
        return Deref(inner, offset, user)

    def _immediate(self, text: str) -> Node:
        if text.startswith('"'):
            if len(text) < 2 or not text.endswith('"'):
                self._fail(Refusal.IMMSTR_NO_CLOSE, 1 + len(text))
            return ImmediateText(text[1:-1])
        bits = self._convention.bits
        try:
            if "0" <= text[:1] <= "9":
                value = kstrtoul(text, bits)
            elif text[:1] in ("-", "+") and text:
                value = kstrtol(text.removeprefix("+"), bits)
            else:
                raise NumberError(numbers.EINVAL)
        except NumberError as error:
            self._fail(Refusal.BAD_IMM, 1, error.errno)
        return Immediate(value & self._convention.mask)

    # --------------------------------------------------------------------------------------------------- BTF variables

    def _btf_variable(self, text: str) -> Node:
        """parse_btf_arg(): a parameter by name, or the typed return value, with fields."""
        types = self._types()
        name, separator, field = self._split_field(text)
        if separator == ".":
            self._fail(Refusal.NOSUP_DAT_ARG, len(name) + 1)
        node, type_id = self._named(name, separator)
        if type_id is None:
            return node
        self._last_type = types.resolve(type_id)
        self._bit_offset = self._bit_size = 0
        if not separator:
            return node
        self._offset += len(name) + len(separator)
        return self._fields(field, self._last_type, node)

    def _types(self) -> Btf:
        if self._context.types is None:
            raise Fault(Refusal.NOSUP_BTFARG, self._offset, numbers.EOPNOTSUPP, self._context.no_types)
        return self._context.types

    def _named(self, name: str, separator: str) -> tuple[Node, int | None]:
        """The variable and its type's id, None for a return value of which BTF says nothing."""
        context, asked = self._context, self._context.asked
        prototype = context.prototype()
        if context.at_return and name == "$retval":
            if prototype is not None:
                if not prototype.target:
                    self._fail(Refusal.NO_RETVAL)
                return ReturnValue(), prototype.target
            if separator:
                self._fail(Refusal.NO_BTF_ENTRY, len(name) + len(separator))
            return ReturnValue(), None
        parameters = context.parameters()
        if prototype is None or not (parameters or asked):
            self._fail(Refusal.NO_BTF_ENTRY)
        for number, parameter in enumerate(parameters, start=1):
            if parameter.name == name:
                return Argument(number, saved=context.at_return), parameter.type_id
        return self._fail(Refusal.NO_BTFARG)

    def _split_field(self, text: str) -> tuple[str, str, str]:
        """Up to the first `->` or `.`, that separator (empty where there is none), and the rest."""
        found = re.search(r"[.-]", text)
        if found is None:
            return text, "", ""
        at = found.start()
        separator = "->" if text.startswith("->", at) else text[at]
        if separator == "-":
            self._fail(Refusal.BAD_HYPHEN, at)
        return text[:at], separator, text[at + len(separator) :]

    def _fields(self, text: str, type_: Type, node: Node) -> Node:
        """parse_btf_field(): each `->` reads memory, each `.` only moves on."""
        types, separator = self._types(), "->"
        bits = 0
        while separator:
            if separator == "->":
                if type_.kind is not Kind.PTR:
                    self._fail(Refusal.NO_PTR_STRCT)
                type_, bits = types.resolve(type_.target), 0
            name, separator, rest = self._split_field(text)
            if type_.kind not in (Kind.STRUCT, Kind.UNION):
                self._fail(Refusal.BAD_BTF_TID)
            member = types.member(type_, name) if name else None
            if member is None:
                self._fail(Refusal.NO_BTF_FIELD)
            bits += member.bit_offset
            self._bit_size = member.bit_size
            type_ = types.resolve(member.type_id)
            self._offset += len(name) + len(separator) if separator else 0
            text = rest
            if separator != ".":
                self._next_op()
                node = Deref(node, bits // 8, user=False)
                self._bit_offset, self._last_type = bits % 8, type_
        return node

    def _type_of_variable(self, type_: Type) -> FetchType:
        """fetch_type_from_btf_type(); what it has no type for is shown as a word."""
        word = self._convention.word
        name = f"x{8 * word}"
        match type_.kind:
            case Kind.ENUM:
                name = "s32"
            case Kind.ENUM64:
                name = "s64"
            case Kind.INT if type_.bits in (8, 16, 32, 64):
                name = f"{'s' if type_.signed else 'u'}{type_.bits}"
            case Kind.INT if not type_.signed:
                name = "u64"
                self._bit_size = type_.bits
                self._bit_offset += type_.detail >> 16 & 0xFF
        found = find_type(name, word)
        assert found is not None
        return found

    def _string_of_variable(self, node: Node, type_: Type, text: str) -> Node:
        """check_prepare_btf_string_fetch(): char arrays are there, char pointers are followed."""
        types = self._types()
        if type_.kind is Kind.ARRAY and _is_char(types.resolve(type_.target)):
            return node
        # The kernel does not look whether it is a pointer: of other kinds it takes the size for a type's number.
        behind = type_.target if type_.kind in (Kind.PTR, Kind.FWD) else 0 if type_.kind is Kind.ARRAY else type_.size
        if 0 < behind < len(types) and _is_char(types.resolve(behind)):
            self._next_op(numbers.E2BIG)
            return Deref(node, 0, user=text.startswith("u"))
        return self._fail(Refusal.BAD_TYPE4STR)


def _container(text: str) -> str:
    """The unsigned type that a bitfield's text asks for; empty where there is none of that size."""
    try:
        return f"u{kstrtoul(text.partition('/')[2])}"
    except NumberError:
        return ""


def _symbol_address(text: str, bits: int) -> SymbolAddress:
    found = re.search(r"[+-]", text)
    if found is None:
        return SymbolAddress(text, 0)
    try:
        return SymbolAddress(text[: found.start()], kstrtol(text[found.start() :], bits))
    except NumberError:
        return SymbolAddress(text[: found.start()], None)


def _is_char(type_: Type) -> bool:
    return type_.kind is Kind.INT and not type_.signed and type_.bits == 8
