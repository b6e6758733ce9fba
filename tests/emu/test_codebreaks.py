"""Breakpoints in translated code: met exactly, seen by nobody."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emu.iface import Cpu
from emu.stops import Breakpoint, Budget, Halted
from tests.support.breaks import Client, after, armed, go_back, planted
from tests.support.tiny import CODE, DATA, ENOUGH, Tiny

BITS = pytest.mark.parametrize("bits", [64, 32])


@BITS
@pytest.mark.parametrize("ring", [0, 3])
def test_counts_every_execution_and_leaves_no_trace(bits: int, ring: int) -> None:
    """In a loop whose body reads its own bytes: same sum, same instruction count, same memory as without."""
    lead = f"mov xcx, 100; xor eax, eax; mov xsi, {CODE}"
    loop = "movzx edx, byte ptr [xsi]; add eax, edx; pushfx; pop xdx; add eax, edx; inc xsi; dec ecx; jnz "
    start = after(lead, bits)
    source = f"{lead}; {loop} {start}; int 0x30"
    results = []
    for probed in (False, True):
        guest = Tiny(bits, source, ring=ring)
        client = armed(guest, *((start, start + 3) if probed else ()))
        assert isinstance(guest.machine.run(ENOUGH), Halted)
        machine = guest.machine
        results.append((machine.cpu.gpr[0], machine.clock.instructions, machine.ram_sha256(), machine.ram.sha256()))
    assert results[0] == results[1]
    assert client.hits == [start, start + 3] * 100


@BITS
@pytest.mark.parametrize("arm", [armed, planted])
def test_fault_of_the_instruction_is_no_second_hit(bits: int, arm: Callable[..., Client]) -> None:
    """A load from a page that the fault handler maps: one hit, and #PF at the instruction's own address with RF."""
    lead = f"mov xbx, {DATA + 0x1000}; mov ecx, 3"
    start = after(lead, bits)
    guest = Tiny(bits, f"{lead}; mov eax, [xbx]; dec ecx; jnz {start}; int 0x30", ring=3)
    guest.map(DATA + 0x1000, 0)
    client = arm(guest, start)
    frame = guest.trap()
    assert (client.hits, frame.vector, frame.pc, frame.flags & 0x10000) == ([start], 14, start, 0x10000)
    guest.map(DATA + 0x1000, DATA + 0x1000 | 7)
    go_back(guest)
    assert guest.trap().vector == 13  # the gate of int 0x30 is not for ring 3
    assert client.hits == [start] * 3


@BITS
def test_first_instruction_of_a_page_that_arrives_by_its_fault_is_a_hit(bits: int) -> None:
    """The processor comes back with RF set, as after any fault; the hit is not taken for a repetition."""
    target = CODE + 0x3000
    guest = Tiny(bits, f"mov xax, {target}; call xax; call xax; int 0x30", ring=3)
    guest.machine.ram.write(CODE + 0x4000, b"\xc3")
    guest.map(target, 0)
    client = armed(guest, target)
    assert guest.trap().vector == 14
    assert client.hits == []
    guest.map(target, CODE + 0x4000 | 7)
    go_back(guest)
    assert guest.trap().vector == 13  # the gate of int 0x30 is not for ring 3
    assert client.hits == [target] * 2


@BITS
def test_follows_the_code_that_the_guest_writes(bits: int) -> None:
    """The armed instruction is rewritten twice by the program itself; each form runs, each is a hit."""
    lead = f"mov ecx, 2; xor eax, eax; mov xbx, {CODE}"
    start = after(lead, bits)
    offset = start - CODE
    source = f"{lead}; inc eax; mov word ptr [xbx + {offset}], 0xc083; mov byte ptr [xbx + {offset + 2}], 5"
    source = source.replace("inc eax;", "nop; nop; inc eax;")
    guest = Tiny(bits, f"{source}; dec ecx; jnz {start}; int 0x30", ring=3)
    client = armed(guest, start)
    assert isinstance(guest.run(), Halted)
    assert len(client.hits) == 2
    assert guest.machine.cpu.gpr[0] == 1 + 5 * (guest.machine.memory.read(start, 1) == b"\x83")


@BITS
def test_blocks_that_share_an_address_are_translated_once(bits: int) -> None:
    """Entered from two sides in turns, one falling through into what the other jumps to: neither drops the other."""
    lead, test = "mov xcx, 100", "test cl, 1; jz "
    start = after(lead, bits)
    join = after(f"{lead}; {test} {start}; inc eax", bits)
    source = f"{lead}; {test} {join}; inc eax; inc eax; inc eax; dec ecx; jnz {start}; int 0x30"
    guest = Tiny(bits, source)
    client = armed(guest, join, join + (after("inc eax", bits) - CODE))
    assert isinstance(guest.machine.run(ENOUGH), Halted)
    assert guest.machine.cpu.gpr[0] == 250
    assert len(client.hits) == 200
    assert client.asked - len(client.hits) < 20  # it is asked at each hit, and at each translation


@BITS
def test_address_inside_an_instruction_changes_nothing(bits: int) -> None:
    """Armed on the operand of a mov: never hit, and the operand is what it was."""
    guest = Tiny(bits, "mov eax, 0x11223344; int 0x30", ring=3)
    client = armed(guest, CODE + 2)
    assert isinstance(guest.run(), Halted)
    assert (client.hits, guest.machine.cpu.gpr[0]) == ([], 0x11223344)


@BITS
def test_armed_late_and_disarmed_between_runs(bits: int) -> None:
    """Code that has run is translated anew when it is armed; disarmed, the int3 left in a translation is not told."""
    guest = Tiny(bits, f"inc eax; jmp {CODE}", ring=3)
    machine = guest.machine
    machine.run(100)
    client = armed(guest, CODE)
    machine.run(100)
    assert len(client.hits) == 50
    machine.breaks.disarm(CODE)
    machine.run(100)
    client.here = False
    machine.breaks.arm(CODE)
    machine.run(100)
    assert (len(client.hits), machine.cpu.gpr[0], machine.clock.instructions) == (50, 200, 400)


@BITS
def test_space_that_is_not_meant_runs_the_same_translation_unseen(bits: int) -> None:
    """What `stands` says of the moment counts, not of the moment of translation."""
    guest = Tiny(bits, f"inc eax; jmp {CODE}", ring=3)
    client = armed(guest, CODE)
    guest.machine.run(100)
    client.here = False
    guest.machine.run(100)
    assert (len(client.hits), guest.machine.cpu.gpr[0]) == (50, 100)


@BITS
def test_int3_of_the_guest_itself_is_delivered_after_the_hit(bits: int) -> None:
    guest = Tiny(bits, "int3", ring=3)
    guest.gate(3, dpl=3)
    client = armed(guest, CODE)
    frame = guest.trap()
    assert (client.hits, frame.vector, frame.pc, frame.flags & 0x10000) == ([CODE], 3, CODE + 1, 0)


@BITS
def test_trap_flag_of_the_guest_traps_behind_the_instruction(bits: int) -> None:
    """A program that steps itself gets its #DB where it would, and pushf shows what it would."""
    lead = "pushfx; or dword ptr [xsp], 0x100; popfx"
    start = after(lead, bits)
    guest = Tiny(bits, f"{lead}; mov eax, 7; nop", ring=3)
    client = armed(guest, start)
    frame = guest.trap()
    assert (client.hits, frame.vector, frame.pc) == ([start], 1, start + 5)


@BITS
def test_interrupt_shadow_hides_no_hit(bits: int) -> None:
    """`mov ss` lets the next instruction run before anything else comes; that one is armed."""
    lead = "mov eax, ss; mov ss, eax"
    start = after(lead, bits)
    guest = Tiny(bits, f"{lead}; inc eax; int 0x30", ring=3)
    client = armed(guest, start)
    assert isinstance(guest.run(), Halted)
    assert client.hits == [start]


@BITS
def test_pushed_flags_show_nothing(bits: int) -> None:
    """pushf on the armed place: neither RF nor TF is in the image."""
    images = []
    for places in ((), (CODE, CODE + 1, CODE + 2)):
        guest = Tiny(bits, "pushfx; .byte 0x66, 0x9c; pop ax; pop xax; int 0x30", ring=3)
        client = armed(guest, *places)
        assert isinstance(guest.run(), Halted)
        images.append((*guest.machine.cpu.gpr, *guest.words(guest.stack, 5), guest.machine.clock.instructions))
    assert images[0] == images[1]
    assert client.hits == [CODE, CODE + 1]  # the pop has an operand-size prefix


@BITS
def test_client_may_stop_the_machine_or_send_it_elsewhere(bits: int) -> None:
    """A stop is before the instruction and the hit is not told twice; a pc that was changed is where the guest goes."""
    source = "inc eax; inc eax; inc eax; int 0x30"
    guest = Tiny(bits, source, ring=3)
    client = armed(guest, CODE, act=lambda cpu: Breakpoint(cpu.pc))
    assert guest.run() == Breakpoint(CODE)
    cpu = guest.machine.cpu
    assert (cpu.pc, cpu.eflags & 0x10000, cpu.interrupt_shadow, guest.machine.clock.instructions) == (CODE, 0, False, 0)
    assert isinstance(guest.run(), Halted)
    assert (len(client.hits), cpu.gpr[0]) == (1, 3)

    def skip(cpu: Cpu) -> None:
        cpu.pc += 2 if bits == 64 else 1

    guest = Tiny(bits, source, ring=3)
    client = armed(guest, CODE, act=skip)
    assert isinstance(guest.run(), Halted)
    assert (len(client.hits), guest.machine.cpu.gpr[0]) == (1, 2)


@BITS
def test_run_that_ends_anywhere_ends_without_our_flags(bits: int) -> None:
    """Budgets of every length: registers as in the bare run, each hit told once."""
    source = f"inc eax; mov edx, [{DATA}]; jmp {CODE}" if bits == 32 else f"inc eax; mov edx, [rsp]; jmp {CODE}"
    for budget in range(1, 12):
        seen = []
        for places in ((), (CODE, CODE + 2)):
            guest = Tiny(bits, source, ring=3)
            client = armed(guest, *places)
            while guest.machine.clock.instructions < 60:
                assert isinstance(guest.machine.run(min(budget, 60 - guest.machine.clock.instructions)), Budget)
                cpu = guest.machine.cpu
                seen.append((places, (cpu.pc, cpu.eflags, cpu.hflags, *cpu.gpr)))
        half = len(seen) // 2
        assert [state for _, state in seen[:half]] == [state for _, state in seen[half:]]
        assert len(client.hits) in (20 + (20 if bits == 64 else 0), 20, 40)


@BITS
def test_debugger_breakpoint_on_the_same_place(bits: int) -> None:
    """The client is told first, then the debugger stops; stepping and going on tell nobody twice."""
    guest = Tiny(bits, f"inc eax; jmp {CODE}", ring=3)
    client = armed(guest, CODE)
    machine = guest.machine
    machine.insert_breakpoint(CODE)
    assert machine.run(ENOUGH) == Breakpoint(CODE)
    assert (len(client.hits), machine.memory.read(CODE, 1) == b"\xcc") == (1, False)
    assert machine.run(ENOUGH) == Breakpoint(CODE)
    assert (len(client.hits), machine.cpu.gpr[0]) == (2, 1)
    machine.step()
    assert (len(client.hits), machine.cpu.gpr[0]) == (2, 2)
    machine.remove_breakpoint(CODE)
    machine.run(10)
    assert machine.cpu.gpr[0] == 7


@BITS
def test_repeated_string_instruction_is_told_per_iteration_and_runs_right(bits: int) -> None:
    """As a PC hook; who counts executions asks for the first."""
    lead = f"mov ecx, 5; mov esi, {CODE}; mov edi, {DATA}"
    start = after(lead, bits)
    guest = Tiny(bits, f"{lead}; rep movsb; int 0x30", ring=3)
    client = armed(guest, start)
    assert isinstance(guest.run(), Halted)
    assert len(client.hits) in (5, 6)
    assert guest.machine.memory.read(DATA, 5) == guest.machine.memory.read(CODE, 5)
