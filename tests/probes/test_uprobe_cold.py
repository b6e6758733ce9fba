"""Cold pages: a file on a disk, its page thrown out of memory between any two runs."""

from __future__ import annotations

import pytest

from probes import Manager, Uprobe
from tests.support.disks import DISK_KERNELS, PROGRAM, mount_disk, with_disk
from tests.support.kernels import run_shell
from tests.support.programs import LIBC, equipped

ROUNDS = 50


@pytest.mark.parametrize("kernel", DISK_KERNELS, indirect=True)
def test_first_instruction_of_a_page_that_was_dropped_fifty_times(kernel: str) -> None:
    """ext4 on a ram disk, drop_caches before each run: pages, inode, names go; no call is missed or told twice."""
    machine = with_disk(kernel)
    manager = Manager(machine)
    run_shell(machine, "sync")
    seen: list[int] = []
    probe = Uprobe(PROGRAM, "cold", lambda up, regs: seen.append(regs.arg(1)), lambda ri, regs: None)
    manager.register(probe)
    run_shell(machine, "for i in 1 2; do echo 3 > /proc/sys/vm/drop_caches; done")  # a name used of late has two lives
    late = Uprobe(PROGRAM, probe.places[0].offset)
    manager.register(late)
    assert late.notes  # nothing of the file is in memory, not even its name; nor are its symbols
    loop = f"while [ $i -lt {ROUNDS} ]; do echo 3 > /proc/sys/vm/drop_caches; {PROGRAM} || f=1; i=$((i+1)); done"
    assert run_shell(machine, f"i=0; f=0; {loop}; echo failed $f", 2_000_000_000).endswith("failed 0")
    assert (late.hits, late.notes) == (3 * ROUNDS, ())
    assert seen == [0, 1, 2] * ROUNDS
    assert str(probe.ends) == f"{3 * ROUNDS} entries = {3 * ROUNDS} returned + 0 live + 0 missed"
    rewrite = f"dd if=/tmp/cold of={PROGRAM} conv=notrunc 2>/dev/null; sync; echo 3 > /proc/sys/vm/drop_caches"
    assert run_shell(machine, f"{rewrite}; cmp /tmp/cold {PROGRAM} && echo same").endswith("same")
    run_shell(machine, PROGRAM)
    assert late.hits == 3 * (ROUNDS + 1)  # nobody was kept from writing, and what was written is probed


@pytest.mark.parametrize("kernel", ["amd64"], indirect=True)
def test_library_that_was_cold_tells_how_functions_were_left(kernel: str) -> None:
    """Where longjmp() is in a file is known only when its symbols have been read: by the dynamic linker, later."""
    machine = equipped(kernel)
    manager = Manager(machine)
    mount_disk(machine, kernel)
    run_shell(machine, f"cp {LIBC} /mnt; sync")
    probe = Uprobe("/bin/leaving", "jumps", ret_handler=lambda ri, regs: None)
    manager.register(probe)
    run_shell(machine, "echo 3 > /proc/sys/vm/drop_caches; LD_LIBRARY_PATH=/mnt /bin/leaving")
    assert str(probe.ends) == "15 entries = 0 returned + 0 live + 0 missed + 15 longjmp"
