"""Pages of probed code: they come, go and are copied while their mapping stays, and processes share them."""

from __future__ import annotations

import pytest

from probes import Manager, Uprobe
from probes.planting import UserArm
from probes.programsymbols import functions
from tests.support.kernels import another, run_shell
from tests.support.programs import bring, build

OPTIONS = ("-nostdlib", "-static", "-fno-stack-protector", "-fno-pic", "-no-pie")
CODE_SIZE = 16
CASES = [("amd64", 64, "hook"), ("6.12", 64, "hook"), ("amd64", 32, "int3"), ("i386", 32, "int3")]


@pytest.mark.parametrize(("kernel", "bits", "arm"), CASES)
def test_probe_outlives_the_pages_of_its_code(kernel: str, bits: int, arm: UserArm) -> None:
    """madvise(MADV_DONTNEED), a file that is truncated and written again, other code mapped over it; a string
    instruction that faults on its way is one hit; and a process that has copied the page runs on without the probe."""
    machine = another(kernel)
    manager = Manager(machine)
    program = build("pages.c", *OPTIONS, f"-m{bits}")
    target = functions(lambda offset, size: program[offset : offset + size])["target"]
    bring(machine, manager.linux, {"/tmp/pages": program})
    write = f"dd if=/tmp/pages of=/tmp/code bs=1 skip={target} count={CODE_SIZE} 2>/dev/null"
    run_shell(machine, f"{write}; mkfifo /tmp/lines; dmesg -n 1")
    own, code = Uprobe("/tmp/pages", "target", arm=arm), Uprobe("/tmp/code", 0, arm=arm)
    moves = Uprobe("/tmp/pages", "moves", ret_handler=lambda call, regs: None, arm=arm)
    for probe in (own, code, moves):
        manager.register(probe)
    run_shell(machine, "/tmp/pages /tmp/code </tmp/lines >/tmp/told & exec 3>/tmp/lines; sleep 0.1")
    assert (own.hits, code.hits) == (2, 1)
    run_shell(machine, f"{write}; echo >&3; sleep 0.1")  # by int3 there is no writing
    assert (own.hits, code.hits, moves.hits) == (2, 2, 2)
    assert len(manager.uprobes.addresses(code)) == 0
    assert len(manager.uprobes.addresses(own)) == 1
    manager.unregister(own)
    assert run_shell(machine, "cat /tmp/told; echo >&3; wait $!; echo $?").splitlines()[:3] == [
        "truncate",
        "copied",
        "0",
    ]


def test_return_is_not_lost_to_a_process_that_shares_the_page() -> None:
    """Of two with one program at the same addresses one is followed. While it waits in the function, the other passes
    the address that it will return to, time and again: what the engine has translated for that one serves both."""
    machine = another("amd64")
    manager = Manager(machine)
    bring(machine, manager.linux, {"/bin/waits": build("waits.c", *OPTIONS)})
    run_shell(machine, "mkfifo /tmp/bytes; waits </tmp/bytes & exec 3>/tmp/bytes; sleep 0.1")
    followed = int(run_shell(machine, "pidof waits"))
    returned: list[int] = []
    probe = Uprobe(
        "/bin/waits",
        "waits",
        ret_handler=lambda call, regs: returned.append(regs.retval),
        filter=lambda up, regs: manager.linux.current().pid.value_() == followed,
    )
    manager.register(probe)
    for _ in range(3):
        run_shell(machine, "waits </dev/null; echo -n x >&3; sleep 0.1")
    assert returned == [2, 3]
    assert str(probe.ends) == "2 entries = 2 returned + 0 live + 0 missed"
