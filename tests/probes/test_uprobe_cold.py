"""Cold pages: a file on a disk, its page thrown out of memory between any two runs."""

from __future__ import annotations

import os

import pytest

from emu.boot import GuestMachine
from probes import Manager, Uprobe
from tests.support.kernels import another, run_shell
from tests.support.modules import kernel_modules
from tests.support.programs import COLD, COLD32, LIBC, bring, build, equipped

ROUNDS = 50
MODULES: dict[str, tuple[str, ...]] = {"amd64": ("brd",), "6.12": ("brd",)}
"""What ext4 on a ram disk needs, in the order of loading."""
if os.environ.get("GDBSTUB_LONG_TESTS"):  # linking the last one takes i386 a quarter of its boot's instructions
    MODULES["i386"] = ("brd", "crc16", "mbcache", "crc32c_generic", "jbd2", "ext4")


def on_ram_disk(machine: GuestMachine, manager: Manager, kernel: str) -> None:
    """/mnt is an ext4 from here on."""
    modules = kernel_modules(kernel, MODULES[kernel])
    bring(machine, manager.linux, {f"/{name}.ko": data for name, data in modules.items()})
    for name in modules:
        run_shell(machine, f"insmod /{name}.ko {'rd_size=4096' if name == 'brd' else ''}")
    run_shell(machine, "mke2fs /dev/ram0 >/dev/null; mkdir /mnt; mount -t ext4 /dev/ram0 /mnt")


@pytest.mark.parametrize("kernel", MODULES, indirect=True)
def test_first_instruction_of_a_page_that_was_dropped_fifty_times(kernel: str) -> None:
    """ext4 on a ram disk, drop_caches before each run: pages, inode, names go; no call is missed or told twice."""
    machine = another(kernel)
    manager = Manager(machine)
    bring(machine, manager.linux, {"/tmp/cold": build(*(COLD if machine.guest.bits == 64 else COLD32))})
    on_ram_disk(machine, manager, kernel)
    run_shell(machine, "cp /tmp/cold /mnt/cold; sync")
    seen: list[int] = []
    probe = Uprobe("/mnt/cold", "cold", lambda up, regs: seen.append(regs.arg(1)), lambda ri, regs: None)
    manager.register(probe)
    run_shell(machine, "echo 3 > /proc/sys/vm/drop_caches")
    late = Uprobe("/mnt/cold", probe.places[0].offset)
    manager.register(late)
    assert late.notes  # nothing of the file is in memory, not even its name; nor are its symbols
    loop = f"while [ $i -lt {ROUNDS} ]; do echo 3 > /proc/sys/vm/drop_caches; /mnt/cold || f=1; i=$((i+1)); done"
    assert run_shell(machine, f"i=0; f=0; {loop}; echo failed $f", 2_000_000_000).endswith("failed 0")
    assert (late.hits, late.notes) == (3 * ROUNDS, ())
    assert seen == [0, 1, 2] * ROUNDS
    assert str(probe.ends) == f"{3 * ROUNDS} entries = {3 * ROUNDS} returned + 0 live + 0 missed"
    rewrite = "dd if=/tmp/cold of=/mnt/cold conv=notrunc 2>/dev/null; sync; echo 3 > /proc/sys/vm/drop_caches"
    assert run_shell(machine, f"{rewrite}; cmp /tmp/cold /mnt/cold && echo same").endswith("same")
    run_shell(machine, "/mnt/cold")
    assert late.hits == 3 * (ROUNDS + 1)  # nobody was kept from writing, and what was written is probed


def test_library_that_was_cold_tells_how_functions_were_left() -> None:
    """Where longjmp() is in a file is known only when its symbols have been read: by the dynamic linker, later."""
    machine = equipped("amd64")
    manager = Manager(machine)
    on_ram_disk(machine, manager, "amd64")
    run_shell(machine, f"cp {LIBC} /bin/leaving /mnt; sync")
    probe = Uprobe("/bin/leaving", "jumps", ret_handler=lambda ri, regs: None)
    manager.register(probe)
    run_shell(machine, "echo 3 > /proc/sys/vm/drop_caches; LD_LIBRARY_PATH=/mnt /bin/leaving")
    assert str(probe.ends) == "15 entries = 0 returned + 0 live + 0 missed + 15 longjmp"
