"""Armed places: owners, aliases, both back ends, and what the guest and a debugger see of them."""

from __future__ import annotations

import pytest

from emu.iface import BackEnd, Cpu, MemoryFault, Verdict
from emu.stops import Breakpoint, Budget, Halted, Stop
from tests.support import tiny
from tests.support.tiny import CODE, DATA, UNMAPPED, Tiny

BP = 3
COUNT_TO_5 = "xor ecx, ecx; again: inc ecx; cmp ecx, 5; jne again; hlt"
AGAIN = CODE + 2
LOOPED = 2 + 3 * 5


@pytest.fixture(params=[32, 64])
def bits(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


@pytest.fixture(params=list(BackEnd))
def back_end(request: pytest.FixtureRequest) -> BackEnd:
    which: BackEnd = request.param
    return which


class Counter:
    """A trap client that counts its breaks and lets the instruction run in place."""

    def __init__(self, verdict: Verdict = Verdict.NOT_MINE) -> None:
        self.hits: list[int] = []
        self.verdict = verdict

    def on_break(self, cpu: Cpu, pc: int, back_end: BackEnd) -> Verdict | Stop:
        assert cpu.pc == pc
        self.hits.append(pc)
        return self.verdict

    def on_debug(self, cpu: Cpu) -> Verdict | Stop:
        return Verdict.NOT_MINE

    def on_fault(self, cpu: Cpu, vector: int) -> Verdict | Stop:
        return Verdict.NOT_MINE


def armed(guest: Tiny, vaddr: int, back_end: BackEnd) -> Counter:
    client = guest.machine.trap_client = Counter()
    guest.machine.text.arm(vaddr, client, back_end)
    return client


def stops(guest: Tiny) -> list[int]:
    """The pcs at which breakpoints end the run, until it ends otherwise."""
    found = []
    while isinstance(stop := guest.run(), Breakpoint):
        found.append(stop.pc)
    assert isinstance(stop, Halted), stop
    return found


# ----------------------------------------------------------------------------------------------------------- hits


def test_both_back_ends_hit_each_time_and_change_nothing(bits: int, back_end: BackEnd) -> None:
    """Five passes, five hits, the bare run's instruction count, registers and RAM."""
    bare, guest = Tiny(bits, COUNT_TO_5), Tiny(bits, COUNT_TO_5)
    client = armed(guest, AGAIN, back_end)
    bare.run()
    guest.run()
    assert client.hits == [AGAIN] * 5
    assert guest.machine.instructions == bare.machine.instructions
    assert list(guest.machine.cpu.gpr) == list(bare.machine.cpu.gpr)
    assert guest.machine.ram_sha256() == bare.machine.ram_sha256()


def test_place_armed_while_its_block_is_translated_fires(bits: int, back_end: BackEnd) -> None:
    """Translated code is dropped: after two passes without it, the third hits."""
    guest = Tiny(bits, COUNT_TO_5)
    guest.run(1 + 3 * 2)
    client = armed(guest, AGAIN, back_end)
    guest.run()
    assert len(client.hits) == 3


def test_disarmed_place_is_forgotten(bits: int, back_end: BackEnd) -> None:
    """Two passes armed, then not: two hits, and the byte is the guest's."""
    guest = Tiny(bits, COUNT_TO_5)
    client = armed(guest, AGAIN, back_end)
    guest.run(1 + 3 * 2)
    guest.machine.text.disarm(AGAIN, client)
    guest.run()
    assert len(client.hits) == 2
    assert guest.machine.ram.read(CODE, len(guest.code)) == guest.code


def test_breakpoint_stops_before_its_instruction_each_time(bits: int) -> None:
    guest = Tiny(bits, COUNT_TO_5)
    guest.machine.insert_breakpoint(AGAIN)
    counts = []
    while isinstance(guest.run(), Breakpoint):
        counts.append((guest.machine.instructions, guest.machine.cpu.gpr[1]))
    assert counts == [(1 + 3 * n, n) for n in range(5)]


@pytest.mark.parametrize("hardware", [False, True])
def test_breakpoint_stop_says_which_kind_it_was(bits: int, hardware: bool) -> None:
    guest = Tiny(bits, COUNT_TO_5)
    guest.machine.insert_breakpoint(AGAIN, hardware)
    assert guest.run() == Breakpoint(AGAIN, hardware)


def test_breakpoint_set_twice_and_removed_once_is_gone(bits: int) -> None:
    """Z packets are idempotent."""
    guest = Tiny(bits, COUNT_TO_5)
    guest.machine.insert_breakpoint(AGAIN)
    guest.machine.insert_breakpoint(AGAIN)
    guest.machine.remove_breakpoint(AGAIN)
    assert stops(guest) == []


def test_removing_a_breakpoint_of_one_kind_leaves_the_other(bits: int) -> None:
    """A software and a hardware breakpoint on one address are two."""
    guest = Tiny(bits, COUNT_TO_5)
    guest.machine.insert_breakpoint(AGAIN)
    guest.machine.insert_breakpoint(AGAIN, hardware=True)
    guest.machine.remove_breakpoint(AGAIN, hardware=True)
    assert guest.run() == Breakpoint(AGAIN, hardware=False)
    guest.machine.insert_breakpoint(AGAIN, hardware=True)
    guest.machine.remove_breakpoint(AGAIN)
    assert guest.run() == Breakpoint(AGAIN, hardware=True)


def test_breakpoints_of_both_kinds_stop_once(bits: int) -> None:
    """One arrival is one stop, though two breakpoints stand there."""
    guest = Tiny(bits, COUNT_TO_5)
    guest.machine.insert_breakpoint(AGAIN)
    guest.machine.insert_breakpoint(AGAIN, hardware=True)
    assert stops(guest) == [AGAIN] * 5


def test_breakpoint_and_probe_share_an_address(bits: int, back_end: BackEnd) -> None:
    """Each sees every pass once, whichever came first, and the end is the bare one."""
    guest = Tiny(bits, COUNT_TO_5)
    client = armed(guest, AGAIN, back_end)
    guest.machine.insert_breakpoint(AGAIN)
    assert stops(guest) == [AGAIN] * 5
    assert client.hits == [AGAIN] * 5
    assert guest.machine.instructions == LOOPED


def test_probe_that_came_after_the_breakpoint_is_asked_too(bits: int) -> None:
    guest = Tiny(bits, COUNT_TO_5)
    guest.machine.insert_breakpoint(AGAIN)
    client = armed(guest, AGAIN, BackEnd.INT3)
    assert stops(guest) == [AGAIN] * 5
    assert client.hits == [AGAIN] * 5


def test_same_byte_keeps_its_int3_until_the_last_owner_leaves(bits: int) -> None:
    guest = Tiny(bits, COUNT_TO_5)
    text, ram = guest.machine.text, guest.machine.ram
    first, second = object(), object()
    for owner in (first, second, first):
        text.arm(AGAIN, owner, BackEnd.INT3)
    text.disarm(AGAIN, first)
    assert ram.read(AGAIN, 1) == b"\xcc"
    text.disarm(AGAIN, second)
    assert ram.read(AGAIN, 1) == guest.code[2:3]
    text.disarm(AGAIN, second)


def test_breakpoint_on_the_guests_own_int3_lets_it_happen(bits: int) -> None:
    """It stops there; going on, the guest gets its #BP."""
    guest = Tiny(bits, "nop; int3; nop")
    guest.machine.insert_breakpoint(CODE + 1)
    assert guest.run() == Breakpoint(CODE + 1)
    frame = guest.trap()
    assert (frame.vector, frame.pc) == (BP, CODE + 2)


def test_probe_on_the_guests_own_int3_lets_it_happen(bits: int, back_end: BackEnd) -> None:
    guest = Tiny(bits, "nop; int3; nop")
    client = armed(guest, CODE + 1, back_end)
    frame = guest.trap()
    assert (frame.vector, frame.pc, client.hits) == (BP, CODE + 2, [CODE + 1])


def test_delivered_break_is_the_guests_own_breakpoint_exception(bits: int) -> None:
    """DELIVER: the guest sees #BP behind one byte, as it would for an int3 of its own there."""
    guest = Tiny(bits, "mov al, 0xcd; nop; nop", ring=3)
    guest.gate(BP, dpl=3)
    armed(guest, CODE + 2, BackEnd.INT3).verdict = Verdict.DELIVER
    frame = guest.trap()
    assert (frame.vector, frame.pc) == (BP, CODE + 3)


def test_rep_prefixed_instruction_under_a_breakpoint_copies_right(bits: int, back_end: BackEnd) -> None:
    """Both back ends ask once an iteration, as a processor's trap flag would; all bytes arrive."""
    source = f"mov esi, {CODE:#x}; mov edi, {DATA:#x}; mov ecx, 4; rep movsb; hlt"
    guest = Tiny(bits, source)
    client = armed(guest, CODE + 15, back_end)
    guest.run()
    assert guest.machine.ram.read(DATA, 4) == guest.code[:4]
    assert len(client.hits) in (4, 5)


def test_rep_prefixed_instruction_is_hit_alike_by_both_back_ends(bits: int) -> None:
    source = f"mov esi, {CODE:#x}; mov edi, {DATA:#x}; mov ecx, 4; rep movsb; hlt"
    ends = []
    for back_end in BackEnd:
        guest = Tiny(bits, source)
        client = armed(guest, CODE + 15, back_end)
        guest.run()
        ends.append((len(client.hits), guest.machine.instructions))
    assert ends[0] == ends[1]


# ------------------------------------------------------------------------------------------------- mappings and aliases


def test_armed_byte_fires_through_every_mapping(bits: int) -> None:
    """An int3 belongs to a physical byte: code reached by another virtual address hits too, by that address."""
    guest = Tiny(bits, "mov eax, 0x90010; jmp xax")
    guest.machine.ram.write(CODE + 0x10, b"\x90\xf4")
    guest.map(0x90000, CODE | 7)
    client = armed(guest, CODE + 0x10, BackEnd.INT3)
    guest.run()
    assert client.hits == [0x90010]


@pytest.mark.parametrize("first_out", [0, 1])
def test_aliases_leave_in_any_order(bits: int, first_out: int) -> None:
    """Armed through two mappings, the byte is restored with the second, and meanwhile the other still fires."""
    guest = Tiny(bits, "mov eax, 0x90010; jmp xax")
    ram, text = guest.machine.ram, guest.machine.text
    ram.write(CODE + 0x10, b"\x90\xf4")
    guest.map(0x90000, CODE | 7)
    places = [CODE + 0x10, 0x90010]
    client = armed(guest, places[0], BackEnd.INT3)
    text.arm(places[1], client, BackEnd.INT3)
    text.disarm(places[first_out], client)
    assert ram.read(CODE + 0x10, 1) == b"\xcc"
    guest.run()
    assert client.hits == [0x90010]
    text.disarm(places[1 - first_out], client)
    assert ram.read(CODE + 0x10, 1) == b"\x90"


def test_int3_on_an_unmapped_address_is_refused(bits: int) -> None:
    """The probe engine is told; nothing stays behind."""
    guest = Tiny(bits, "hlt")
    with pytest.raises(MemoryFault) as caught:
        guest.machine.text.arm(UNMAPPED, object(), BackEnd.INT3)
    assert caught.value.address == UNMAPPED
    assert guest.machine.text.owners(UNMAPPED) == []


def test_breakpoint_on_an_unmapped_address_waits_until_it_is_mapped(bits: int) -> None:
    """`break` before the page is there: the guest maps it, jumps to it, and stops."""
    leaf = tiny.TABLES + 0x1000 * (3 if bits == 64 else 1) + (0x90000 >> 12) * (bits // 8)
    guest = Tiny(bits, f"mov ebx, {leaf:#x}; mov dword ptr [xbx], {CODE | 7:#x}; mov eax, 0x90040; jmp xax")
    guest.machine.ram.write(CODE + 0x40, b"\x90\xf4")
    guest.map(0x90000, 0)
    guest.machine.insert_breakpoint(0x90040)
    assert guest.run() == Breakpoint(0x90040)
    assert isinstance(guest.run(), Halted)


# ---------------------------------------------------------------------------------------------------- reads and writes


def test_no_debugger_read_shows_an_int3(bits: int) -> None:
    guest = Tiny(bits, COUNT_TO_5)
    memory = guest.machine.memory
    guest.map(0x90000, CODE | 7)
    for offset in range(len(guest.code)):
        guest.machine.text.arm(CODE + offset, self_owner := object(), BackEnd.INT3)
        assert self_owner in guest.machine.text.owners(CODE + offset)
    assert memory.read(CODE, len(guest.code)) == guest.code
    assert memory.read(0x90000, len(guest.code)) == guest.code
    assert memory.read_physical(CODE, len(guest.code)) == guest.code


@pytest.mark.parametrize("physical", [False, True])
def test_write_over_an_armed_byte_keeps_it_armed(bits: int, physical: bool) -> None:
    """The read shows the new byte, the hit still comes, and the new instruction is what runs."""
    guest = Tiny(bits, "nop; nop; hlt")
    client = armed(guest, CODE + 1, BackEnd.INT3)
    memory = guest.machine.memory
    (memory.write_physical if physical else memory.write)(CODE + 1, b"\xf4")
    assert memory.read(CODE, 3) == b"\x90\xf4\xf4"
    assert isinstance(guest.run(), Halted)
    assert (client.hits, guest.machine.cpu.pc) == ([CODE + 1], CODE + 2)
    guest.machine.text.disarm(CODE + 1, client)
    assert guest.machine.ram.read(CODE + 1, 1) == b"\xf4"


def test_byte_the_guest_wrote_over_ours_is_the_truth(bits: int) -> None:
    """The guest patches its text over the int3: reads show its byte, and disarming leaves it."""
    guest = Tiny(bits, f"mov ebx, {CODE + 0x20:#x}; mov byte ptr [xbx], 0xf4; jmp xbx")
    client = armed(guest, CODE + 0x20, BackEnd.INT3)
    assert isinstance(guest.run(), Halted)
    assert guest.machine.memory.read(CODE + 0x20, 1) == b"\xf4"
    guest.machine.text.disarm(CODE + 0x20, client)
    assert guest.machine.ram.read(CODE + 0x20, 1) == b"\xf4"


def test_hook_changes_no_byte(bits: int) -> None:
    """Not even the accessed bits of page tables, which the engine's own walk would set."""
    guest = Tiny(bits, COUNT_TO_5)
    before = guest.machine.ram.sha256()
    guest.machine.insert_breakpoint(AGAIN, hardware=True)
    assert guest.machine.ram.sha256() == before


# ------------------------------------------------------------------------------------------------------------ handlers


def test_client_that_moves_the_pc_skips_the_instruction(bits: int, back_end: BackEnd) -> None:
    """HANDLED with another pc: the instruction at the place is not executed, by either back end."""
    guest = Tiny(bits, "mov ebx, 1; inc ebx; hlt")
    at = CODE + 5
    length = len(guest.code) - 6

    class Skipper(Counter):
        def on_break(self, cpu: Cpu, pc: int, back_end: BackEnd) -> Verdict:
            cpu.pc = pc + length
            return Verdict.HANDLED

    client = guest.machine.trap_client = Skipper()
    guest.machine.text.arm(at, client, back_end)
    assert isinstance(guest.run(), Halted)
    assert guest.machine.cpu.gpr[3] == 1


def test_hook_client_that_changes_a_register_is_asked_once(bits: int) -> None:
    """The instruction then runs with the new value."""
    guest = Tiny(bits, "mov ebx, 1; inc ebx; hlt")

    class Setter(Counter):
        def on_break(self, cpu: Cpu, pc: int, back_end: BackEnd) -> Verdict:
            self.hits.append(pc)
            cpu.gpr[3] = 41
            return Verdict.HANDLED

    client = guest.machine.trap_client = Setter()
    guest.machine.text.arm(CODE + 5, client, BackEnd.HOOK)
    guest.run()
    assert (guest.machine.cpu.gpr[3], client.hits) == (42, [CODE + 5])


def test_client_may_disarm_its_place_during_the_hit(bits: int, back_end: BackEnd) -> None:
    guest = Tiny(bits, COUNT_TO_5)

    class Leaver(Counter):
        def on_break(self, cpu: Cpu, pc: int, back_end: BackEnd) -> Verdict:
            self.hits.append(pc)
            guest.machine.text.disarm(pc, self)
            return Verdict.NOT_MINE

    client = guest.machine.trap_client = Leaver()
    guest.machine.text.arm(AGAIN, client, back_end)
    assert isinstance(guest.run(), Halted)
    assert (client.hits, guest.machine.instructions, guest.machine.cpu.gpr[1]) == ([AGAIN], LOOPED, 5)


def test_watch_is_asked_each_time_until_it_ends(bits: int) -> None:
    """A watch that returns nothing lets the guest go on; one that returns a stop ends the run there."""
    guest = Tiny(bits, COUNT_TO_5)
    seen: list[int] = []

    def look() -> Stop | None:
        seen.append(guest.machine.cpu.gpr[1])
        return Budget(0) if len(seen) == 3 else None

    end = guest.machine.watch(AGAIN, look)
    assert guest.run() == Budget(0)
    end()
    assert isinstance(guest.run(), Halted)
    assert seen == [0, 1, 2]
    assert guest.machine.instructions == LOOPED
