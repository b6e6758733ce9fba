"""perf probe's form on a guest with DWARF: a C program that the machine's compiler made, executed."""

from __future__ import annotations

import functools
import io
import random
import subprocess
import tempfile
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from emu import GuestMachine, load
from probes import Manager
from probes.dwarf import Dwarf
from probes.errors import ProbeError
from probes.perfprobe import kernel_lines

SOURCE = Path(__file__).parent / "samples" / "lists.c"
OPTIONS = ("-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-no-pie", "-fno-stack-protector", "-mno-sse", "-w")
BUDGET = 10_000
BUILDS = ["-m64 -O0", "-m64 -O1", "-m64 -O2 -gdwarf-4", "-m32 -O0", "-m32 -O1"]


@functools.cache
def program(build: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        linked = ("-Wl,-Ttext=0x100000", "-Wl,--build-id=none", "-o", f"{folder}/lists")
        subprocess.run(["cc", "-g", *build.split(), *OPTIONS, *linked, str(SOURCE)], check=True, capture_output=True)
        return Path(folder, "lists").read_bytes()


def guest(tmp_path: Path, build: str) -> GuestMachine:
    path = tmp_path / "lists"
    path.write_bytes(program(build))
    return load(path)


def line_of(text: str) -> int:
    """Lines of `text` below the one that `walk` is declared in."""
    lines = SOURCE.read_text().splitlines()
    (start,) = (number for number, line in enumerate(lines) if "long walk(" in line)
    return next(number for number, line in enumerate(lines) if text in line and number > start) - start


def hits(probes: Manager, event: str) -> list[dict[str, object]]:
    records = [record for record in probes.trace.last() if record.event == event]
    return [{name: value for name, _, value in record.arguments} for record in records]


@pytest.mark.parametrize("build", BUILDS)
def test_lines_and_variables_are_found(tmp_path: Path, build: str) -> None:
    """At a function's entry, at a line wherever its code is, in an inlined function, and of the whole unit; members
    through pointers, strings and elements of arrays. Whatever the compiler made of them."""
    machine = guest(tmp_path, build)
    probes = Manager(machine)
    probes.add("kprobe", "walk it->name:string limit first.id")
    probes.add(
        "kprobe", f"sum=walk@lists.c:{line_of('sink = here')} $params it->in.tag:string here t=it->in.tag[2]:char"
    )
    probes.add("kprobe", "g:twice_=twice v")
    machine.run(BUDGET)
    assert hits(probes, "walk") == [{"it_name": "first", "limit": 100, "first_id": 5}] * 3
    seen = [(one["limit"], one["it_in_tag"], one["here"], one["t"]) for one in hits(probes, "sum")]
    assert seen == [(100, "in1", 5, ord("1")), (100, "in2", 7, ord("2"))] * 3
    assert [one["v"] for one in hits(probes, "twice_")] == [0, 1, 2]


def test_a_return_knows_the_parameters_of_its_entry(tmp_path: Path) -> None:
    """As the kernel's `$argN`; of 32 bits, where they are on the stack, it says that they are gone."""
    machine = guest(tmp_path, "-m64 -O1")
    probes = Manager(machine)
    probes.add("kprobe", "walk%return $retval:s64 limit n=it->name:string")
    machine.run(BUDGET)
    assert hits(probes, "walk__return") == [{"arg1": 12, "limit": 100, "n": "first"}] * 3
    with pytest.raises(ProbeError, match=r"limit is not available .* because at a function's return"):
        Manager(guest(tmp_path, "-m32 -O1")).add("kprobe", "walk%return limit")


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        ("walk:99", "line 99 of walk has no code; there is some in 1, "),
        ("walk nosuch", "walk has no variable nosuch at 0x10.*; there are it, limit"),
        ("walk it->nosuch", "it->nosuch: there is no member nosuch"),
        ("walk it->in", "it->in: that is a structure"),
        ("walk limit->x", "->x: that is no pointer"),
        ("walk limit[1]", "that is no array"),
        ("walk@other.c", "DWARF knows no function walk in other.c"),
        ("twice%return", "twice is inlined everywhere"),
        ("wlak:3", "no function wlak"),
        ("walk;total*", "lazy patterns are not available"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, definition: str, reason: str) -> None:
    """One line that says what there is instead."""
    with pytest.raises(ProbeError, match=reason):
        Manager(guest(tmp_path, "-m64 -O1")).add("kprobe", definition)


def test_broken_dwarf_is_no_worse_than_none(tmp_path: Path) -> None:
    """Functions go by the symbols, lines are refused with the reason."""
    machine = guest(tmp_path, "-m64 -O1")
    whole = program("-m64 -O1")
    for image in (b"\x7fELF", whole[:64], b"\x7fELF" + b"\xff" * 200):
        with pytest.raises(ValueError, match="DWARF"):
            Dwarf(image)
        assert kernel_lines(machine, "walk %di", image) == ["p:probe/walk walk %di"]
        with pytest.raises(ProbeError, match="lines and sources are not available because the guest's DWARF"):
            kernel_lines(machine, "walk:3", image)


@pytest.mark.parametrize("build", ["-m64 -O1", "-m32 -O0"])
def test_damaged_dwarf_is_refused_or_read(tmp_path: Path, build: str) -> None:
    """Bytes of its sections changed at random: each definition becomes lines or a ProbeError, nothing else."""
    machine, whole, chance = guest(tmp_path, build), program(build), random.Random(4)
    sections = [section for section in ELFFile(io.BytesIO(whole)).iter_sections() if section.name.startswith(".debug")]
    refused = 0
    for _ in range(30):
        image = bytearray(whole)
        for _ in range(3):
            section = chance.choice(sections)
            image[section["sh_offset"] + chance.randrange(section["sh_size"])] = chance.randrange(256)
        for definition in ("walk it->in.tag[2]:char limit", "walk:3 $vars", "walk%return limit", "g:t=twice v"):
            try:
                assert kernel_lines(machine, definition, bytes(image))
            except ProbeError as error:
                refused += "the guest's DWARF cannot be read" in error.reason
    assert refused > 10
