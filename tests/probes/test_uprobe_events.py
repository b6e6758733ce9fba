"""Uprobes by definition: the kernel's lines in and out, functions by name, strings that are not in memory."""

from __future__ import annotations

import errno

import pytest

from emu.iface import ConsoleMatch
from emu.images.embedded import embedded_program
from probes import Manager, ProbeError
from tests.support.embedded import power_on
from tests.support.kernels import another, run_shell, run_until
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


def test_string_that_is_not_in_memory() -> None:
    """From the page cache where the file has it; else what is missing is said, and what can never come is a fault."""
    machine = another("amd64")
    manager = Manager(machine)
    bring(machine, manager.linux, {"/bin/absent": build("absent.c", "-nostdlib", "-static", "-fno-stack-protector")})
    manager.add("uprobe", "p:show /bin/absent:show text=+0(%di):string")
    run_shell(machine, "absent")
    assert [record.text().rpartition("text=")[2] for record in manager.trace.last()] == [
        '"in the file only"',
        '"(not present)"',
        "(fault)",
    ]
