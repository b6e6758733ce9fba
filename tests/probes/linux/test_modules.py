"""Modules of stock kernels, as the guest loads and unloads them: symbols, lsmod, probes that wait and that are GONE."""

from __future__ import annotations

import functools
import re

import pytest

from emu.boot import GuestMachine, restore
from emu.snapshot import Snapshot
from probes import ProbeError
from probes.linux import report
from probes.manager import Manager
from tests.support.kernels import another, run_shell
from tests.support.modules import MODULE, bring_module

ADD = "ip link add dummy9 type dummy"


@functools.cache
def with_module(kernel: str) -> Snapshot:
    """The prompt, with the module's file in the guest."""
    machine = another(kernel)
    bring_module(machine, kernel)
    return machine.snapshot()


@pytest.fixture
def machine(kernel: str) -> GuestMachine:
    return restore(with_module(kernel))


def test_symbols_come_and_go_with_the_module(machine: GuestMachine) -> None:
    """Found by name, by the module's and its own name, and by address, while the guest has the module and no longer."""
    probes = Manager(machine)
    assert machine.symbols.lookup("dummy_setup") == []
    run_shell(machine, f"insmod {MODULE}")
    (found,) = machine.symbols.lookup("dummy:dummy_setup")
    assert machine.symbols.lookup("dummy_setup") == [found]
    assert machine.symbols.find(found.address + 1) == (found, 1)
    start = int(run_shell(machine, "cat /proc/modules").split()[5], 16)
    (module,) = probes.linux.modules()
    assert (module.name, module.contains(found.address), module.contains(start)) == ("dummy", True, True)
    listed = run_shell(machine, "lsmod").split("\n")[1:]
    assert [line.split() for line in report.modules(probes.linux)[1:]] == [line.split() for line in listed]
    run_shell(machine, "rmmod dummy")
    assert machine.symbols.lookup("dummy:dummy_setup") == []
    assert (probes.linux.modules(), machine.symbols.modules) == ([], [])


def test_probe_waits_for_its_module_and_sees_its_first_instruction(machine: GuestMachine) -> None:
    """Defined before the module is there, as on Linux; its initialisation is hit too, and then is GONE."""
    probes = Manager(machine)
    probes.add("kprobe", "p:init dummy:init_module")
    probes.add("kprobe", "p:dev dummy:dummy_dev_init")
    probes.add("kretprobe", "r:back dummy:dummy_dev_init $retval")
    assert "waits for its module" in probes.info("dev")[2]
    run_shell(machine, f"insmod {MODULE}; {ADD}")
    texts = [record.text() for record in probes.trace.last()]
    assert [record.event for record in probes.trace.last()] == ["init", "dev", "back", "dev", "back"]
    assert re.search(r"\(dummy_dev_init\+0x[04]/0x", texts[1])  # behind its ENDBR, where it has one
    assert " [dummy])" in texts[1]
    assert "<- dummy_dev_init" in texts[2]
    assert "[GONE]" in probes.info("init")[2]
    assert "int3" in probes.info("dev")[2]


def test_probe_is_gone_with_its_module_and_back_with_it(machine: GuestMachine) -> None:
    """The guest may put something else there meanwhile; hits go on being counted."""
    probes = Manager(machine)
    probes.add("kprobe", "p:dev dummy:dummy_dev_init")
    run_shell(machine, f"insmod {MODULE}; {ADD}; rmmod dummy")
    assert "[GONE]" in probes.info("dev")[2]
    assert probes.status()[0].hits == 2
    run_shell(machine, f"insmod {MODULE}; {ADD}")
    assert "int3" in probes.info("dev")[2]
    assert probes.status()[0].hits == 4
    assert probes.delete("dev") == ["kprobes/dev"]
    assert run_shell(machine, "rmmod dummy; echo fine") == "fine"


def test_probe_of_a_loaded_module_that_has_no_such_function_is_refused(machine: GuestMachine) -> None:
    """Only a module that is not there can be waited for."""
    probes = Manager(machine)
    run_shell(machine, f"insmod {MODULE}")
    with pytest.raises(ProbeError, match="no symbol dummy:dummy_nonsense"):
        probes.add("kprobe", "p:x dummy:dummy_nonsense")
    probes.add("kprobe", "p:y other:anything")
    assert probes.delete("y") == ["kprobes/y"]


@pytest.mark.parametrize("kernel", ["amd64"], indirect=True)
def test_modules_are_those_of_the_moment(machine: GuestMachine, kernel: str) -> None:
    """A machine restored with the module loaded knows it; gone back to before, its probes wait."""
    probes = Manager(machine)
    probes.add("kprobe", "p:dev dummy:dummy_dev_init")
    before = machine.snapshot()
    run_shell(machine, f"insmod {MODULE}")
    loaded = machine.snapshot()
    machine.restore(before)
    assert machine.symbols.modules == []
    assert "waits" in probes.info("dev")[2]
    machine.restore(loaded)
    assert "int3" in probes.info("dev")[2]
    run_shell(machine, ADD)
    assert probes.status()[0].hits == 2
    fresh = restore(loaded)
    Manager(fresh)
    assert fresh.symbols.modules == ["dummy"]


@pytest.mark.parametrize("kernel", ["i386"], indirect=True)
def test_watching_modules_changes_nothing(machine: GuestMachine, kernel: str) -> None:
    """As many instructions and the same memory as without anybody looking."""
    bare = restore(with_module(kernel))
    probes = Manager(machine)
    probes.add("kprobe", "p:dev dummy:dummy_dev_init")
    work = f"insmod {MODULE}; {ADD}; rmmod dummy"
    assert run_shell(machine, work) == run_shell(bare, work)
    assert machine.instructions == bare.instructions
    assert machine.ram_sha256() == bare.ram_sha256()
