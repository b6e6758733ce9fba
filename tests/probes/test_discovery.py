"""What can be probed: symbols by glob, definitions with a glob for a place, what Linux would say."""

from __future__ import annotations

import errno

import pytest

from probes import Manager, ProbeError
from probes.discovery import MAX_SPREAD, find_symbols, spread
from tests.support.fake_cpu import ProbedMachine
from tests.support.fake_machine import FakeSymbol

TEXT, DATA = 0x10000, 0x20000
ENDBR, SEALED, NOP = bytes.fromhex("f30f1efa"), bytes.fromhex("660f1f00"), bytes.fromhex("0f1f440000")
CODE = {"vfs_read": ENDBR + NOP, "vfs_write": SEALED + NOP, "vfs_open": NOP, "__switch_to": b"\x55" * 8}
VFS = ("vfs_read", "vfs_write", "vfs_open")
OTHERS = ("vfs_part.0", "arch_adjust_kprobe_addr", "ftrace_location", "twice", "twice")


@pytest.fixture
def machine() -> ProbedMachine:
    names = [*CODE, *OTHERS]
    symbols = [FakeSymbol(name, TEXT + 0x40 * index, 0x40) for index, name in enumerate(names)]
    made = ProbedMachine(*symbols, FakeSymbol("vfs_table", DATA, 8, "D"), bits=64)
    text = b"".join(CODE.get(name, NOP).ljust(0x40, b"\x90") for name in names)
    made.memory.map(TEXT, text)
    return made


def test_a_glob_means_each_function_it_matches(machine: ProbedMachine) -> None:
    """Not data, not parts of functions, not names that several have; the rest of the line is kept."""
    assert spread(machine, "p:e vfs_*+0 a=%di") == [
        f"p:e {name}+0 a=%di" for name in ("vfs_read", "vfs_write", "vfs_open")
    ]
    assert spread(machine, "p vfs_read a=+0(%di):u8[2]") == ["p vfs_read a=+0(%di):u8[2]"]
    assert spread(machine, "p /bin/*:10") == ["p /bin/*:10"]
    assert spread(machine, "'p vfs_read %di'") == ["p vfs_read %di"]
    for line, number in (("p nosuch_*", errno.ENOENT), ("p twi*", errno.ENOENT)):
        with pytest.raises(ProbeError) as refused:
            spread(machine, line)
        assert refused.value.errno == number


@pytest.mark.parametrize(
    ("definition", "line"),
    [
        ("vfs_read", "p:probe/vfs_read vfs_read"),
        ("vfs_read+4 %di", "p:probe/vfs_read vfs_read+4 %di"),
        ("vfs_read%return $retval", "p:probe/vfs_read__return vfs_read%return $retval"),
        ("mine=vfs_read $params", "p:probe/mine vfs_read $arg*"),
        ("g:e=vfs_read n=count:u32", "p:g/e vfs_read n=count:u32"),
    ],
)
def test_perf_probes_form_needs_no_dwarf_for_functions(machine: ProbedMachine, definition: str, line: str) -> None:
    """It becomes the kernel's line, parameters being its BTF's."""
    assert spread(machine, definition) == [line]


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        ("vfs_read:3", "lines and sources are not available because"),
        ("vfs_read@fs/read_write.c", "lines and sources are not available because"),
        ("vfs_read;x=*", "lazy patterns are not available because"),
        ("vfs_raed:3 count", "no function vfs_raed"),
    ],
)
def test_perf_probes_form_says_what_it_lacks(machine: ProbedMachine, definition: str, reason: str) -> None:
    """The reason, not a complaint about a kernel's line."""
    with pytest.raises(ProbeError, match=reason):
        spread(machine, definition)


def test_a_glob_of_too_many_is_refused() -> None:
    """A number, before anything is armed."""
    symbols = (FakeSymbol(f"f{index}", TEXT + index, 1) for index in range(MAX_SPREAD + 1))
    with pytest.raises(ProbeError, match=f"matches {MAX_SPREAD + 1} functions"):
        spread(ProbedMachine(*symbols, bits=64), "p f*")


def test_an_event_on_a_glob_has_a_place_in_each(machine: ProbedMachine) -> None:
    """Named once it is one event, else each function has its own; where a line does not fit, the answer says so."""
    manager = Manager(machine)
    assert manager.add("kprobe", "p:e vfs_*") == [
        f"p:kprobes/e {name}" for name in ("vfs_read", "vfs_write", "vfs_open")
    ]
    assert [status.name for status in manager.status()] == ["kprobes/e"]
    manager.add("kprobe", "r vfs_[ro]*")
    assert [status.name for status in manager.status()][1:] == ["kprobes/r_vfs_read_0", "kprobes/r_vfs_open_0"]
    said = manager.add("kprobe", "p:f vfs_*+5")
    assert said[0] == "p:kprobes/f vfs_open+5"
    assert said[1].startswith("note: not on vfs_read+5: ")


def test_an_event_says_it_stands_where_linux_puts_it(machine: ProbedMachine) -> None:
    """Behind an ENDBR, sealed or not, with %ip one further; [M] `k1: (vfs_read+0x4/0x370)`."""
    manager = Manager(machine)
    for name in VFS:
        manager.add("kprobe", f"p:e {name} ip=%ip:symbol")
        machine.hit(machine.symbols.lookup(name)[0].address)
    assert [record.text().partition(": e: ")[2] for record in manager.trace.last()] == [
        "(vfs_read+0x4/0x40) ip=vfs_read+0x5/0x40",
        "(vfs_write+0x4/0x40) ip=vfs_write+0x5/0x40",
        "(vfs_open+0x0/0x40) ip=vfs_open+0x1/0x40",
    ]


def test_a_function_ftrace_does_not_know_is_noted(machine: ProbedMachine) -> None:
    """It is probed all the same."""
    manager = Manager(machine)
    listing, note = manager.add("kprobe", "p __switch_to")
    assert listing == "p:kprobes/p___switch_to_0 __switch_to"
    assert "Linux's kprobe_events would refuse: EINVAL" in note
    assert manager.add("kprobe", "p vfs_write") == ["p:kprobes/p_vfs_write_0 vfs_write"]
    manager.delete("all")
    with pytest.raises(ProbeError, match="Linux refuses this place: ftrace does not trace") as refused:
        Manager(machine, linux_limits=True).add("kprobe", "p:x __switch_to")
    assert (refused.value.errno, refused.value.column, machine.text.armed) == (errno.EINVAL, 4, {})


def test_a_list_of_ftrace_s_that_cannot_be_read_says_nothing(machine: ProbedMachine) -> None:
    """As where the kernel's nops are others than those we know: no function is recognised."""
    for name in VFS:
        machine.memory.write(machine.symbols.lookup(name)[0].address, b"\x66\x66\x90\x66\x90".ljust(16, b"\x90"))
    assert Manager(machine, linux_limits=True).add("kprobe", "p:x __switch_to") == ["p:kprobes/x __switch_to"]


def test_symbols_are_shown_and_counted(machine: ProbedMachine) -> None:
    """At most so many; where there is none, names that were meant."""
    found = find_symbols(machine, "vfs_*", limit=2)
    assert found.count == 5
    assert found.lines == (f"{TEXT:016x}     64 vfs_read", f"{TEXT + 0x40:016x}     64 vfs_write", "... and 3 more")
    assert find_symbols(machine, "vfs_raed").count == 0
