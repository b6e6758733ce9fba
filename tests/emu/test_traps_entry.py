"""System-call entry, single-stepping, interrupts and their shadow, HLT, V86 and real mode: SDM vol. 2 and 3."""

from __future__ import annotations

import struct

import pytest

from emu.boot import Guest, GuestMachine
from emu.cpustate import MSR_EFER, MSR_FMASK, MSR_LSTAR, MSR_STAR
from emu.events import POLL
from emu.images.flat import load_flat
from emu.stops import Budget, Halted, Stop
from tests.support import tiny
from tests.support.tiny import CODE, FLAGS_IF, FLAGS_TF, HANDLERS, Tiny

DB, UD, GP = 1, 6, 13
ENTRY = HANDLERS + 16 * 255
"""Where system calls arrive: the last vector's HLT."""
IRQ0_VECTOR = 0x20


@pytest.fixture(params=[32, 64])
def bits(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


# ------------------------------------------------------------------------------------------------- SYSCALL, SYSENTER


def syscall_guest(source: str, fmask: int = 0) -> Tiny:
    guest = Tiny(64, source, ring=3)
    for index, value in (
        (MSR_EFER, 0x501),
        (MSR_STAR, (tiny.USER_CS32 & ~3) << 48 | tiny.KERNEL_CS << 32),
        (MSR_LSTAR, ENTRY),
        (MSR_FMASK, fmask),
    ):
        guest.machine.engine.write_msr(index, value)
    return guest


@pytest.mark.parametrize(("source", "length"), [("syscall", 2), (".byte 0x48, 0x0f, 0x05", 3)])
def test_syscall_enters_the_kernel(source: str, length: int) -> None:
    """RCX is the next instruction, prefixes counted; R11 the flags; FMASK clears some; CS and SS come from STAR."""
    guest = syscall_guest(f"stc; {source}", fmask=1)
    assert isinstance(guest.run(), Halted)
    cpu = guest.machine.cpu
    assert (cpu.pc, cpu.gpr[1]) == (ENTRY + 1, CODE + 1 + length)
    assert (cpu.gpr[11] & 0xFF, cpu.eflags & 1) == (3, 0)
    assert (guest.machine.registers.read("cs"), guest.machine.registers.read("ss")) == (0x08, 0x10)
    assert cpu.cpl == 0
    assert guest.stack == tiny.USER_STACK


def test_syscall_to_address_0_is_no_defect() -> None:
    """A guest that never set LSTAR goes on at 0."""
    guest = syscall_guest("syscall")
    guest.machine.engine.write_msr(MSR_LSTAR, 0)
    guest.run(1)
    assert guest.machine.cpu.pc == 0


def test_sysret_goes_back_to_ring_3() -> None:
    """SYSRETQ loads RIP, flags and the user's segments; the instruction behind SYSCALL runs in ring 3."""
    guest = syscall_guest("syscall; inc ebx; ud2")
    guest.handler(255, ".byte 0x48, 0x0f, 0x07")
    frame = guest.trap()
    assert (frame.vector, frame.pc, frame.cs) == (UD, CODE + 4, tiny.USER_CS64)
    assert guest.machine.cpu.gpr[3] == 1


def test_syscall_without_sce_is_undefined() -> None:
    """EFER.SCE clear: #UD at the instruction."""
    frame = Tiny(64, "nop; syscall", ring=3).trap()
    assert (frame.vector, frame.pc) == (UD, CODE + 1)


def sysenter_guest(bits: int, source: str) -> Tiny:
    guest = Tiny(bits, source, ring=3)
    for index, value in ((0x174, tiny.KERNEL_CS), (0x175, tiny.RING0_STACK), (0x176, ENTRY)):
        guest.machine.engine.write_msr(index, value)
    return guest


def test_sysenter_enters_the_kernel(bits: int) -> None:
    """SP and IP from the MSRs, flat segments, IF off, nothing pushed."""
    guest = sysenter_guest(bits, "sysenter")
    guest.machine.cpu.eflags |= FLAGS_IF
    assert isinstance(guest.run(), Halted)
    cpu = guest.machine.cpu
    assert (cpu.pc, guest.stack, cpu.cpl, cpu.eflags & FLAGS_IF) == (ENTRY + 1, tiny.RING0_STACK, 0, 0)
    assert (guest.machine.registers.read("cs"), guest.machine.registers.read("ss")) == (0x08, 0x10)


def test_sysexit_goes_back_to_ring_3(bits: int) -> None:
    """SYSEXIT takes the pc from DX and the stack from CX, with the user's segments behind the kernel's."""
    guest = sysenter_guest(bits, "mov xcx, xsp; sysenter; inc ebx; ud2")
    behind = CODE + len(guest.code) - len(tiny.assemble("inc ebx; ud2", bits, CODE))
    exits = ".byte 0x48, 0x0f, 0x35" if bits == 64 else ".byte 0x0f, 0x35"
    guest.handler(255, f"mov edx, {behind:#x}; {exits}")
    frame = guest.trap()
    assert (frame.vector, frame.sp, guest.machine.cpu.gpr[3]) == (UD, tiny.USER_STACK, 1)
    assert frame.cs & 3 == 3


def test_sysenter_with_a_null_segment_is_a_general_protection_fault(bits: int) -> None:
    frame = Tiny(bits, "nop; sysenter", ring=3).trap()
    assert (frame.vector, frame.code, frame.pc) == (GP, 0, CODE + 1)


def test_iret_to_ring_3_and_a_trap_back(bits: int) -> None:
    """The kernel's own way down: IRET with a frame of ring 3, then a fault brings it back to the TSS's stack."""
    cs, ss = (tiny.USER_CS64, tiny.USER_SS64) if bits == 64 else (tiny.USER_CS32, tiny.USER_SS)
    down = f"push {ss}; push {tiny.USER_STACK}; push 2; push {cs}; push {CODE + 0x40}; iret{'q' if bits == 64 else 'd'}"
    guest = Tiny(bits, down)
    guest.machine.ram.write(CODE + 0x40, tiny.assemble("inc ebx; ud2", bits, CODE))
    frame = guest.trap()
    assert (frame.vector, frame.cs, frame.sp, guest.machine.cpu.gpr[3]) == (UD, cs, tiny.USER_STACK, 1)
    assert guest.stack == tiny.RING0_STACK - 5 * guest.word


# --------------------------------------------------------------------------------------------- the guest steps itself

SET_TF = "pushfx; or WORD ptr [xsp], 0x100; popfx"
CLEAR_TF = "pushfx; and WORD ptr [xsp], 0xfffffffffffffeff; popfx"


def test_trap_flag_steps_the_guest_instruction_by_instruction(bits: int) -> None:
    """#DB behind each instruction after the POPF that set TF; a handler that IRETs sees every one."""
    count = f"inc edi; iret{'q' if bits == 64 else 'd'}"
    guest = Tiny(bits, f"{SET_TF}; nop; nop; nop; ud2", handlers={DB: count})
    frame = guest.trap()
    assert (frame.vector, guest.machine.cpu.gpr[7]) == (UD, 3)
    assert frame.flags & FLAGS_TF


def test_single_step_is_a_trap_with_bs_in_dr6(bits: int) -> None:
    """The frame has the next instruction and TF; the handler runs without TF, and DR6.BS says what it was."""
    guest = Tiny(bits, f"{SET_TF}; nop; nop")
    frame = guest.trap()
    assert (frame.vector, frame.code, frame.pc) == (DB, None, CODE + len(guest.code) - 1)
    assert frame.flags & FLAGS_TF
    assert not guest.machine.cpu.eflags & FLAGS_TF
    assert guest.machine.cpu.debug_register(6) & 0x4000


# ------------------------------------------------------------------------------------------------------- interrupts


def interrupt_guest(bits: int, source: str, at: int) -> Tiny:
    """IRQ 0 is raised when `at` instructions are done; its vector is 0x20."""
    guest = Tiny(bits, source)
    bus, machine = guest.machine.devices.bus, guest.machine
    for port, value in ((0x20, 0x11), (0x21, IRQ0_VECTOR), (0x21, 4), (0x21, 1), (0x21, 0xFE)):
        bus.write(port, 1, value)
    machine.clock.schedule(at, lambda: machine.devices.pic.set_irq(0, True))
    return guest


STI = "pushfx; or WORD ptr [xsp], 0x200; popfx"


def test_interrupt_arrives_at_its_instruction(bits: int) -> None:
    """Raised after instruction n, it is delivered before n+1: the frame has exactly that pc."""
    nops = "; nop" * 50
    for at in (3, 10, 41):
        guest = interrupt_guest(bits, STI + nops, at)
        frame = guest.trap()
        assert (frame.vector, frame.pc) == (IRQ0_VECTOR, CODE + len(guest.code) - 50 + at - 3)


def test_interrupts_wait_for_if(bits: int) -> None:
    """With IF clear it is held; after STI it comes, at the latest POLL instructions later."""
    nops = "; nop" * 300
    guest = interrupt_guest(bits, "cli" + "; nop" * 100 + "; sti" + nops, 10)
    frame = guest.trap()
    assert frame.vector == IRQ0_VECTOR
    assert CODE + 102 < frame.pc <= CODE + 102 + POLL


@pytest.mark.parametrize("at", [1, 2, 3])
def test_shadow_of_sti_lets_one_instruction_pass(bits: int, at: int) -> None:
    """An interrupt due between STI and the next instruction comes behind that one (SDM vol. 2, STI)."""
    guest = interrupt_guest(bits, "sti; nop; nop; nop", at)
    frame = guest.trap()
    assert (frame.vector, frame.pc) == (IRQ0_VECTOR, CODE + max(at, 2))


def test_shadow_of_mov_ss_lets_one_instruction_pass(bits: int) -> None:
    """So does a load of SS, whose next instruction loads the stack pointer (SDM vol. 3, 6.8.3)."""
    guest = interrupt_guest(bits, f"{STI}; mov eax, 0x10; mov ss, ax; nop; nop; nop", 5)
    frame = guest.trap()
    assert (frame.vector, frame.pc) == (IRQ0_VECTOR, CODE + len(guest.code) - 2)


def test_hlt_wakes_for_an_interrupt_and_time_jumps(bits: int) -> None:
    """The frame has the instruction behind HLT; the time between passed without instructions."""
    guest = interrupt_guest(bits, "sti; hlt; nop", 1_000_000)
    frame = guest.trap()
    assert (frame.vector, frame.pc) == (IRQ0_VECTOR, CODE + 2)
    assert guest.machine.clock.now_ns >= 1_000_000
    assert guest.machine.clock.instructions < 10


def test_hlt_with_interrupts_off_is_for_good(bits: int) -> None:
    guest = Tiny(bits, "cli; hlt; nop")
    assert guest.run() == Halted(CODE + 2, "HLT with interrupts off")


def test_hlt_without_a_timer_is_for_good(bits: int) -> None:
    stop = Tiny(bits, "sti; hlt; nop").run()
    assert isinstance(stop, Halted)
    assert stop.pc == CODE + 2
    assert "no timer" in stop.reason


def test_interrupt_whose_gate_is_absent_says_external(bits: int) -> None:
    """#NP with IDT and EXT set, returning to the interrupted instruction."""
    guest = interrupt_guest(bits, STI + "; nop" * 20, 5)
    guest.gate(IRQ0_VECTOR, 0x0E)
    frame = guest.trap()
    assert (frame.vector, frame.code, frame.pc) == (11, IRQ0_VECTOR * 8 + 3, CODE + len(guest.code) - 18)


# --------------------------------------------------------------------------------------------------- V86, real mode


def test_interrupt_out_of_v86_pushes_its_segments() -> None:
    """IRET with VM, then a fault: GS FS DS ES SS ESP EFLAGS CS EIP on the stack of ring 0, data segments null."""
    words = [0x4000, 0x3000, 0x2000, 0x1000, 0x880, 0x8000, 0x20002, CODE >> 4, 0x40]
    pushes = "; ".join(f"push {value:#x}" for value in words)
    guest = Tiny(32, f"{pushes}; iretd")
    guest.machine.ram.write(CODE + 0x40, b"\x0f\x0b")
    assert isinstance(guest.run(), Halted)
    assert guest.machine.cpu.pc == HANDLERS + 16 * UD + 1
    frame = guest.words(guest.stack, 9)
    assert frame[:2] == [0x40, CODE >> 4]
    assert frame[2] & 0x20000
    assert frame[3:] == [0x8000, 0x880, 0x1000, 0x2000, 0x3000, 0x4000]
    assert [guest.machine.registers.read(name) for name in ("es", "ds", "fs", "gs")] == [0, 0, 0, 0]
    assert not guest.machine.cpu.eflags & 0x20000


def real_mode(code: bytes, vectors: dict[int, int]) -> tuple[GuestMachine, Stop]:
    """A boot sector at 0x7c00 with `vectors` set to offsets; run to its end."""
    machine = GuestMachine(2 << 20)
    machine.guest = Guest("flat", "a boot sector", 16)
    machine.power_on(load_flat("sector", code.ljust(512, b"\x90"), bits=16))
    for vector, offset in vectors.items():
        machine.ram.write(vector * 4, struct.pack("<HH", offset, 0))
    return machine, machine.run(1000)


# 7c00 sti; 7c01 stc; 7c02 int 0x40; 7c04 hlt ... 7c10 hlt
INT_CODE = bytes.fromhex("fbf9cd40f4").ljust(16, b"\x90") + b"\xf4"


def test_real_mode_interrupt_pushes_three_words() -> None:
    """FLAGS, CS, IP; IF and TF off in the handler."""
    machine, stop = real_mode(INT_CODE, {0x40: 0x7C10})
    assert isinstance(stop, Halted)
    assert machine.cpu.gpr[4] & 0xFFFF == 0x7C00 - 6
    pc, cs, flags = struct.unpack("<HHH", machine.ram.read(0x7C00 - 6, 6))
    assert (pc, cs) == (0x7C04, 0)
    assert flags & 0x201 == 0x201
    assert not machine.cpu.eflags & FLAGS_IF


def test_real_mode_iret_goes_back() -> None:
    """The handler at 7c10 IRETs; the guest halts at 7c04, interrupts on, carry kept."""
    machine, stop = real_mode(INT_CODE[:16] + b"\xcf", {0x40: 0x7C10})
    assert isinstance(stop, Halted)
    assert stop.pc == 0x7C05
    assert machine.cpu.eflags & 0x201 == 0x201


@pytest.mark.parametrize(
    ("code", "vector"),
    [("31c9f7f1", 0), ("89c80f0b", 6), ("b0cdcc90", 3)],  # xor cx,cx; div cx | mov ax,cx; ud2 | mov al,0xcd; int3
)
def test_real_mode_exceptions_have_no_error_code(code: str, vector: int) -> None:
    """Three words as for an interrupt; faults return to their instruction, int3 behind it."""
    machine, stop = real_mode(bytes.fromhex(code).ljust(16, b"\x90") + b"\xf4", {vector: 0x7C10})
    assert isinstance(stop, Halted)
    assert stop.pc == 0x7C11
    (pc,) = struct.unpack("<H", machine.ram.read(0x7C00 - 6, 2))
    assert pc == (0x7C03 if vector == 3 else 0x7C02)


def test_budget_is_exact(bits: int) -> None:
    """A loop stops after exactly the instructions it was given, however they are split."""
    for pieces in ([1000], [1, 2, 3, 994], [500, 500]):
        guest = Tiny(bits, "spin: inc ebx; jmp spin")
        for piece in pieces:
            assert guest.run(piece) == Budget(guest.machine.instructions)
        assert (guest.machine.instructions, guest.machine.cpu.gpr[3]) == (1000, 500)
