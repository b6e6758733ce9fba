"""`gdbstub check` and `gdbstub symbols`, as a person and a script use them: text, JSON, exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gdbstub.cli import main
from tests.support.images import REAL_KERNELS, fetch_real_kernel

KERNEL = REAL_KERNELS["amd64 6.12"][1] or ""


@pytest.fixture(autouse=True)
def fetched() -> None:
    fetch_real_kernel("amd64 6.12")


def run(tmp_path: Path, lines: str, *options: str) -> int:
    file = tmp_path / "probes.txt"
    file.write_text(lines)
    return main(["check", str(file), "--kernel", KERNEL, *options])


def test_each_line_is_answered_and_a_refusal_has_its_caret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`ok: LISTING`, or the error with errno, line and caret; 1 where one is rejected."""
    assert run(tmp_path, "# what we watch\n\np:read vfs_read $arg*\nr vfs_read n=$retval:s33\n") == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok: # what we watch",
        "ok: p:kprobes/read vfs_read file=file buf=buf count=count pos=pos",
        "error: Unknown type is specified (EINVAL)",
        "  r vfs_read n=$retval:s33",
        "                       ^",
    ]


def test_all_accepted_is_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 0."""
    assert run(tmp_path, "r vfs_read\n") == 0
    assert capsys.readouterr().out == "ok: r10:kprobes/r_vfs_read_0 vfs_read\n"


def test_json_rows_have_the_fields_of_the_measured_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the kernel logs nothing for has no error text; ours is in `note`."""
    assert run(tmp_path, "p vfs_raed\np\n-:e\np:e dput\n-:e\n", "--json") == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == {
        "definition": "p vfs_raed",
        "verdict": "reject",
        "errno": "-EINVAL",
        "error": "Invalid probed address or symbol",
        "caret": 2,
        "listing": "",
        "note": "did you mean vfs_read, vfs_readv?",
    }
    assert [(row["verdict"], row["errno"], row["error"], row["caret"], row["listing"]) for row in rows[1:]] == [
        ("reject", "-EINVAL", "", None, ""),
        ("reject", "-ENOENT", "", None, ""),
        ("accept", "0", "", None, "p:kprobes/e dput"),
        ("accept", "0", "", None, ""),
    ]


def test_lines_build_on_each_other_unless_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same definition twice is refused; alone, each is taken."""
    assert run(tmp_path, "p:e dput\np:e dput\n") == 1
    assert run(tmp_path, "p:e dput\np:e dput\n", "--each") == 0
    assert "exact same" in capsys.readouterr().out


def test_paths_are_looked_up_in_the_sysroot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Links are followed inside it and never lead out."""
    (tmp_path / "root" / "lib").mkdir(parents=True)
    (tmp_path / "root" / "lib" / "x.so").write_bytes(b"")
    (tmp_path / "root" / "x").symlink_to("/lib/x.so")
    (tmp_path / "root" / "out").symlink_to("/../../../probes.txt")
    (tmp_path / "root" / "loop").symlink_to("loop")
    lines = "p /x:0x10\np /lib/../x:1\np /out:1\np /lib:1\np /lib/x.so/y:1\np /loop:1\n"
    assert run(tmp_path, lines, "--sysroot", str(tmp_path / "root"), "--json") == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["listing"] or f"{row['errno']} {row['error']}" for row in rows] == [
        "p:uprobes/p_x_0x10 /x:0x0000000000000010",
        "p:uprobes/p_x_0x1 /lib/../x:0x0000000000000001",
        "-ENOENT Failed to find the given file",
        "-EINVAL Not a regular file",
        "-ENOTDIR Failed to find the given file",
        "-ELOOP Failed to find the given file",
    ]


def test_the_file_a_line_is_meant_for_can_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kprobe_events does not take a uprobe's line; auto picks by the place."""
    assert run(tmp_path, "p /bin/sh:0x10\n", "--kind", "kprobe") == 1
    assert run(tmp_path, "p /bin/sh:0x10\np dput\n") == 0
    assert run(tmp_path, "p dput\n", "--kind", "uprobe") == 1


@pytest.mark.parametrize("options", [["--kernel", "/nosuch"], ["--kernel", "/etc/passwd"], ["--sysroot", "/nosuch"]])
def test_what_cannot_be_read_is_status_2(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, nothing judged."""
    assert run(tmp_path, "p dput\n", *options) == 2
    assert main(["check", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().out == ""


def test_symbols_have_prototypes_and_what_linux_says(capsys: pytest.CaptureFixture[str]) -> None:
    """By glob; 1 and names one may have meant where there is none."""
    assert main(["symbols", KERNEL, "vfs_readl*"]) == 0
    assert "vfs_readlink  int vfs_readlink(struct dentry *dentry, char *buffer, int buflen)" in capsys.readouterr().out
    assert main(["symbols", KERNEL, "__switch_to"]) == 0
    assert "[Linux refuses: notrace]" in capsys.readouterr().out
    assert main(["symbols", KERNEL, "vfs_raed"]) == 1
    assert "did you mean vfs_read" in capsys.readouterr().err


def test_a_pattern_that_matches_nothing_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    """An empty one, as a script's unset variable makes it."""
    assert main(["symbols", KERNEL, ""]) == 1
    assert capsys.readouterr().err.endswith("no symbol matches ''; * matches all\n")
