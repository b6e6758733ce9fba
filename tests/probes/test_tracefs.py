"""tracefs' names, triggers and actions: what is written to a file and what the hits after it do."""

from __future__ import annotations

import errno

import pytest

from emu.iface import Verdict
from emu.stops import ProbeStop
from probes import Manager, ProbeError
from probes.tracefs import Tracefs, redirection
from tests.support.fake_cpu import ProbedMachine
from tests.support.fake_machine import FakeSymbol
from tests.support.hits import Shell

TEXT, DATA = 0x10000, 0x20000
OPEN = "events/kprobes/open"


@pytest.fixture(params=[64, 32])
def machine(request: pytest.FixtureRequest) -> ProbedMachine:
    symbols = (FakeSymbol("open", TEXT, 0x40), FakeSymbol("close", TEXT + 0x40, 0x10), FakeSymbol("table", DATA, 0x100))
    made = ProbedMachine(*symbols, bits=request.param)
    made.memory.map(TEXT, b"\x90" * 0x80)
    made.memory.map(DATA, b"/etc/motd\0".ljust(0x100, b"."))
    made.cpu.eflags |= 0x200
    return made


@pytest.fixture
def manager(machine: ProbedMachine) -> Manager:
    return Manager(machine, tasks=Shell())


@pytest.fixture
def files(manager: Manager) -> Tracefs:
    """With two events that are defined as with Linux: not enabled."""
    tracefs = Tracefs(manager)
    echo(tracefs, r"'p:open open n=%ax:u32 file=@table:string' > kprobe_events")
    echo(tracefs, "'p:close close' >> kprobe_events")
    return tracefs


def echo(files: Tracefs, line: str) -> None:
    text, file, append = redirection(line)
    files.write(file, text, append=append)


def recorded(manager: Manager) -> list[str]:
    return [record.event for record in manager.trace.last()]


def test_a_definition_waits_until_it_is_enabled(machine: ProbedMachine, manager: Manager, files: Tracefs) -> None:
    """`enable` arms, and says what it is; so do the group's and everybody's."""
    assert (machine.text.armed, files.read(f"{OPEN}/enable")) == ({}, "0\n")
    echo(files, f"1 > {OPEN}/enable")
    machine.hit(TEXT)
    assert (recorded(manager), files.read(f"{OPEN}/enable")) == (["open"], "1\n")
    assert (files.read("events/enable"), files.read("set_event")) == ("X\n", "kprobes:open\n")
    echo(files, "1 > events/kprobes/enable")
    assert files.read("events/enable") == "1\n"
    echo(files, "0 > events/enable")
    assert machine.text.armed == {}


def test_events_are_listed_profiled_and_deleted(machine: ProbedMachine, files: Tracefs) -> None:
    """`-:` takes one away, `>` all of them, and neither one that is in use."""
    assert files.read("kprobe_events") == "p:kprobes/open open n=%ax:u32 file=@table:string\np:kprobes/close close\n"
    echo(files, f"1 > {OPEN}/enable")
    machine.hit(TEXT)
    assert files.read("kprobe_profile").splitlines()[0] == f"  {'open':<44} {1:>15} {0:>15}"
    with pytest.raises(ProbeError, match="in use"):
        echo(files, "'-:open' >> kprobe_events")
    with pytest.raises(ProbeError, match="in use"):
        echo(files, "> kprobe_events")
    echo(files, "'-:close' >> kprobe_events")
    assert files.list("events/kprobes") == ["enable", "filter", "open"]
    echo(files, f"0 > {OPEN}/enable")
    echo(files, "> dynamic_events")
    assert (files.read("kprobe_events"), files.list("events")) == ("", ["enable"])


def test_a_name_may_have_letters_of_latin_1(machine: ProbedMachine, manager: Manager, files: Tracefs) -> None:
    """Events, groups and arguments: in their files, in filters and in the trace they are the bytes that were given."""
    echo(files, "'p:caf\udce9/\udcff_1 open \udce9=%ax' >> kprobe_events")
    assert files.read("kprobe_events").splitlines()[-1] == "p:caf\udce9/\udcff_1 open \udce9=%ax"
    echo(files, "'\udce9 == 0' > events/caf\udce9/\udcff_1/filter")
    echo(files, "1 > events/caf\udce9/\udcff_1/enable")
    machine.hit(TEXT)
    assert manager.trace.last()[0].text().endswith(": \udcff_1: (open+0x0/0x40) \udce9=0x0")


def test_a_filter_decides_what_is_recorded(machine: ProbedMachine, manager: Manager, files: Tracefs) -> None:
    """Hits are hits all the same; the file shows the filter, or what is wrong with it."""
    echo(files, f"1 > {OPEN}/enable")
    echo(files, f"'n == 7' > {OPEN}/filter")
    machine.hit(TEXT)
    machine.cpu.gpr[0] = 7
    machine.hit(TEXT)
    assert (len(manager.trace), manager.status()[0].hits, files.read(f"{OPEN}/filter")) == (1, 2, "n == 7\n")
    with pytest.raises(ProbeError):
        echo(files, f"'n = 7' > {OPEN}/filter")
    assert files.read(f"{OPEN}/filter") == "n = 7\n   ^\nparse_error: Invalid operator\n\n"
    assert files.read("error_log").splitlines()[1:] == ["  Command: n = 7", "              ^"]
    echo(files, f"0 > {OPEN}/filter")
    assert files.read(f"{OPEN}/filter") == "none\n"


def test_a_groups_filter_goes_where_it_fits(files: Tracefs) -> None:
    """Only `open` has that field; the file of one that has not says so, as the kernel's does, and a note tells."""
    notes = files.write("events/kprobes/filter", "n == 7", append=False)
    wrong = "n == 7\n^\nparse_error: Couldn't find or set field in one of a subsystem's events\n\n"
    assert (files.read(f"{OPEN}/filter"), files.read("events/kprobes/close/filter")) == ("n == 7\n", wrong)
    assert [note.split(":")[1] for note in notes] == [" kprobes/close has no filter now"]
    assert files.write("events/kprobes/filter", "0", append=False) == []
    assert files.read("events/kprobes/close/filter") == "none\n"


def test_traceoff_ends_the_trace_before_the_record_it_is_for(
    machine: ProbedMachine, manager: Manager, files: Tracefs
) -> None:
    """As in Linux: without a condition the record is not made any more; traceon brings it back."""
    echo(files, "1 > events/enable")
    echo(files, f"'traceoff:1' > {OPEN}/trigger")
    echo(files, "'traceon' > events/kprobes/close/trigger")
    for place in (TEXT, TEXT, TEXT + 0x40, TEXT):
        machine.hit(place)
    assert recorded(manager) == ["close", "open"]
    assert files.read(f"{OPEN}/trigger") == "traceoff:count=0\n"


def test_a_conditional_traceoff_comes_after_its_record(
    machine: ProbedMachine, manager: Manager, files: Tracefs
) -> None:
    """The record has to be there for the condition."""
    echo(files, f"1 > {OPEN}/enable")
    echo(files, f"'traceoff if n == 0' > {OPEN}/trigger")
    machine.hit(TEXT)
    machine.hit(TEXT)
    assert (recorded(manager), files.read("tracing_on")) == (["open"], "0\n")


def test_one_event_switches_another(machine: ProbedMachine, manager: Manager, files: Tracefs) -> None:
    """enable_event keeps its target armed and silent until its hit; a star shows that."""
    echo(files, "'enable_event:kprobes:open' > events/kprobes/close/trigger")
    assert (files.read(f"{OPEN}/enable"), files.read("events/kprobes/close/enable")) == ("0*\n", "0*\n")
    machine.hit(TEXT)
    machine.hit(TEXT + 0x40)
    machine.hit(TEXT)
    assert (recorded(manager), files.read(f"{OPEN}/enable")) == (["open"], "1*\n")
    with pytest.raises(ProbeError, match="already"):
        echo(files, "'disable_event:kprobes:open' > events/kprobes/close/trigger")
    echo(files, "'!enable_event:kprobes:open' > events/kprobes/close/trigger")
    echo(files, f"0 > {OPEN}/enable")
    assert machine.text.armed == {}


def test_deleting_an_event_takes_triggers_on_it_along(machine: ProbedMachine, manager: Manager, files: Tracefs) -> None:
    """`kprobe del` asks nobody."""
    echo(files, "'enable_event:kprobes:open' > events/kprobes/close/trigger")
    manager.delete("open")
    assert files.read("events/kprobes/close/trigger").startswith("# Available triggers:")
    assert machine.text.armed == {}


def test_snapshots_and_histograms_count_hits_of_events_nobody_enabled(
    machine: ProbedMachine, manager: Manager, files: Tracefs
) -> None:
    """A trigger arms its event."""
    echo(files, f"'hist:keys=n:sort=n' > {OPEN}/trigger")
    for number in (3, 4, 3):
        machine.cpu.gpr[0] = number
        machine.hit(TEXT)
    assert [line for line in files.read(f"{OPEN}/hist").splitlines() if line.startswith("{")] == [
        "{ n:          3 } hitcount:          2",
        "{ n:          4 } hitcount:          1",
    ]
    echo(files, f"'hist:keys=n:sort=n:pause' >> {OPEN}/trigger")
    machine.hit(TEXT)
    assert "Hits: 3" in files.read(f"{OPEN}/hist")
    echo(files, f"'hist:keys=n:sort=n:clear' >> {OPEN}/trigger")
    assert "Hits: 0" in files.read(f"{OPEN}/hist")
    echo(files, f"1 > {OPEN}/enable")
    echo(files, f"'snapshot:1' > {OPEN}/trigger")
    machine.hit(TEXT)
    machine.hit(TEXT)
    assert (recorded(manager), "is freed" in files.read("snapshot")) == (["open", "open"], False)
    echo(files, "0 > snapshot")
    assert "is freed" in files.read("snapshot")


def test_histograms_can_be_paused_by_another_event(machine: ProbedMachine, files: Tracefs) -> None:
    """disable_hist and enable_hist."""
    echo(files, f"'hist:keys=n' > {OPEN}/trigger")
    echo(files, "'disable_hist:kprobes:open' > events/kprobes/close/trigger")
    machine.hit(TEXT)
    machine.hit(TEXT + 0x40)
    machine.hit(TEXT)
    assert "Hits: 1" in files.read(f"{OPEN}/hist")
    assert files.read(f"{OPEN}/trigger").endswith("[paused]\n")


def test_kprobe_events_takes_no_other_form(files: Tracefs) -> None:
    """perf probe's is for `kprobe add`; the kernel reads `pen` as a p with letters behind it."""
    with pytest.raises(ProbeError, match=r"a definition is p\|r"):
        echo(files, "open >> kprobe_events")
    with pytest.raises(ProbeError, match=r"a definition is p\|r"):
        echo(files, "'open %ax' >> kprobe_events")


def test_opening_the_trigger_file_anew_ends_its_histograms(files: Tracefs) -> None:
    """As in Linux: > takes them away and leaves the other triggers, >> keeps both; also where the line is refused."""
    echo(files, f"'hist:keys=n' > {OPEN}/trigger")
    echo(files, f"traceoff >> {OPEN}/trigger")
    assert len(files.read(f"{OPEN}/trigger").splitlines()) == 2
    with pytest.raises(ProbeError):
        echo(files, f"nonsense > {OPEN}/trigger")
    assert files.read(f"{OPEN}/trigger") == "traceoff:unlimited\n"


@pytest.mark.parametrize("trigger", ["traceoff", "enable_event:kprobes:close"])
def test_a_second_trigger_is_refused_after_its_filter_was_read(files: Tracefs, trigger: str) -> None:
    """A filter that is wrong is what the kernel tells of first; then that the trigger is there, and which."""
    echo(files, f"'{trigger}:3' > {OPEN}/trigger")
    with pytest.raises(ProbeError, match="Field not found"):
        echo(files, f"'{trigger} if nosuch == 1' > {OPEN}/trigger")
    with pytest.raises(ProbeError, match=f"already: {trigger}:count=3") as refused:
        echo(files, f"'{trigger} if n == 1' > {OPEN}/trigger")
    assert refused.value.errno == errno.EEXIST
    echo(files, f"'!{trigger}' > {OPEN}/trigger")
    assert files.read("events/kprobes/close/enable") == "0\n"


def test_a_stack_is_a_key_under_its_old_name_too(files: Tracefs) -> None:
    """One trigger, not two; it is shown by the name it has now, and is no value."""
    echo(files, f"'hist:keys=stacktrace' > {OPEN}/trigger")
    with pytest.raises(ProbeError, match="already exists"):
        echo(files, f"'hist:keys=common_stacktrace' >> {OPEN}/trigger")
    assert "keys=common_stacktrace:" in files.read(f"{OPEN}/trigger")
    with pytest.raises(ProbeError, match="Invalid field modifier"):
        echo(files, f"'hist:keys=n:vals=stacktrace' >> {OPEN}/trigger")


# --------------------------------------------------------------------------------------------- actions no kernel has


def test_stop_is_a_breakpoint_that_is_met_once(machine: ProbedMachine, manager: Manager, files: Tracefs) -> None:
    """The run ends before the instruction; going on executes it without a second hit."""
    echo(files, f"1 > {OPEN}/enable")
    echo(files, f"'stop if n == 7' > {OPEN}/trigger")
    assert isinstance(machine.hit(TEXT), Verdict)
    machine.cpu.gpr[0] = 7
    assert machine.hit(TEXT) == ProbeStop(TEXT)
    machine.uncount(1)  # the int3, as the machine does for every stop
    assert isinstance(machine.hit(TEXT), Verdict)
    assert (len(manager.trace), manager.status()[0].hits) == (2, 2)


def test_dump_writes_memory_down(machine: ProbedMachine, manager: Manager, files: Tracefs) -> None:
    """Behind its record, with what is printable; what cannot be read says so."""
    echo(files, f"1 > {OPEN}/enable")
    echo(files, f"'dump:@table,18' > {OPEN}/trigger")
    echo(files, f"'dump:0x990000,4:1' > {OPEN}/trigger")
    machine.hit(TEXT)
    assert [record.text().split(": ", 1)[1] for record in manager.trace.last()][1:] == [
        "<dump>\n => 990000: (fault)",
        "<dump>\n => 20000: 2f 65 74 63 2f 6d 6f 74 64 00 2e 2e 2e 2e 2e 2e  /etc/motd.......\n"
        f" => 20010: {'2e 2e':<47}  ..",
    ]
    echo(files, f"'!dump:@table,18' > {OPEN}/trigger")
    assert files.read(f"{OPEN}/trigger") == "dump:0x990000,4:count=0\n"


def test_set_changes_registers_and_memory(machine: ProbedMachine, files: Tracefs) -> None:
    """A register, a word behind a pointer, a symbol's first byte; where memory is missing nothing happens."""
    machine.cpu.gpr[3] = DATA + 0x40
    echo(files, f"'set:ax=$stack' > {OPEN}/trigger")
    echo(files, f"'set:+4(%bx):u16=0x1234 if n == 0' > {OPEN}/trigger")
    echo(files, f"'set:@table:u8=65' > {OPEN}/trigger")
    echo(files, f"'set:0x990000=1' > {OPEN}/trigger")
    machine.cpu.gpr[4] = 0x5550
    machine.hit(TEXT)
    assert machine.cpu.gpr[0] == 0x5550
    assert (machine.memory.read(DATA + 0x44, 2), machine.memory.read(DATA, 2)) == (b"\x34\x12", b"Ae")


def test_a_register_is_the_same_with_and_without_its_percent_sign(files: Tracefs) -> None:
    """A second trigger on it is refused, and `!` takes it away by either name."""
    echo(files, f"'set:%ax=5' > {OPEN}/trigger")
    with pytest.raises(ProbeError, match="already: set:%ax=5:unlimited"):
        echo(files, f"'set:ax=5:3' > {OPEN}/trigger")
    echo(files, f"'!set:ax=5' > {OPEN}/trigger")
    assert files.read(f"{OPEN}/trigger").startswith("# Available triggers")


def test_return_leaves_the_function_with_a_value(machine: ProbedMachine, manager: Manager, files: Tracefs) -> None:
    """An error of the caller's choice, without an instruction of the function."""
    word = machine.bits // 8
    machine.memory.write(DATA + 0x80, (0x10050).to_bytes(word, "little"))
    machine.cpu.gpr[4] = DATA + 0x80
    echo(files, f"'return:-ENOMEM:1' > {OPEN}/trigger")
    assert machine.hit(TEXT) is Verdict.HANDLED
    mask = (1 << machine.bits) - 1
    assert (machine.cpu.pc, machine.cpu.gpr[0], machine.cpu.gpr[4]) == (0x10050, -12 & mask, DATA + 0x80 + word)
    assert files.read(f"{OPEN}/trigger") == "return:-ENOMEM:count=0\n"


@pytest.mark.parametrize(
    "line",
    [
        *("", "nosuch", "traceon:x", "traceon if", "traceon 5", "traceon:-1", "traceon:1 fi n == 1"),
        *("enable_event:kprobes", "enable_event:kprobes:nosuch", "enable_hist:kprobes:close", "traceoff if n = 1"),
        *("stop:x", "traceon:08", "traceon:0x8000000000000000", "set:ax", "set:=1"),
        *("dump:%ax", "dump:%ax,0", "dump:%ax,99999", "dump:@nosuch,4", "dump:%nosuch,4", "dump:@table,08"),
        *("set:rax=1", "set:@table:u7=1", "set:ax=@table:string", "set:ax=%nosuch", "return", "return:", "return:%zz"),
        *("hist", "hist:keys=x", "hist:keys=n:foo=1", "hist:keys=n:onmatch(a.b).c(d)", "hist:keys=n+1"),
    ],
)
def test_a_bad_trigger_is_refused_and_nothing_is_armed(machine: ProbedMachine, files: Tracefs, line: str) -> None:
    """One line that says what would be right."""
    with pytest.raises(ProbeError) as refused:
        files.write(f"{OPEN}/trigger", line, append=False)
    assert refused.value.reason
    assert (machine.text.armed, files.read(f"{OPEN}/enable")) == ({}, "0\n")


@pytest.mark.parametrize(("name", "near"), [("-ENOSUCH", "ENOSPC"), ("-enoent", "ENOENT"), ("-EZZZ", "ENOENT")])
def test_return_names_the_errors_it_knows(files: Tracefs, name: str, near: str) -> None:
    """A name that is none is what the refusal says, with others that are."""
    with pytest.raises(ProbeError, match=f"no error is called {name[1:]}.*{near}"):
        echo(files, f"'return:{name}' > {OPEN}/trigger")


def test_return_is_for_a_functions_entry(manager: Manager, files: Tracefs) -> None:
    """Elsewhere the return address is not on top of the stack."""
    echo(files, "'p:inside open+1' >> kprobe_events")
    with pytest.raises(ProbeError, match="entry"):
        echo(files, "'return:1' > events/kprobes/inside/trigger")


# ------------------------------------------------------------------------------------------------------- other files


def test_the_trace_and_its_size(machine: ProbedMachine, manager: Manager, files: Tracefs) -> None:
    """`cat trace` has the kernel's header, writing empties it, and buffer_size_kb holds what was asked for."""
    echo(files, "1 > events/enable")
    machine.hit(TEXT)
    shown = files.read("trace").splitlines()
    assert (shown[0], shown[2]) == ("# tracer: nop", "# entries-in-buffer/entries-written: 1/1   #P:1")
    assert "open: (open+0x0/0x40) n=0" in shown[-1]
    echo(files, "> trace")
    assert len(manager.trace) == 0
    echo(files, "100 > buffer_size_kb")
    assert (files.read("buffer_size_kb"), manager.trace.size) == ("100\n", 102400)
    for size in ("0", "x", "99999999"):
        with pytest.raises(ProbeError):
            echo(files, f"{size} > buffer_size_kb")


@pytest.mark.parametrize("path", ["nosuch", "events/x/y", f"{OPEN}/nosuch", "/etc/passwd", "../../etc/passwd", ""])
def test_there_is_no_other_file(files: Tracefs, path: str) -> None:
    """Nothing of the host's, nothing unknown; and a pipe cannot be read inside a command."""
    with pytest.raises(ProbeError):
        files.read(path)
    with pytest.raises(ProbeError, match="trace stream on"):
        files.read("trace_pipe")
    with pytest.raises(ProbeError, match="cannot be written"):
        files.write("kprobe_profile", "1", append=False)


@pytest.mark.parametrize(
    ("path", "number", "text"),
    [
        ("events", errno.EISDIR, "events is a directory"),
        ("events/kprobes/open", errno.EISDIR, "is a directory"),
        ("/sys/kernel/tracing", errno.EISDIR, "is a directory"),
        ("uprobe_events/x", errno.ENOTDIR, "uprobe_events is a file, no directory"),
        (f"{OPEN}/filter/x", errno.ENOTDIR, "filter is a file, no directory"),
    ],
)
def test_what_cannot_be_written_says_why(files: Tracefs, path: str, number: int, text: str) -> None:
    """A directory, or something below a file."""
    with pytest.raises(ProbeError, match=text) as refused:
        echo(files, f"1 > {path}")
    assert refused.value.errno == number


def test_the_kernels_own_paths_lead_to_the_same(files: Tracefs) -> None:
    """What a person has in the fingers."""
    assert files.read("/sys/kernel/debug/tracing/tracing_on") == files.read("/sys/kernel/tracing/tracing_on") == "1\n"
    assert files.list("/sys/kernel/tracing/events") == ["enable", "kprobes"]


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("'p:x y' > kprobe_events", ("p:x y", "kprobe_events", False)),
        ("p:x y>>kprobe_events", ("p:x y", "kprobe_events", True)),
        ("> trace", ("", "trace", False)),
        ("-n 1 > tracing_on", ("1", "tracing_on", False)),
        ("-n > trace", ("", "trace", False)),
        ("-:open >> kprobe_events", ("-:open", "kprobe_events", True)),
        ("'a > b' >> 'f'", ("a > b", "f", True)),
        ("'comm == \"sh\"' > f", ('comm == "sh"', "f", False)),
    ],
)
def test_a_redirection_is_read_as_a_shell_reads_it(line: str, meant: tuple[str, str, bool]) -> None:
    """Quotes, > and >>."""
    assert redirection(line) == meant


@pytest.mark.parametrize("line", ["p:x y", "'p > f", "a >", "a > b c", ""])
def test_an_incomplete_redirection_is_refused(line: str) -> None:
    """With the form that is right."""
    with pytest.raises(ProbeError):
        redirection(line)
