"""Return events: a definition, its lines of trace, and the account of its entries."""

from __future__ import annotations

import errno
import json

import pytest

from gdbstub.monitor import Monitor
from gdbstub.monitorservices import Services
from probes import Manager, ProbeError
from tests.probes.returns import WAYS, Returns, Way

pytestmark = pytest.mark.parametrize("way", WAYS, ids=str)


def add(run: Returns, definition: str, **options: str | bool | int) -> list[str]:
    return run.manager.add("kretprobe", definition, {"shadow" if run.way.shadow else "trampoline": True, **options})


def place(run: Returns, address: int) -> str:
    """As %pS shows it."""
    found = run.machine.symbols.find(address)
    assert found is not None
    return f"{found[0].name}+{found[1]:#x}/{found[0].size:#x}"


def test_line_names_where_it_returned_to_and_the_function(way: Way) -> None:
    """`EV: (RETSYM+0xO/0xS <- FUNC)`; the embedded guest's task has a name."""
    run = Returns(way, "calls=2")
    run.probe("recursed_target", lambda ri, regs: returns.append(place(run, ri.ret_addr)))
    returns: list[str] = []
    add(run, "r:third recursed_target value=$retval:u32")
    run.run()
    lines = [record.text() for record in run.manager.trace.last()]
    assert [line.partition(": ")[2] for line in lines] == [
        f"third: ({returns[0]} <- recursed_target) value=0",
        f"third: ({returns[1]} <- recursed_target) value=0",
    ]
    assert all(line.startswith("            init-1       [000] ") for line in lines)


def test_ip_is_the_return_address_and_sp_the_callers(way: Way) -> None:
    """Not the trampoline's, nor a breakpoint's; in JSON too."""
    run, seen = Returns(way, "calls=1"), []
    run.probe("recursed_target", lambda ri, regs: seen.append((ri.ret_addr, regs.sp)))
    add(run, "r recursed_target ip=%ip sp=$stack")
    run.run()
    (record,) = run.manager.trace.last()
    fields = json.loads(record.json())
    assert [(fields["args"]["ip"], fields["args"]["sp"])] == seen
    assert fields["ip"] == seen[0][0]


def test_arguments_of_the_entry_are_shown_at_the_return(way: Way) -> None:
    """[S] kretprobe_entry_arg: the return event shows what the entry event shows, each call its own."""
    run = Returns(way, "calls=1")
    run.manager.add("kprobe", "p:entry fib n=$arg1:u32")
    add(run, "r20:exit fib n=$arg1:u32")
    run.run()
    seen: dict[str, list[object]] = {"entry": [], "exit": []}
    for record in run.manager.trace.last():
        seen[record.event].append(record.arguments[0][2])
    assert seen["entry"][:3] == [6, 5, 4]
    assert sorted(map(str, seen["exit"])) == sorted(map(str, seen["entry"]))
    assert seen["exit"] != seen["entry"]  # the innermost returns first


def test_suffix_lists_as_the_letter(way: Way) -> None:
    """`p f%return` is `r f`; the default of maxactive is shown, as the kernel shows it once it is armed."""
    assert add(Returns(way, ""), "p:e target%return") == add(Returns(way, ""), "r:e target") == ["r10:kprobes/e target"]


@pytest.mark.parametrize(("definition", "options"), [("r3:e fib", {}), ("r:e fib", {"maxactive": "3"})])
def test_maxactive_from_the_line_or_the_option(way: Way, definition: str, options: dict[str, str]) -> None:
    """fib(6) goes six deep: hits and misses add up to the guest's own count."""
    run = Returns(way, "calls=1")
    assert add(run, definition, **options) == ["r3:kprobes/e fib"]
    run.run()
    (status,) = run.manager.status()
    assert status.hits + status.missed == run.guest.counters["fib"]
    assert (status.kind, status.missed > 0) == ("kretprobe", True)


def test_info_accounts_for_every_entry(way: Way) -> None:
    """Skipped frames are named, as soon as the task is seen to have left them, and how returns are caught."""
    run = Returns(way, "calls=2")
    add(run, "r:e skipped_target")
    run.run()
    how = "shadow" if way.shadow else "trampoline"
    line = f"    by {how}: 6 entries = 0 returned + 3 live + 0 missed + 3 skipped"
    assert line in run.manager.info("e")


def test_trampoline_is_the_default_here(way: Way) -> None:
    """Only a Linux guest's events leave the stack alone where nobody says."""
    run = Returns(way, "")
    run.manager.add("kretprobe", "r:e target")
    assert "    by trampoline: 0 entries = 0 returned + 0 live + 0 missed" in run.manager.info("e")


def test_disabled_event_has_no_entries(way: Way) -> None:
    """Enabled half-way it has the rest."""
    run = Returns(way, "calls=2")
    add(run, "r:e recursed_target", disabled=True)
    run.breakpoint(run.guest.address("exercise"))
    run.manager.enable("e")
    run.run()
    assert run.manager.status()[0].hits == 2


def test_a_return_after_its_event_was_disabled_is_no_record(way: Way) -> None:
    """The call that was under way is accounted for; as with Linux, the trace has nothing of it."""
    run = Returns(way, "sleep=2")
    add(run, "r:e sleeping_target")
    run.run_until(lambda: "+ 2 live" in run.manager.info("e")[-1])
    run.manager.disable("e")
    run.run()
    assert "2 entries = 2 returned + 0 live" in run.manager.info("e")[-1]
    assert len(run.manager.trace) == 0


def test_event_of_another_type_is_refused(way: Way) -> None:
    """One name is either of hits or of returns; the kernel's text, the caret at the start."""
    run = Returns(way, "")
    add(run, "r:e target")
    with pytest.raises(ProbeError) as refusal:
        run.manager.add("kprobe", "p:e target2")
    assert refusal.value.lines()[0] == "Probe type is different from existing probe (EEXIST)"
    assert (refusal.value.errno, refusal.value.column) == (errno.EEXIST, 0)


def test_what_maxactive_0_became_is_said(way: Way) -> None:
    """As in register_kretprobe(), where 0 is the default; the event's info keeps saying it."""
    run = Returns(way, "")
    (listing, *notes) = run.manager.add("kretprobe", "r:e target", {"maxactive": "0"})
    assert listing == "r10:kprobes/e target"
    said = "note: --maxactive 0 leaves it to the definition or the kernel: it is 10"
    assert said in notes
    assert f"    {said}" in run.manager.info("e")
    assert not any("maxactive" in line for line in run.manager.add("kretprobe", "r:f target", {"maxactive": "3"}))


def test_monitor_verb(way: Way) -> None:
    """`kretprobe add [OPTIONS] r..`, list, info and del, as a person types them."""
    run = Returns(way, "calls=1")
    monitor = Monitor(Services(run.machine, probes=run.manager))
    how = "shadow" if way.shadow else "trampoline"
    assert monitor.execute(f"kretprobe add --{how} --maxactive 7 r:e fib n=$retval").lines == (
        "r7:kprobes/e fib n=$retval",
    )
    run.run()
    assert (
        monitor.execute("kretprobe info e").lines[-1] == f"    by {how}: 25 entries = 25 returned + 0 live + 0 missed"
    )
    assert monitor.execute("kretprobe del e").lines == ("kprobes/e",)
    assert monitor.execute("kretprobe list").lines == ()
    assert monitor.execute("kretprobe add p fib").refused


def test_lines_of_both_kinds_go_through_one_door(way: Way) -> None:
    """As kprobe_events takes them: what the command line's --probe hands over."""
    manager: Manager = Returns(way, "").manager
    manager.add("kprobe", "p:a target")
    manager.add("kprobe", "r:b target")
    assert [status.kind for status in manager.status()] == ["kprobe", "kretprobe"]


@pytest.mark.parametrize(("options", "whose"), [({"pid": "1", "comm": "in*"}, True), ({"comm": "sh"}, False)])
def test_calls_of_other_tasks_are_declined(way: Way, options: dict[str, str], whose: bool) -> None:
    """By --pid and --comm: they are neither hits nor records."""
    run = Returns(way, "calls=1")
    (listing,) = add(run, "r:e recursed_target", **options)
    assert listing == "r10:kprobes/e recursed_target"
    run.run()
    (status,) = run.manager.status()
    assert status.hits == len(run.manager.trace.last())
    assert bool(status.hits) is whose
    assert ("declined" in run.manager.info("e")[-1]) is not whose
