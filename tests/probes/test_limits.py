"""What Linux would refuse to probe: taken with a note by default and hit, refused with its errno under its limits."""

from __future__ import annotations

import base64
import errno
import struct

import pytest

from emu.insn import spans
from probes import Kprobe, Manager
from probes.errors import ProbeError
from probes.limits import LinuxLimits
from tests.support.embedded import Guest, power_on
from tests.support.kernels import another, run_shell

pytestmark = pytest.mark.boots

EXERCISE = "/tmp/x; ls / | md5sum"

# By role: the symbol, and the errno of that kernel's own register_kprobe at its entry; None where it takes the probe.
_AMD64 = {
    "page-fault entry": ("asm_exc_page_fault", errno.EINVAL),
    "system-call entry": ("entry_SYSCALL_64", errno.EINVAL),
    "int 0x80 entry": ("asm_int80_emulation", errno.EINVAL),
    "sysenter entry": ("entry_SYSENTER_compat", errno.EINVAL),
    "int3 entry": ("asm_exc_int3", errno.EINVAL),
    "int3 handler": ("exc_int3", errno.EINVAL),
    "return to user mode": ("swapgs_restore_regs_and_return_to_usermode", errno.EINVAL),
    "iret path": ("native_irq_return_iret", errno.EINVAL),
    "memcpy": ("memcpy", errno.EINVAL),
    "context switch": ("__switch_to", None),
    "ordinary function": ("vfs_read", None),
}
ROLES = {
    "amd64": _AMD64,
    "6.12": _AMD64,
    "i386": {
        "page-fault entry": ("asm_exc_page_fault", errno.EINVAL),
        "int 0x80 entry": ("entry_INT80_32", errno.EINVAL),
        "sysenter entry": ("entry_SYSENTER_32", errno.EINVAL),
        "int3 entry": ("asm_exc_int3", errno.EINVAL),
        "int3 handler": ("exc_int3", errno.EINVAL),
        "iret path": ("handle_exception_return", errno.EINVAL),
        "memcpy": ("memcpy", None),
        "context switch": ("__switch_to", None),
        "ordinary function": ("vfs_read", None),
    },
}
# A program that asks for its pid by int 0x80 and by sysenter, then meets an int3.
_BEFORE = bytes.fromhex("b814000000 cd80 b814000000")  # mov eax,20; int 0x80; mov eax,20
_SYSENTER = bytes.fromhex("51 52 55 89e5 0f34")  # push ecx; push edx; push ebp; mov ebp,esp; sysenter
_HEADERS = 84
_BASE = 0x8048000


def trapping_program() -> bytes:
    """An i386 ELF file of one segment. The kernel returns from sysenter to the address that is pushed first."""
    returns_to = _BASE + _HEADERS + len(_BEFORE) + 5 + len(_SYSENTER)
    code = _BEFORE + b"\x68" + returns_to.to_bytes(4, "little") + _SYSENTER + b"\xcc"
    size = _HEADERS + len(code)
    identity = b"\x7fELF\1\1\1".ljust(16, b"\0")
    header = struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, _BASE + _HEADERS, 52, 0, 0, 52, 32, 1, 40, 0, 0)
    segment = struct.pack("<8I", 1, 0, _BASE, _BASE, size, size, 5, 0x1000)
    return identity + header + segment + code


TYPE_PROGRAM = f"echo {base64.b64encode(trapping_program()).decode()} | base64 -d > /tmp/x; chmod +x /tmp/x"
NEVER_RUN = ("do_int3", "kprobe_int3_handler", "poke_int3_handler", "get_kprobe")  # what int3's own path calls


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
    for machine in (bare, probed):
        run_shell(machine, TYPE_PROGRAM)
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
    table = {**dict(ROLES[name].values()), **dict.fromkeys(NEVER_RUN, errno.EINVAL)}
    for symbol, number in table.items():
        probe = Kprobe(symbol=symbol)
        if number is None:
            manager.register(probe)
            assert probe.notes == ()
        else:
            assert refused(manager, probe) == number, symbol


@pytest.mark.parametrize("name", ROLES)
def test_linux_limits_refuse_events_where_ftrace_does_not_trace(name: str) -> None:
    """Shown: the kernel has freed its list, and its functions are told apart all the same."""
    manager = Manager(another(name), linux_limits=True)
    for symbol in ("vfs_read", "vfs_open", "do_sys_openat2"):
        assert len(manager.add("kprobe", f"p {symbol}")) == 1
    with pytest.raises(ProbeError, match="notrace") as caught:
        manager.add("kprobe", "p __switch_to")
    assert caught.value.errno == errno.EINVAL


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


@pytest.mark.parametrize(
    ("symbol", "why"),
    [
        ("jiffies", "jiffies is data (symbol kind D), not code"),
        ("kernel_init_freeable", "the kernel has freed this code at the end of its boot (.init.text)"),
    ],
)
def test_what_is_no_code_now_is_refused(symbol: str, why: str) -> None:
    """An int3 there would be read as data: the guest that has such probes computes something else."""
    manager = Manager(another("amd64"))
    with pytest.raises(ProbeError) as caught:
        manager.register(Kprobe(symbol=symbol))
    assert (caught.value.errno, caught.value.reason) == (errno.EINVAL, why)
    with pytest.raises(ProbeError, match=r"data|freed"):
        manager.add("kprobe", f"r:e {symbol}")
