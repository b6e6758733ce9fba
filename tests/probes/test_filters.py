"""Filters and histograms of events: the judgement of a real kernel, line by line, and what they then let through."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.arch.x86 import AMD64
from probes.errors import ProbeError, errno_name
from probes.fetch import Value
from probes.filters import FilterError, compile_filter
from probes.hist import HistError, parse_histogram
from probes.hit import Hit, Variable, variables
from probes.layout import Layout
from probes.spec import parse
from tests.support.hits import Guest, hit
from tests.support.scopes import AnySymbol

MEASURED = Path(__file__).parent / "measured"


def measured(name: str) -> tuple[dict[str, Variable], list[tuple[str, str, str]]]:
    """The event's variables, and (line, "ok" or errno, what the kernel shows then) of a transcript."""
    head, *blocks = re.split(r"^== ", (MEASURED / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    definition = head.splitlines()[-1].removeprefix("# ")
    cases = []
    for block in blocks:
        first, _, shown = block.partition("\n")
        line, _, verdict = first.rpartition(" => ")
        cases.append((line, verdict, shown))
    layout = Layout(parse(definition, AnySymbol(AMD64)).args, is_return=False, word=8)
    return variables(layout, 1554), cases


FILTER_VARIABLES, FILTERS = measured("filters.txt")
HIST_VARIABLES, HISTOGRAMS = measured("histograms.txt")


@pytest.mark.parametrize(("line", "verdict", "shown"), FILTERS)
def test_filters_are_judged_as_linux_judges_them(line: str, verdict: str, shown: str) -> None:
    """Errno, text and caret of Linux 6.12.117, as the filter file shows them."""
    if line == "0":
        return  # takes a filter away and is none
    try:
        compile_filter(line, FILTER_VARIABLES, Guest())
        found = ("ok", f"{line}\n")
    except FilterError as error:
        found = (errno_name(error.errno), error.text)
    assert found == (verdict, shown)


@pytest.mark.parametrize(("line", "verdict", "shown"), [case for case in HISTOGRAMS if " if " not in case[0]])
def test_histograms_are_judged_as_linux_judges_them(line: str, verdict: str, shown: str) -> None:
    """The full line that the trigger file shows, or errno and the entry in error_log, of Linux 6.12.117."""
    try:
        made, asked = parse_histogram(line, HIST_VARIABLES, Guest())
        if asked in ("cont", "clear"):
            return  # about one that exists
        found = ("ok", f"{made.text()}\n")
    except HistError as error:
        caret = " " * (error.column or 0)
        logged = f"hist:kprobes:open: error: {error.reason}\n  Command: {error.definition}\n           {caret}^\n"
        found = (errno_name(error.errno), logged if error.logged else "")
    assert found == (verdict, shown)


def values(**changed: Value) -> Hit:
    """A hit of the filters' event."""
    own: dict[str, Value] = {
        "file": "/etc/motd",
        "fl": 5,
        "sg": -100,
        "u8": 7,
        "arr": (1, 2, 3, 4),
        "sym": 0,
        "c": "sh",
    }
    return hit(tuple((own | changed).values()))


@pytest.mark.parametrize(
    ("text", "accepts"),
    [
        ("fl == 5", True),
        ("fl != 5", False),
        ("fl & 6", True),
        ("fl & 2", False),
        ("sg < 0", True),
        ("sg == -100 && u8 >= 7", True),
        ("u8 == 0x107", True),
        ("fl == 1 || sg == 1 && u8 == 7", False),
        ("(fl == 5 || sg == 1) && u8 == 7", True),
        ("fl == 5 || sg == 1 && u8 == 8", True),
        ("!(fl == 5 && u8 == 7)", False),
        ("!!fl == 5", True),
        ("!fl == 6 && !(u8 == 1 || u8 == 2)", True),
        ('file ~ "/etc/*"', True),
        ('file ~ "*motd"', True),
        ('file ~ "*c/m*"', True),
        ('file ~ "!*motd"', False),
        ('file ~ "/e?c/m[a-o]td"', True),
        ('file ~ "/e?c/m[!a-o]td"', False),
        ('file ~ "motd"', False),
        ('file == "/etc/motd"', True),
        ('comm == "sh" && COMM ~ "s*"', True),
        ("common_pid == 142 && cpu == 0", True),
        ("arr == 0x04030201", True),
        ("CPU & CPUS{0}", True),
        ("sym.function == known", True),
        ("sym.function != known", False),
    ],
)
def test_a_filter_lets_through_what_it_says(text: str, accepts: bool) -> None:
    """Operators, precedence, sizes and signs of fields, patterns."""
    assert compile_filter(text, FILTER_VARIABLES, Guest())(values(sym=0x1008)) is accepts


def test_a_failed_string_is_empty() -> None:
    """What could not be read matches no pattern but those of nothing."""
    failed = values(file=None)
    assert not compile_filter('file ~ "*motd*"', FILTER_VARIABLES, Guest())(failed)
    assert compile_filter('file == ""', FILTER_VARIABLES, Guest())(failed)


@given(st.text(alphabet="()!&|=<>~ '\"flu8sgcommABx0123456789{}CPUS.*[]-\\", max_size=80))
def test_no_line_brings_a_filter_down(text: str) -> None:
    """Every text is a filter or refused by one error with a caret inside what is shown."""
    try:
        compile_filter(text, FILTER_VARIABLES, Guest())(values())
    except FilterError as error:
        shown = error.text
    else:
        shown = text
    assert shown.startswith(text)


@given(st.text(alphabet="*a[]?!-\\", max_size=60))
def test_no_pattern_is_slow(pattern: str) -> None:
    """Stars do not multiply."""
    compile_filter(f'file ~ "{pattern}"', FILTER_VARIABLES, Guest())(values(file="a" * 4000))


@given(st.text(alphabet="keysvalortiz=,.:flu8hex log2buckts0123456789", max_size=60))
def test_no_line_brings_a_histogram_down(text: str) -> None:
    """Every text is a histogram or refused."""
    try:
        made, _ = parse_histogram(f"hist:{text}", HIST_VARIABLES, Guest())
        made.update(values())
        made.lines()
    except ProbeError:
        pass


# --------------------------------------------------------------------------------------------------------- histograms


def counted(line: str, hits: Iterator[Hit]) -> list[str]:
    """The rows of a histogram after `hits`."""
    made, _ = parse_histogram(line, FILTER_VARIABLES, Guest())
    for one in hits:
        made.update(one)
    return [row for row in made.lines() if row.startswith("{")]


def some() -> Iterator[Hit]:
    return iter([values(fl=3), values(fl=40, u8=9), values(fl=3, file="/init")])


@pytest.mark.parametrize(
    ("line", "rows"),
    [
        ("hist:keys=fl", ["{ fl:         40 } hitcount:          1", "{ fl:          3 } hitcount:          2"]),
        ("hist:keys=fl.hex:sort=fl.descending", ["{ fl: 28 } hitcount:          1", "{ fl: 3 } hitcount:          2"]),
        (
            "hist:keys=fl.log2:vals=u8",
            [
                "{ fl: ~ 2^6  } hitcount:          1  u8:          9",
                "{ fl: ~ 2^2  } hitcount:          2  u8:         14",
            ],
        ),
        (
            "hist:keys=fl.buckets=0xa:vals=u8.hex",  # kstrtoul(), base 0
            [
                "{ fl: ~ 40-49 } hitcount:          1  u8:          9",
                "{ fl: ~ 0-9 } hitcount:          2  u8:          e",
            ],
        ),
        (
            "hist:keys=common_pid.execname:vals=u8:nohitcount",
            ["{ common_pid: sh              [       142] }  u8:         23"],
        ),
        (
            "hist:keys=fl:vals=hitcount.percent,u8.graph",
            [
                "{ fl:         40 } hitcount:          1  hitcount (%):  33.33  u8: ############        ",
                "{ fl:          3 } hitcount:          2  hitcount (%):  66.66  u8: ####################",
            ],
        ),
        ("hist:keys=sg,c:sort=sg", [f"{{ sg: {2**64 - 100}, c: {'sh':<50} }} hitcount:          3"]),
        (
            "hist:keys=common_stacktrace",
            ["{ common_stacktrace:\n         known+0x4/0x10\n         0x2000\n} hitcount:          3"],
        ),
    ],
)
def test_a_histogram_is_shown_as_linux_shows_it(line: str, rows: list[str]) -> None:
    """Columns, widths, sorting and modifiers."""
    assert counted(line, some()) == rows


@pytest.mark.parametrize("key", ["file.log2", "fl,file.buckets=16"])
def test_a_string_is_no_number_to_put_into_buckets(key: str) -> None:
    """Linux would count by where in its own ring buffer the string lies, each hit in a row of its own."""
    with pytest.raises(HistError, match=r"^file is a string, which has no (log2|buckets)\n") as refused:
        parse_histogram(f"hist:keys={key}", FILTER_VARIABLES, Guest())
    assert not refused.value.logged


def test_a_full_histogram_drops_new_keys_and_says_so() -> None:
    """Its size is its memory."""
    made, _ = parse_histogram("hist:keys=fl:size=128", FILTER_VARIABLES, Guest())
    for number in range(200):
        made.update(values(fl=number))
    assert made.lines()[-4:] == ["Totals:", "    Hits: 128", "    Entries: 128", "    Dropped: 72"]
