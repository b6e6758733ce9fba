"""A file system on a disk in a stock kernel's guest: ext4 on a ram disk, with a program on it.

Rules: tests only; made once a session for each kernel.
"""

from __future__ import annotations

import functools

from emu.boot import GuestMachine, restore
from emu.snapshot import Snapshot
from probes.linux import linux_of
from tests.support.kernels import another, run_shell
from tests.support.modules import kernel_modules
from tests.support.programs import COLD, COLD32, bring, build

DISK_KERNELS = ("amd64", "6.12")
"""Those with ext4 built in; i386 would spend a quarter of its boot's instructions on loading it."""
PROGRAM = "/mnt/cold"


@functools.cache
def _with_disk(kernel: str) -> Snapshot:
    machine = another(kernel)
    program = build(*(COLD if machine.guest.bits == 64 else COLD32))
    bring(machine, linux_of(machine), {"/tmp/cold": program, "/brd.ko": kernel_modules(kernel, ["brd"])["brd"]})
    run_shell(
        machine, "insmod /brd.ko rd_size=4096; mke2fs /dev/ram0 >/dev/null; mkdir /mnt; mount -t ext4 /dev/ram0 /mnt"
    )
    run_shell(machine, "cp /tmp/cold /mnt/cold")
    return machine.snapshot()


def with_disk(kernel: str) -> GuestMachine:
    """At its prompt, with ext4 on /mnt and PROGRAM on it: just copied there, so that the disk does not have it yet."""
    return restore(_with_disk(kernel))
