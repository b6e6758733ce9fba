"""Stock kernels from switching on to the shell: determinism, neutral debugging, how they end, what is refused."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from emu import boot, load, restore
from emu.boot import GuestMachine
from emu.iface import ImageError
from emu.stops import Breakpoint, Budget, ConsoleMatch, Panic, PowerOff, Reset, Step
from tests.support import kernels
from tests.support.kernels import another, at_prompt, run_shell, run_until, type_line

WORK = "cat /proc/version; ls /bin > /dev/null; md5sum /bin/busybox"
WORK_LENGTH = 20_000_000
STEPPED_LENGTH = 6_000_000
STOPS = 100
"""At most: a breakpoint in a hot loop is hit again after a few instructions."""
ENOUGH = 400_000_000


def state(machine: GuestMachine) -> tuple[object, ...]:
    """What two equal machines share."""
    return (machine.instructions, machine.clock.now_ns, machine.ram_sha256(), machine.console.text)


def test_shell_answers_a_command(linux: GuestMachine) -> None:
    """A command typed at the prompt prints what the guest computes."""
    assert run_shell(linux, "echo $((6 * 7)); echo done") == "42\ndone"


def test_kernel_says_what_it_is(kernel: str, linux: GuestMachine) -> None:
    """The title is the banner that the guest prints of itself, and it has done patching its text at the prompt."""
    assert run_shell(linux, "cat /proc/version") == linux.guest.title
    assert linux.guest.settled
    assert linux.guest.bits == (32 if kernel == "i386" else 64)


def test_kernel_has_its_random_seed_from_the_loader(linux: GuestMachine) -> None:
    """Before its clock has ticked once: it need not gather entropy while it boots. Older kernels take none."""
    seeded = "5.10" not in linux.guest.title
    assert ("[    0.000000] random: crng init done" in run_shell(linux, "dmesg | grep crng; true")) is seeded


# ------------------------------------------------------------------------------------------------------- how they end


@pytest.mark.parametrize(
    ("command", "expected"), [("poweroff -f", PowerOff()), ("halt -f", PowerOff()), ("reboot -f", Reset())]
)
def test_guest_that_ends_itself_is_a_stop(linux: GuestMachine, command: str, expected: object) -> None:
    type_line(linux, command)
    assert linux.run(ENOUGH) == expected


def test_guest_panic_is_a_stop_with_its_message(linux: GuestMachine) -> None:
    """At the function panic, with the format string it was given."""
    type_line(linux, "echo c > /proc/sysrq-trigger")
    stop = linux.run(ENOUGH)
    assert isinstance(stop, Panic)
    assert stop.message == "sysrq triggered crash"
    found = linux.symbols.find(stop.pc)
    assert found is not None
    assert found[0].name == "panic"
    assert linux.guest.crashed


# ------------------------------------------------------------------------------------------------- the same every time


@pytest.mark.boots
def test_two_boots_are_the_same_to_the_instruction() -> None:
    """Switched on again, the kernel reaches the prompt at the same instruction with the same RAM."""
    first = another("amd64")
    second = kernels.switched_on("amd64")
    assert isinstance(run_until(second, kernels.PROMPT, kernels.BOOT_BUDGET), ConsoleMatch)
    assert state(second) == state(first)


@pytest.mark.parametrize("kernel", ["amd64", "i386"], indirect=True)
def test_restored_guest_goes_on_as_the_one_before(kernel: str) -> None:
    """Twice from one snapshot, once of them in place: the same end."""
    first = another(kernel)
    ends = []
    for _ in range(2):
        type_line(first, WORK)
        first.run(WORK_LENGTH)
        ends.append(state(first))
        first.restore(at_prompt(kernel))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("kernel", ["amd64", "i386"], indirect=True)
def test_two_hundred_interruptions_change_nothing(kernel: str) -> None:
    """Ctrl-C at scattered moments of a busy kernel."""
    bare, machine = another(kernel), another(kernel)
    for each in (bare, machine):
        type_line(each, WORK)
    bare.run(WORK_LENGTH)
    end, chance = machine.instructions + WORK_LENGTH, random.Random(4)
    for _ in range(200):
        stopper = threading.Timer(chance.uniform(0, 0.004), machine.request_stop)
        stopper.start()
        machine.run(min(end - machine.instructions, chance.randrange(1, 100_000)))
        stopper.join()
        machine.cancel_stop()
    machine.run(end - machine.instructions)
    assert state(machine) == state(bare)


@pytest.mark.parametrize("kernel", ["amd64", "i386"], indirect=True)
def test_stepping_and_breakpoints_change_nothing(kernel: str) -> None:
    """Steps through whatever runs, system calls and interrupts included; breakpoints at the pc and on a system call."""
    bare, machine = another(kernel), another(kernel)
    for each in (bare, machine):
        type_line(each, WORK)
    bare.run(STEPPED_LENGTH)
    end, chance = machine.instructions + STEPPED_LENGTH, random.Random(5)
    openat = machine.symbols.lookup("do_sys_openat2")[0].address
    steps = hits = 0
    for _ in range(STOPS):
        if (left := end - machine.instructions) <= STEPPED_LENGTH // 4:
            break
        for _ in range(chance.randrange(1, 20)):
            steps += isinstance(machine.step(), Step)
        pc, hardware = machine.cpu.linear_pc, chance.random() < 0.3
        machine.insert_breakpoint(pc, hardware)
        machine.insert_breakpoint(openat)
        hits += isinstance(machine.run(min(left // 2, chance.randrange(1, 800_000))), Breakpoint)
        machine.remove_breakpoint(pc, hardware)
        machine.remove_breakpoint(openat)
    assert steps > 50
    assert hits > 0
    assert machine.run(end - machine.instructions) == Budget(end)
    assert state(machine) == state(bare)


# ------------------------------------------------------------------------------------------------- what is refused


def test_the_command_lines_name_of_the_embedded_guest_leads_to_its_function() -> None:
    """`gdbstub load embedded` is no file here."""
    with pytest.raises(ImageError, match=r"embedded32: no such file; the embedded guest is boot_embedded\(32\)"):
        load("embedded32")


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"MZ" + bytes(600), bytes(4096), b"#!/bin/sh\n"])
def test_file_that_is_no_kernel_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        boot(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", [boot, load, restore])
def test_missing_file_is_refused_in_one_line(tmp_path: Path, start: object) -> None:
    assert callable(start)
    with pytest.raises(ImageError, match=r"(?i)none: .*no such file"):
        start(tmp_path / "none")


def test_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"(?i)is a directory"):
        load(tmp_path)
