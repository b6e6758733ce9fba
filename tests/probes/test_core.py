"""Kprobes: registration, handlers and their order, faults and reentrancy, on a machine without an engine."""

import errno
from typing import Any

import pytest

from emu.iface import BackEnd, Verdict
from probes import Kprobe, Manager, ProbeError, Regs
from tests.support.fake_cpu import ProbedMachine
from tests.support.fake_machine import FakeSymbol

TEXT = 0x10000
# f3 0f 1e fa endbr64; 0f 1f 44 00 00 nopl; 55 push rbp; 48 89 e5 mov rbp,rsp; c3 ret
FUNCTION = bytes.fromhex("f30f1efa0f1f4400005548 89e5c3")
PUSH, MOV, RET = TEXT + 9, TEXT + 10, TEXT + 13
TF = 0x100


@pytest.fixture
def machine() -> ProbedMachine:
    made = ProbedMachine(FakeSymbol("target", TEXT, len(FUNCTION)), FakeSymbol("other", TEXT + 0x100, 1))
    made.memory.map(TEXT, FUNCTION.ljust(0x100, b"\x90") + b"\xc3")
    return made


@pytest.fixture
def manager(machine: ProbedMachine) -> Manager:
    return Manager(machine)


@pytest.mark.parametrize("place", [{}, {"symbol": "target", "addr": TEXT}], ids=["neither", "both"])
def test_a_probe_has_one_place_when_it_is_made(manager: Manager, place: dict[str, Any]) -> None:
    """Where the mistake is made it is said; one made later on, at the registration."""
    with pytest.raises(ProbeError, match="a symbol or an address") as refusal:
        Kprobe(**place)
    assert refusal.value.errno == errno.EINVAL
    probe = Kprobe(symbol="target")
    probe.symbol, probe.addr = place.get("symbol"), place.get("addr")
    assert refused(manager, probe) == errno.EINVAL


def refused(manager: Manager, probe: Kprobe) -> int:
    with pytest.raises(ProbeError) as refusal:
        manager.register(probe)
    return refusal.value.errno


@pytest.mark.parametrize(
    ("probe", "number"),
    [
        (Kprobe(symbol="nothing"), errno.ENOENT),
        (Kprobe(symbol="target", offset=0x50), errno.ENOENT),
        (Kprobe(symbol="target", offset=5), errno.EILSEQ),
        (Kprobe(symbol="target", offset=MOV + 1 - TEXT), errno.EILSEQ),
        (Kprobe(addr=0x999000, arm="int3"), errno.EFAULT),
    ],
    ids=["unknown", "outside", "in-nop", "in-mov", "unmapped"],
)
def test_a_probe_is_refused_with_the_kernels_errno(manager: Manager, probe: Kprobe, number: int) -> None:
    """register_kprobe()'s refusals, and the one for an int3 where no page is."""
    assert refused(manager, probe) == number


def test_the_same_probe_twice_is_refused(manager: Manager) -> None:
    """A registered struct kprobe cannot be registered again until it is unregistered."""
    probe = Kprobe(symbol="target")
    manager.register(probe)
    assert refused(manager, probe) == errno.EINVAL
    manager.unregister(probe)
    manager.register(probe)


def test_the_last_unregistration_disarms(machine: ProbedMachine, manager: Manager) -> None:
    """Two probes share one armed byte; it goes with the second."""
    first, second = Kprobe(symbol="target"), Kprobe(addr=TEXT)
    manager.register_many([first, second])
    manager.unregister(first)
    assert machine.text.armed == {TEXT: BackEnd.INT3}
    manager.unregister(second)
    assert machine.text.armed == {}


def test_a_batch_is_all_or_nothing(machine: ProbedMachine, manager: Manager) -> None:
    """register_kprobes() undoes the first when the second is refused."""
    with pytest.raises(ProbeError):
        manager.register_many([Kprobe(symbol="target"), Kprobe(symbol="nothing")])
    assert machine.text.armed == {}


def test_an_address_without_a_page_waits_behind_a_hook(machine: ProbedMachine, manager: Manager) -> None:
    """`auto` takes a PC hook where int3 has no byte to stand on."""
    manager.register(Kprobe(addr=0x999000))
    assert machine.text.armed == {0x999000: BackEnd.HOOK}


def test_probes_move_to_int3_when_the_guest_has_settled(machine: ProbedMachine) -> None:
    """While the kernel patches itself probes stand on hooks; afterwards on int3, except where asked otherwise."""
    manager = Manager(machine, settled=False)
    manager.register_many([Kprobe(symbol="target"), Kprobe(addr=PUSH, arm="hook")])
    assert set(machine.text.armed.values()) == {BackEnd.HOOK}
    manager.settled = True
    assert machine.text.armed == {TEXT: BackEnd.INT3, PUSH: BackEnd.HOOK}


def test_a_disabled_probe_leaves_no_trace(machine: ProbedMachine, manager: Manager) -> None:
    """Disabled at registration: not armed; enabled: armed; disabled again: the byte is back."""
    probe = Kprobe(symbol="target", disabled=True)
    manager.register(probe)
    assert machine.text.armed == {}
    manager.enable(probe)
    assert machine.text.armed == {TEXT: BackEnd.INT3}
    manager.disable(probe)
    assert machine.text.armed == {}


def test_handlers_run_newest_first_and_see_the_breakpoints_frame(machine: ProbedMachine, manager: Manager) -> None:
    """In an aggregate the last registered comes first; ip points behind the int3 and arguments are in place."""
    seen: list[tuple[str, int, int]] = []
    for name in ("old", "new"):
        manager.register(
            Kprobe(symbol="target", pre_handler=lambda p, regs, n=name: seen.append((n, regs.ip, regs.arg(1))))
        )
    machine.cpu.gpr[7] = 42
    machine.hit(TEXT)
    assert seen == [("new", TEXT + 1, 42), ("old", TEXT + 1, 42)]


def test_a_pre_handler_that_returns_true_goes_where_it_says(machine: ProbedMachine, manager: Manager) -> None:
    """Neither the instruction nor the other handlers run, nor is the instruction counted."""
    other = Kprobe(symbol="target", post_handler=lambda p, regs: pytest.fail("post ran"))

    def divert(probe: Kprobe, regs: Regs) -> bool:
        regs.ip = RET
        regs.retval = 7
        return True

    manager.register_many([other, Kprobe(symbol="target", pre_handler=divert)])
    before = machine.clock.instructions
    assert machine.hit(TEXT) is Verdict.HANDLED
    assert (machine.cpu.pc, machine.cpu.gpr[0], machine.clock.instructions) == (RET, 7, before)
    assert (other.hits, other.nmissed) == (0, 1)


def test_an_instruction_without_observers_is_boosted(machine: ProbedMachine, manager: Manager) -> None:
    """push rbp runs as a copy followed by a jump back; int3 and jump are taken off the clock before."""
    manager.register(Kprobe(addr=PUSH))
    before = machine.clock.instructions
    machine.hit(PUSH)
    assert machine.window.contains(machine.cpu.pc)
    assert not machine.cpu.eflags & TF
    assert machine.window.bytes[:2] == b"\x55\xe9"
    assert machine.clock.instructions == before + 1 - 2


def test_a_post_handler_sees_the_next_instruction(machine: ProbedMachine, manager: Manager) -> None:
    """push rbp is stepped in its slot; after it TF is gone and ip is mov's address."""
    seen: list[int] = []
    manager.register(Kprobe(addr=PUSH, post_handler=lambda p, regs: seen.append(regs.ip)))
    machine.hit(PUSH)
    assert machine.cpu.eflags & TF
    assert machine.finish_step(lambda copy: copy + 1) is Verdict.HANDLED
    assert (seen, machine.cpu.pc, machine.cpu.eflags & TF) == ([MOV], MOV, 0)


def test_a_guest_that_steps_itself_gets_its_trap(machine: ProbedMachine, manager: Manager) -> None:
    """With TF set by the guest the #DB after the probed instruction is delivered, with TF still set."""
    manager.register(Kprobe(addr=PUSH))
    machine.cpu.eflags |= TF
    machine.hit(PUSH)
    assert machine.finish_step(lambda copy: copy + 1) is Verdict.DELIVER
    assert (machine.cpu.pc, machine.cpu.eflags & TF) == (MOV, TF)


def test_a_fault_in_the_step_is_reported_at_the_original_address(machine: ProbedMachine, manager: Manager) -> None:
    """The step is undone, the fault handler asked, and a second hit runs the pre-handler again, the post once."""
    calls: list[str] = []
    manager.register(
        Kprobe(
            addr=PUSH,
            pre_handler=lambda p, regs: calls.append("pre"),
            post_handler=lambda p, regs: calls.append("post"),
            fault_handler=lambda p, regs, vector: calls.append(f"fault {vector} at {regs.ip:#x}"),
        )
    )
    machine.hit(PUSH)
    assert machine.trap_client is not None
    assert machine.trap_client.on_fault(machine.cpu, 14) is Verdict.DELIVER
    assert (machine.cpu.pc, machine.cpu.eflags & TF) == (PUSH, 0)
    machine.hit(PUSH)
    machine.finish_step(lambda copy: copy + 1)
    assert calls == ["pre", f"fault 14 at {PUSH:#x}", "pre", "post"]


def test_a_fault_of_a_boosted_copy_counts_one_instruction(machine: ProbedMachine, manager: Manager) -> None:
    """The jump back taken off the clock in advance is owed when the copy faults."""
    manager.register(Kprobe(addr=PUSH))
    before = machine.clock.instructions
    machine.hit(PUSH)
    machine.clock.instructions += 1  # the attempt
    assert machine.trap_client is not None
    machine.trap_client.on_fault(machine.cpu, 12)
    assert (machine.cpu.pc, machine.clock.instructions) == (PUSH, before + 1)


def test_a_fault_handler_may_swallow_the_fault(machine: ProbedMachine, manager: Manager) -> None:
    """True from it: the guest goes on where the handler says and never hears of the fault."""

    def fix(probe: Kprobe, regs: Regs, vector: int) -> bool:
        regs.ip = RET
        return True

    manager.register(Kprobe(addr=PUSH, post_handler=lambda p, regs: None, fault_handler=fix))
    machine.hit(PUSH)
    assert machine.trap_client is not None
    assert machine.trap_client.on_fault(machine.cpu, 14) is Verdict.HANDLED
    assert machine.cpu.pc == RET


def test_a_probe_met_inside_handlers_is_stepped_and_missed(machine: ProbedMachine, manager: Manager) -> None:
    """As KUnit's test_kprobe_missed: pre- and post-handler reach another probe, which runs no handler of its own."""
    inner = Kprobe(addr=PUSH, pre_handler=lambda p, regs: pytest.fail("a reentrant handler ran"))

    def reach(probe: Kprobe, regs: Regs) -> None:
        kept = machine.cpu.pc
        machine.hit(PUSH)
        machine.cpu.pc = kept

    outer = Kprobe(symbol="target", pre_handler=reach, post_handler=reach)
    manager.register_many([inner, outer])
    machine.hit(TEXT)
    assert (outer.hits, outer.nmissed, inner.hits, inner.nmissed) == (1, 0, 0, 2)


def test_a_handler_may_unregister_its_own_probe(machine: ProbedMachine, manager: Manager) -> None:
    """The instruction is still executed once, out of line."""
    probe = Kprobe(addr=PUSH)
    probe.pre_handler = lambda p, regs: manager.unregister(probe)
    manager.register(probe)
    assert machine.hit(PUSH) is Verdict.HANDLED
    assert machine.window.contains(machine.cpu.pc)
    assert machine.text.armed == {}


def test_user_mode_turns_an_int3_into_a_hook(machine: ProbedMachine, manager: Manager) -> None:
    """Ring 3 cannot execute a slot: the hit is left to a PC hook at the same instruction, uncounted."""
    probe = Kprobe(addr=PUSH)
    manager.register(probe)
    machine.cpu.cpl = 3
    before = machine.clock.instructions
    assert machine.hit(PUSH) is Verdict.HANDLED
    assert (machine.cpu.pc, machine.text.armed, probe.hits) == (PUSH, {PUSH: BackEnd.HOOK}, 0)
    assert machine.clock.instructions == before


def test_what_linux_would_refuse_is_noted(machine: ProbedMachine, manager: Manager) -> None:
    """ff 10 call [rax]: mainline says EOPNOTSUPP, we probe it and say so."""
    machine.memory.write(TEXT + 0x20, b"\xff\x10")
    probe = Kprobe(addr=TEXT + 0x20)
    manager.register(probe)
    assert probe.notes == ("Linux would refuse: EOPNOTSUPP, indirect call through memory",)


@pytest.mark.parametrize(
    ("code", "word"),
    [("48cf", "iret"), ("8ed0", "shadow"), ("0f05", "address"), ("f4", "hlt"), ("0f04", "no processor")],
)
def test_what_cannot_run_out_of_line_takes_a_hook_or_says_why(
    machine: ProbedMachine, manager: Manager, code: str, word: str
) -> None:
    """iretq, mov ss, syscall, hlt, undefined bytes: `auto` hooks them, `int3` is refused with the reason."""
    machine.memory.write(TEXT + 0x20, bytes.fromhex(code))
    with pytest.raises(ProbeError, match=word):
        manager.register(Kprobe(addr=TEXT + 0x20, arm="int3"))
    manager.register(Kprobe(addr=TEXT + 0x20))
    assert machine.text.armed == {TEXT + 0x20: BackEnd.HOOK}


def test_slots_run_out_with_enomem(machine: ProbedMachine, manager: Manager) -> None:
    """64 slots of 64 bytes fit the window; `int3` cannot have a 65th, and a freed one is used again."""
    probes = [Kprobe(addr=TEXT + 0x20 + at, arm="int3") for at in range(65)]
    manager.register_many(probes[:64])
    assert refused(manager, probes[64]) == errno.ENOMEM
    manager.unregister(probes[0])
    manager.register(probes[64])
