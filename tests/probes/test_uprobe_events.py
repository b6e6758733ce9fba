"""Uprobes by definition: the kernel's lines in and out, functions by name, strings that are not in memory."""

from __future__ import annotations

import errno

import pytest

from emu.images.embedded import embedded_program
from emu.stops import ConsoleMatch
from probes import Manager, ProbeError, Regs, Uprobe
from probes.spec import parse
from tests.support.embedded import power_on
from tests.support.kernels import another, run_shell, run_until
from tests.support.modules import kernel_modules
from tests.support.programs import LIBC, bring, build, equipped


@pytest.mark.parametrize("bits", [64, 32])
def test_definition_lists_records_and_goes(bits: int) -> None:
    """On the embedded guest: entry and return events by offset, listed as uprobe_events does, limited by task name."""
    machine = power_on(bits, "user=3")
    manager = Manager(machine)
    offset, argument = embedded_program(bits).offset("user_cold"), "%di" if bits == 64 else "%ax"
    wide = f"{offset:0{bits // 4}x}"
    assert manager.add("uprobe", f"p:cold /bin/program:{offset:#x} n={argument}") == [
        f"p:uprobes/cold /bin/program:0x{wide} n={argument}"
    ]
    manager.add("uprobe", f"r:back /bin/program:{offset:#x} $retval")
    manager.add("uprobe", f"p:none /bin/program:{offset:#x}", {"comm": "somebody*"})
    with pytest.raises(ProbeError, match="exact same"):
        manager.add("uprobe", f"p:cold /bin/program:{offset:#x} n={argument}")
    assert isinstance(run_until(machine, "embedded: done", 100_000_000), ConsoleMatch)
    shown = [record.text().partition(": ")[2] for record in manager.trace.last()]
    address = f"0x{0x400000 + offset:x}"
    assert [line for line in shown if line.startswith("cold")] == [
        f"cold: ({address}) n={n}" for n in ("0x1", "0x2", "0x3")
    ]
    back = [line for line in shown if line.startswith("back")]
    assert all(
        line.endswith(f" <- {address}) arg1={value}") for line, value in zip(back, ("0x2", "0x3", "0x4"), strict=True)
    )
    assert [(one.name, one.kind, one.hits) for one in manager.status()] == [
        ("uprobes/cold", "uprobe", 3),
        ("uprobes/back", "uprobe", 3),
        ("uprobes/none", "uprobe", 0),
    ]
    line = f"{offset:0{bits // 4}x}  u  /bin/program:{offset:#x}    "
    assert manager.kernel_list() == [line] * 3
    assert not any(line.startswith("none") for line in shown)
    assert "    by shadow: 3 entries = 3 returned + 0 live + 0 missed" in manager.info("back")
    assert any(line.endswith(f"{address} in space 0x0") for line in manager.info("cold"))
    manager.delete("all")
    assert machine.breaks.client is None


def test_function_by_name_in_a_library_before_exec() -> None:
    """PATH:SYMBOL, with what a user may get wrong about it."""
    machine = equipped("amd64")
    manager = Manager(machine)
    assert manager.add("uprobe", f"p:text {LIBC}:puts text=+0(%di):string") == [
        f"p:uprobes/text {LIBC}:puts text=+0(%di):string"
    ]
    manager.add("uprobe", "p /bin/dynamic:work+0%return who=$comm magic=@+0:x32")
    with pytest.raises(ProbeError, match="no function wrok") as refused:
        manager.add("uprobe", "p:x /bin/dynamic:wrok")
    assert (refused.value.errno, refused.value.hint) == (errno.ENOENT, "did you mean work?")
    with pytest.raises(ProbeError, match="so none at"):
        manager.add("uprobe", "p:x /bin/dynamic:0x9999999")
    (_, note) = manager.add("uprobe", "p:later /not/there:main")
    assert note.startswith("note: waiting")
    run_shell(machine, "dynamic")
    shown = [record.text().partition(": ")[2] for record in manager.trace.last()]
    assert [line.partition(") ")[2] for line in shown if line.startswith("text")] == [
        'text="hello from a dynamic program"',
        'text="child"',
    ]
    back = [line for line in shown if 'who="dynamic"' in line]
    assert len(back) == 42
    assert back[0].endswith("magic=0x464c457f")  # the file's first bytes, as the program has them mapped


@pytest.mark.parametrize("kernel", ["amd64", "i386"])
def test_string_that_is_not_in_memory(kernel: str) -> None:
    """From the page cache where the file has it; else what is missing is said, and what can never come is a fault.

    Or the record waits: for the page, which is empty when it comes, or for the end of the program.
    """
    machine = another(kernel)
    manager = Manager(machine)
    wide = machine.guest.bits == 64
    options = ("-nostdlib", "-static", "-fno-stack-protector", *(() if wide else ("-m32", "-fno-pic", "-no-pie")))
    bring(machine, manager.linux, {"/bin/absent": build("absent.c", *options)})
    string = "+0(%di)" if wide else "+0(+4(%sp))"
    manager.add("uprobe", f"p:show /bin/absent:show text={string}:string")
    assert manager.add("uprobe", f"p:wait /bin/absent:show text={string}:ustring!") == [
        f"p:uprobes/wait /bin/absent:show text={string}:ustring!"
    ]
    before = machine.text.armed_bytes()
    run_shell(machine, "absent")
    records = {name: [one for one in manager.trace.last() if one.event == name] for name in ("show", "wait")}
    shown = {name: [one.text().rpartition("text=")[2] for one in records[name]] for name in records}
    assert shown["show"] == ['"in the file only"', '"(not present)"', "(fault)", '"(not present)"']
    assert shown["wait"] == ['"in the file only"', "(fault)", '""', '"(not present)"']
    assert [one.timestamp_ns for one in records["wait"]] == [records["show"][at].timestamp_ns for at in (0, 2, 1, 3)]
    assert machine.text.armed_bytes() == before


def test_string_on_a_disk_is_recorded_when_it_has_been_read() -> None:
    """At the moment of the hit nobody had it; a filter sees what came. A kernel's own probe can wait as well."""
    machine = equipped("amd64")
    manager = Manager(machine)
    files = {"/bin/late": build("late.c"), "/brd.ko": kernel_modules("amd64", ("brd",))["brd"]}
    bring(machine, manager.linux, files)
    run_shell(
        machine, "insmod /brd.ko rd_size=4096; mke2fs /dev/ram0 >/dev/null; mkdir /mnt; mount -t ext4 /dev/ram0 /mnt"
    )
    run_shell(machine, "echo from the disk >/mnt/text; sync; echo 3 >/proc/sys/vm/drop_caches")
    manager.add("uprobe", "p:wait /bin/late:show text=+0(%di):ustring!")
    manager.add("uprobe", "p:other /bin/late:show text=+0(%di):ustring!")
    other = manager.events.get("uprobes/other")
    assert other is not None
    other.set_filter('text ~ "*here*"')
    manager.add("kprobe", "p:open do_sys_openat2 file=+0($arg2):ustring!")
    assert run_shell(machine, "late /mnt/text; echo $?") == "0"
    shown = [(one.event, one.arguments[0][2]) for one in manager.trace.last()]
    assert [value for name, value in shown if name == "wait"] == ["from the disk\n"] * 2
    assert not any(name == "other" for name, _ in shown)
    assert ("open", "/mnt/text") in shown
    assert not {None, "(not present)"} & {value for _, value in shown}
    with pytest.raises(ProbeError, match="Unknown type"):  # Linux has no such type
        parse("p:x do_sys_openat2 file=+0($arg2):ustring!", manager.events.scope)


def test_record_that_waits_goes_with_its_event() -> None:
    """Deleted while its page is not there, the event leaves the record as it is, and no probe on the kernel."""
    machine = another("amd64")
    manager = Manager(machine)
    before = machine.text.armed_bytes()
    options = ("-nostdlib", "-static", "-fno-stack-protector")
    bring(machine, manager.linux, {"/bin/absent": build("absent.c", *options)})
    manager.add("uprobe", "p:wait /bin/absent:show text=+0(%di):ustring!")
    calls: list[int] = []

    def third(up: Uprobe, regs: Regs) -> None:
        calls.append(regs.di)
        if len(calls) == 3:
            manager.delete("wait")

    probe = Uprobe("/bin/absent", "show", third)
    manager.register(probe)
    run_shell(machine, "absent")
    manager.unregister(probe)
    shown = [one.text().rpartition("text=")[2] for one in manager.trace.last()]
    assert shown[0] == '"in the file only"'
    assert '"(not present)"' in shown
    assert machine.text.armed_bytes() == before
