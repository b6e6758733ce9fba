"""Watchpoints: after which instruction, of which kind, at which address, and that the guest notices nothing."""

from __future__ import annotations

import pytest

from emu import boot_embedded
from emu.boot import GuestMachine
from emu.iface import MachineError
from emu.stops import Breakpoint, Budget, Halted, Step, Stop, WatchKind, Watchpoint
from emu.watch import MAX_SIZE
from tests.support.tiny import (
    CODE,
    DATA,
    FLAGS_IF,
    HANDLERS,
    PRESENT,
    RING0_STACK,
    TABLES,
    UNMAPPED,
    USER,
    WRITABLE,
    Tiny,
)

READ, WRITE, ACCESS = WatchKind.READ, WatchKind.WRITE, WatchKind.ACCESS
EVERY = PRESENT | WRITABLE | USER


@pytest.fixture(params=[32, 64])
def bits(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


def stops(machine: GuestMachine, budget: int = 10_000) -> tuple[list[Watchpoint], Stop]:
    """The watchpoints until something else stops the machine, and that."""
    found = []
    while isinstance(stop := machine.run(budget), Watchpoint):
        found.append(stop)
    return found, stop


def facts(machine: GuestMachine) -> tuple[object, ...]:
    return (machine.instructions, machine.clock.now_ns, machine.ram_sha256(), machine.console.text)


def watched(bits: int, source: str, *watches: tuple[WatchKind, int, int]) -> list[tuple[str, int]]:
    """(kind, address) of the stops of a guest at `source`, which runs to its HLT as it does without watchpoints."""
    guest, bare = Tiny(bits, source), Tiny(bits, source)
    for watch in watches:
        guest.machine.insert_watchpoint(*watch)
    found, stop = stops(guest.machine)
    assert (bare.run(), facts(bare.machine)) == (stop, facts(guest.machine))
    assert isinstance(stop, Halted)
    return [(hit.kind.value, hit.address) for hit in found]


# ------------------------------------------------------------------------------------------------- kinds and addresses

TO_DATA = f"mov xax, {DATA}; "
ONE_BYTE_EACH = TO_DATA + "mov byte ptr [xax], 1; mov cl, [xax]; inc byte ptr [xax]; hlt"


@pytest.mark.parametrize(
    ("kind", "expected"), [(WRITE, ["watch"] * 2), (READ, ["rwatch"] * 2), (ACCESS, ["awatch"] * 3)]
)
def test_reads_and_writes_are_told_apart(bits: int, kind: WatchKind, expected: list[str]):
    """A store, a load, and an increment that is both: one stop for one instruction."""
    assert watched(bits, ONE_BYTE_EACH, (kind, DATA, 1)) == [(word, DATA) for word in expected]


def test_a_write_is_told_before_the_read_of_the_same_instruction(bits: int):
    """Where both are watched."""
    found = watched(bits, ONE_BYTE_EACH, (READ, DATA, 1), (WRITE, DATA, 1))
    assert [kind for kind, _ in found] == ["watch", "rwatch", "watch"]


def test_the_stop_is_after_the_instruction_with_the_value_in_memory(bits: int):
    """As a processor's data breakpoint: pc is the next one, and the old value was there before."""
    guest = Tiny(bits, TO_DATA + "mov dword ptr [xax], 0x11223344; nop; hlt")
    machine = guest.machine
    machine.insert_watchpoint(WRITE, DATA, 4)
    assert machine.memory.read(DATA, 4) == bytes(4)
    stop = machine.run()
    assert stop == Watchpoint(machine.cpu.linear_pc, WRITE, DATA)
    assert machine.memory.read(machine.cpu.linear_pc, 2) == b"\x90\xf4"
    assert machine.memory.read(DATA, 4) == bytes.fromhex("44332211")
    assert machine.instructions == 2


@pytest.mark.parametrize(
    ("first", "size", "expected"),
    [(3, 1, [3]), (0, 1, []), (0, 2, [1]), (0, 64, [1]), (8, 1, [8]), (9, 1, []), (2, 16, [2])],
)
def test_an_unaligned_access_hits_at_its_first_watched_byte(first: int, size: int, expected: list[int]):
    """Eight bytes stored at DATA + 1, watched from DATA + first."""
    found = watched(64, TO_DATA + "mov [rax + 1], rax; hlt", (WRITE, DATA + first, size))
    assert found == [("watch", DATA + at) for at in expected]


WIDE = """
    movups [xax], xmm0; movups xmm1, [xax]; fld1; fstp tbyte ptr [xax]; lock xadd [xax], ecx; lock cmpxchg8b [xax + 4]
    mov xdi, {data}; mov xsi, xdi; mov ecx, 20; rep stosb; movsb; mov xax, {data}; push xax; pop xcx; sgdt [xax]; hlt
"""


def test_every_instruction_that_stores_is_seen():
    """Vectors, x87, atomics, strings (each iteration), tables: what reaches the bytes 8 to 9 of DATA."""
    expected = [DATA + 8] * 3 + [DATA + 8, DATA + 9] + [DATA + 8]
    # movups, fstp, the upper half of cmpxchg8b, two iterations of stosb, the base that sgdt stores
    assert watched(64, TO_DATA + WIDE.format(data=DATA), (WRITE, DATA + 8, 2)) == [("watch", at) for at in expected]


def test_a_string_instruction_stops_at_each_iteration_it_reaches(bits: int):
    """With the pc still at it, as rep leaves it; reads at the source, writes at the destination."""
    source = f"mov xsi, {DATA}; mov xdi, {DATA + 0x100}; mov ecx, 4; rep movsb; hlt"
    found = watched(bits, source, (READ, DATA + 2, 1), (WRITE, DATA + 0x101, 1))
    assert found == [("watch", DATA + 0x101), ("rwatch", DATA + 2)]


def test_an_access_across_pages_that_are_apart_is_seen_on_both(bits: int):
    """Virtual neighbours, far from each other in RAM."""
    source = f"mov xax, {DATA + 0xFFE}; mov dword ptr [xax], -1; hlt"
    for watch, expected in ((DATA + 0xFFC, DATA + 0xFFE), (DATA + 0x1000, DATA + 0x1000)):
        guest = Tiny(bits, source)
        guest.map(DATA + 0x1000, 0x60000 | EVERY)
        guest.machine.insert_watchpoint(WRITE, watch, 4)
        found, _ = stops(guest.machine)
        assert [stop.address for stop in found] == [expected]


def test_any_number_and_any_length(bits: int):
    """A thousand single bytes, and one range over the whole guest's memory: the engine is asked no more than it can."""
    many = [(WRITE, DATA + 2 * index, 1) for index in range(1000)]
    assert watched(bits, TO_DATA + "mov byte ptr [xax + 500], 1; mov byte ptr [xax + 501], 1; hlt", *many) == [
        ("watch", DATA + 500)
    ]
    assert watched(bits, TO_DATA + "mov byte ptr [xax + 500], 1; hlt", (WRITE, 0, 4 << 20)) == [("watch", DATA + 500)]


@pytest.mark.parametrize("size", [0, -1, MAX_SIZE + 1])
def test_impossible_sizes_are_refused(size: int):
    with pytest.raises(MachineError, match="a watchpoint has 1 to"):
        Tiny(64, "hlt").machine.insert_watchpoint(WRITE, DATA, size)


def test_a_watchpoint_is_removed(bits: int):
    """Removing what is not there is no error, and the others stay."""
    machine = Tiny(bits, TO_DATA + "mov byte ptr [xax], 1; mov byte ptr [xax], 2; mov byte ptr [xax], 3; hlt").machine
    for size in (1, 2):
        machine.insert_watchpoint(WRITE, DATA, size)
        machine.insert_watchpoint(WRITE, DATA, size)
    machine.remove_watchpoint(READ, DATA, 1)
    machine.remove_watchpoint(WRITE, DATA, 1)
    assert isinstance(machine.run(), Watchpoint)
    machine.remove_watchpoint(WRITE, DATA, 2)
    assert isinstance(machine.run(), Halted)


# ------------------------------------------------------------------------------------------- with the other stops


def test_a_watchpoint_is_told_before_the_breakpoint_behind_it(bits: int):
    """Two stops at one pc, with nothing executed between them; both back ends."""
    for hardware in (False, True):
        machine = Tiny(bits, TO_DATA + "mov byte ptr [xax], 1; nop; hlt").machine
        machine.insert_watchpoint(WRITE, DATA, 1)
        after = CODE + len(Tiny(bits, TO_DATA + "mov byte ptr [xax], 1").code)
        machine.insert_breakpoint(after, hardware)
        assert machine.run() == Watchpoint(after, WRITE, DATA)
        assert machine.run() == Breakpoint(after, hardware)
        assert machine.instructions == 2
        assert isinstance(machine.run(), Halted)


def test_a_step_over_an_access_is_a_watchpoint(bits: int):
    """And one over anything else is a step."""
    machine = Tiny(bits, TO_DATA + "mov byte ptr [xax], 1; nop; hlt").machine
    machine.insert_watchpoint(WRITE, DATA, 1)
    assert [type(machine.step()) for _ in range(3)] == [Step, Watchpoint, Step]


def test_an_instruction_that_faults_accesses_nothing(bits: int):
    """It read what is watched before its store failed, and does not count until it is executed whole."""
    source = f"mov xax, {DATA}; push [xax]; hlt"
    guest = Tiny(bits, source)
    guest.machine.cpu.gpr[4] = UNMAPPED + 0x100
    guest.machine.insert_watchpoint(READ, DATA, 1)
    assert not stops(guest.machine)[0]


def test_what_an_interrupt_pushes_is_an_access(bits: int):
    """The frame of a trap, told at the handler's first instruction; from ring 3 the TSS is read for it."""
    guest = Tiny(bits, "int 0x30; hlt", ring=3)
    guest.gate(0x30, dpl=3)
    guest.machine.insert_watchpoint(WRITE, RING0_STACK - guest.word, 1)
    found, _ = stops(guest.machine)
    assert found == [Watchpoint(HANDLERS + 16 * 0x30, WRITE, RING0_STACK - guest.word)]


def test_what_a_timer_interrupt_pushes_is_an_access(bits: int):
    """Of the guest's own timer, on the idle stack."""
    machine = boot_embedded(bits, "loop")
    machine.run(200_000)
    while not machine.cpu.eflags & FLAGS_IF:
        machine.step()
    machine.insert_watchpoint(WRITE, machine.cpu.gpr[4] - 0x100, 0x100)
    stop = machine.run(5_000_000)
    assert isinstance(stop, Watchpoint)


def test_fetches_and_page_walks_are_no_accesses(bits: int):
    """Of the code that runs, and of the tables that map it."""
    assert watched(bits, "nop; nop; hlt", (ACCESS, CODE, 16), (ACCESS, TABLES, 0x4000)) == []


def test_a_debuggers_own_writes_are_no_accesses(bits: int):
    machine = Tiny(bits, "nop; hlt").machine
    machine.insert_watchpoint(ACCESS, DATA, 8)
    machine.memory.write(DATA, b"debugger")
    machine.memory.read(DATA, 8)
    assert isinstance(machine.run(), Halted)


# ---------------------------------------------------------------------------------------------- linear and physical


def remap(bits: int, entry: int) -> str:
    """Code that puts `entry` into the page table for the page of DATA + 0x1000."""
    leaf = Tiny(bits, "hlt")._leaf_at(DATA + 0x1000)
    return f"mov dword ptr [{leaf}], {entry}; mov xax, {DATA + 0x1000}; invlpg [xax]; "


def test_a_watchpoint_follows_its_page(bits: int):
    """The guest moves the page it watches: accesses to the new place count, and those to the old one no longer do."""
    moved = remap(bits, 0x60000 | EVERY)
    source = f"mov xax, {DATA + 0x1000}; mov byte ptr [xax], 1; {moved} mov byte ptr [xax], 2; mov xcx, 0x60000"
    source += "; mov byte ptr [xcx], 3; mov byte ptr [xcx + 0x1000], 4; hlt"
    guest = Tiny(bits, source)
    guest.map(0x61000, DATA + 0x1000 | EVERY)  # where the page was
    guest.machine.insert_watchpoint(WRITE, DATA + 0x1000, 4)
    seen = []
    while isinstance(guest.run(), Watchpoint):
        seen.append(guest.machine.memory.read(DATA + 0x1000, 1)[0])
    assert seen == [1, 2, 3]
    assert guest.machine.memory.read(0x61000, 1) == b"\4"


def test_a_watchpoint_waits_for_its_page(bits: int):
    """Nothing is mapped when it is inserted, and nothing when it is unmapped again."""
    source = "nop; " + remap(bits, 0x60000 | EVERY) + "mov byte ptr [xax], 1; hlt"
    guest = Tiny(bits, source)
    guest.map(DATA + 0x1000, 0)
    guest.machine.insert_watchpoint(WRITE, DATA + 0x1000, 1)
    found, stop = stops(guest.machine)
    assert [hit.address for hit in found] == [DATA + 0x1000]
    assert isinstance(stop, Halted)


def test_a_watchpoint_is_on_the_address_space_in_force(bits: int):
    """CR3 changes and changes back; in the other space the address is another page."""
    other = 0x50000
    source = f"""
        mov xax, {DATA}; mov byte ptr [xax], 1; mov xbx, cr3; mov xcx, {other}; mov cr3, xcx
        mov byte ptr [xax], 2; mov byte ptr [xax + 0x1000], 3; mov cr3, xbx; mov byte ptr [xax], 4; hlt
    """
    guest = Tiny(bits, source)
    ram = guest.machine.ram
    levels = 4 if bits == 64 else 2
    ram.write(other, ram.read(TABLES, 0x1000 * levels))
    for level in range(levels - 1):
        ram.write(other + 0x1000 * level, (other + 0x1000 * (level + 1) | EVERY).to_bytes(guest.word, "little"))
    leaf = other + 0x1000 * (levels - 1) + (DATA >> 12) * guest.word
    ram.write(leaf, (DATA + 0x1000 | EVERY).to_bytes(guest.word, "little"))
    guest.machine.insert_watchpoint(WRITE, DATA, 1)
    seen = []
    while isinstance(stop := guest.machine.run(), Watchpoint):
        seen.append((stop.address, guest.machine.memory.read(DATA, 1)[0]))
    # in the other space DATA and its neighbour are the same page, so both stores change what is watched
    assert seen == [(DATA, 1), (DATA, 2), (DATA, 3), (DATA, 4)]
    assert isinstance(stop, Halted)


def test_a_watchpoint_holds_while_paging_is_switched_on(bits: int):
    """From the guest's first instruction, through the modes it boots in."""
    machine, bare = boot_embedded(bits, "exit=0"), boot_embedded(bits, "exit=0")
    jiffies = machine.symbols.lookup("jiffies")[0].address
    machine.insert_watchpoint(WRITE, jiffies, bits // 8)
    values = []
    while isinstance(machine.run(5_000_000), Watchpoint):
        values.append(int.from_bytes(machine.memory.read(jiffies, bits // 8), "little"))
    assert values == list(range(1, len(values) + 1))
    bare.run(5_000_000)
    assert facts(machine) == facts(bare)


# ------------------------------------------------------------------------------------------------------- neutrality

WORKLOAD = "calls=2 sleep=2 faults=1 opens=3 traps=1 user=1 exit=5"


def test_a_guest_with_watchpoints_is_the_bare_one(bits: int):
    """Interrupts, faults and tasks: after some hundred stops everything is as without them, to the bit."""
    bare, machine = boot_embedded(bits, WORKLOAD), boot_embedded(bits, WORKLOAD)
    for name, kind in (("current", WatchKind.ACCESS), ("jiffies", WRITE), ("checksum", READ)):
        machine.insert_watchpoint(kind, machine.symbols.lookup(name)[0].address, bits // 8)
    bare_stop = bare.run(3_000_000)
    found, stop = stops(machine, 3_000_000)
    assert len(found) > 100
    assert (stop, facts(machine)) == (bare_stop, facts(bare))


def test_the_machine_is_as_fast_as_before_when_they_are_gone(bits: int):
    """No hook of the engine's is left, so code is translated without calls again."""
    machine = boot_embedded(bits, "loop")
    machine.insert_watchpoint(ACCESS, machine.symbols.lookup("jiffies")[0].address, 8)
    machine.run(50_000)
    assert machine.watched._hooks
    machine.remove_watchpoint(ACCESS, machine.symbols.lookup("jiffies")[0].address, 8)
    assert isinstance(machine.run(50_000), Budget)
    assert not machine.watched._hooks
    assert not machine.text._hooks


def test_restored_machine_watches_the_other_moment(bits: int):
    """The watchpoints stay, on what is mapped there."""
    machine = boot_embedded(bits, "loop")
    start = machine.snapshot()
    jiffies = machine.symbols.lookup("jiffies")[0].address
    machine.insert_watchpoint(WRITE, jiffies, 1)
    first = machine.run(5_000_000)
    machine.restore(start)
    assert machine.run(5_000_000) == first
