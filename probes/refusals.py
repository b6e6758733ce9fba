"""The kernel's own words for a definition it does not take, by its own names for them.

Rules: a table. Texts are those of kernel/trace/trace_probe.h in Linux 6.12 (read in a 6.12.117 image too); the errno is
the usual one, which a place that answers with another overrides.
"""

from __future__ import annotations

import enum
import errno as numbers
from collections.abc import Sequence

from probes.errors import ProbeError


class Refusal(enum.Enum):
    """TP_ERR_*: text and errno."""

    FILE_NOT_FOUND = ("Failed to find the given file", numbers.ENOENT)
    NO_REGULAR_FILE = ("Not a regular file", numbers.EINVAL)
    BAD_REFCNT = ("Invalid reference counter offset", numbers.EINVAL)
    REFCNT_OPEN_BRACE = ("Reference counter brace is not closed", numbers.EINVAL)
    BAD_REFCNT_SUFFIX = ("Reference counter has wrong suffix", numbers.EINVAL)
    BAD_UPROBE_OFFS = ("Invalid uprobe offset", numbers.EINVAL)
    BAD_MAXACT_TYPE = ("Maxactive is only for function exit", numbers.EINVAL)
    MAXACT_NO_KPROBE = ("Maxactive is not for kprobe", numbers.EINVAL)  # until 6.4
    BAD_MAXACT = ("Invalid maxactive number", numbers.EINVAL)
    MAXACT_TOO_BIG = ("Maxactive is too big", numbers.EINVAL)
    BAD_PROBE_ADDR = ("Invalid probed address or symbol", numbers.EINVAL)
    NON_UNIQ_SYMBOL = ("The symbol is not unique", numbers.EINVAL)
    BAD_RETPROBE = ("Retprobe address must be an function entry", numbers.EINVAL)
    BAD_ADDR_SUFFIX = ("Invalid probed address suffix", numbers.EINVAL)
    NO_GROUP_NAME = ("Group name is not specified", numbers.EINVAL)
    GROUP_TOO_LONG = ("Group name is too long", numbers.EINVAL)
    BAD_GROUP_NAME = ("Group name must follow the same rules as C identifiers", numbers.EINVAL)
    NO_EVENT_NAME = ("Event name is not specified", numbers.EINVAL)
    EVENT_TOO_LONG = ("Event name is too long", numbers.EINVAL)
    BAD_EVENT_NAME = ("Event name must follow the same rules as C identifiers", numbers.EINVAL)
    EVENT_EXIST = ("Given group/event name is already used by another event", numbers.EEXIST)
    RETVAL_ON_PROBE = ("$retval is not available on probe", numbers.EINVAL)
    NO_RETVAL = ("This function returns 'void' type", numbers.ENOENT)
    BAD_STACK_NUM = ("Invalid stack number", numbers.EINVAL)
    BAD_ARG_NUM = ("Invalid argument number", numbers.EINVAL)
    BAD_VAR = ("Invalid $-variable specified", numbers.EINVAL)
    BAD_REG_NAME = ("Invalid register name", numbers.EINVAL)
    BAD_MEM_ADDR = ("Invalid memory address", numbers.EINVAL)
    BAD_IMM = ("Invalid immediate value", numbers.EINVAL)
    IMMSTR_NO_CLOSE = ("String is not closed with '\"'", numbers.EINVAL)
    FILE_ON_KPROBE = ("File offset is not available with kprobe", numbers.EINVAL)
    BAD_FILE_OFFS = ("Invalid file offset value", numbers.EINVAL)
    SYM_ON_UPROBE = ("Symbol is not available with uprobe", numbers.EINVAL)
    TOO_MANY_OPS = ("Dereference is too much nested", numbers.EINVAL)
    DEREF_NEED_BRACE = ("Dereference needs a brace", numbers.EINVAL)
    BAD_DEREF_OFFS = ("Invalid dereference offset", numbers.EINVAL)
    DEREF_OPEN_BRACE = ("Dereference brace is not closed", numbers.EINVAL)
    COMM_CANT_DEREF = ("$comm can not be dereferenced", numbers.EINVAL)
    BAD_FETCH_ARG = ("Invalid fetch argument", numbers.EINVAL)
    ARRAY_NO_CLOSE = ("Array is not closed", numbers.EINVAL)
    BAD_ARRAY_SUFFIX = ("Array has wrong suffix", numbers.EINVAL)
    BAD_ARRAY_NUM = ("Invalid array size", numbers.EINVAL)
    ARRAY_TOO_BIG = ("Array number is too big", numbers.EINVAL)
    BAD_TYPE = ("Unknown type is specified", numbers.EINVAL)
    BAD_STRING = ("String accepts only memory argument", numbers.EINVAL)
    BAD_SYMSTRING = ("Symbol String doesn't accept data/userdata", numbers.EINVAL)
    BAD_BITFIELD = ("Invalid bitfield", numbers.EINVAL)
    ARG_NAME_TOO_LONG = ("Argument name is too long", numbers.EINVAL)
    NO_ARG_NAME = ("Argument name is not specified", numbers.EINVAL)
    BAD_ARG_NAME = ("Argument name must follow the same rules as C identifiers", numbers.EINVAL)
    USED_ARG_NAME = ("This argument name is already used", numbers.EINVAL)
    ARG_TOO_LONG = ("Argument expression is too long", numbers.E2BIG)
    NO_ARG_BODY = ("No argument expression", numbers.EINVAL)
    BAD_INSN_BNDRY = ("Probe point is not an instruction boundary", numbers.EILSEQ)
    FAIL_REG_PROBE = ("Failed to register probe event", numbers.EINVAL)
    DIFF_PROBE_TYPE = ("Probe type is different from existing probe", numbers.EEXIST)
    DIFF_ARG_TYPE = ("Argument type or name is different from existing probe", numbers.EEXIST)
    SAME_PROBE = ("There is already the exact same probe event", numbers.EEXIST)
    NOSUP_BTFARG = ("BTF is not available or not supported", numbers.EINVAL)
    NO_BTFARG = ("This variable is not found at this probe point", numbers.ENOENT)
    NO_BTF_ENTRY = ("No BTF entry for this probe point", numbers.ENOENT)
    NOFENTRY_ARGS = ("$arg* can be used only on function entry or exit", numbers.EINVAL)
    DOUBLE_ARGS = ("$arg* can be used only once in the parameters", numbers.EINVAL)
    ARGS_2LONG = ("$arg* failed because the argument list is too long", numbers.E2BIG)
    NO_PTR_STRCT = ("This is not a pointer to union/structure.", numbers.EINVAL)
    NOSUP_DAT_ARG = ("Non pointer structure/union argument is not supported.", numbers.EOPNOTSUPP)
    BAD_HYPHEN = ("Failed to parse single hyphen. Forgot '>'?", numbers.EINVAL)
    NO_BTF_FIELD = ("This field is not found.", numbers.ENOENT)
    BAD_BTF_TID = ("Failed to get BTF type info.", numbers.EINVAL)
    BAD_TYPE4STR = ("This type does not fit for string.", numbers.EINVAL)
    NEED_STRING_TYPE = ("$comm and immediate-string only accepts string type", numbers.EINVAL)
    EVENT_TOO_BIG = ("Event too big (too many fields?)", numbers.E2BIG)

    @property
    def text(self) -> str:
        return self.value[0]

    @property
    def errno(self) -> int:
        return self.value[1]

    def at(self, words: Sequence[str], index: int, offset: int = 0, errno: int | None = None) -> ProbeError:
        """This refusal with the caret `offset` characters into word `index`, or behind a line without such a word."""
        definition = " ".join(words)
        start = sum(len(word) + 1 for word in words[:index])
        # __trace_probe_log_err(): a place beyond the last word counts the terminating null as well.
        column = start + offset if index < len(words) else len(definition) + 1
        return ProbeError(errno or self.errno, self.text, definition=definition, column=max(column, 0), token=self.name)
