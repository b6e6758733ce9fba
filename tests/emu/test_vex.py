"""VEX instructions are undefined in the guest, whatever leads to them, and nothing else is."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.engine import self_test
from emu.images.plan import Image, Segment, flat_start
from emu.machine import Machine
from emu.stops import Breakpoint, Step, TripleFault
from emu.vex import begins_with_vex, find_vex
from tests.support.assemble import assemble
from tests.support.trapping import CODE, MEMORY, trapping_image

VPADDD = bytes.fromhex("c5e9fecb")  # vpaddd xmm1, xmm2, xmm3
VPADDD_LONG = bytes.fromhex("c4e169fecb")  # the same with the 3-byte prefix
MULX = bytes.fromhex("c4e2fbf6c1")  # mulx rax, rax, rcx: VEX.0F38
STAY = b"\xeb\xfe"  # jmp to itself

R13, R14 = 13, 14  # traps so far, and where the last one was


def started(code: bytes, skip: int = 0, ring: int = 3) -> Machine:
    machine = Machine(MEMORY)
    machine.power_on(trapping_image(code, skip, ring))
    return machine


def protected(code: bytes) -> Machine:
    """A machine about to run 32-bit code in ring 0; #UD is counted in ESI and stops it with the trap's pc in EDI."""
    idt, handler, entry, at = 0x20000, 0x21000, 0x22000, 0x23000
    gate = struct.pack("<HHBBH", handler & 0xFFFF, 0x10, 0, 0x8E, handler >> 16)
    segments = [
        Segment(idt, bytes(6 * 8) + gate),
        Segment(idt + 0x800, struct.pack("<HI", 0x37, idt)),
        Segment(handler, assemble("inc esi; mov edi, [esp]; stay: jmp stay", 32, handler)),
        Segment(entry, b"\x0f\x01\x1d" + struct.pack("<I", idt + 0x800) + assemble(f"jmp {at}", 32, entry + 7)),
        Segment(at, code),
    ]
    own, start = flat_start("vex", segments, entry, 32)
    machine = Machine(MEMORY)
    machine.power_on(Image("vex", "flat", (*segments, *own), start))
    return machine


class TestUndefined:
    """Where a processor without AVX raises #UD, so does the machine."""

    @pytest.mark.parametrize("ring", [0, 3])
    @pytest.mark.parametrize("code", [VPADDD, VPADDD_LONG, MULX, b"\x2e" + VPADDD], ids=bytes.hex)
    def test_raises_ud_at_its_own_address(self, code: bytes, ring: int) -> None:
        """Three instructions into a block: #UD once, with the VEX instruction's address in the frame."""
        lead = b"\x90\x90\x90"
        machine = started(lead + code + STAY, len(code), ring)
        machine.run(200)
        assert (machine.cpu.gpr[R13], machine.cpu.gpr[R14]) == (1, CODE + len(lead))

    def test_changes_no_register(self) -> None:
        """The engine's wrong sum never reaches the destination."""
        machine = started(VPADDD + STAY, len(VPADDD))
        machine.registers.write("xmm1", 1)
        machine.registers.write("xmm3", 4)
        machine.run(200)
        assert machine.registers.read("xmm1") == 1

    def test_raises_ud_each_time(self) -> None:
        """In a loop, where the block is translated once and chained to itself."""
        machine = started(VPADDD + b"\xeb" + struct.pack("b", -6), len(VPADDD))
        machine.run(2000)
        assert machine.cpu.gpr[R13] > 200

    def test_as_the_first_instruction_of_a_machine(self) -> None:
        """Without an IDT #UD cannot be delivered: the machine shuts down before anything else runs."""
        segment = Segment(CODE, VPADDD + STAY)
        own, start = flat_start("vex", [segment], CODE, 64)
        machine = Machine(MEMORY)
        machine.power_on(Image("vex", "flat", (segment, *own), start))
        stop = machine.run(100)
        assert isinstance(stop, TripleFault)
        assert (stop.vector, stop.pc) == (6, CODE)

    def test_in_32_bit_code(self) -> None:
        machine = protected(b"\x90" + VPADDD + STAY)
        machine.run(100)
        assert (machine.cpu.gpr[6], machine.cpu.gpr[7]) == (1, 0x23001)

    def test_counts_as_ud2_does(self) -> None:
        """Virtual time does not tell the two apart: as many traps in as many instructions."""
        loop = b"\xeb" + struct.pack("b", -6)
        machines = [started(code + loop, 4) for code in (VPADDD, b"\x0f\x0b\x90\x90")]
        for machine in machines:
            machine.run(5000)
        assert machines[0].cpu.gpr[R13] == machines[1].cpu.gpr[R13]

    def test_many_more_than_the_engine_can_have_hooks(self) -> None:
        """300 of them, three times round: each raises #UD each time, though hooks are taken back in between."""
        block = VPADDD + b"\xeb\x00"
        loop = assemble(f"jmp {CODE}", 64, CODE + 300 * len(block))
        machine = started(block * 300 + loop, len(VPADDD))
        machine.run(1000)
        before, rounds = machine.cpu.gpr[R13], 0
        while machine.cpu.gpr[R13] < before + 900:
            machine.run(1000)
            rounds += 1
        assert rounds <= 7  # 6 instructions a trap: 900 traps are 5,400

    def test_is_one_step(self) -> None:
        """A debugger's step over it ends at the handler's first instruction."""
        machine = started(b"\x90" + VPADDD + STAY, len(VPADDD), ring=0)
        while machine.cpu.pc != CODE + 1:
            machine.step()
        before = machine.instructions
        assert isinstance(machine.step(), Step)
        assert machine.instructions == before + 1
        assert machine.memory.read(machine.cpu.pc, 3) == bytes.fromhex("49ffc5")  # inc r13

    def test_after_a_breakpoint_on_it(self) -> None:
        """The breakpoint is reported first, once; then comes the trap."""
        machine = started(b"\x90" + VPADDD + STAY, len(VPADDD))
        machine.insert_breakpoint(CODE + 1)
        assert isinstance(machine.run(1000), Breakpoint)
        machine.run(100)
        assert (machine.cpu.gpr[R13], machine.cpu.gpr[R14]) == (1, CODE + 1)


class TestChangingCode:
    """The bytes that count are those at the moment of execution."""

    def test_written_by_the_guest_over_code_that_ran(self) -> None:
        """It calls four nops, stores the instruction over them, and calls again."""
        target = CODE + 0x100
        store = f"mov dword ptr [{target}], {int.from_bytes(VPADDD, 'little'):#x}"
        source = f"call {target}; {store}; call {target}; stay: jmp stay"
        code = assemble(source, 64, CODE).ljust(0x100, b"\x90") + b"\x90" * 4 + b"\xc3"
        machine = started(code, len(VPADDD), ring=0)
        machine.run(500)
        assert (machine.cpu.gpr[R13], machine.cpu.gpr[R14]) == (1, target)

    def test_written_by_a_debugger_over_code_that_ran(self) -> None:
        machine = started(b"\x90" * 4 + b"\xeb\xfa", 4)
        machine.run(500)
        machine.memory.write(CODE, VPADDD)
        machine.run(500)
        assert machine.cpu.gpr[R13] > 10

    def test_replaced_by_something_else(self) -> None:
        """Four nops where it stood are four nops."""
        machine = started(VPADDD + b"\xeb\xfa", 4)
        machine.run(500)
        machine.memory.write(CODE, b"\x90" * 4)
        machine.run(20)
        before = machine.cpu.gpr[R13]
        machine.run(500)
        assert machine.cpu.gpr[R13] == before > 0


class TestEverythingElse:
    """What only looks like VEX runs as ever."""

    def test_immediate_with_the_same_bytes(self) -> None:
        """mov eax, 0xcbfee9c5: the four bytes of vpaddd are its operand."""
        machine = started(b"\xb8" + VPADDD + STAY)
        machine.run(100)
        assert (machine.cpu.gpr[0], machine.cpu.gpr[R13]) == (0xCBFEE9C5, 0)

    @pytest.mark.parametrize(("opcode", "segment"), [(0xC4, "es"), (0xC5, "ds")], ids=["les", "lds"])
    def test_les_and_lds_in_32_bit_code(self, opcode: int, segment: str) -> None:
        """With a memory operand, c4 and c5 load a far pointer."""
        pointer = 0x23100
        code = bytes((opcode, 0x05)) + struct.pack("<I", pointer) + STAY
        machine = protected(code.ljust(0x100, b"\0") + struct.pack("<IH", 0x12345678, 0x18))
        machine.run(100)
        assert (machine.cpu.gpr[0], machine.registers.read(segment)) == (0x12345678, 0x18)

    def test_sse_without_vex(self) -> None:
        """paddd xmm1, xmm3."""
        machine = started(b"\x66\x0f\xfe\xcb" + STAY)
        machine.registers.write("xmm1", 1)
        machine.registers.write("xmm3", 4)
        machine.run(100)
        assert machine.registers.read("xmm1") == 5


class TestFinding:
    """`find_vex` and `begins_with_vex`, on bytes."""

    def test_the_engine_needs_it(self) -> None:
        """Once this fails, Unicorn has learnt VEX and `emu.vex` can go."""
        assert self_test() == ("VEX: vpaddd xmm1,xmm2,xmm3 ignores xmm2",)

    @given(
        lead=st.lists(st.sampled_from(["90", "89c5", "4883c408", "b8c5e9fecb", "0fc4c500", "4801c5"]), max_size=8),
        vex=st.sampled_from([VPADDD, VPADDD_LONG, MULX]),
    )
    def test_first_one_after_any_legacy_code(self, lead: list[str], vex: bytes) -> None:
        """Legacy instructions full of c4 and c5 before it are told from it."""
        code = bytes.fromhex("".join(lead))
        assert find_vex(code + vex + VPADDD, 64) == len(code)
        assert find_vex(code, 64) is None

    @pytest.mark.parametrize(
        ("code", "bits", "expected"),
        [
            (VPADDD, 64, True),
            (VPADDD, 32, True),
            (VPADDD, 16, False),
            (b"\x64\x67" + VPADDD, 64, True),
            (b"\xc5\x78\x28\xc8", 64, True),  # vmovaps xmm8: R is in use, so in 32-bit code it would be lds
            (b"\xc5\x78\x28\xc8", 32, False),
            (b"\xc4\xe9\xfe\xcb", 64, False),  # map 9 does not exist
            (b"\xc5\xe9", 64, False),
            (b"", 64, False),
        ],
    )
    def test_bytes(self, code: bytes, bits: int, expected: bool) -> None:
        assert begins_with_vex(code, bits) is expected
