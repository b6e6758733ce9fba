"""Reference counters: a program with a probe of its own looks at its counter; the kernel's uprobes are the judge."""

from __future__ import annotations

import errno
import io

import pytest
from elftools.elf.elffile import ELFFile

from emu.boot import GuestMachine
from probes import Manager, ProbeError, Regs, Uprobe
from probes.planting import UserArm
from tests.support.disks import with_disk
from tests.support.kernels import another, run_shell
from tests.support.programs import bring, build

OPTIONS = ("-nostdlib", "-static", "-fno-stack-protector", "-fno-pic", "-no-pie")
USDT, USDT32 = ("usdt.c", *OPTIONS), ("usdt.c", "-m32", *OPTIONS)
PATH = "/bin/usdt"
EVENTS = "/sys/kernel/tracing/events/uprobes/enable"


def offset_of(program: bytes, name: str) -> int:
    """Of a symbol in the file."""
    elf = ELFFile(io.BytesIO(program))
    table = elf.get_section_by_name(".symtab")
    return int(next(elf.address_offsets(table.get_symbol_by_name(name)[0]["st_value"])))


def prepared(kernel: str, made: tuple[str, ...]) -> tuple[GuestMachine, Manager, int, int]:
    """With the program in the guest, and where its probe and its counter are."""
    machine = another(kernel)
    manager = Manager(machine)
    program = build(*made)
    bring(machine, manager.linux, {PATH: program})
    return machine, manager, offset_of(program, "probe"), offset_of(program, "semaphore")


@pytest.mark.parametrize(
    ("kernel", "made", "arm"),
    [("amd64", USDT, "hook"), ("amd64", USDT32, "int3"), ("6.12", USDT, "int3"), ("i386", USDT32, "hook")],
    ids=["amd64", "32 bits on amd64", "6.12", "i386"],
)
def test_program_sees_what_the_kernels_uprobes_show_it(kernel: str, made: tuple[str, ...], arm: UserArm) -> None:
    """A process that looks before, while and after; its children; its own store in between. By the kernel, then us."""
    machine, manager, probe, counter = prepared(kernel, made)
    run_shell(machine, "mount -t tracefs none /sys/kernel/tracing; mkfifo /tmp/lines")
    run_shell(machine, f"echo 'p {PATH}:{probe:#x}({counter:#x})' > /sys/kernel/tracing/uprobe_events")
    ours = Uprobe(PATH, probe, ref_ctr_offset=counter, disabled=True, arm=arm)

    def told(on: str | None) -> str:
        """What a program tells; `on` is the shell's way to switch the probe, None means ours."""
        run_shell(machine, f"{PATH} x </tmp/lines >/tmp/told & exec 3>/tmp/lines")
        for line in ("", "1", "", "f", "0", "f", "1", "s", "0", "f", "q"):
            if line not in ("0", "1"):
                run_shell(machine, f"echo '{line}' >&3; sleep 0.1")
            elif on:
                run_shell(machine, f"echo {line} {on}")
            else:
                (manager.enable if line == "1" else manager.disable)(ours)
        return run_shell(machine, "exec 3>&-; wait; cat /tmp/told")

    judged = told(f"> {EVENTS}")
    assert judged.replace("\n", " ") == "b=0p0 v=0p0 v=1p1 c=1p1 v=1p1 c=0p0 v=0p0 v=2p1 c=1p1 v=1p1"
    manager.register(ours)
    assert told(None) == judged
    assert ours.hits == judged.count("p1") - 2  # while it was off and the program itself had stored a one
    manager.unregister(ours)
    assert (machine.traps.before_entry, machine.breaks.client) == (None, None)


def test_both_are_counted_and_each_new_process_begins_with_them() -> None:
    """The kernel's probe and two places of ours, one with two events: three; nothing when all are gone."""
    machine, manager, probe, counter = prepared("amd64", USDT)
    run_shell(machine, f"mount -t tracefs none /sys/kernel/tracing; cd /; status() {{ {PATH}; echo $?; }}")
    run_shell(
        machine, f"echo 'p {PATH}:{probe:#x}({counter:#x})' > /sys/kernel/tracing/uprobe_events; echo 1 > {EVENTS}"
    )
    assert run_shell(machine, "status") == str(16 + 3)
    manager.add("uprobe", f"p:first {PATH}:{probe:#x}({counter:#x}) number=%di")
    manager.add("uprobe", f"p:same {PATH}:{probe:#x}({counter:#x})")
    manager.add("uprobe", f"p:second {PATH}:{probe + 1:#x}({counter:#x})")
    assert run_shell(machine, "status") == str(3 * 16 + 3)
    assert [(one.name, one.hits) for one in manager.status()] == [
        ("uprobes/first", 3),
        ("uprobes/same", 3),
        ("uprobes/second", 3),
    ]
    assert f"    counter at offset {counter:#x} held up in 0 processes" in manager.info("first")
    manager.delete("all")
    assert run_shell(machine, f"status; echo 0 > {EVENTS}; status").split() == ["19", "0"]


@pytest.mark.parametrize("kernel", ["6.12"])
def test_counter_and_int3_of_a_file_on_a_disk(kernel: str) -> None:
    """By `aops`: each process has the counter up from its start, whether the int3's page was in memory or is read."""
    machine = with_disk(kernel)
    manager = Manager(machine)
    program = build(*USDT)
    bring(machine, manager.linux, {"/mnt/usdt": program})
    run_shell(machine, "sync; echo 1 > /proc/sys/vm/drop_caches; dmesg -n 1; status() { /mnt/usdt; echo $?; }")
    probe, counter = offset_of(program, "probe"), offset_of(program, "semaphore")
    manager.add("uprobe", f"p:counted /mnt/usdt:{probe:#x}({counter:#x}) number=%di", {"arm": "aops"})
    assert run_shell(machine, "status; status; echo 1 > /proc/sys/vm/drop_caches; status").split() == ["19"] * 3
    assert len(machine.planted.guest_bytes()) == 1
    assert [record.arguments[0][2] for record in manager.trace.last()] == [0, 1, 2] * 3
    manager.disable("counted")
    assert run_shell(machine, "status") == "0"
    manager.delete("all")
    assert run_shell(machine, "status") == "0"
    assert (machine.planted.guest_bytes(), machine.traps.before_entry, machine.breaks.client) == ({}, None, None)


def test_snapshot_has_the_programs_own_value() -> None:
    """Going back to a moment when the counter was up, the probe still there or not, it is neither lost nor doubled."""
    machine, manager, probe, counter = prepared("amd64", USDT)
    run_shell(machine, f"mkfifo /tmp/lines; {PATH} x </tmp/lines >/tmp/told & exec 3>/tmp/lines")
    ours = Uprobe(PATH, probe, ref_ctr_offset=counter)
    manager.register(ours)
    ask = "echo >&3; sleep 0.1; tail -n 1 /tmp/told"
    assert run_shell(machine, ask) == "v=1p1"
    saved = machine.snapshot()
    machine.restore(saved)
    assert run_shell(machine, ask) == "v=1p1"
    manager.unregister(ours)
    assert run_shell(machine, ask) == "v=0p0"
    machine.restore(saved)
    assert run_shell(machine, ask) == "v=0p0"


def test_page_that_may_not_be_stored_to_is_left_alone() -> None:
    """A program whose counter lies in read-only data runs as ever; so does one whose data is another file's."""
    machine, manager, probe, counter = prepared("amd64", USDT)
    seen: list[int] = []
    code = Uprobe(PATH, probe - 8, lambda up, regs: seen.append(regs.ip), ref_ctr_offset=probe & -4096)
    manager.register(code)
    assert run_shell(machine, f"{PATH}; echo $?") == "0"
    assert "held up in 0 processes" in manager.uprobes.info(code)[-1]
    with pytest.raises(ProbeError, match="another reference counter") as refused:
        manager.register(Uprobe(PATH, probe - 8, ref_ctr_offset=counter))
    assert refused.value.errno == errno.EINVAL
    with pytest.raises(ProbeError, match="multiple of 2") as refused:
        manager.register(Uprobe(PATH, probe, ref_ctr_offset=counter + 1))
    assert refused.value.errno == errno.EINVAL


def test_handler_may_take_its_probe_away() -> None:
    """In the middle of the program, which sees its counter fall at once and passes the probe no more."""
    machine, manager, probe, counter = prepared("amd64", USDT)

    def once(up: Uprobe, regs: Regs) -> None:
        manager.unregister(up)

    ours = Uprobe(PATH, probe, once, ref_ctr_offset=counter)
    manager.register(ours)
    assert run_shell(machine, f"{PATH}; echo $?") == "1"
    assert ours.hits == 1
