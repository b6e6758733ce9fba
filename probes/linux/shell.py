"""drgn's own interactive shell on a guest's kernel.

Rules: blocks until its user leaves; talks to the terminal itself, through drgn.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

from drgn import Program
from drgn.cli import run_interactive

from emu.iface import Registers
from probes.linux.saved import running_registers
from probes.linux.system import Linux

_UNWOUND: Final = 8  # bytes of a word: drgn 0.3 walks no stacks of i386, and says so
_BANNER = """\
drgn on {release}: `prog` is its kernel, `linux` asks as monitor's ps, maps and files do; Ctrl-D leaves.
`regs` is the processor's state: prog.stack_trace(regs) for the task that runs, linux.current().
"""


def interact(linux: Linux, registers: Registers, image: Callable[[], bytes], code: range) -> None:
    """NotAvailable where the kernel has not come far enough to be looked at.

    drgn has no way to be told the registers of a task that runs: its user gets them as a `struct pt_regs`.
    `image` makes an ELF file with unwind tables for the kernel's `code`: without them drgn guesses at a stack's frames.
    """
    with linux.asking("the kernel is") as program:
        program["init_task"].comm.string_()
        regs = running_registers(linux, registers)
    linux.unbounded()
    if linux.kernel.btf.pointer_size == _UNWOUND:
        _teach_unwinding(program, image(), code)

    def names(known: dict[str, Any]) -> dict[str, Any]:
        return {**known, "linux": linux, "regs": regs}

    run_interactive(program, banner_func=lambda _: _BANNER.format(release=linux.kernel.release), globals_func=names)


def _teach_unwinding(program: Program, image: bytes, code: range) -> None:
    """drgn reads files only: this one is in memory, for as long as it takes to read it."""
    with os.fdopen(os.memfd_create("kernel"), "wb") as file:
        file.write(image)
        file.flush()
        kernel = program.main_module("kernel", create=True)
        kernel.address_range = (code.start, code.stop)
        kernel.try_file(f"/proc/self/fd/{file.fileno()}", force=True)
