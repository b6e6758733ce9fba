"""How C functions take arguments and give results, as gcc compiles kernels: pure layout, no machine.

Rules: standard library only. Register numbers are those of `Cpu.gpr`; stack words count up from the first above the
return address. Sources: System V AMD64 ABI 3.2.3; gcc's function_arg_32 and function_arg_advance_32 (i386.c, 12.2) for
regparm: an argument that finds too few registers left goes to the stack and so do all after it, and a function with
variable arguments takes none in registers.

`u8` to `u64`, `s8` to `s64` and `ulong` (a machine word, a pointer) annotate a Python function's parameters; `struct`
annotates a result that C returns through a hidden first argument.
"""

from __future__ import annotations

import errno
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal, TypeAlias

from probes.errors import ProbeError

AbiName: TypeAlias = Literal["sysv", "regparm3", "cdecl"]


@dataclass(frozen=True, slots=True)
class Scalar:
    """An integer type; 0 `bits` is the machine's word."""

    bits: int
    signed: bool = False

    def read(self, raw: int, word: int) -> int:
        """The value in the low bits of registers or stack words."""
        bits = self.bits or word * 8
        value = raw & ((1 << bits) - 1)
        return value - (1 << bits) if self.signed and value >> (bits - 1) else value


@dataclass(frozen=True, slots=True)
class Struct:
    """A structure returned in memory: its address is a hidden first argument."""


u8: TypeAlias = Annotated[int, Scalar(8)]
u16: TypeAlias = Annotated[int, Scalar(16)]
u32: TypeAlias = Annotated[int, Scalar(32)]
u64: TypeAlias = Annotated[int, Scalar(64)]
s8: TypeAlias = Annotated[int, Scalar(8, signed=True)]
s16: TypeAlias = Annotated[int, Scalar(16, signed=True)]
s32: TypeAlias = Annotated[int, Scalar(32, signed=True)]
s64: TypeAlias = Annotated[int, Scalar(64, signed=True)]
ulong: TypeAlias = Annotated[int, Scalar(0)]
struct: TypeAlias = Annotated[None, Struct()]

WORD: Final = Scalar(0)
VARIADIC_WORDS: Final = 6  # words a Python entry gets for `...`: how many were passed, no convention tells


@dataclass(frozen=True, slots=True)
class Abi:
    """A calling convention: bytes of a word, registers that take arguments, registers of a result."""

    name: AbiName
    word: int
    registers: tuple[int, ...]
    result: tuple[int, ...]


ABIS: Final[Mapping[str, Abi]] = {
    "sysv": Abi("sysv", 8, (7, 6, 2, 1, 8, 9), (0,)),
    "regparm3": Abi("regparm3", 4, (0, 2, 1), (0, 2)),
    "cdecl": Abi("cdecl", 4, (), (0, 2)),
}


def abi_for(word: int, name: str | None = None) -> Abi:
    """The convention of that name, or the kernel's own for the word size; ProbeError where it is another size's."""
    abi = ABIS.get(name or ("sysv" if word == 8 else "regparm3"))
    if abi is None or abi.word != word:
        fitting = ", ".join(known.name for known in ABIS.values() if known.word == word)
        raise ProbeError(errno.EINVAL, f"no calling convention {name!r} on {word * 8} bits: {fitting}")
    return abi


@dataclass(frozen=True, slots=True)
class Slot:
    """Where an argument is: in `registers`, or (empty) in `words` stack words from `stack` on."""

    registers: tuple[int, ...]
    stack: int
    words: int


def layout(abi: Abi, types: Sequence[Scalar], *, variadic: bool = False) -> list[Slot]:
    """A slot for each argument, in order."""
    free = () if variadic and abi.name == "regparm3" else abi.registers
    stack = 0
    slots = []
    for scalar in types:
        words = max(1, -(-scalar.bits // (8 * abi.word)))
        if words <= len(free):
            slots.append(Slot(free[:words], -1, words))
        else:
            slots.append(Slot((), stack, words))
            stack += words
        free = free[words:]
    return slots


def encode(abi: Abi, types: Sequence[Scalar], values: Sequence[int]) -> tuple[dict[int, int], bytes]:
    """(registers by number, bytes above the return address) of a call."""
    registers: dict[int, int] = {}
    stack = bytearray()
    for slot, value in zip(layout(abi, types), values, strict=True):
        raw = (value & ((1 << 8 * abi.word * slot.words) - 1)).to_bytes(abi.word * slot.words, "little")
        for index, register in enumerate(slot.registers):
            registers[register] = int.from_bytes(raw[index * abi.word :][: abi.word], "little")
        if not slot.registers:
            stack += raw
    return registers, bytes(stack)


def scalar_of(annotation: object) -> Scalar:
    """The type an annotation names: one of this module's, or a machine word for `int` and for none at all."""
    for extra in getattr(annotation, "__metadata__", ()):
        if isinstance(extra, Scalar):
            return extra
    if annotation in (int, inspect.Parameter.empty, None):
        return WORD
    raise ProbeError(errno.EINVAL, f"{annotation!r} is no type of an argument: u8 to u64, s8 to s64, ulong or int")


@dataclass(frozen=True, slots=True)
class Prototype:
    """A C function as a Python one declares it."""

    types: tuple[Scalar, ...]
    variadic: bool
    returns_struct: bool
    wants_regs: bool

    def slots(self, abi: Abi) -> list[Slot]:
        """Of the declared arguments, then of VARIADIC_WORDS more where there are any."""
        more = (WORD,) * VARIADIC_WORDS if self.variadic else ()
        hidden = (WORD,) if self.returns_struct else ()
        return layout(abi, (*hidden, *self.types, *more), variadic=self.variadic)[len(hidden) :]


def prototype(function: Callable[..., object]) -> Prototype:
    """What `function`'s signature says: `*args` is C's `...`, `-> struct` a hidden first argument, and a keyword-only
    `regs` asks for the registers. ProbeError EINVAL for what C has no word for."""
    try:
        hints = typing.get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError, NameError) as error:
        raise ProbeError(errno.EINVAL, f"cannot tell the arguments of {function!r}: {error}") from error
    types: list[Scalar] = []
    variadic = wants_regs = False
    for parameter in parameters:
        match parameter.kind:
            case inspect.Parameter.POSITIONAL_ONLY | inspect.Parameter.POSITIONAL_OR_KEYWORD:
                types.append(scalar_of(hints.get(parameter.name, int)))
            case inspect.Parameter.VAR_POSITIONAL:
                variadic = True
            case _ if parameter.name == "regs":
                wants_regs = True
            case _:
                raise ProbeError(errno.EINVAL, f"{parameter} is no argument of a C function")
    result = getattr(hints.get("return"), "__metadata__", ())
    return Prototype(tuple(types), variadic, any(isinstance(extra, Struct) for extra in result), wants_regs)
