"""The definition language by itself, on a guest without types; tests/conformance has what a kernel answered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes import ProbeError
from probes.arch import Convention
from probes.arch.x86 import AMD64, I386
from probes.spec import ProbeSpec, parse

UNIQUE = frozenset(
    (
        *("vfs_read", "kfree", "kernel_clone", "do_exit", "do_sys_openat2", "vfs_open", "vfs_symlink", "dput"),
        *("getname_flags", "eventfs_create_dir", "inet_csk_accept", "schedule", "_sdata", "linux_proc_banner"),
        *("do_sys_open", "__switch_to"),
    )
)


class Scope:
    """The fixtures the cases were measured with: endbr64 at vfs_read, two symbols of one name."""

    def __init__(self, convention: Convention = AMD64) -> None:
        self.convention = convention

    def count(self, symbol: str) -> int:
        return 2 if symbol == "name_show" else int(symbol in UNIQUE)

    def is_entry(self, symbol: str, offset: int) -> bool:
        return offset in (0, 4)

    names = True
    types = None
    no_types = "names are not available because this is a test"


def judge(line: str, convention: Convention = AMD64) -> ProbeSpec | ProbeError:
    """The spec, or the refusal as a value."""
    try:
        return parse(line, Scope(convention))
    except ProbeError as error:
        return error


@pytest.mark.parametrize(("levels", "inner"), [(14, "%ax"), (13, "@0"), (12, "@_sdata")])
def test_nesting_ends_where_the_kernel_ends_it(levels: int, inner: str) -> None:
    """[M] 16 fetch instructions: 14 dereferences over a register, 13 over an address, 12 over a symbol."""
    fits = f"p vfs_read {'+0(' * levels}{inner}{')' * levels}"
    assert isinstance(judge(fits), ProbeSpec)
    judged = judge(f"p vfs_read +0({fits.removeprefix('p vfs_read ')})")
    assert isinstance(judged, ProbeError)
    assert judged.token == "TOO_MANY_OPS"


def test_i386_has_its_own_registers() -> None:
    """%gs is in i386's pt_regs and %r8 is not."""
    assert parse("p vfs_read %gs", Scope(I386)).args[0].name == "arg1"
    with pytest.raises(ProbeError, match="Invalid register name"):
        parse("p vfs_read %r8", Scope(I386))


def test_an_error_shows_the_line_and_a_caret() -> None:
    """What `monitor` prints: reason with errno, line, caret under the column."""
    with pytest.raises(ProbeError) as refused:
        parse("p   vfs_read a=%nope", Scope())
    assert refused.value.lines() == ["Invalid register name (EINVAL)", "  p vfs_read a=%nope", "               ^"]


@given(st.text(max_size=80), st.sampled_from(["", "p ", "p vfs_read ", "p vfs_read a=", "p vfs_read +0("]))
def test_any_text_is_a_spec_or_one_error(text: str, start: str) -> None:
    """Hostile lines never escape as anything but ProbeError, and a caret never leaves the line by more than one."""
    judged = judge(start + text)
    if isinstance(judged, ProbeError) and judged.column is not None:
        assert judged.definition is not None
        assert 0 <= judged.column <= len(judged.definition) + 1


@pytest.mark.parametrize(
    "line", ["p vfs_read count", "p vfs_read $arg*", "r vfs_read file->f_mode", "p vfs_read %ax:%pd"]
)
def test_a_guest_without_types_says_why(line: str) -> None:
    """Names of arguments come from the kernel's BTF; Debian's i386 kernel has none."""
    with pytest.raises(ProbeError) as refused:
        parse(line, Scope(I386))
    assert refused.value.hint == Scope.no_types


@pytest.mark.parametrize(
    ("line", "token"),
    [
        ("p:caf\udce9 vfs_read", None),
        ("p:\udce9-x/\udcff vfs_read \udce9=%di", None),
        ("p:\u00e9 vfs_read", "BAD_EVENT_NAME"),  # whose second byte, 0xa9, is no letter
        ("p:\udce9\udcd7 vfs_read", "BAD_EVENT_NAME"),
        ("p:x vfs_read \u00e9=%di", "BAD_ARG_NAME"),
        ("p:x vfs_read \udcd7", "BAD_FETCH_ARG"),
        ("p:x vfs_read \u05d0", "BAD_FETCH_ARG"),  # in UTF-8 it begins with 0xd7
        ("p:x \udce9", "BAD_PROBE_ADDR"),
    ],
)
def test_letters_are_latin_1s(line: str, token: str | None) -> None:
    """The kernel's isalpha() looks at bytes: lone ones are letters, of UTF-8 only the first byte is. As 6.12.117."""
    judged = judge(line)
    assert (judged.token if isinstance(judged, ProbeError) else judged.definition) == (token or line)
