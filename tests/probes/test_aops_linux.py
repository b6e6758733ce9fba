"""`--arm aops` and `--arm int3` on stock kernels: int3s in the page cache, and what the guest sees of them."""

from __future__ import annotations

import errno

import pytest

from emu.boot import GuestMachine
from probes import Manager, ProbeError, Uprobe
from tests.probes.test_uprobe_linux import BUSYBOX, entry_of
from tests.support.disks import DISK_KERNELS, PROGRAM, with_disk
from tests.support.kernels import another, run_shell
from tests.support.programs import COLD32, bring, build

on_disk = pytest.mark.parametrize("kernel", DISK_KERNELS, indirect=True)
DROP = "echo 3 > /proc/sys/vm/drop_caches"
FLUSH = f"sync; {DROP}"
ROUNDS = 5
SEEN = "busybox ls / | wc -l; busybox cat /proc/self/maps; busybox md5sum /proc/self/smaps; busybox dmesg | tail -3"


def in_memory(machine: GuestMachine) -> int:
    return len(machine.planted.guest_bytes())


@on_disk
def test_same_hits_as_in_translated_code_through_writeback_and_evictions(kernel: str) -> None:
    """A probe of either kind in the same function, in one run: equal hits and returns. The int3 is not in the page
    while that is yet to be written, and in the frame of every new read of it."""
    machine = with_disk(kernel)
    manager = Manager(machine)
    cached = Uprobe(PROGRAM, "cold", ret_handler=lambda call, regs: None, arm="aops")
    usual = Uprobe(PROGRAM, "cold", offset=4)
    for probe in (cached, usual):
        manager.register(probe)
    run_shell(machine, PROGRAM)
    assert (cached.hits, in_memory(machine)) == (3, 0)
    run_shell(machine, FLUSH)
    frames = set()
    for _ in range(ROUNDS):
        run_shell(machine, f"{PROGRAM}; {DROP}; {PROGRAM}")
        frames.update(machine.planted.guest_bytes())
    assert cached.hits == usual.hits == 3 + 6 * ROUNDS
    assert cached.ends.returned == cached.hits
    assert in_memory(machine) == 1
    assert len(frames) > 1
    assert machine.text.armed_bytes().keys().isdisjoint(frames)


@on_disk
def test_denied_pinned_and_gone_without_trace(kernel: str) -> None:
    """Nobody can write the file or unmount its disk meanwhile, `cmp` sees the int3; after the last probe the disk has
    what was put there, and the kernel has said nothing."""
    machine = with_disk(kernel)
    manager = Manager(machine)
    run_shell(machine, f"{FLUSH}; cat {PROGRAM} >/dev/null; dmesg -c >/dev/null")
    probes = [Uprobe(PROGRAM, "cold", arm="aops"), Uprobe(PROGRAM, "run", arm="aops")]
    for probe in probes:
        manager.register(probe)
    assert in_memory(machine) == 2
    assert run_shell(machine, f"{PROGRAM}; echo $?") == "0"
    assert "Text file busy" in run_shell(machine, f"echo x >> {PROGRAM}")
    assert "busy" in run_shell(machine, "umount /mnt")
    assert "differ" in run_shell(machine, f"cmp /tmp/cold {PROGRAM}")
    manager.unregister(probes[0])
    assert in_memory(machine) == 1
    manager.unregister(probes[1])
    remount = "umount /mnt && mount -t ext4 /dev/ram0 /mnt"
    compare = f"cmp /tmp/cold {PROGRAM}"
    assert run_shell(machine, f"{compare} && {remount} && {compare} && echo same").endswith("\nsame")
    assert run_shell(machine, f"echo x >> {PROGRAM} && {PROGRAM} && echo fine").endswith("fine")
    assert "BUG" not in run_shell(machine, "dmesg")
    assert (machine.planted.guest_bytes(), machine.breaks.client) == ({}, None)


@on_disk
def test_file_that_comes_later_and_page_that_is_there_already(kernel: str) -> None:
    """Registered before the file exists; then a second probe when its page is in memory and on the disk."""
    machine = with_disk(kernel)
    manager = Manager(machine)
    file = manager.uprobes.open(PROGRAM)
    assert file is not None
    manager.register(probe := Uprobe(PROGRAM, "cold"))
    offset = probe.places[0].offset
    manager.unregister(probe)
    late = Uprobe("/mnt/later", offset, arm="aops")
    manager.register(late)
    assert "waiting" in late.notes[0]
    run_shell(machine, f"cp /tmp/cold /mnt/later; /mnt/later; {FLUSH}; /mnt/later")
    assert (late.hits, late.notes, in_memory(machine)) == (6, (), 1)
    second = Uprobe("/mnt/later", offset, arm="aops")
    third = Uprobe("/mnt/later", offset + 4, arm="aops")
    manager.register(second)
    manager.register(third)
    assert in_memory(machine) == 2
    run_shell(machine, "/mnt/later")
    assert (late.hits, second.hits, third.hits) == (9, 3, 3)


@on_disk
def test_machine_that_goes_back_has_its_probes_again(kernel: str) -> None:
    """Counts of the kernel's that are partly ours are as they were, however often."""
    machine = with_disk(kernel)
    manager = Manager(machine)
    run_shell(machine, FLUSH)
    probe = Uprobe(PROGRAM, "cold", arm="aops")
    run_shell(machine, PROGRAM)
    manager.register(probe)
    saved = machine.snapshot()
    for _ in range(2):
        run_shell(machine, f"{PROGRAM}; {DROP}; {PROGRAM}")
        machine.restore(saved)
    assert probe.hits == 12
    manager.unregister(probe)
    assert run_shell(machine, f"echo x >> {PROGRAM} && umount /mnt && echo fine").endswith("fine")


def test_machine_that_goes_back_to_before_the_file_was_there() -> None:
    """The file comes once more, and the probe with it: its int3, and no writer while it is there."""
    machine = another("amd64")
    manager = Manager(machine)
    file = manager.uprobes.open(BUSYBOX)
    assert file is not None
    saved = machine.snapshot()
    probe = Uprobe("/tmp/later", entry_of(file), arm="int3")
    manager.register(probe)
    for _ in range(2):
        assert in_memory(machine) == 0
        run_shell(machine, "cp /bin/busybox /tmp/later; /tmp/later true; /tmp/later true")
        assert in_memory(machine) == 1
        assert "Text file busy" in run_shell(machine, "echo x >> /tmp/later")
        machine.restore(saved)
    assert (probe.hits, probe.notes) == (4, ())


def test_file_systems_that_read_no_pages_are_refused(kernel: str) -> None:
    """The initramfs's files are made of their page cache: there is nothing to follow."""
    machine = another(kernel)
    manager = Manager(machine)
    file = manager.uprobes.open(BUSYBOX)
    assert file is not None
    probe = Uprobe(BUSYBOX, entry_of(file), arm="aops")
    with pytest.raises(ProbeError, match="no file system on a block device") as refused:
        manager.register(probe)
    assert (refused.value.errno, probe.registered) == (errno.EOPNOTSUPP, False)
    assert manager.add("uprobe", f"p {BUSYBOX}:{entry_of(file):#x}", {"arm": "int3"})


def test_int3_leaves_all_else_as_in_the_bare_run(kernel: str) -> None:
    """Mappings, the log, the time and every byte of RAM but the int3s; nothing of the file is read as a file here."""
    ends = []
    for arm in (None, "int3"):
        machine = another(kernel)
        manager = Manager(machine)
        file = manager.uprobes.open(BUSYBOX)
        assert file is not None
        probes = [Uprobe(BUSYBOX, entry_of(file) + offset, arm=arm) for offset in (0, 2, 5) if arm is not None]
        for probe in probes:
            manager.register(probe)
        ends.append((run_shell(machine, SEEN), machine.clock.instructions, machine.ram_sha256()))
    assert ends[0] == ends[1]
    assert all(probe.hits >= 3 for probe in probes)
    assert in_memory(machine) == len(probes)


def test_int3_is_seen_denies_writers_and_goes(kernel: str) -> None:
    """By int3 in the page that all processes share: the hits of the default kind, another checksum, no writer; and the
    checksum of before when it has gone."""
    machine = another(kernel)
    manager = Manager(machine)
    file = manager.uprobes.open(BUSYBOX)
    assert file is not None
    before = run_shell(machine, f"md5sum {BUSYBOX}")
    probe, usual = Uprobe(BUSYBOX, entry_of(file), arm="int3"), Uprobe(BUSYBOX, entry_of(file) + 2)
    for one in (probe, usual):
        manager.register(one)
    run_shell(machine, "busybox true; (exec busybox true); busybox sh -c 'busybox true; busybox true'")
    assert probe.hits == usual.hits >= 4
    assert in_memory(machine) == 1
    assert run_shell(machine, f"md5sum {BUSYBOX}") != before
    assert "Text file busy" in run_shell(machine, f"echo x >> {BUSYBOX}")
    assert file.read(probe.places[0].offset, 1) != b"\xcc"  # a debugger sees the file's own
    manager.disable(probe)
    assert (run_shell(machine, f"md5sum {BUSYBOX}"), in_memory(machine)) == (before, 0)
    manager.enable(probe)
    run_shell(machine, "busybox true")
    assert (probe.hits, in_memory(machine)) == (usual.hits, 1)
    manager.unregister(probe)
    assert (run_shell(machine, f"md5sum {BUSYBOX}"), in_memory(machine)) == (before, 0)


def test_32_bit_processes_by_int3(kernel: str) -> None:
    """On a 64-bit kernel as on its own: arguments, returns and the program's status."""
    machine = another(kernel)
    manager = Manager(machine)
    bring(machine, manager.linux, {"/tmp/cold": build(*COLD32)})
    seen: list[int] = []
    probe = Uprobe(
        "/tmp/cold",
        "cold",
        lambda up, regs: seen.append(regs.arg(1)),
        lambda call, regs: seen.append(regs.retval),
        arm="int3",
    )
    manager.register(probe)
    assert run_shell(machine, "/tmp/cold && /tmp/cold && /tmp/cold; echo $?") == "0"
    assert seen == [0, 1, 1, 2, 2, 3] * 3
    assert in_memory(machine) == 1
