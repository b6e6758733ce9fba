"""A probe is a file's: in each of its mappings, in every process, and in the file that takes its name."""

from __future__ import annotations

import pytest

from emu.boot import GuestMachine
from probes import Manager, ProbeError, Regs, Uprobe
from probes.programsymbols import functions
from tests.support.kernels import another, run_shell
from tests.support.programs import COLD, COLD32, GUESTS, bring, build, equipped

LIBRARY = "/lib/place.so"


@pytest.mark.parametrize(("kernel", "bits"), GUESTS, indirect=["kernel"])
def test_every_mapping_of_a_library_and_the_file_that_replaces_another(kernel: str, bits: int) -> None:
    """dlopen and dlclose, twice in one process, moved, made executable late, copied on write; fork, vfork and exec."""
    machine = equipped(kernel, bits)
    manager = Manager(machine)
    seen: list[int] = []
    places: set[int] = set()

    def called(up: Uprobe, regs: Regs) -> None:
        seen.append(regs.arg(1))
        places.add(regs.ip)

    returned: list[int] = []
    probe = Uprobe(LIBRARY, "place", called, lambda ri, regs: returned.append(regs.retval))
    manager.register(probe)
    assert run_shell(machine, f"/bin/mappings {LIBRARY}") == f"sum {sum((1, 2, 3, 6, 7, 8, 9, 10)) + 8}"
    assert seen == [1, 2, 3, 4, 5, 20, 6, 7, 8, 9, 10]
    assert returned == [n + 1 for n in seen]
    assert len(places) >= 4
    assert (manager.uprobes.addresses(probe), probe.ends.live) == ([], 0)
    manager.unregister(probe)
    assert machine.breaks.armed == []
    replaced(machine, manager, bits)


def replaced(machine: GuestMachine, manager: Manager, bits: int) -> None:
    """By name: where the function stands in each file that has had the name, and no more in the one before."""
    first, *options = COLD if bits == 64 else COLD32
    files = {f"/tmp/{name}": build(first, *options, *more) for name, more in {"one": (), "two": ("-DMOVED",)}.items()}
    bring(machine, manager.linux, files)
    probes = [Uprobe(path, "cold") for path in ("/tmp/program", "/tmp/program", "/tmp/link")]
    for probe in probes:
        manager.register(probe)
    run_shell(machine, "cp /tmp/one /tmp/program; /tmp/program; cp /tmp/two /tmp/new; mv /tmp/new /tmp/program")
    assert [probe.hits for probe in probes] == [3, 3, 0]
    run_shell(machine, "/tmp/program; /tmp/one; /tmp/two")
    assert [probe.hits for probe in probes] == [6, 6, 0]
    run_shell(machine, "ln -s one /tmp/link; /tmp/link; rm /tmp/link; ln -s two /tmp/link; /tmp/link")
    assert [probe.hits for probe in probes] == [6, 6, 6]
    for probe in probes:
        assert len({place.offset for place in probe.places}) == len({place.file for place in probe.places}) == 2
        manager.unregister(probe)


def test_event_on_two_files_has_the_bytes_of_each_and_one_written_over_is_told() -> None:
    """`@+OFF` is a byte of the file that was hit. Written over, a file keeps its probe where it was, as on Linux;
    `info` says so, and where the function is now. A directory is refused. Neither file's first page was touched."""
    machine = another("amd64")
    manager = Manager(machine)
    first, *options = COLD
    files = [build(first, *options, *more) for more in ((), ("-DMOVED",))]
    bring(machine, manager.linux, {"/tmp/one": files[0], "/tmp/two": files[1]})
    run_shell(machine, "cp /tmp/one /tmp/program")
    starts = [functions(lambda offset, size, file=file: file[offset : offset + size])["cold"] for file in files]
    codes = [f"{int.from_bytes(file[at : at + 4], 'little'):#x}" for file, at in zip(files, starts, strict=True)]
    for letter in "pr":
        manager.add(
            "uprobe", f"{letter}:{letter} /tmp/program:cold elf=@+0:x32 one=@+{starts[0]}:x32 two=@+{starts[1]}:x32"
        )
    run_shell(machine, "/tmp/program; cp /tmp/two /tmp/new; mv /tmp/new /tmp/program; /tmp/program")
    lines = [record.text() for record in manager.trace.last()]
    assert all("elf=0x464c457f" in line for line in lines)
    shown = [line.partition("one=")[2].split(" two=") for line in lines]
    assert ([one for one, _ in shown[:6]], [two for _, two in shown[6:]]) == ([codes[0]] * 6, [codes[1]] * 6)
    run_shell(machine, "cat /tmp/one > /tmp/program; /tmp/program")
    (note,) = [line.strip() for line in manager.info("p") if "note:" in line]
    assert note == (
        "note: another program has been written into /tmp/program since; "
        f"cold is at offset {starts[0]:#x} now: remove the probe and add it again"
    )
    manager.delete("all")
    manager.add("uprobe", "p:again /tmp/program:cold")
    run_shell(machine, "/tmp/program")
    assert [one.hits for one in manager.status()] == [3]
    assert not any("note:" in line for line in manager.info("again"))
    with pytest.raises(ProbeError, match="Not a regular file"):
        manager.add("uprobe", "p /tmp:0x0")
    with pytest.raises(ProbeError, match="/tmp is no regular file"):
        manager.register(Uprobe("/tmp", "main"))
