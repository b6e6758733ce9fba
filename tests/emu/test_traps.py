"""Exceptions and interrupts arrive in the guest's handlers as SDM vol. 3, chapter 6 has them; both word sizes."""

from __future__ import annotations

import pytest

from emu.stops import Halted, TripleFault
from tests.support import tiny
from tests.support.tiny import CODE, FLAGS_IF, FLAGS_NT, FLAGS_RF, FLAGS_TF, UNMAPPED, Frame, Tiny

DE, BP, OF, UD, DF, TS, NP, SS, GP, PF = 0, 3, 4, 6, 8, 10, 11, 12, 13, 14


@pytest.fixture(params=[32, 64])
def bits(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


def user_selectors(bits: int) -> tuple[int, int]:
    return (tiny.USER_CS64, tiny.USER_SS64) if bits == 64 else (tiny.USER_CS32, tiny.USER_SS)


# ------------------------------------------------------------------------------------------------------------ frames


def test_fault_returns_to_its_instruction_and_resumes(bits: int) -> None:
    """#DE pushes no error code, the address of the DIV, and RF set (SDM 17.3.1.1)."""
    frame = Tiny(bits, "nop; xor ecx, ecx; div ecx").trap()
    assert (frame.vector, frame.code, frame.pc, frame.cs) == (DE, None, CODE + 3, tiny.KERNEL_CS)
    assert frame.flags & FLAGS_RF


def test_fault_with_an_error_code_pushes_it_last(bits: int) -> None:
    """A selector beyond the GDT: #GP with the selector, without its RPL, on top of the frame."""
    frame = Tiny(bits, "mov eax, 0xfffb; mov ds, ax").trap()
    assert (frame.vector, frame.code, frame.pc) == (GP, 0xFFF8, CODE + 5)


def test_undefined_instruction_is_a_fault(bits: int) -> None:
    frame = Tiny(bits, "nop; ud2").trap()
    assert (frame.vector, frame.code, frame.pc) == (UD, None, CODE + 1)
    assert frame.flags & FLAGS_RF


def test_handler_that_returns_lets_the_guest_go_on(bits: int) -> None:
    """A #UD handler steps past ud2 and IRETs; the guest's next instruction runs with its flags."""
    skip = f"add WORD ptr [xsp], 2; iret{'q' if bits == 64 else 'd'}"
    guest = Tiny(bits, "mov eax, 1; cmp eax, 1; ud2; setz al; hlt", handlers={UD: skip})
    assert isinstance(guest.run(), Halted)
    assert guest.machine.cpu.gpr[0] == 1


def test_trap_inside_ring_0_keeps_the_stack(bits: int) -> None:
    """Same privilege: the frame follows what was on the stack; 64-bit delivery aligns it to 16 and pushes SS:RSP."""
    guest = Tiny(bits, "push 1; int 0x40")
    frame = guest.trap()
    if bits == 32:
        assert (frame.sp, guest.stack) == (None, tiny.STACK - 4 - 12)
    else:
        assert (frame.sp, frame.ss, guest.stack) == (tiny.STACK - 8, tiny.KERNEL_SS, tiny.STACK - 16 - 40)


def test_trap_from_ring_3_switches_to_the_stack_of_the_tss(bits: int) -> None:
    """SS0:ESP0 or RSP0; the user's SS:SP lie in the frame, CPL is 0, and SS is null in 64-bit mode."""
    guest = Tiny(bits, "ud2", ring=3)
    frame = guest.trap()
    cs, ss = user_selectors(bits)
    assert frame == Frame(UD, None, CODE, cs, frame.flags, tiny.USER_STACK, ss)
    assert guest.stack == tiny.RING0_STACK - 5 * guest.word
    assert guest.machine.cpu.cpl == 0
    assert guest.machine.registers.read("ss") == (0 if bits == 64 else tiny.KERNEL_SS)


def test_conforming_handler_keeps_the_privilege_level(bits: int) -> None:
    """A gate to a conforming segment of DPL 0 from ring 3: still ring 3, on the user's stack (SDM 6.12.1)."""
    guest = Tiny(bits, "int 0x40", ring=3)
    guest.gate(0x40, dpl=3, selector=tiny.CONFORMING_CS)
    guest.handler(0x40, "jmp .")
    guest.run(10)
    assert guest.machine.registers.read("cs") == tiny.CONFORMING_CS | 3
    assert tiny.USER_STACK - 64 < guest.stack < tiny.USER_STACK


def test_ist_stack_is_taken_even_inside_ring_0() -> None:
    """A 64-bit gate with IST 1 starts at IST1, whatever RSP is."""
    guest = Tiny(64, "xor esp, esp; int 0x40")
    guest.gate(0x40, ist=1)
    frame = guest.trap()
    assert (frame.sp, guest.stack) == (0, tiny.IST1_STACK - 40)


@pytest.mark.parametrize(("kind", "kept"), [(tiny.INTERRUPT_GATE, 0), (tiny.TRAP_GATE, FLAGS_IF)])
def test_gate_type_decides_on_interrupts(bits: int, kind: int, kept: int) -> None:
    """An interrupt gate clears IF, a trap gate leaves it; both clear NT and TF. The frame has the old flags."""
    guest = Tiny(bits, "pushfx; or WORD ptr [xsp], 0x4200; popfx; int 0x40")
    guest.gate(0x40, kind)
    frame = guest.trap()
    assert frame.flags & (FLAGS_IF | FLAGS_NT) == FLAGS_IF | FLAGS_NT
    assert guest.machine.cpu.eflags & (FLAGS_IF | FLAGS_NT | FLAGS_TF | FLAGS_RF) == kept


def test_sixteen_bit_gate_pushes_words() -> None:
    """A 286 interrupt gate in protected mode: three 16-bit words."""
    guest = Tiny(32, "int 0x40")
    guest.gate(0x40, 0x86)
    guest.machine.ram.write(tiny.IDT + 0x40 * 8, b"\x00\x00\x08\x00\x00\x86\x00\x00")
    guest.map(0, 0x20000 | 7)  # its offset has 16 bits only: vector 0's handler, seen at 0
    guest.run()
    words = guest.machine.memory.read(guest.stack, 6)
    assert guest.stack == tiny.STACK - 6
    assert int.from_bytes(words[:2], "little") == (CODE + 2) & 0xFFFF


# ------------------------------------------------------------------------------------------------------- int n and int3


def test_int_n_returns_behind_itself(bits: int) -> None:
    frame = Tiny(bits, "nop; int 0x40").trap()
    assert (frame.vector, frame.pc, frame.flags & FLAGS_RF) == (0x40, CODE + 3, 0)


def test_int_n_from_ring_3_needs_a_gate_of_its_level(bits: int) -> None:
    """DPL 0: #GP with vector*8+2 (IDT, not EXT), returning to the INT itself."""
    frame = Tiny(bits, "nop; int 0x40", ring=3).trap()
    assert (frame.vector, frame.code, frame.pc) == (GP, 0x40 * 8 + 2, CODE + 1)


def test_int_n_through_a_gate_of_ring_3_passes(bits: int) -> None:
    guest = Tiny(bits, "nop; int 0x40", ring=3)
    guest.gate(0x40, dpl=3)
    assert guest.trap().vector == 0x40


def test_privilege_of_a_gate_is_not_checked_for_exceptions(bits: int) -> None:
    """Ring 3 faults arrive through gates of DPL 0 (SDM 6.12.1.2)."""
    assert Tiny(bits, "ud2", ring=3).trap().vector == UD


@pytest.mark.parametrize(("source", "length"), [("int3", 1), (".byte 0xcd, 3", 2)])
def test_guests_own_int3_is_a_trap(bits: int, source: str, length: int) -> None:
    """#BP returns behind the instruction, in one or two bytes."""
    frame = Tiny(bits, f"nop; {source}").trap()
    assert (frame.vector, frame.code, frame.pc) == (BP, None, CODE + 1 + length)


@pytest.mark.parametrize("source", ["int3", ".byte 0xcd, 3"])
def test_int3_from_ring_3_needs_a_gate_of_its_level(bits: int, source: str) -> None:
    """The #GP returns to the first byte of either encoding."""
    frame = Tiny(bits, f"nop; {source}", ring=3).trap()
    assert (frame.vector, frame.code, frame.pc) == (GP, BP * 8 + 2, CODE + 1)


def test_int3_behind_a_byte_of_int_n_is_one_byte_long(bits: int) -> None:
    """`mov al, 0xcd; int3` is no `int 0xcc`: the #GP returns to the int3."""
    frame = Tiny(bits, "mov al, 0xcd; int3", ring=3).trap()
    assert (frame.vector, frame.pc) == (GP, CODE + 2)


def test_into_is_a_trap_of_one_byte() -> None:
    """INTO with OF set, 32 bits only: #OF returns behind it."""
    frame = Tiny(32, "mov al, 0x7f; inc al; into").trap()
    assert (frame.vector, frame.code, frame.pc) == (OF, None, CODE + 5)


# ------------------------------------------------------------------------------------- what goes wrong on the way in


def test_absent_gate_is_not_present(bits: int) -> None:
    guest = Tiny(bits, "nop; int 0x40")
    guest.gate(0x40, 0x0E)
    frame = guest.trap()
    assert (frame.vector, frame.code, frame.pc) == (NP, 0x40 * 8 + 2, CODE + 1)


def test_absent_gate_of_an_exception_says_external(bits: int) -> None:
    """The program did not ask for it: EXT is set (SDM 6.13)."""
    guest = Tiny(bits, "ud2")
    guest.gate(UD, 0x0E)
    frame = guest.trap()
    assert (frame.vector, frame.code) == (NP, UD * 8 + 3)


def test_vector_beyond_the_table_is_a_general_protection_fault(bits: int) -> None:
    guest = Tiny(bits, "int 0x40")
    guest.machine.cpu.set_system_segment("idt", 0, tiny.IDT, 0x40 * 2 * guest.word - 1)
    frame = guest.trap()
    assert (frame.vector, frame.code) == (GP, 0x40 * 8 + 2)


@pytest.mark.parametrize(
    ("selector", "vector", "code"),
    [(0, GP, 0), (tiny.DATA_ONLY, GP, tiny.DATA_ONLY), (tiny.ABSENT_CS, NP, tiny.ABSENT_CS), (0xFFF8, GP, 0xFFF8)],
)
def test_handlers_segment_is_checked(bits: int, selector: int, vector: int, code: int) -> None:
    """Null, data, absent, beyond the GDT: the fault's code is the segment's selector."""
    guest = Tiny(bits, "nop; int 0x40")
    guest.gate(0x40, selector=selector)
    frame = guest.trap()
    assert (frame.vector, frame.code, frame.pc) == (vector, code, CODE + 1)


def test_64_bit_handler_must_be_64_bit_code() -> None:
    """A gate in IA-32e mode to a compatibility-mode segment is #GP (SDM 6.14.1)."""
    guest = Tiny(64, "int 0x40", ring=3)
    guest.gate(0x40, dpl=3, selector=tiny.USER_CS32)
    frame = guest.trap()
    assert (frame.vector, frame.code) == (GP, tiny.USER_CS32 & ~3)


def test_64_bit_handler_must_have_a_canonical_address() -> None:
    """A gate's target outside the canonical range is #GP(0)."""
    guest = Tiny(64, "int 0x40")
    guest.machine.ram.write(tiny.IDT + 0x40 * 16 + 8, (0x8000_0000).to_bytes(4, "little"))
    frame = guest.trap()
    assert (frame.vector, frame.code, frame.pc) == (GP, 0, CODE)


def test_64_bit_stack_that_is_not_canonical_is_a_stack_fault() -> None:
    """#SS, not #PF, for a frame outside the canonical range (SDM vol. 1, 3.3.7.1)."""
    guest = Tiny(64, "movabs rsp, 0x900000000000; int 0x40")
    guest.gate(SS, ist=1)
    assert guest.trap().vector == SS


@pytest.mark.parametrize("selector", [0, tiny.KERNEL_CS, tiny.USER_SS, tiny.KERNEL_SS | 3])
def test_ring_0_stack_of_a_32_bit_tss_is_checked(selector: int) -> None:
    """Null, code, of another level, RPL of another level: #TS with the selector, seen here through a task gate."""
    guest = Tiny(32, "int 0x40", ring=3)
    guest.gate(0x40, dpl=3)
    guest.gate(TS, tiny.TASK_GATE, selector=tiny.DOUBLE_FAULT_SELECTOR)
    guest.machine.ram.write(tiny.TSS + 8, selector.to_bytes(4, "little"))
    assert isinstance(guest.run(), Halted)
    assert guest.words(guest.stack, 1) == [selector & ~3]


# ------------------------------------------------------------------------------------------------------- double, triple


def test_two_contributory_faults_are_a_double_fault(bits: int) -> None:
    """#NP while #GP is delivered: #DF with code 0 (SDM table 6-5)."""
    guest = Tiny(bits, "mov eax, 0xfff8; mov ds, ax")
    guest.gate(GP, 0x0E)
    frame = guest.trap()
    assert (frame.vector, frame.code, frame.pc) == (DF, 0, CODE + 5)


def test_page_fault_whose_delivery_faults_is_a_double_fault() -> None:
    """The stack of ring 0 is not there: #PF, then #PF again, then #DF on the IST stack. CR2 is the last address."""
    guest = Tiny(64, f"mov esp, {UNMAPPED + 0x1000:#x}; mov eax, [{UNMAPPED:#x}]")
    guest.gate(DF, ist=1)
    frame = guest.trap()
    assert (frame.vector, frame.code, frame.sp) == (DF, 0, UNMAPPED + 0x1000)
    assert guest.machine.cpu.cr(2) == UNMAPPED + 0x1000 - 48


def test_contributory_fault_then_page_fault_is_serial(bits: int) -> None:
    """The page with #GP's gate is absent, the next one has #PF's: it is delivered alone (SDM table 6-5)."""
    guest = Tiny(bits, "mov eax, 0xfff8; mov ds, ax")
    boundary, size = 0x81000, 2 * guest.word
    ram, split = guest.machine.ram, boundary - PF * size
    ram.write(split, ram.read(tiny.IDT, 256 * size))
    guest.machine.cpu.set_system_segment("idt", 0, split, 256 * size - 1)
    guest.map(boundary - 1, 0)
    frame = guest.trap()
    assert (frame.vector, frame.code, frame.pc) == (PF, 0, CODE + 5)
    assert guest.machine.cpu.cr(2) == boundary - size


def test_page_fault_in_the_delivery_of_an_interrupt_is_delivered() -> None:
    """`int n` is benign: the #PF of its stack arrives alone, with the code of a write and the INT's address."""
    guest = Tiny(64, f"mov esp, {UNMAPPED + 0x1000:#x}; int 0x40")
    guest.gate(PF, ist=1)
    frame = guest.trap()
    assert (frame.vector, frame.code, frame.pc) == (PF, 2, CODE + 5)


def test_triple_fault_names_the_first_vector(bits: int) -> None:
    """No gate is present: #UD, #NP, #DF, shutdown; the stop has the instruction and the vector that began it."""
    guest = Tiny(bits, "nop; ud2")
    for vector in (UD, NP, GP, DF):
        guest.gate(vector, 0x0E)
    assert guest.run() == TripleFault(CODE + 1, UD)


def test_stack_without_ram_loses_the_frame(bits: int) -> None:
    """Its page leads to physical memory that is not there: stores are lost, as on a bus, and the handler runs."""
    guest = Tiny(bits, "mov esp, 0x150800; ud2", handlers={UD: "pop eax; hlt" if bits == 32 else "pop rax; hlt"})
    guest.map(0x150000, 0x4000_0000 | tiny.PRESENT | tiny.WRITABLE)
    assert isinstance(guest.run(), Halted)
    assert guest.machine.cpu.gpr[0] == (1 << bits) - 1


def test_page_fault_can_be_delivered_many_times(bits: int) -> None:
    """The engine's memory of an earlier exception is wiped: the third #PF is a #PF, not a double fault."""
    load = "mov eax, [xbx]"
    skip = f"add xsp, {bits // 8}; add WORD ptr [xsp], 2; inc edx; iret{'q' if bits == 64 else 'd'}"
    guest = Tiny(bits, f"mov ebx, {UNMAPPED:#x}; xor edx, edx; {load}; {load}; {load}; hlt", handlers={PF: skip})
    assert isinstance(guest.run(), Halted)
    assert guest.machine.registers.read("edx" if bits == 32 else "rdx") == 3


def test_task_gate_brings_a_double_fault_into_its_own_task() -> None:
    """i386: registers from the second TSS, the old ones into the first; NT, back link, busy bit, CR0.TS, error code."""
    guest = Tiny(32, f"mov ebx, 0x1234; mov esp, {UNMAPPED + 0x1000:#x}; push 1")
    guest.gate(DF, tiny.TASK_GATE, selector=tiny.DOUBLE_FAULT_SELECTOR)
    assert isinstance(guest.run(), Halted)
    machine = guest.machine
    assert machine.cpu.pc == tiny.HANDLERS + 16 * DF + 1
    assert guest.words(guest.stack, 1) == [0]
    assert guest.stack == tiny.IST1_STACK - 4
    saved = guest.words(tiny.TSS + 32, 10)
    assert (saved[0], saved[5], saved[6]) == (CODE + 10, 0x1234, UNMAPPED + 0x1000)
    assert guest.words(tiny.DOUBLE_FAULT_TSS, 1) == [tiny.TSS_SELECTOR]
    assert machine.cpu.eflags & FLAGS_NT
    assert machine.cpu.cr(0) & 8
    assert machine.ram.read(tiny.GDT + tiny.DOUBLE_FAULT_SELECTOR + 5, 1) == b"\x8b"
