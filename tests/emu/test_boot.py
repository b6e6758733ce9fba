"""Stock kernels from switching on to the shell, and what boot() is asked to put into them."""

from __future__ import annotations

from emu.boot import GuestMachine
from tests.support.kernels import run_shell


def test_shell_answers_a_command(linux: GuestMachine) -> None:
    """A command typed at the prompt prints what the guest computes."""
    assert run_shell(linux, "echo $((6 * 7)); echo done") == "42\ndone"
