"""Agent expressions: what each instruction computes, what is refused before it runs, and what bounds a run."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from emu.arch import I386, X86_64, Arch
from gdbstub.agent import (
    MAX_LENGTH,
    MAX_MEMORY,
    MAX_STACK,
    Agent,
    BadExpression,
    Failure,
    Fault,
    Outcome,
    StateVariables,
)
from tests.support.fake_machine import DATA, PAGE, FakeMachine

ADD, SUB, MUL = "02", "03", "04"
DIV_SIGNED, DIV_UNSIGNED, REM_SIGNED, REM_UNSIGNED = "05", "06", "07", "08"
LSH, RSH_SIGNED, RSH_UNSIGNED = "09", "0a", "0b"
TRACE, TRACE_QUICK, TRACE16, TRACE_STRING = "0c", "0d", "30", "2f"
LOG_NOT, BIT_AND, BIT_OR, BIT_XOR, BIT_NOT = "0e", "0f", "10", "11", "12"
EQUAL, LESS_SIGNED, LESS_UNSIGNED = "13", "14", "15"
EXT, ZERO_EXT = "16", "2a"
REF8, REF16, REF32, REF64 = "17", "18", "19", "1a"
IF_GOTO, GOTO = "20", "21"
REG, END, DUP, POP, SWAP, PICK, ROT = "26", "27", "28", "29", "2b", "32", "33"
GETV, SETV, TRACEV = "2c", "2d", "2e"
TOP = (1 << 64) - 1


def const(value: int) -> str:
    """const64."""
    return f"25{value & TOP:016x}"


class World:
    """An agent on the fake machine, and what it has printed and recorded."""

    def __init__(self, arch: Arch = X86_64) -> None:
        self.machine = FakeMachine(arch)
        self.printed = ""
        self.memory: list[tuple[int, bytes]] = []
        self.recorded_variables: list[tuple[int, int]] = []
        self.variables = StateVariables()
        self.agent = Agent(self.machine, arch, self.variables, self.print)

    def print(self, text: str) -> None:
        self.printed += text

    def record_memory(self, vaddr: int, data: bytes) -> None:
        self.memory.append((vaddr, data))

    def record_variable(self, number: int, value: int) -> None:
        self.recorded_variables.append((number, value))

    def run(self, *code: str) -> Outcome:
        return self.agent.compile(bytes.fromhex("".join(code))).evaluate(self)


@pytest.fixture
def world() -> World:
    return World()


# ----------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("left", "right", "operation", "result"),
    [
        (TOP, 2, ADD, 1),
        (1, 2, SUB, TOP),
        (1 << 63, 2, MUL, 0),
        (-7, 2, DIV_SIGNED, -3),
        (7, -2, DIV_SIGNED, -3),
        (-1 << 63, -1, DIV_SIGNED, -1 << 63),
        (-7, 2, DIV_UNSIGNED, (TOP - 6) // 2),
        (-7, 2, REM_SIGNED, -1),
        (7, -2, REM_SIGNED, 1),
        (-7, 2, REM_UNSIGNED, 1),
        (1, 63, LSH, 1 << 63),
        (1, 65, LSH, 2),
        (-8, 1, RSH_SIGNED, -4),
        (-8, 1, RSH_UNSIGNED, (TOP - 7) >> 1),
        (12, 10, BIT_AND, 8),
        (12, 10, BIT_OR, 14),
        (12, 10, BIT_XOR, 6),
        (5, 5, EQUAL, 1),
        (5, 6, EQUAL, 0),
        (-1, 0, LESS_SIGNED, 1),
        (-1, 0, LESS_UNSIGNED, 0),
        (0, 1, LESS_UNSIGNED, 1),
    ],
)
def test_two_values_become_one(world: World, left: int, right: int, operation: str, result: int):
    """Arithmetic is on 64 bits, signed values in two's complement, division towards zero, as gdbserver computes."""
    assert world.run(const(left), const(right), operation, END) == result & TOP


@pytest.mark.parametrize(
    ("value", "operation", "result"),
    [
        (0, LOG_NOT, 1),
        (9, LOG_NOT, 0),
        (0, BIT_NOT, TOP),
        (0x80, EXT + "08", -0x80),
        (0x7F, EXT + "08", 0x7F),
        (0x80000000, EXT + "20", -0x80000000),
        (1 << 40, EXT + "29", -1 << 40),
        (-1, EXT + "40", -1),
        (0x1FF, ZERO_EXT + "08", 0xFF),
        (-1, ZERO_EXT + "20", 0xFFFFFFFF),
        (-1, ZERO_EXT + "40", -1),
        (-1, ZERO_EXT + "00", 0),
    ],
)
def test_one_value_becomes_another(world: World, value: int, operation: str, result: int):
    """Negation and the extensions, whose widths above 63 bits change nothing."""
    assert world.run(const(value), operation, END) == result & TOP


@pytest.mark.parametrize("operation", [DIV_SIGNED, DIV_UNSIGNED, REM_SIGNED, REM_UNSIGNED])
def test_division_by_zero_is_a_failure(world: World, operation: str):
    """A value, not an exception."""
    outcome = world.run(const(1), const(0), operation, END)
    assert outcome == Failure(Fault.DIVISION, "division by zero")


def test_constants_are_big_endian_and_unsigned(world: World):
    """Each width of const, summed."""
    assert world.run("22ff", "238000", ADD, "2480000000", ADD, END) == 0xFF + 0x8000 + 0x80000000


def test_stack_movements(world: World):
    """dup, pop, swap, pick and rot, seen through subtraction."""
    three = const(1) + const(2) + const(3)
    assert world.run(const(5), DUP, ADD, END) == 10
    assert world.run(const(5), const(6), POP, END) == 5
    assert world.run(const(5), const(6), SWAP, SUB, END) == 1
    assert world.run(three, PICK, "02", END) == 1
    assert world.run(three, PICK, "00", END) == 3
    assert world.run(three, ROT, END) == 2  # a b c => c a b
    assert world.run(three, ROT, POP, END) == 1
    assert world.run(three, ROT, POP, POP, END) == 3


def test_jumps(world: World):
    """A loop that counts to ten: if_goto pops its value, targets are offsets from the first byte."""
    counting = "2200" + "2201" + ADD + DUP + "220a" + EQUAL + IF_GOTO + "000f" + GOTO + "0002" + END
    assert world.run(counting) == 10


# ---------------------------------------------------------------------------------------------------- registers, memory


@pytest.mark.parametrize("arch", [I386, X86_64], ids=lambda arch: arch.name)
def test_registers_by_gdb_number(arch: Arch):
    """The program counter by the number target.xml gives it."""
    world = World(arch)
    assert world.run(REG, f"{arch.numbers[arch.pc]:04x}", END) == world.machine.pc


def test_memory_is_little_endian(world: World):
    """Each width of ref."""
    world.machine.memory.write(DATA, bytes(range(0x81, 0x89)))
    assert world.run(const(DATA), REF8, END) == 0x81
    assert world.run(const(DATA), REF16, END) == 0x8281
    assert world.run(const(DATA), REF32, END) == 0x84838281
    assert world.run(const(DATA), REF64, END) == 0x8887868584838281


def test_unmapped_memory_is_a_failure(world: World):
    """With the first address that has no byte."""
    outcome = world.run(const(DATA + PAGE - 4), REF64, END)
    assert outcome == Failure(Fault.MEMORY, f"invalid memory access at {DATA + PAGE:#x}")


def test_an_expression_without_a_value(world: World):
    """`end` with nothing on the stack: what actions that only record do."""
    assert world.run(END) is None


# -------------------------------------------------------------------------------------------------------------- tracing


def test_memory_is_recorded(world: World):
    """trace takes address and size, trace_quick and trace16 leave the address, tracenz ends behind the NUL."""
    world.machine.memory.write(DATA, b"abcdefgh\0ijk")
    assert world.run(const(DATA), const(3), TRACE, END) is None
    assert world.run(const(DATA), TRACE_QUICK, "02", END) == DATA
    assert world.run(const(DATA + 1), TRACE16, "0002", END) == DATA + 1
    assert world.run(const(DATA), const(100), TRACE_STRING, END) is None
    assert world.run(const(DATA), const(4), TRACE_STRING, END) is None
    assert world.memory == [
        (DATA, b"abc"),
        (DATA, b"ab"),
        (DATA + 1, b"bc"),
        (DATA, b"abcdefgh\0"),
        (DATA, b"abcd"),
    ]


def test_addresses_of_a_32_bit_guest_have_32_bits():
    """gdb takes a register for an int and extends its sign: half of all addresses come with 32 ones before them."""
    world, vaddr = World(I386), 0xC0000000
    world.machine.memory.map(vaddr)
    world.machine.memory.write(vaddr, b"high\0")
    extended = const(vaddr - (1 << 32))
    assert world.run(extended, REF8, END) == ord("h")
    world.run(extended, const(4), TRACE, extended, TRACE_QUICK, "02", extended, const(9), TRACE_STRING, END)
    assert world.memory == [(vaddr, b"high"), (vaddr, b"hi"), (vaddr, b"high\0")]


def test_what_cannot_be_read_is_not_recorded(world: World):
    """A range with a hole is recorded up to it; nothing is made up, and the expression goes on."""
    assert world.run(const(DATA + PAGE - 2), TRACE_QUICK, "08", const(8), TRACE_QUICK, "08", END) == 8
    assert world.memory == [(DATA + PAGE - 2, b"\0\0")]


def test_state_variables(world: World):
    """setv leaves its value on the stack; tracev leaves the stack alone; an undefined one reads 0 and stays so."""
    world.variables.define(2, 40)
    assert world.run(GETV, "0002", const(2), ADD, SETV, "0002", TRACEV, "0002", END) == 42
    assert world.recorded_variables == [(2, 42)]
    assert world.run(const(9), SETV, "0003", GETV, "0003", END) == 0


def test_a_computed_variable_is_read_only(world: World):
    """Like gdb's trace_timestamp."""
    world.variables.compute(1, lambda: 77)
    assert world.run(const(9), SETV, "0001", GETV, "0001", END) == 77


# ------------------------------------------------------------------------------------------------------------- printing


def print_code(text: str, *values: int) -> str:
    data = text.encode() + b"\0"
    pushed = "".join(const(value) for value in reversed(values))
    return pushed + const(0) + const(0) + f"34{len(values):02x}{len(data):04x}" + data.hex() + END


@pytest.mark.parametrize(
    ("text", "values", "printed"),
    [
        (r"tab\tquote\"end\n", (), 'tab\tquote"end\n'),
        ("100%% of %d", (5,), "100% of 5"),
        ("%d %i %u", (TOP, TOP, TOP), "-1 -1 4294967295"),
        ("%ld %lu %llx", (TOP, TOP, TOP), f"-1 {TOP} {TOP:x}"),
        ("%hhd %hd", (0xFF, 0x8000), "-1 -32768"),
        ("[%5d][%-5d][%05d][%+d][% d]", (42, 42, 42, 42, 42), "[   42][42   ][00042][+42][ 42]"),
        ("%.3d|%x|%#x|%X|%#o", (7, 255, 255, 255, 8), "007|ff|0xff|FF|010"),
        ("%06d %#x", (TOP, 0), "-00001 0"),
        ("%c%c", (0x41, 0x142), "AB"),
        ("%s|%.4s|%10s|%-6s|", (DATA, DATA, 0, DATA + 12), "data of the guest|data|    (null)|guest |"),
        ("%p", (0x1234,), "0x1234"),
    ],
)
def test_formats(world: World, text: str, values: tuple[int, ...], printed: str):
    """The directives and escapes that gdb lets through, with C's meaning."""
    assert world.run(print_code(text, *values)) is None
    assert world.printed == printed


def test_long_is_the_guests():
    """Four bytes on i386."""
    world = World(I386)
    world.run(print_code("%ld %p", TOP, TOP))
    assert world.printed == "-1 0xffffffff"


@pytest.mark.parametrize("text", ["%f", "%g", "%n", "%", "%5", r"\q", "%2000d", "%.9999999999d", "%d %d"])
def test_formats_that_cannot_be_printed(world: World, text: str):
    """Floats, what writes memory, what ends inside a directive, huge widths, more directives than values."""
    with pytest.raises(BadExpression):
        world.run(print_code(text, 1))


def test_a_string_that_is_nowhere(world: World):
    """A failure of the run, and nothing is printed."""
    outcome = world.run(print_code("%s", 0x10))
    assert isinstance(outcome, Failure)
    assert outcome.fault is Fault.MEMORY
    assert world.printed == ""


# ---------------------------------------------------------------------------------------------- refusals and the limits


@pytest.mark.parametrize(
    ("code", "offset", "reason"),
    [
        ("", 0, "0 bytes of code"),
        (END * (MAX_LENGTH + 1), 0, "65537 bytes of code"),
        ("2201", 0, "leads to byte 2"),
        ("22", 0, "const8 is cut short"),
        ("3400", 0, "printf is cut short"),
        ("34000000", 0, "does not end with NUL"),
        ("3400000141", 0, "does not end with NUL"),
        (END + "00", 1, "0x00 is no instruction"),
        (END + "ff", 1, "0xff is no instruction"),
        ("01" + END, 0, "float"),
        ("22001b" + END, 2, "ref_float"),
        ("2205" + ADD + END, 2, "too few values"),
        ("2205" + PICK + "01" + END, 2, "too few values"),
        ("2205" + ROT + END, 2, "too few values"),
        (GOTO + "0063" + END, 0, "leads to byte 99"),
        ("22" + "22" + GOTO + "0001" + END, 2, "leads to byte 1"),
        ("2201" + "20" + "0007" + "2201" + END, 7, "values on the stack"),
        (REG + "7fff" + END, 0, "no register 32767"),
        (REG + "0018" + END, 0, "register st0 has 80 bits"),
        ("2201" + "1600" + END, 2, "ext of no bits"),
        ("2201" + DUP * MAX_STACK + END, 101, "more than 100 values"),
    ],
)
def test_refused_before_it_runs(world: World, code: str, offset: int, reason: str):
    """What is wrong, and at which byte."""
    with pytest.raises(BadExpression, match=reason) as caught:
        world.agent.compile(bytes.fromhex(code))
    assert caught.value.offset == offset


def test_a_loop_without_end_is_ended(world: World):
    """By the number of instructions."""
    outcome = world.run(GOTO, "0000")
    assert isinstance(outcome, Failure)
    assert outcome.fault is Fault.STEPS


@pytest.mark.parametrize("what", [const(MAX_MEMORY + 1) + TRACE, const(-1) + TRACE])
def test_memory_of_a_run_is_bounded(world: World, what: str):
    """More than the limit is not even begun."""
    outcome = world.run(const(DATA), what, END)
    assert isinstance(outcome, Failure)
    assert outcome.fault is Fault.SPACE
    assert world.memory == []


def test_each_run_has_the_whole_limit(world: World):
    """What one run has read does not count in the next."""
    expression = world.agent.compile(bytes.fromhex(const(DATA) + const(MAX_MEMORY) + TRACE + END))
    assert expression.evaluate(world) is None
    assert expression.evaluate(world) is None


OPCODES = st.sampled_from([*range(0x01, 0x35)])
LIKELY = st.lists(
    st.one_of(OPCODES.map(lambda opcode: bytes((opcode,))), st.integers(0, 40).map(lambda n: bytes((0x22, n)))),
    max_size=40,
).map(lambda pieces: b"".join(pieces) + b"\x27")


@given(st.one_of(st.binary(max_size=64), LIKELY))
@example(bytes.fromhex("2201 28 02 21 0002"))
def test_any_bytes_are_refused_or_end(code: bytes):
    """Whatever the bytes, the answer is a refusal, a value or a failure; no exception of another kind, no hang."""
    world = World()
    try:
        expression = world.agent.compile(code)
    except BadExpression:
        return
    outcome = expression.evaluate(world)
    assert outcome is None or isinstance(outcome, Failure) or 0 <= outcome <= TOP
    assert sum(len(data) for _, data in world.memory) + len(world.printed) <= MAX_MEMORY
