"""Definitions judged against the answers of a real kernel, and what must hold for every line there can be."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conformance.definitions import Case, judge_of, judged, kernel_file, read_cases

OURS = [case for case in read_cases() if case.is_ours]
OTHERS = [case for case in read_cases() if not case.is_ours]


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.definition[:60])
def test_a_definition_is_judged_as_the_kernel_did(case: Case) -> None:
    """Verdict, errno, text, the caret's column and the listing are the measured ones."""
    verdict = judged(case)
    if verdict.error is None:
        assert ("accept", "0", verdict.listing) == (case.verdict, case.errno, case.listing)
        return
    error = verdict.error
    caret = "" if error.column is None else str(error.column)
    answer = ("reject", f"-{error.name}", error.reason if error.token else "", caret)
    assert answer == (case.verdict, case.errno, case.text, case.caret)


def test_the_table_of_cases_is_whole() -> None:
    """A guard for the reading above: every row is there."""
    assert (len(OURS), len(OTHERS)) == (131, 26)


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.definition[:60])
def test_other_systems_are_refused_by_their_name(case: Case) -> None:
    """e, f and t lines say what they would be."""
    error = judged(case).error
    assert error is not None
    assert "another system of the kernel's" in error.reason


@pytest.mark.parametrize("case", [case for case in OURS if case.listing], ids=lambda case: case.definition[:60])
def test_a_listing_is_a_definition_of_itself(case: Case) -> None:
    """What kprobe_events shows can be written back to it."""
    judge = judge_of()
    judge.forget()
    assert judge.judge(case.listing, case.kind).listing == case.listing


# ------------------------------------------------------------------------------------------- every line there can be

_NUMBERS = st.one_of(st.integers(0, 70).map(str), st.integers(0, 4096).map(hex), st.sampled_from(["010", "-8", "+3"]))
_TYPES = st.one_of(
    st.sampled_from([f"{kind}{bits}" for kind in "usx" for bits in (8, 16, 32, 64)]),
    st.sampled_from(["char", "symbol", "string", "ustring", "symstr", "b3@2/8", "b4@0x4/32", "%pd", "%pD", "x7"]),
)
_LEAVES = st.one_of(
    st.sampled_from(["%di", "%ax", "%ip", "%r15", "$stack", "$stack3", "$arg1", "$retval", "$comm", "@_sdata"]),
    st.sampled_from(["file", "file->f_flags", "file->f_path.dentry->d_name.name", "count", "pos", '\\"text"', "buf"]),
    _NUMBERS.map(lambda number: f"\\{number}"),
    _NUMBERS.map(lambda number: f"@{number}"),
    _NUMBERS.map(lambda number: f"@linux_proc_banner+{number}"),
)
_FETCHES = st.recursive(
    _LEAVES,
    lambda inner: st.builds(
        lambda sign, number, body: f"{sign}{number}({body})", st.sampled_from(["+", "-", "+u"]), _NUMBERS, inner
    ),
    max_leaves=3,
)
_ARGS = st.builds(
    lambda name, fetch, kind, count: name + fetch + kind + (count if kind else ""),
    st.sampled_from(["", "", "a=", "b=", "name_1="]),
    _FETCHES,
    st.one_of(st.just(""), _TYPES.map(lambda name: f":{name}")),
    st.sampled_from(["", "", "[2]", "[0x40]"]),
)
_HEADS = st.sampled_from(["p", "r", "r7", "p:e", "r:e", "p:g/e", "r32:my-group/e_1", "p:g/", "p:g.e"])
_PLACES = st.sampled_from(
    ["vfs_read", "vfs_read%return", "vfs_read+4", "vfs_read+9", "kfree", "dput", "do_sys_openat2"]
)
_FILES = st.sampled_from(["/bin/busybox:0x1020", "/bin/sh:64%return", "/bin/busybox:0x1000(0x10)", "/bin/../init:010"])


@given(_HEADS, st.one_of(_PLACES, _FILES), st.lists(st.one_of(_ARGS, st.just("$arg*")), max_size=3))
def test_the_listing_of_what_is_accepted_gives_itself(head: str, place: str, args: list[str]) -> None:
    """Parsed again, a listing is the same definition: nothing is lost or read in two ways."""
    judge = judge_of()
    judge.forget()
    listing = judge.judge(" ".join([head, place, *args])).listing
    if listing:
        judge.forget()
        assert judge.judge(listing).listing == listing


_PIECES = (
    *(
        "p",
        "r",
        "r10",
        "-",
        ":",
        "/",
        ".",
        " ",
        " ",
        " ",
        "\t",
        "#",
        "vfs_read",
        "kfree",
        "+4",
        "+",
        "-",
        "(",
        ")",
        "@",
    ),
    *(
        "%",
        "%return",
        "$",
        "$arg*",
        "$arg1",
        "$retval",
        "$stack",
        "$comm",
        "\\",
        '"',
        "=",
        "[",
        "]",
        "u8",
        "x64",
        "b4@4/8",
    ),
    *("string", "symstr", "0x", "10", "file", "->", "f_path", "_sdata", "/bin/sh:", "0", "é", "\0", "\x7f", "9" * 25),
    *("e:", "f", "-:", "g/", "abcdefgh" * 9, "+0(", "+u8(", "%di", ":%pd", "\n", "𝛑", "name_show", "-1"),
)


def test_a_hundred_thousand_random_lines_crash_nothing() -> None:
    """Each is a listing or a refusal; the lines are always the same.

    Its caret lies in the line or right behind it, but where the kernel counts in what it has put for $arg1 and :%pd.
    """
    random_ = random.Random(6_12_117)
    judge, seeds = judge_of(), [case.definition[:200] for case in OURS]
    accepted = 0
    for number in range(100_000):
        if number % 2:
            line = "".join(random_.choices(_PIECES, k=random_.randrange(1, 12)))
        else:
            line = random_.choice(seeds)
            cut = random_.randrange(len(line) + 1)
            line = line[:cut] + random_.choice(_PIECES) + line[cut + random_.randrange(3) :]
        judge.forget()
        verdict = judge.judge(line)
        if verdict.error is None:
            accepted += 1
        elif verdict.error.column is not None:
            assert verdict.error.definition is not None
            beyond = 100 if "$arg" in line else 1
            assert 0 <= verdict.error.column <= len(verdict.error.definition) + beyond, line
    assert 2_000 < accepted < 50_000


# -------------------------------------------------------------------------------------------------- beyond the table


@pytest.mark.parametrize(
    ("definition", "answer"),
    [
        ("p vfs_read file->f_flags file->f_path.dentry", "arg1=file->f_flags arg2=file->f_path.dentry"),
        ("p vfs_read file.f_flags", "NOSUP_DAT_ARG 16"),
        ("p vfs_read file->nope", "NO_BTF_FIELD 17"),
        ("p vfs_read count->x", "NO_PTR_STRCT 18"),
        ("p vfs_read pos->x", "BAD_BTF_TID 16"),
        ("p vfs_read file->f_path.nope", "NO_BTF_FIELD 24"),
        ("p vfs_read pos:string", "BAD_TYPE4STR 11"),
        ("r kfree $retval", "NO_RETVAL 8"),
        ("r vfs_read $retvalx", "NO_BTFARG 11"),
        ("p vfs_read $arg* $arg*", "DOUBLE_ARGS 17"),
        ("p schedule $arg*", "NOSUP_BTFARG 11"),
        ("p vfs_read $arg0", "BAD_ARG_NUM 11"),
        ("p vfs_read x=$arg0", "BAD_ARG_NUM 13"),
        ("p vfs_read $comm:u8", "NEED_STRING_TYPE 17"),
        ("p vfs_read @99999999999999999999999", "BAD_MEM_ADDR 11"),
        ("p vfs_read +u0(%di):u8[2]", "BAD_STRING 23"),
        ("p vfs_read $stack2049", "BAD_STACK_NUM 11"),
        ("p vfs_read \\-9223372036854775809", "BAD_IMM 12"),
        ("p10 vfs_read", "BAD_MAXACT_TYPE 1"),
        ("r0 vfs_read", "BAD_MAXACT 1"),
        ("p:sched/sched_switch vfs_read", "EVENT_EXIST 0"),
        ("p start_kernel", "FAIL_REG_PROBE 2"),
        ("p clear_page_rep", "FAIL_REG_PROBE 2"),
        ("r __switch_to_xtra", ""),
        ("p vfs_read $arg1:u8 $arg2:string", "file=file:u8 buf=buf:string"),
    ],
)
def test_rules_the_table_does_not_show(definition: str, answer: str) -> None:
    """[S] kernel/trace/trace_probe.c, 6.12: arguments of the listing, or the token and the caret's column."""
    judge = judge_of()
    judge.forget()
    verdict = judge.judge(definition)
    if verdict.error is None:
        assert verdict.listing.partition(" ")[2].partition(" ")[2] == answer
    else:
        assert f"{verdict.error.token} {verdict.error.column}" == answer


def test_definitions_build_on_each_other() -> None:
    """A name used again adds a place, of the same shape; deletions are by name, by group and by place."""
    judge = judge_of()
    judge.forget()

    def say(line: str) -> str:
        error = judge.judge(line).error
        return "" if error is None else f"{error.token or error.name} {error.column}"

    assert say("p:g/e kernel_clone a=%di") == ""
    assert say("p:g/e do_exit a=%di") == ""
    assert say("p:g/e do_exit a=%di") == "SAME_PROBE 0"
    assert say("p:g/e dput a=%di b=%si") == "DIFF_ARG_TYPE 17"
    assert say("p:g/e dput") == "DIFF_ARG_TYPE 11"  # behind the line, where the kernel counts its null as well
    assert say("r:g/e vfs_read a=$retval") == "DIFF_PROBE_TYPE 0"
    assert say("p:g/e /bin/sh:0x10") == "EVENT_EXIST 0"
    assert say("-:g/e do_exit a=%si") == "ENOENT None"
    assert say("-:g/e do_exit a=%di") == ""
    assert say("-:g/e do_exit") == "ENOENT None"
    assert say("-:g/") == ""
    assert say("-:g/e") == "ENOENT None"


@pytest.mark.parametrize("kernel", ["i386 6.1", "amd64 6.1"])
def test_an_older_kernel_knows_no_names(kernel: str) -> None:
    """[M] On 6.1 arguments have numbers only, at entries only, and what is not available says why."""
    judge = judge_of(kernel)
    judge.forget()
    assert judge.judge("p vfs_read $arg1:u32 %ax").listing == "p:kprobes/p_vfs_read_0 vfs_read arg1=$arg1:u32 arg2=%ax"
    answers = {
        "p vfs_read count": "BAD_FETCH_ARG 11",
        "p vfs_read $arg*": "BAD_VAR 11",
        "r vfs_read $arg1": "BAD_VAR 11",
        "r vfs_read $retvalx": "BAD_VAR 11",
        "p vfs_read %ax:char": "BAD_TYPE 15",
        "p vfs_read $comm:u8": "None None",
        "p vfs_read +0(%ax):b9@0/8": "BAD_BITFIELD 19",
        "p10 vfs_read": "MAXACT_NO_KPROBE 1",
        "p __switch_to": "FAIL_REG_PROBE 2",
    }
    errors = {line: judge.judge(line).error for line in answers}
    assert {line: f"{error and error.token} {error and error.column}" for line, error in errors.items()} == answers
    for line in ("p vfs_read count", "p vfs_read $arg*"):
        error = errors[line]
        assert error is not None
        assert "not available because" in (error.hint or "")


def test_every_accepted_function_could_be_armed() -> None:
    """The blacklist is the image's own: what ftrace and kprobes themselves need is refused, in both its sections."""
    judge = judge_of()
    for name in ("do_syscall_64", "exc_page_fault", "memcpy", "kprobe_int3_handler", "asm_exc_int3", "__switch_to"):
        judge.forget()
        assert kernel_file().symbols.lookup(name), name
        error = judge.judge(f"p {name}").error
        assert error is not None, name
        assert error.token == "FAIL_REG_PROBE"
