"""A file system on a disk in a stock kernel's guest: ext4 on a ram disk, with a program on it.

Rules: tests only; made once a session for each kernel.
"""

from __future__ import annotations

import functools
import os

from emu.boot import GuestMachine, restore
from emu.snapshot import Snapshot
from probes.linux import linux_of
from tests.support.kernels import KERNELS, another, run_shell
from tests.support.modules import kernel_modules
from tests.support.programs import COLD, COLD32, bring, build

DISK_KERNELS: dict[str, tuple[str, ...]] = {name: ("brd",) for name in KERNELS if name != "i386"}
"""Each with the modules that an ext4 on a ram disk needs, in the order of loading."""
if os.environ.get("GDBSTUB_LONG_TESTS"):  # linking the last one takes i386 a quarter of its boot's instructions
    DISK_KERNELS["i386"] = ("brd", "crc16", "mbcache", "crc32c_generic", "jbd2", "ext4")
    DISK_KERNELS["5.10"] = ("brd",)
PROGRAM = "/mnt/cold"


@functools.cache
def _with_disk(kernel: str) -> Snapshot:
    machine = another(kernel)
    program = build(*(COLD if machine.guest.bits == 64 else COLD32))
    bring(machine, linux_of(machine), {"/tmp/cold": program})
    mount_disk(machine, kernel)
    run_shell(machine, "cp /tmp/cold /mnt/cold")
    return machine.snapshot()


def mount_disk(machine: GuestMachine, kernel: str) -> None:
    """/mnt is an ext4 from here on, with nothing on it."""
    modules = kernel_modules(kernel, DISK_KERNELS[kernel])
    bring(machine, linux_of(machine), {f"/{name}.ko": data for name, data in modules.items()})
    for name in modules:
        run_shell(machine, f"insmod /{name}.ko {'rd_size=4096' if name == 'brd' else ''}")
    run_shell(machine, "mke2fs /dev/ram0 >/dev/null; mkdir /mnt; mount -t ext4 /dev/ram0 /mnt")


def with_disk(kernel: str) -> GuestMachine:
    """At its prompt, with ext4 on /mnt and PROGRAM on it: just copied there, so that the disk does not have it yet."""
    return restore(_with_disk(kernel))
