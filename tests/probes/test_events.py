"""Trace events: a definition becomes lines of trace when the guest gets there."""

from __future__ import annotations

import errno
import json

import pytest

from probes import Jprobe, Kprobe, Manager, ProbeError
from tests.support.fake_cpu import ProbedMachine
from tests.support.fake_machine import FakeSymbol
from tests.support.hits import Shell

TEXT, DATA, LAST_PAGE = 0x10000, 0x20000, 0x31000


@pytest.fixture(params=[64, 32])
def machine(request: pytest.FixtureRequest) -> ProbedMachine:
    symbols = (FakeSymbol("open", TEXT, 0x40), FakeSymbol("close", TEXT + 0x40, 0x10), FakeSymbol("table", DATA, 0x100))
    made = ProbedMachine(*symbols, bits=request.param)
    made.memory.map(TEXT, b"\x55" + b"\x90" * 0x80)
    made.memory.map(DATA, b"\x80\x01\x02\x03" + b"/etc/motd\0".rjust(0x20, b"."))
    made.memory.map(LAST_PAGE, b"".ljust(0xFF0, b".") + b"/bin/busybox\0abc")
    return made


@pytest.fixture
def manager(machine: ProbedMachine) -> Manager:
    return Manager(machine, tasks=Shell())


def set_argument(machine: ProbedMachine, number: int, value: int) -> None:
    registers = {64: (7, 6, 2, 1, 8, 9), 32: (0, 2, 1)}[machine.bits]
    machine.cpu.gpr[registers[number - 1]] = value


def fetched(machine: ProbedMachine, manager: Manager, expression: str) -> str:
    """The text after `a=` of the one record a hit makes."""
    manager.add("kprobe", f"p:e open a={expression}")
    machine.hit(TEXT)
    (record,) = manager.trace.last()
    return record.text().partition(" a=")[2]


def test_a_hit_is_one_line_of_ftrace(machine: ProbedMachine, manager: Manager) -> None:
    """Task, cpu, flags, virtual time, event, place and arguments as `cat trace` prints them."""
    set_argument(machine, 2, DATA + 4 + 0x16)
    machine.cpu.eflags |= 0x200
    manager.add("kprobe", "p:files open file=+0($arg2):string n=$arg2:u32")
    machine.hit(TEXT)
    assert [record.text() for record in manager.trace.last()] == [
        "              sh-142     [000] .....     5.684361: files: (open+0x0/0x40) "
        f'file="/etc/motd" n={DATA + 4 + 0x16}'
    ]


@pytest.mark.parametrize(
    ("expression", "shown"),
    [
        (f"@{DATA:#x}:u8", "128"),
        (f"@{DATA:#x}:s8", "-128"),
        ("@table:x8", "0x80"),
        ("@table+1:u16", "513"),
        ("@table:x8[4]", "{0x80,0x1,0x2,0x3}"),
        ("@table:b4@4/8", "8"),
        ("@table+1:char", "'\x01'"),
        (f"\\{DATA:#x}:symbol", "table+0x0/0x100"),
        ("\\-1:s32", "-1"),
        ('\\"text"', '"text"'),
        ("$comm", '"sh"'),
        ("%ip:symbol", "open+0x1/0x40"),
        (f"@{LAST_PAGE + 0xFF0:#x}:string", '"/bin/busybox"'),
        (f"@{LAST_PAGE + 0xFFD:#x}:string", "(fault)"),
        ("@0x999000:string", "(fault)"),
        ("@0x999000:u32", "0"),
        ("@0x999000:x8[2]", "{0x0,0x0}"),
        ("+0(+0(@0x999000))", "0x0"),
        ("+0(@0x999000):string[2]", "{(fault),(fault)}"),
    ],
)
def test_values_are_fetched_and_shown_as_on_linux(
    machine: ProbedMachine, manager: Manager, expression: str, shown: str
) -> None:
    """Types, arrays, bitfields, symbols; a failed string is (fault), a failed number 0."""
    assert fetched(machine, manager, expression) == shown


def test_arguments_beyond_the_registers_come_from_the_stack(machine: ProbedMachine, manager: Manager) -> None:
    """The first stack argument lies above the return address: $arg7 on amd64, $arg4 on i386."""
    word = machine.bits // 8
    machine.cpu.gpr[4] = DATA + 0x80
    machine.memory.write(DATA + 0x80 + word, (77).to_bytes(word, "little"))
    assert fetched(machine, manager, "$arg7:u32" if machine.bits == 64 else "$arg4:u32") == "77"


def test_stack_words_count_from_the_stack_pointer(machine: ProbedMachine, manager: Manager) -> None:
    """$stack is the pointer, $stackN the Nth word."""
    word = machine.bits // 8
    machine.cpu.gpr[4] = DATA + 0x80
    machine.memory.write(DATA + 0x80 + 2 * word, (78).to_bytes(word, "little"))
    assert fetched(machine, manager, "$stack2:u32 b=$stack") == f"78 b={DATA + 0x80:#x}"


def test_records_keep_virtual_time_and_instructions(machine: ProbedMachine, manager: Manager) -> None:
    """JSON lines carry both clocks and raw values."""
    manager.add("kprobe", "p:grp/e open a=\\5:u8 b=@0x999000:string")
    machine.hit(TEXT)
    decoded = json.loads(manager.trace.last()[0].json())
    assert decoded["event"] == "grp/e"
    assert decoded["args"] == {"a": 5, "b": None}
    assert (decoded["timestamp_ns"], decoded["instructions"]) == (5_684_361_000, 1001)


def test_events_are_listed_counted_switched_and_deleted(machine: ProbedMachine, manager: Manager) -> None:
    """The life of two events by name and glob."""
    manager.add("kprobe", "p:one open")
    manager.add("kprobe", "p:two close", {"disabled": True})
    assert manager.list() == ["p:kprobes/one open", "p:kprobes/two close"]
    machine.hit(TEXT)
    assert [(event.name, event.hits, event.enabled) for event in manager.status()] == [
        ("kprobes/one", 1, True),
        ("kprobes/two", 0, False),
    ]
    assert manager.enable("t*") == ["kprobes/two"]
    assert manager.disable("all") == ["kprobes/one", "kprobes/two"]
    assert machine.text.armed == {}
    assert manager.delete("kprobes/*") == ["kprobes/one", "kprobes/two"]
    assert manager.list() == []


def test_probes_of_every_kind_are_listed_and_go(machine: ProbedMachine, manager: Manager) -> None:
    """[M] `c0107a50  k  vfs_read+0x0    [DISABLED]`: events and objects, by address; gdb's own are not the user's."""
    manager.add("kprobe", "p:two close", {"disabled": True})
    manager.add("kprobe", "r open")
    manager.register(Jprobe(kp=Kprobe(symbol="open"), entry=lambda: None))
    manager.register(own := Kprobe(addr=TEXT + 2), ours=True)
    manager.register(gone := Kprobe(addr=TEXT + 1))
    gone.gone = True
    wide = machine.bits // 4
    assert manager.kernel_list() == [
        f"{TEXT:0{wide}x}  r  open+0x0    ",
        f"{TEXT:0{wide}x}  j  open+0x0    ",
        f"{TEXT + 1:0{wide}x}  k  open+0x1    [GONE]",
        f"{TEXT + 0x40:0{wide}x}  k  close+0x0    [DISABLED]",
    ]
    assert manager.reset() == ["4 probes removed"]
    assert (manager.kernel_list(), manager.list(), list(machine.text.armed)) == ([], [], [TEXT + 2])
    assert own.registered
    assert manager.reset() == ["0 probes removed"]


def test_tasks_that_nobody_knows_limit_nothing(machine: ProbedMachine) -> None:
    """The refusal says why."""
    for kind, option in (("kprobe", "pid"), ("kretprobe", "comm")):
        with pytest.raises(ProbeError, match="--pid and --comm are not available: the guest is no Linux"):
            Manager(machine).add(kind, "r open" if kind == "kretprobe" else "p open", {option: "1"})


def test_a_name_used_again_adds_a_place(machine: ProbedMachine, manager: Manager) -> None:
    """One event on two functions, as multi-probe events are; other arguments are refused with the caret under them."""
    manager.add("kprobe", "p:e open a=%ax")
    manager.add("kprobe", "p:e close a=%ax")
    machine.hit(TEXT)
    machine.hit(TEXT + 0x40)
    assert manager.status()[0].hits == 2
    with pytest.raises(ProbeError) as refused:
        manager.add("kprobe", "p:e close b=%ax")
    assert (refused.value.errno, refused.value.column) == (errno.EEXIST, 10)
    with pytest.raises(ProbeError, match="exact same"):
        manager.add("kprobe", "p:e open a=%ax")


@pytest.mark.parametrize(
    ("options", "recorded"), [({"pid": "142"}, 1), ({"pid": 7}, 0), ({"comm": "s*"}, 1), ({"comm": "init"}, 0)]
)
def test_records_can_be_limited_to_a_task(
    machine: ProbedMachine, manager: Manager, options: dict[str, str | int], recorded: int
) -> None:
    """Hits of others are no hits of this event."""
    manager.add("kprobe", "p:e open", options)
    machine.hit(TEXT)
    assert (len(manager.trace), manager.status()[0].hits) == (recorded, recorded)


def test_an_unknown_symbol_brings_a_suggestion(manager: Manager) -> None:
    """The kernel's text and caret, and a line for a person."""
    with pytest.raises(ProbeError) as refused:
        manager.add("kprobe", "p opne")
    assert refused.value.lines()[:3] == ["Invalid probed address or symbol (EINVAL)", "  p opne", "    ^"]
    with pytest.raises(ProbeError) as refused:
        manager.add("kprobe", "p opex")
    assert refused.value.lines()[3] == "did you mean open?"
    assert str(refused.value) == "Invalid probed address or symbol\n  p opex\n    ^\ndid you mean open?"


@pytest.mark.parametrize(
    ("kind", "definition", "options"),
    [
        ("uprobe", "p /bin/sh:1", {}),
        ("kretprobe", "p open", {}),
        ("kretprobe", "r open", {"maxactive": "4097"}),
        ("kretprobe", "r open", {"shadow": True, "trampoline": True}),
        ("kprobe", "p open", {"shadow": True}),
        ("kprobe", "p open", {"post": "handler"}),
        ("kprobe", "p open", {"arm": "laser"}),
        ("kprobe", "p open", {"pid": "x"}),
        ("kprobe", "p mod:open", {}),
    ],
)
def test_what_is_not_there_is_refused_and_leaves_nothing(
    machine: ProbedMachine, manager: Manager, kind: str, definition: str, options: dict[str, str]
) -> None:
    """One line saying so, nothing armed, nothing listed."""
    with pytest.raises(ProbeError):
        manager.add(kind, definition, options)
    assert (machine.text.armed, manager.list()) == ({}, [])


def test_a_boundary_refusal_points_at_the_place(machine: ProbedMachine, manager: Manager) -> None:
    """[M] BAD_INSN_BNDRY, EILSEQ, caret under the probe point."""
    machine.memory.write(TEXT, b"\x0f\x1f\x44\x00\x00")
    with pytest.raises(ProbeError) as refused:
        manager.add("kprobe", "p:e open+2 %ax")
    assert (refused.value.errno, refused.value.column, refused.value.token) == (errno.EILSEQ, 4, "BAD_INSN_BNDRY")
