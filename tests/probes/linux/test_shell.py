"""`gdbstub drgn SNAPSHOT`: drgn's shell on the guest's kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from emu.boot import boot_embedded
from tests.support.kernels import at_prompt


def drgn_shell(snapshot: Path, typed: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gdbstub", "drgn", str(snapshot)]
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=120, check=False)


def test_shell_has_the_kernel_and_drgns_helpers(tmp_path: Path) -> None:
    """On i386, whose types are a profile's: a variable, a helper of drgn's, and a question of ours."""
    at_prompt("i386").save(tmp_path / "snapshot")
    typed = (
        "print(prog['init_task'].comm.string_())\nprint(find_task(1).comm)\nprint(linux.current().comm, hex(regs.cs))\n"
    )
    done = drgn_shell(tmp_path / "snapshot", typed)
    assert done.returncode == 0, done.stderr
    assert "b'swapper/0'" in done.stdout
    assert '(char [16])"init"' in done.stdout
    assert '(char [16])"sh" 0x60' in done.stdout  # __KERNEL_CS


@pytest.mark.parametrize(("kernel", "shown"), [("amd64", "do_wait"), ("6.12", "do_wait"), ("i386", "not supported")])
def test_stacks_are_whole_or_refused(tmp_path: Path, kernel: str, shown: str) -> None:
    """init waits for its child; without unwind tables drgn would show two frames and words of the stack. The shell is
    about to print its prompt, and runs."""
    at_prompt(kernel).save(tmp_path / "snapshot")
    done = drgn_shell(tmp_path / "snapshot", "print(prog.stack_trace(1))\nprint(prog.stack_trace(regs))\n")
    assert shown in done.stdout + done.stderr
    assert done.stdout.count("do_syscall_64") == (0 if kernel == "i386" else 2)
    assert ("vfs_write" in done.stdout) == (kernel != "i386")


def test_a_snapshot_of_no_linux_is_refused_in_one_line(tmp_path: Path) -> None:
    boot_embedded().snapshot().save(tmp_path / "snapshot")
    done = drgn_shell(tmp_path / "snapshot", "")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "gdbstub: the guest's operating system is not available because the guest is no Linux"
    )
