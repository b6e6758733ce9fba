"""Uprobes against the kernel's own, in one run: same hits, same order, same registers, same returned values."""

from __future__ import annotations

import re

import pytest

from probes import Manager, Regs, Uprobe
from probes.programsymbols import functions
from tests.support.kernels import run_shell
from tests.support.programs import LIBC, equipped

TRACING = "/sys/kernel/tracing"
PLACES = ((LIBC, "malloc"), (LIBC, "puts"), ("/bin/dynamic", "work"), ("/bin/dynamic", "main"))
_LINE = re.compile(r"-(\d+) +\[000\] \S+ +[\d.]+: (\w+): \(0x[0-9a-f]+(?: <- 0x[0-9a-f]+)?\)(.*)")


@pytest.mark.parametrize("kernel", ["amd64", "6.12"], indirect=True)
def test_kernel_and_we_see_the_same(kernel: str) -> None:
    """Entries with three registers, returns with the value; forks, threads and a shared library among them."""
    machine = equipped(kernel)
    manager = Manager(machine)
    run_shell(machine, f"mount -t tracefs none {TRACING}")
    ours: list[tuple[int, str, list[int]]] = []

    def took(name: str, regs: Regs, *values: int) -> None:
        ours.append((manager.linux.current().pid.value_(), name, list(values)))

    for path, name in PLACES:
        file = manager.uprobes.open(path)
        assert file is not None
        place = f"{path}:{functions(file.read)[name]:#x}"
        run_shell(machine, f"echo 'p:p_{name} {place} %di:x64 %si:x64 %sp:x64' >> {TRACING}/uprobe_events")
        run_shell(machine, f"echo 'r:r_{name} {place} $retval:x64' >> {TRACING}/uprobe_events")
        manager.register(
            Uprobe(
                path,
                name,
                lambda up, regs, name=name: took(f"p_{name}", regs, regs.di, regs.si, regs.sp),
                lambda ri, regs, name=name: took(f"r_{name}", regs, regs.ax),
            )
        )
    run_shell(machine, f"echo 1 > {TRACING}/events/uprobes/enable; dynamic; echo 0 > {TRACING}/events/uprobes/enable")
    lines = [_LINE.search(line) for line in run_shell(machine, f"cat {TRACING}/trace").splitlines()]
    theirs = [
        (int(line[1]), line[2], [int(word.partition("=")[2], 16) for word in line[3].split()]) for line in lines if line
    ]
    assert len(theirs) > 90
    assert ours == theirs
