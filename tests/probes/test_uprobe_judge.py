"""Uprobes against the kernel's own, in one run: same hits, same order, same registers, same returned values."""

from __future__ import annotations

import re

import pytest

from probes import Manager, Regs, Uprobe
from probes.programsymbols import functions
from tests.support.kernels import KERNELS, run_shell
from tests.support.programs import GUESTS, LIBC, LIBC32, equipped

TRACING = "/sys/kernel/tracing"
WANTED = {64: "%di:x64 %si:x64 %sp:x64", 32: "+4(%sp):x32 %ax:x32 %sp:x32"}
OTHERS = [(name, 64) for name in KERNELS if name not in ("amd64", "i386")]
_LINE = re.compile(r"-(\d+) +\[000\] \S+ +[\d.]+: (\w+): \(0x[0-9a-f]+(?: <- 0x[0-9a-f]+)?\)(.*)")


def wanted(regs: Regs, bits: int) -> list[int]:
    """What WANTED asks the kernel for."""
    return [regs.di, regs.si, regs.sp] if bits == 64 else [regs.stack(1), regs.ax, regs.sp]


@pytest.mark.parametrize(
    ("kernel", "bits"), [*GUESTS, *((name, 64) for name in KERNELS.keys() - {"amd64", "i386"})], indirect=["kernel"]
)
def test_kernel_and_we_see_the_same(kernel: str, bits: int) -> None:
    """Entries with three values, returns with theirs, of three processes at once that fork and have threads."""
    machine = equipped(kernel, bits)
    manager = Manager(machine)
    run_shell(machine, f"mount -t tracefs none {TRACING}")
    ours: list[tuple[int, str, list[int]]] = []

    def took(name: str, values: list[int]) -> None:
        ours.append((manager.linux.current().pid.value_(), name, values))

    libc = LIBC if bits == 64 else LIBC32
    for path, name in ((libc, "malloc"), (libc, "puts"), ("/bin/dynamic", "work"), ("/bin/dynamic", "main")):
        file = manager.uprobes.open(path)
        assert file is not None
        place = f"{path}:{functions(file.read)[name]:#x}"
        run_shell(machine, f"echo 'p:p_{name} {place} {WANTED[bits]}' >> {TRACING}/uprobe_events")
        run_shell(machine, f"echo 'r:r_{name} {place} $retval:x{bits}' >> {TRACING}/uprobe_events")
        manager.register(
            Uprobe(
                path,
                name,
                lambda up, regs, name=name: took(f"p_{name}", wanted(regs, bits)),
                lambda ri, regs, name=name: took(f"r_{name}", [regs.ax]),
            )
        )
    work = "for i in 1 2 3; do dynamic & done; wait"
    run_shell(machine, f"echo 1 > {TRACING}/events/uprobes/enable; {work}; echo 0 > {TRACING}/events/uprobes/enable")
    lines = [_LINE.search(line) for line in run_shell(machine, f"cat {TRACING}/trace").splitlines()]
    theirs = [
        (int(line[1]), line[2], [int(word.partition("=")[2], 16) for word in line[3].split()]) for line in lines if line
    ]
    assert len(theirs) > 3 * 90
    assert len({pid for pid, *_ in theirs}) == 3 * 6
    assert ours == theirs
