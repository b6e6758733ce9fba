"""Uprobes on programs of stock Linux guests, with every process that maps them."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from emu.boot import GuestMachine
from emu.insn import spans
from gdbstub.servedir import ServedFolder, open_copy
from probes import Manager, ProbeError, Regs, Uprobe
from probes.programs import ProgramFile
from probes.programsymbols import functions
from tests.support.kernels import another, run_shell, type_line
from tests.support.programs import COLD, COLD32, GUESTS, bring, build

BUSYBOX = "/bin/busybox"
LOOKS = ("looks.c", "-nostdlib", "-static", "-fno-stack-protector", "-fno-pic", "-no-pie")
WORK = "md5sum /bin/busybox; ls / | wc -l; cat /proc/self/maps; md5sum /proc/self/smaps; dmesg | tail -3"


def entry_of(file: ProgramFile) -> int:
    """The file offset of a program's first instruction."""
    program = ELFFile(io.BytesIO(file.read(0, file.size)))
    return next(program.address_offsets(program["e_entry"]))


def probed(machine: GuestMachine, *more: int) -> tuple[Manager, list[Uprobe], list[str]]:
    """Probes on busybox's entry and at `more` bytes behind it, and the names of those who hit the first."""
    manager = Manager(machine)
    file = manager.uprobes.open(BUSYBOX)
    assert file is not None
    names: list[str] = []

    def who(up: Uprobe, regs: Regs) -> None:
        names.append(manager.linux.current().comm.string_().decode())

    probes = [Uprobe(BUSYBOX, entry_of(file) + offset, who if not offset else None) for offset in (0, *more)]
    for probe in probes:
        manager.register(probe)
    return manager, probes, names


@functools.cache
def bare(name: str) -> tuple[str, int, str]:
    """What WORK prints, the instructions at its end and the hash of RAM, without probes."""
    machine = another(name)
    return run_shell(machine, WORK), machine.clock.instructions, machine.ram_sha256()


def test_guest_sees_nothing(kernel: str) -> None:
    """Checksum of the probed file, its mappings, the log, the time and every byte of RAM: as in the bare run."""
    machine = another(kernel)
    _, probes, _ = probed(machine, 2, 5)
    assert (run_shell(machine, WORK), machine.clock.instructions, machine.ram_sha256()) == bare(kernel)
    assert all(probe.hits >= 3 for probe in probes)


def test_every_process_present_and_future(kernel: str) -> None:
    """One hit for each exec of the file, none for others; nothing is left of processes that have gone."""
    machine = another(kernel)
    manager, (probe,), names = probed(machine)
    here = manager.uprobes.addresses(probe)
    assert len(here) == 2  # init's shell and its parent, or login
    run_shell(machine, "busybox true; busybox true; (exec busybox true); /bin/busybox sh -c 'exec busybox true'; echo")
    assert (probe.hits, len(names)) == (5, 5)
    assert manager.uprobes.addresses(probe) == here
    run_shell(machine, "cp /bin/busybox /tmp/other; /tmp/other true; ln -s /tmp/other /tmp/link; /tmp/link true")
    assert probe.hits == 5  # cp runs inside the shell
    manager.unregister(probe)
    assert machine.breaks.client is None
    assert run_shell(machine, "busybox echo still here") == "still here"
    assert probe.hits == 5


def test_file_that_does_not_exist_yet(kernel: str) -> None:
    """Registered by path first; then a program of that name comes, goes, and another takes its place."""
    machine = another(kernel)
    manager = Manager(machine)
    file = manager.uprobes.open(BUSYBOX)
    assert file is not None
    probe = Uprobe("/tmp/later/program", entry_of(file))
    manager.register(probe)
    assert probe.notes
    run_shell(machine, "busybox true; mkdir /tmp/later; cp /bin/busybox /tmp/later/program; /tmp/later/program true")
    assert (probe.hits, probe.notes) == (1, ())
    run_shell(machine, "rm /tmp/later/program; cp /bin/busybox /tmp/later/program; /tmp/later/program true")
    run_shell(machine, "ln -s later /tmp/aside; /tmp/aside/program true; busybox true")
    assert probe.hits == 3


@pytest.mark.parametrize(("kernel", "bits"), GUESTS, indirect=["kernel"])
def test_program_that_reads_its_own_flags_stack_and_code(kernel: str, bits: int) -> None:
    """Probed on every instruction of the function that looks: no TF, its own return address, its own bytes."""
    machine = another(kernel)
    manager = Manager(machine)
    bring(machine, manager.linux, {"/bin/looks": build(*LOOKS, f"-m{bits}")})
    bare = run_shell(machine, "looks; echo $?")
    assert bare == "0"
    file = manager.uprobes.open("/bin/looks")
    assert file is not None
    start = functions(file.read)["looks"]
    code = file.read(start, functions(file.read)["looks_end"] - start)
    probes = [Uprobe("/bin/looks", start + at, ret_handler=lambda ri, regs: None) for at, _ in spans(code, bits)]
    for probe in probes:
        manager.register(probe)
    assert run_shell(machine, "looks; echo $?") == bare
    assert [probe.hits > 0 for probe in probes] == [True] * (len(probes) - 2) + [False] * 2  # where it would complain


def test_32_bit_process(kernel: str) -> None:
    """On either kernel: arguments from the stack, the return by its own word size."""
    calls_of_cold(another(kernel), COLD32)


def calls_of_cold(machine: GuestMachine, made: tuple[str, ...]) -> None:
    manager = Manager(machine)
    bring(machine, manager.linux, {"/tmp/cold": build(*made)})
    seen: list[int] = []
    results: list[int] = []
    probe = Uprobe(
        "/tmp/cold", "cold", lambda up, regs: seen.append(regs.arg(1)), lambda ri, regs: results.append(regs.retval)
    )
    manager.register(probe)
    assert run_shell(machine, "/tmp/cold; echo $?") == "0"
    assert (seen, results, str(probe.ends)) == ([0, 1, 2], [1, 2, 3], "3 entries = 3 returned + 0 live + 0 missed")


@pytest.mark.parametrize("kernel", ["amd64", "i386"], indirect=True)
def test_two_hundred_processes_while_probes_come_and_go(kernel: str) -> None:
    """Each at addresses of its own, forty killed inside; then nothing is left: no site, no call, no place in text."""
    machine = another(kernel)
    manager = Manager(machine)
    program, *options = COLD if machine.guest.bits == 64 else COLD32
    files = {"/tmp/cold": build(program, *options), "/tmp/stays": build(program, *options, "-DSTAYS")}
    bring(machine, manager.linux, files)
    before = machine.text.armed_bytes()
    ending, staying = (Uprobe(path, "cold", ret_handler=lambda ri, regs: None) for path in files)
    manager.register(ending)
    manager.register(staying)
    passing = [Uprobe(path, name, ret_handler=lambda ri, regs: None) for path in files for name in ("cold", "run")]
    passing += [Uprobe(path, "_start") for path in files]
    start = '/tmp/cold & /tmp/cold & /tmp/cold & /tmp/cold & /tmp/stays & k="$k $!"'
    type_line(machine, f"for i in $(seq 40); do {start}; done; usleep 99999; kill -9 $k; wait; echo over")
    turn = 0
    while "\nover" not in machine.console.text.replace("\r", ""):
        machine.run(8_000_000)
        probe = passing[turn % len(passing)]
        (manager.unregister if probe.registered else manager.register)(probe)
        turn += 1
    assert turn > len(passing)
    assert str(ending.ends) == "480 entries = 480 returned + 0 live + 0 missed"
    assert str(staying.ends) == "120 entries = 80 returned + 0 live + 0 missed + 40 died"
    for probe in [ending, staying, *passing]:
        assert manager.uprobes.addresses(probe) == []
        assert probe.ends.live == 0
        if probe.registered:
            manager.unregister(probe)
    assert (machine.breaks.client, machine.breaks.armed, machine.text.armed_bytes()) == (None, [], before)


@pytest.mark.parametrize("kernel", ["amd64"], indirect=True)
def test_symbols_of_a_stripped_program_come_from_the_sysroot(kernel: str, tmp_path: Path) -> None:
    """The copy has the names; one of another program is refused, and one behind a link that leads out is not there."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "bin").mkdir(parents=True)
    outside.mkdir()
    (root / "bin/cold").write_bytes(build(*COLD))
    (root / "bin/other").write_bytes(build(*COLD32))
    (outside / "cold").write_bytes(build(*COLD))
    (root / "out").symlink_to(outside)
    machine = another(kernel)
    manager = Manager(machine, copies=functools.partial(open_copy, ServedFolder(root)))
    program = build(*COLD)
    stripped = program[:0x28] + bytes(8) + program[0x30:0x3C] + bytes(4) + program[0x40:]  # no section headers
    bring(machine, manager.linux, dict.fromkeys(("/bin/cold", "/bin/other", "/out/cold"), stripped))
    probe, late = Uprobe("/bin/cold", "cold"), Uprobe("/tmp/later", "cold")
    manager.register(probe)
    manager.register(late)
    (root / "tmp").mkdir()
    (root / "tmp/later").write_bytes(build(*COLD))
    run_shell(machine, "cold; cp /bin/cold /tmp/later; /tmp/later; /tmp/later")
    assert (probe.hits, late.hits) == (3, 6)
    assert ", cold, of device" in manager.uprobes.info(probe)[0]
    with pytest.raises(ProbeError, match="another program"):
        manager.register(Uprobe("/bin/other", "cold"))
    with pytest.raises(ProbeError, match=r"no function cold\n.* no symbols \(stripped\): give an offset.*--sysroot"):
        manager.register(Uprobe("/out/cold", "cold"))
    with pytest.raises(ProbeError, match="no function warm") as refused:
        manager.register(Uprobe("/bin/cold", "warm"))
    assert refused.value.hint is None  # its copy has symbols
