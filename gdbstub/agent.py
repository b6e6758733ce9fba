"""Agent expressions: the byte code in which gdb sends conditions, dprintf and what a tracepoint is to collect.

Rules: the machine's thread; knows the machine as `emu.iface` only, no packet and no session. An expression is decoded
and checked once, by `Agent.compile`: jumps land on instructions, the stack is as high on every way to an instruction
and never too high or too low, registers exist. What is left to go wrong while it runs is a value, `Failure`, never an
exception; the limits below bound every run, whatever the bytes are.

Source: GDB manual, appendix F "The GDB Agent Expression Mechanism"; opcodes as in gdbsupport/ax.def; where the manual
is silent (tracev pushes nothing, shifts, division), what gdbserver does on x86-64.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from emu.arch import Arch
from emu.iface import Machine, MemoryFault
from gdbstub.agentprintf import FormatError, Template

MAX_LENGTH: Final = 0x10000  # bytes of code: as far as a jump of two bytes reaches
MAX_STACK: Final = 100  # values; gdbserver's STACK_MAX
MAX_STEPS: Final = 20_000  # instructions a run: some milliseconds
MAX_MEMORY: Final = 1 << 20  # bytes a run may read, record and print, all together
MAX_VARIABLES: Final = 4096

_MASK: Final = (1 << 64) - 1
_END: Final = -1


class BadExpression(Exception):
    """Code that is refused before it runs: what is wrong at which byte."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"agent expression, byte {offset}: {reason}")
        self.offset = offset
        self.reason = reason


class Fault(enum.Enum):
    """What went wrong in a run, in the words `tstatus` shows."""

    MEMORY = "invalid memory access"
    DIVISION = "division by zero"
    STEPS = f"more than {MAX_STEPS} instructions"
    SPACE = f"more than {MAX_MEMORY} bytes of memory"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run had no result; `text` is a line for the user."""

    fault: Fault
    text: str


Outcome: TypeAlias = int | Failure | None
"""The value on top of the stack (0 to 2**64 - 1), None where there is none, or what went wrong."""


class Sink(Protocol):
    """Where the trace instructions put what they record."""

    def record_memory(self, vaddr: int, data: bytes) -> None: ...

    def record_variable(self, number: int, value: int) -> None: ...


class StateVariables:
    """Trace state variables: 64-bit numbers that live here, by gdb's number. A computed one cannot be set."""

    def __init__(self) -> None:
        self._values: dict[int, int] = {}
        self._computed: dict[int, Callable[[], int]] = {}

    def define(self, number: int, value: int) -> None:
        """ValueError for one too many."""
        if len(self._values) >= MAX_VARIABLES and number not in self._values:
            raise ValueError(f"no more than {MAX_VARIABLES} trace state variables")
        self._values[number] = value & _MASK

    def compute(self, number: int, value: Callable[[], int]) -> None:
        """A built-in variable."""
        self._computed[number] = value

    def clear(self) -> None:
        """Forget all but the built-in ones."""
        self._values.clear()

    def get(self, number: int) -> int:
        """0 where it isn't defined, as gdbserver has it."""
        computed = self._computed.get(number)
        return computed() & _MASK if computed is not None else self._values.get(number, 0)

    def set(self, number: int, value: int) -> None:
        """Nothing happens where it isn't defined."""
        if number in self._values:
            self._values[number] = value & _MASK

    def __contains__(self, number: int) -> bool:
        return number in self._values or number in self._computed


# ------------------------------------------------------------------------------------------------------------- opcodes


@dataclass(frozen=True, slots=True)
class _Op:
    """An instruction's name, bytes of operand after it, and values taken from and put on the stack."""

    name: str
    operand: int = 0
    pops: int = 0
    pushes: int = 0


_PRINTF: Final = 0x34  # its operand and what it pops depend on its bytes
_IF_GOTO, _GOTO, _FINISH, _PICK, _REG = 0x20, 0x21, 0x27, 0x32, 0x26

_OPS: Final = {
    0x02: _Op("add", 0, 2, 1),
    0x03: _Op("sub", 0, 2, 1),
    0x04: _Op("mul", 0, 2, 1),
    0x05: _Op("div_signed", 0, 2, 1),
    0x06: _Op("div_unsigned", 0, 2, 1),
    0x07: _Op("rem_signed", 0, 2, 1),
    0x08: _Op("rem_unsigned", 0, 2, 1),
    0x09: _Op("lsh", 0, 2, 1),
    0x0A: _Op("rsh_signed", 0, 2, 1),
    0x0B: _Op("rsh_unsigned", 0, 2, 1),
    0x0C: _Op("trace", 0, 2, 0),
    0x0D: _Op("trace_quick", 1, 1, 1),
    0x0E: _Op("log_not", 0, 1, 1),
    0x0F: _Op("bit_and", 0, 2, 1),
    0x10: _Op("bit_or", 0, 2, 1),
    0x11: _Op("bit_xor", 0, 2, 1),
    0x12: _Op("bit_not", 0, 1, 1),
    0x13: _Op("equal", 0, 2, 1),
    0x14: _Op("less_signed", 0, 2, 1),
    0x15: _Op("less_unsigned", 0, 2, 1),
    0x16: _Op("ext", 1, 1, 1),
    0x17: _Op("ref8", 0, 1, 1),
    0x18: _Op("ref16", 0, 1, 1),
    0x19: _Op("ref32", 0, 1, 1),
    0x1A: _Op("ref64", 0, 1, 1),
    _IF_GOTO: _Op("if_goto", 2, 1, 0),
    _GOTO: _Op("goto", 2, 0, 0),
    0x22: _Op("const8", 1, 0, 1),
    0x23: _Op("const16", 2, 0, 1),
    0x24: _Op("const32", 4, 0, 1),
    0x25: _Op("const64", 8, 0, 1),
    _REG: _Op("reg", 2, 0, 1),
    _FINISH: _Op("end"),
    0x28: _Op("dup", 0, 1, 2),
    0x29: _Op("pop", 0, 1, 0),
    0x2A: _Op("zero_ext", 1, 1, 1),
    0x2B: _Op("swap", 0, 2, 2),
    0x2C: _Op("getv", 2, 0, 1),
    0x2D: _Op("setv", 2, 1, 1),
    0x2E: _Op("tracev", 2, 0, 0),
    0x2F: _Op("tracenz", 0, 2, 0),
    0x30: _Op("trace16", 2, 1, 1),
    _PICK: _Op("pick", 1, 0, 1),
    0x33: _Op("rot", 0, 3, 3),
}
_FLOAT: Final = {
    0x01: "float",
    0x1B: "ref_float",
    0x1C: "ref_double",
    0x1D: "ref_long_double",
    0x1E: "l_to_d",
    0x1F: "d_to_l",
}


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _divide(a: int, b: int) -> int:
    """Towards zero, as C does."""
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


_BINARY: Final[dict[str, Callable[[int, int], int]]] = {
    "add": lambda a, b: (a + b) & _MASK,
    "sub": lambda a, b: (a - b) & _MASK,
    "mul": lambda a, b: (a * b) & _MASK,
    "div_signed": lambda a, b: _divide(_signed(a), _signed(b)) & _MASK,
    "div_unsigned": lambda a, b: a // b,
    "rem_signed": lambda a, b: (_signed(a) - _signed(b) * _divide(_signed(a), _signed(b))) & _MASK,
    "rem_unsigned": lambda a, b: a % b,
    # Counts of 64 and more are undefined in C; gdbserver's processor looks at their low six bits.
    "lsh": lambda a, b: (a << (b & 63)) & _MASK,
    "rsh_signed": lambda a, b: (_signed(a) >> (b & 63)) & _MASK,
    "rsh_unsigned": lambda a, b: a >> (b & 63),
    "bit_and": lambda a, b: a & b,
    "bit_or": lambda a, b: a | b,
    "bit_xor": lambda a, b: a ^ b,
    "equal": lambda a, b: int(a == b),
    "less_signed": lambda a, b: int(_signed(a) < _signed(b)),
    "less_unsigned": lambda a, b: int(a < b),
}
_UNARY: Final[dict[str, Callable[[int], int]]] = {
    "log_not": lambda a: int(not a),
    "bit_not": lambda a: a ^ _MASK,
}
_REFS: Final = {"ref8": 1, "ref16": 2, "ref32": 4, "ref64": 8}

# ---------------------------------------------------------------------------------------------------------- expressions

_Stack: TypeAlias = list[int]
_Step: TypeAlias = Callable[[_Stack], int]
"""One instruction with its operand built in: changes the stack, returns the offset of the next one or _END."""


class _Abort(Exception):
    """Carries a Failure out of a step."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


class Expression:
    """Checked code, ready to run on the machine of the `Agent` that compiled it."""

    def __init__(self, agent: Agent, code: bytes, steps: Sequence[_Step | None]) -> None:
        self.code = code
        self._agent = agent
        self._steps = steps

    def evaluate(self, sink: Sink | None = None) -> Outcome:
        """Run it on the machine as it is now; without `sink`, trace instructions record nothing."""
        steps, index = self._steps, 0
        stack: _Stack = []
        self._agent.begin(sink)
        try:
            for _ in range(MAX_STEPS):
                index = steps[index](stack)  # type: ignore[misc]  # compile has seen to it that there is one
                if index < 0:
                    return stack[-1] if stack else None
        except MemoryFault as fault:
            return Failure(Fault.MEMORY, f"{Fault.MEMORY.value} at {fault.address:#x}")
        except ZeroDivisionError:
            return Failure(Fault.DIVISION, Fault.DIVISION.value)
        except _Abort as abort:
            return abort.failure
        return Failure(Fault.STEPS, Fault.STEPS.value)


class Agent:
    """Compiles and runs expressions on one machine; `output` gets what they print.

    Registers are numbered as gdb numbers those of `arch`, which changes when a debugger is told of another.
    """

    def __init__(self, machine: Machine, arch: Arch, variables: StateVariables, output: Callable[[str], None]) -> None:
        self.variables = variables
        self._machine = machine
        self.arch = arch
        self._output = output
        self._sink: Sink | None = None
        self._space = 0  # bytes of MAX_MEMORY left to this run

    def begin(self, sink: Sink | None) -> None:
        """A run starts. `Expression` calls it."""
        self._sink = sink
        self._space = MAX_MEMORY

    # ---------------------------------------------------------------------------------------------------- compilation

    def compile(self, code: bytes) -> Expression:
        """Decode and check; BadExpression says what is wrong where."""
        if not code or len(code) > MAX_LENGTH:
            raise BadExpression(0, f"{len(code)} bytes of code; 1 to {MAX_LENGTH} are possible")
        instructions = _decode(code)
        _check_flow(instructions)
        steps: list[_Step | None] = [None] * len(code)
        for instruction in instructions.values():
            steps[instruction.offset] = self._step(instruction)
        return Expression(self, code, steps)

    def _step(self, instruction: _Instruction) -> _Step:
        name, value, after = instruction.op.name, instruction.value, instruction.after
        if name in _BINARY:
            return _binary(_BINARY[name], after)
        if name in _UNARY:
            return _unary(_UNARY[name], after)
        if name.startswith("const"):
            return _push(lambda: value, after)
        if name in _REFS:
            return _unary(self._reader(_REFS[name]), after)
        if name in ("ext", "zero_ext"):
            return _unary(_extension(instruction), after)
        if name in ("if_goto", "goto", "end", "dup", "pop", "swap", "pick", "rot"):
            return _flow(name, value, after)
        if name == "reg":
            return _push(self._register(instruction), after)
        if name == "printf":
            return self._printer(instruction)
        return self._tracer(name, value, after)

    def _register(self, instruction: _Instruction) -> Callable[[], int]:
        registers = self.arch.registers
        if instruction.value >= len(registers):
            raise BadExpression(instruction.offset, f"no register {instruction.value}")
        register = registers[instruction.value]
        if register.size > 8:
            raise BadExpression(instruction.offset, f"register {register.name} has {register.bits} bits")
        read, name = self._machine.registers.read, register.name
        return lambda: read(name)

    def _reader(self, size: int) -> Callable[[int], int]:
        read, mask = self._machine.memory.read, self._address_mask

        def reference(value: int) -> int:
            self._charge(size)
            return int.from_bytes(read(value & mask, size), "little")

        return reference

    def _tracer(self, name: str, value: int, after: int) -> _Step:
        """The instructions about tracing and its variables."""
        variables = self.variables

        def trace(stack: _Stack) -> int:
            size = stack.pop()
            self._trace(stack.pop(), size)
            return after

        def trace_quick(stack: _Stack) -> int:
            self._trace(stack[-1], value)
            return after

        def trace_string(stack: _Stack) -> int:
            limit, vaddr = stack.pop(), stack.pop() & self._address_mask
            self._record(vaddr, self._string(vaddr, limit, keep_end=True))
            return after

        def trace_variable(_stack: _Stack) -> int:
            if self._sink is not None:
                self._sink.record_variable(value, variables.get(value))
            return after

        def set_variable(stack: _Stack) -> int:
            variables.set(value, stack[-1])
            return after

        if name == "getv":
            return _push(lambda: variables.get(value), after)
        return {
            "trace": trace,
            "trace_quick": trace_quick,
            "trace16": trace_quick,
            "tracenz": trace_string,
            "tracev": trace_variable,
            "setv": set_variable,
        }[name]

    def _printer(self, instruction: _Instruction) -> _Step:
        after, count = instruction.after, instruction.value
        try:
            template = Template(instruction.text, self.arch.word_size)
        except FormatError as error:
            raise BadExpression(instruction.offset, str(error)) from error
        if template.arguments > count:
            raise BadExpression(instruction.offset, f"the format takes {template.arguments} values, not {count}")

        def step(stack: _Stack) -> int:
            del stack[-2:]  # function and channel: there is one place to print to
            values = [stack.pop() for _ in range(count)]
            mask = self._address_mask
            text = template.render(values, lambda value, limit: self._string(value & mask, limit, keep_end=False))
            self._charge(len(text))
            self._output(text)
            return after

        return step

    # ------------------------------------------------------------------------------------------------- guest's memory

    @property
    def _address_mask(self) -> int:
        """What of a value counts as an address: gdb extends a 32-bit register by its sign before it is one."""
        return (1 << 8 * self.arch.word_size) - 1

    def _charge(self, size: int) -> None:
        self._space -= size
        if self._space < 0:
            raise _Abort(Failure(Fault.SPACE, Fault.SPACE.value))

    def _trace(self, vaddr: int, size: int) -> None:
        self._charge(size)
        vaddr &= self._address_mask
        self._record(vaddr, readable(self._machine, vaddr, size))

    def _record(self, vaddr: int, data: bytes) -> None:
        if self._sink is not None and data:
            self._sink.record_memory(vaddr, data)

    def _string(self, vaddr: int, limit: int, keep_end: bool) -> bytes:
        """The C string at `vaddr`, at most `limit` bytes, as far as it can be read; MemoryFault where nothing can."""
        found = bytearray()
        while len(found) < limit:
            size = min(limit - len(found), _PIECE - (vaddr + len(found)) % _PIECE)
            self._charge(size)
            try:
                piece = self._machine.memory.read(vaddr + len(found), size)
            except MemoryFault:
                if not found:
                    raise
                break
            end = piece.find(0)
            if end >= 0:
                return bytes(found + piece[: end + keep_end])
            found += piece
        return bytes(found)


_PIECE: Final = 64  # bytes of a string looked at once; divides a page, so that no piece has a hole inside


def readable(machine: Machine, vaddr: int, size: int) -> bytes:
    """Memory up to the first byte that is not there: perhaps all of it, perhaps nothing."""
    if not size:
        return b""
    try:
        return machine.memory.read(vaddr, size)
    except MemoryFault as fault:
        there = fault.address - vaddr
        return machine.memory.read(vaddr, there) if 0 < there < size else b""


# --------------------------------------------------------------------------------------------------- decoding, checking


@dataclass(frozen=True, slots=True)
class _Instruction:
    """One decoded instruction: `value` is its operand, `after` the offset behind it, `text` a printf's format."""

    offset: int
    op: _Op
    value: int
    after: int
    text: bytes = b""


def _decode(code: bytes) -> dict[int, _Instruction]:
    """Every instruction by offset; BadExpression for a byte that is none or one cut short."""
    found = {}
    offset = 0
    while offset < len(code):
        opcode = code[offset]
        if opcode in _FLOAT:
            raise BadExpression(offset, f"{_FLOAT[opcode]}: there is no floating point in agent expressions")
        if opcode == _PRINTF:
            instruction = _decode_printf(code, offset)
        elif opcode in _OPS:
            op = _OPS[opcode]
            after = offset + 1 + op.operand
            instruction = _Instruction(offset, op, int.from_bytes(code[offset + 1 : after], "big"), after)
        else:
            raise BadExpression(offset, f"{opcode:#04x} is no instruction")
        if instruction.after > len(code):
            raise BadExpression(offset, f"{instruction.op.name} is cut short")
        if opcode == 0x16 and not instruction.value:
            raise BadExpression(offset, "ext of no bits")
        found[offset] = instruction
        offset = instruction.after
    return found


def _decode_printf(code: bytes, offset: int) -> _Instruction:
    """`nargs` in a byte, the length of the format in two, the format with its NUL."""
    count, size = code[offset + 1 : offset + 2], int.from_bytes(code[offset + 2 : offset + 4], "big")
    after = offset + 4 + size
    if not count or after > len(code):
        raise BadExpression(offset, "printf is cut short")
    if not size or code[after - 1]:
        raise BadExpression(offset, "the format of printf does not end with NUL")
    return _Instruction(offset, _Op("printf", 0, count[0] + 2, 0), count[0], after, code[offset + 4 : after - 1])


def _check_flow(instructions: dict[int, _Instruction]) -> None:
    """Follow every way through the code: it stays on instructions, and the stack is as high on each."""
    heights = {0: 0}
    waiting = [0]
    while waiting:
        instruction = instructions[waiting.pop()]
        op, height = instruction.op, heights[instruction.offset]
        if height < op.pops or (op.name == "pick" and height <= instruction.value):
            raise BadExpression(instruction.offset, f"{op.name} finds too few values on the stack")
        height += op.pushes - op.pops
        if height > MAX_STACK:
            raise BadExpression(instruction.offset, f"more than {MAX_STACK} values on the stack")
        for target in _successors(instruction):
            if target not in instructions:
                raise BadExpression(instruction.offset, f"{op.name} leads to byte {target}, where no instruction is")
            if target not in heights:
                heights[target] = height
                waiting.append(target)
            elif heights[target] != height:
                raise BadExpression(target, f"{heights[target]} or {height} values on the stack")


def _successors(instruction: _Instruction) -> tuple[int, ...]:
    match instruction.op.name:
        case "end":
            return ()
        case "goto":
            return (instruction.value,)
        case "if_goto":
            return (instruction.value, instruction.after)
        case _:
            return (instruction.after,)


# --------------------------------------------------------------------------------------------------------------- steps


def _binary(operation: Callable[[int, int], int], after: int) -> _Step:
    def step(stack: _Stack) -> int:
        right = stack.pop()
        stack[-1] = operation(stack[-1], right)
        return after

    return step


def _unary(operation: Callable[[int], int], after: int) -> _Step:
    def step(stack: _Stack) -> int:
        stack[-1] = operation(stack[-1])
        return after

    return step


def _push(value: Callable[[], int], after: int) -> _Step:
    def step(stack: _Stack) -> int:
        stack.append(value())
        return after

    return step


def _extension(instruction: _Instruction) -> Callable[[int], int]:
    bits = instruction.value
    if bits >= 64:
        return lambda value: value
    mask, sign = (1 << bits) - 1, 1 << (bits - 1) if bits else 0
    if instruction.op.name == "zero_ext":
        return lambda value: value & mask
    return lambda value: (((value & mask) ^ sign) - sign) & _MASK


def _flow(name: str, value: int, after: int) -> _Step:
    """The instructions that only jump or move values about."""

    def rot(stack: _Stack) -> int:
        stack[-3:] = (stack[-1], stack[-3], stack[-2])
        return after

    def pick(stack: _Stack) -> int:
        stack.append(stack[-1 - value])
        return after

    def dup(stack: _Stack) -> int:
        stack.append(stack[-1])
        return after

    def pop(stack: _Stack) -> int:
        del stack[-1]
        return after

    def swap(stack: _Stack) -> int:
        stack[-2:] = (stack[-1], stack[-2])
        return after

    steps: dict[str, _Step] = {
        "if_goto": lambda stack: value if stack.pop() else after,
        "goto": lambda stack: value,
        "end": lambda stack: _END,
        "dup": dup,
        "pop": pop,
        "swap": swap,
        "pick": pick,
        "rot": rot,
    }
    return steps[name]
