"""What Linux would refuse to probe: taken with a note by default and hit, refused with its errno under its limits."""

from __future__ import annotations

import errno

import pytest

from emu.insn import spans
from probes import Kprobe, Manager
from probes.errors import ProbeError
from probes.limits import LinuxLimits
from tests.support.embedded import Guest, power_on
from tests.support.kernels import another, run_shell

pytestmark = pytest.mark.boots

EXERCISE = "ls / | md5sum"

# By role: the symbol, and the errno of that kernel's own register_kprobe at its entry; None where it takes the probe.
ROLES = {
    "amd64": {
        "page-fault entry": ("asm_exc_page_fault", errno.EINVAL),
        "system-call entry": ("entry_SYSCALL_64", errno.EINVAL),
        "return to user mode": ("swapgs_restore_regs_and_return_to_usermode", errno.EINVAL),
        "iret path": ("native_irq_return_iret", errno.EINVAL),
        "memcpy": ("memcpy", errno.EINVAL),
        "context switch": ("__switch_to", None),
        "ordinary function": ("vfs_read", None),
    },
    "i386": {
        "page-fault entry": ("asm_exc_page_fault", errno.EINVAL),
        "system-call entry": ("entry_INT80_32", errno.EINVAL),
        "iret path": ("handle_exception_return", errno.EINVAL),
        "memcpy": ("memcpy", None),
        "context switch": ("__switch_to", None),
        "ordinary function": ("vfs_read", None),
    },
}
NEVER_RUN = {  # the rest of the blacklist: int3's own path, and what it calls
    "amd64": ("asm_exc_int3", "exc_int3", "do_int3", "kprobe_int3_handler", "poke_int3_handler", "get_kprobe"),
    "i386": ("asm_exc_int3", "exc_int3", "do_int3", "kprobe_int3_handler", "poke_int3_handler", "get_kprobe"),
}


def refused(manager: Manager, probe: Kprobe) -> int:
    """The errno of a registration that must fail."""
    with pytest.raises(ProbeError) as caught:
        manager.register(probe)
    return caught.value.errno


@pytest.mark.parametrize("name", ROLES)
def test_places_that_linux_refuses_are_probed_with_a_note(name: str) -> None:
    """Shown: each role's probe is hit while the guest works, the guest is right and on time, and the note says which
    errno Linux would have given."""
    bare, probed = another(name), another(name)
    manager = Manager(probed)
    probes = {role: Kprobe(symbol=symbol) for role, (symbol, _) in ROLES[name].items()}
    manager.register_many(probes.values())
    assert run_shell(probed, EXERCISE) == run_shell(bare, EXERCISE)
    assert probed.instructions == bare.instructions
    for role, (_, number) in ROLES[name].items():
        note = "".join(probes[role].notes)
        assert note.startswith(f"Linux would refuse: {errno.errorcode[number]}" if number else ""), role
        assert bool(note) == bool(number), role
    assert {role for role, probe in probes.items() if not probe.hits} == set()


@pytest.mark.parametrize("name", ROLES)
def test_linux_limits_refuse_what_the_guest_s_kernel_would(name: str) -> None:
    """Shown: the same table with the option; what Linux takes is taken."""
    manager = Manager(another(name), linux_limits=True)
    table = {**dict(ROLES[name].values()), **dict.fromkeys(NEVER_RUN[name], 22)}
    for symbol, number in table.items():
        probe = Kprobe(symbol=symbol)
        if number is None:
            manager.register(probe)
            assert probe.notes == ()
        else:
            assert refused(manager, probe) == number, symbol


def test_refusals_come_in_the_kernel_s_order() -> None:
    """Shown: an unknown symbol before the blacklist, the blacklist before the boundary, that before the instruction."""
    manager = Manager(another("amd64"), linux_limits=True)
    assert refused(manager, Kprobe(symbol="nowhere_at_all")) == errno.ENOENT
    assert refused(manager, Kprobe(symbol="asm_exc_int3", offset=1)) == errno.EINVAL
    assert refused(manager, Kprobe(symbol="vfs_read", offset=1)) == errno.EILSEQ
    assert refused(manager, Kprobe(symbol="start_kernel")) == errno.EINVAL
    assert refused(manager, Kprobe(symbol="init_task")) == errno.EINVAL


def test_a_static_key_s_branch_is_refused_and_its_neighbours_are_not() -> None:
    """Shown: the branch found in the kernel's table has its own two or five bytes, not one more."""
    machine = another("amd64")
    limits = LinuxLimits(machine)
    start = machine.symbols.lookup("normalize_rt_tasks")[0].address
    at = start + machine.memory.read(start, 512).index(bytes.fromhex("669066906690"))
    reasons = [limits.refusal(at + offset, init_freed=True) for offset in (-1, 0, 2, 4, 6)]
    assert [reason is not None for reason in reasons] == [False, True, True, True, False]


@pytest.mark.parametrize("bits", [32, 64])
def test_a_probe_on_the_guest_s_own_int3_is_hit_and_the_guest_gets_its_trap(bits: int) -> None:
    """Shown: in the embedded guest, which has no blacklist, the instruction alone is refused; without the option it is
    probed with a note, and so is the entry that its trap goes through: each hit once a round, as bare."""
    rounds, budget = 4, 300_000
    bare, probed = (power_on(bits, f"traps={rounds}") for _ in range(2))
    guest = Guest(probed, bits)
    start = guest.address("do_traps")
    probed.insert_breakpoint(start)
    probed.run(budget)
    probed.remove_breakpoint(start)
    code = probed.memory.read(start, 64)
    own = start + next(at for at, _ in spans(code, bits) if code[at] == 0xCC)
    assert refused(Manager(probed, linux_limits=True), Kprobe(addr=own)) == errno.EILSEQ
    manager = Manager(probed)
    trap, entry = Kprobe(addr=own), Kprobe(symbol="int3")
    manager.register_many([trap, entry])
    assert trap.notes[0].startswith("Linux would refuse: EILSEQ")
    bare.run(budget)
    probed.run(budget - probed.instructions)
    assert (trap.hits, entry.hits) == (rounds, rounds)
    assert guest.counters == Guest(bare, bits).counters
    assert probed.ram_sha256() == bare.ram_sha256()
