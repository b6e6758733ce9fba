"""drgn's own interactive shell on a guest's kernel.

Rules: blocks until its user leaves; talks to the terminal itself, through drgn.
"""

from __future__ import annotations

from typing import Any

from drgn.cli import run_interactive

from probes.linux.system import Linux

_BANNER = "drgn on {release}: `prog` is its kernel, `linux` asks as monitor's ps, maps and files do; Ctrl-D leaves.\n"


def interact(linux: Linux) -> None:
    """NotAvailable where the kernel has not come far enough to be looked at."""
    with linux.asking("the kernel is") as program:
        program["init_task"].comm.string_()
    linux.unbounded()

    def names(known: dict[str, Any]) -> dict[str, Any]:
        return {**known, "linux": linux}

    run_interactive(program, banner_func=lambda _: _BANNER.format(release=linux.kernel.release), globals_func=names)
