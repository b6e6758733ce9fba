"""The embedded guest's bytes against its text: keystone mis-assembles some statements without a word, capstone tells.

Every instruction of every function, for all three variants, is decoded where its statement must have gone and compared:
mnemonic, registers, immediates, displacements, jump targets.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import capstone
import pytest

from emu.images.embedded import embedded_kernel, embedded_program, kernel_source, layout, program_source
from emu.images.embedded.assembler import Assembled, AssemblyError, encode, translate
from tests.support.assemble import assemble

SYNONYMS = {"jz": "je", "jnz": "jne", "jc": "jb", "jnc": "jae", "setz": "sete", "sysret": "sysretq", "movabs": "mov"}
IMPLIED_OPERANDS = re.compile(r"rep\w* \w+|f(?!s)\w+")
"""String and x87 instructions: what capstone spells out is what the mnemonic says, or a matter of taste."""
LABEL = re.compile(r"^([.\w]+):$")
DATA_WIDTH = {".byte": 1, ".short": 2, ".long": 4, ".quad": 8}
REGISTER = re.compile(r"[re]?(ax|bx|cx|dx|si|di|bp|sp|ip)|r(8|9|1\d)[dwb]?|[abcd][lh]|[cdefgs]s|cr\d|xmm\d|st")


def expand(text: str) -> Iterator[str]:
    """Statements as keystone would see them: conditions resolved, macros without parameters put in place."""
    macros: dict[str, list[str]] = {}
    body: list[str] | None = None
    keep = [True]
    for line in (line.strip() for line in text.split("\n")):
        word = line.split(" ", 1)[0]
        if word == ".if":
            left, _, right = line[4:].partition("==")
            keep.append(int(left, 0) == int(right, 0) if right else bool(int(left, 0)))
        elif word == ".else":
            keep[-1] = not keep[-1]
        elif word == ".endif":
            keep.pop()
        elif not line or not all(keep):
            continue
        elif word == ".macro":
            body = macros.setdefault(line.split()[1], [])
        elif word == ".endm":
            body = None
        elif body is not None:
            body.append(line)
        else:
            yield from macros.get(line, [line])


@dataclass(frozen=True)
class Listing:
    """A linked program, its statements, and where each of its labels is."""

    bits: int
    linked: Assembled
    statements: list[str]
    labels: dict[str, int]

    def value(self, expression: str) -> tuple[Counter[str], int]:
        """Registers with their factors, and the rest as a number modulo the word size."""
        registers: Counter[str] = Counter()
        total = 0
        for sign, term in re.findall(r"([+-]?)\s*([^+-]+)", expression):
            factor, names = (-1 if sign == "-" else 1), []
            for part in (part.strip() for part in term.split("*")):
                if REGISTER.fullmatch(part):
                    names.append(part)
                else:
                    factor *= self.labels[part] if part in self.labels else int(part, 0)
            if names:
                registers[names[0]] += factor
            else:
                total += factor
        return registers, total % (1 << self.bits)

    def operands(self, text: str, end: int) -> list[object]:
        """`end`: the address after the instruction, which RIP-relative operands of the disassembly count from."""
        result: list[object] = []
        for operand in re.split(r",\s*", re.sub(r"\b[a-z]*word ptr |\bbyte ptr ", "", text)) if text else []:
            segment, _, inner = operand.rpartition("[")
            registers, number = self.value(inner.rstrip("]"))
            if registers.pop("rip", 0) and end:
                number = (number + end) % (1 << self.bits)
            result.append((bool(inner != operand), segment, registers, number))
        return result


def listing(bits: int, linked: Assembled, source: str, pae: bool) -> Listing:
    text = translate(source, bits, layout.names(bits, pae))
    statements = list(expand(text))
    names = [match[1] for statement in statements if (match := LABEL.match(statement))]
    table = encode(text + "".join(f"\n.quad {name}" for name in names) + "\n", bits, linked.base)
    addresses = struct.unpack(f"<{len(names)}Q", table[-8 * len(names) :])
    return Listing(bits, linked, statements, dict(zip(names, addresses, strict=True)))


def differences(program: Listing) -> Iterator[str]:
    """What the bytes of each function say other than its text."""
    mode = capstone.CS_MODE_64 if program.bits == 64 else capstone.CS_MODE_32
    decoder = capstone.Cs(capstone.CS_ARCH_X86, mode)
    functions = {symbol.name for symbol in program.linked.symbols if symbol.kind == "T"}
    address, end = 0, ""
    for statement in program.statements:
        if match := LABEL.match(statement):
            if not end and match[1] in functions:
                address, end = program.labels[match[1]], f"{match[1]}.end"
            if end and program.labels[match[1]] != address:
                yield f"{match[1]} is at {program.labels[match[1]]:#x}, expected at {address:#x}"
            end = "" if match[1] == end else end
        elif end:
            directive, _, rest = statement.partition(" ")
            if directive in DATA_WIDTH:
                address += DATA_WIDTH[directive] * len(rest.split(","))
                continue
            offset = address - program.linked.base
            insn = next(decoder.disasm(program.linked.code[offset : offset + 15], address, 1))
            address += insn.size
            if not same(program, statement, insn, address):
                yield f"{statement!r} became {insn.mnemonic} {insn.op_str} ({insn.bytes.hex()})"


def same(program: Listing, statement: str, insn: capstone.CsInsn, end: int) -> bool:
    match = re.fullmatch(r"((?:rep\w*|lock) \w+|\w+)\s*(.*)", statement)
    assert match is not None
    mnemonic = SYNONYMS.get(match[1], match[1])
    if mnemonic != SYNONYMS.get(insn.mnemonic.strip(), insn.mnemonic.strip()):
        return False
    if IMPLIED_OPERANDS.fullmatch(mnemonic):
        return True
    wanted, found = program.operands(match[2], 0), program.operands(insn.op_str, end)
    for operand in wanted:
        operand[2].pop("rip", 0)  # type: ignore[index]
    return found in (wanted, wanted[::-1] if mnemonic == "xchg" else wanted)


@pytest.mark.parametrize(("bits", "pae"), [(64, False), (32, False), (32, True)])
def test_every_kernel_instruction_is_what_its_text_says(bits: int, pae: bool) -> None:
    """No statement of the kernel is one that keystone gets wrong."""
    program = listing(bits, embedded_kernel(bits, pae), kernel_source(bits), pae)
    assert list(differences(program)) == []


@pytest.mark.parametrize("bits", [64, 32])
def test_every_program_instruction_is_what_its_text_says(bits: int) -> None:
    """The same for the ring-3 program."""
    program = listing(bits, embedded_program(bits), program_source(), False)
    assert list(differences(program)) == []


def test_a_statement_that_keystone_gets_wrong_is_reported() -> None:
    """The comparison can fail: of two labels in one memory operand keystone loses the second."""
    text = "a:\nmov dword ptr [edi + b - a], eax\na.end:\nb:\nnop\n"
    code = encode(text, 32, 0x1000)
    linked = Assembled(0x1000, code, (embedded_kernel(32).symbols[0]._replace(name="a", kind="T"),), ())
    program = Listing(32, linked, text.split("\n"), {"a": 0x1000, "a.end": 0x1006, "b": 0x1006})
    assert len(list(differences(program))) == 1


@pytest.mark.parametrize(
    ("source", "bits", "code"),
    [
        ("push rbp; mov rbp, rsp; ret", 64, "554889e5c3"),
        ("push ebp; mov ebp, esp; ret", 32, "5589e5c3"),
        ("top: loop top", 64, "e2fe"),
        ("call far_away\n.skip 16\nfar_away: nop", 32, "e810000000" + "00" * 16 + "90"),
    ],
)
def test_helper_assembles_to_the_manuals_bytes(source: str, bits: int, code: str) -> None:
    """tests.support.assemble gives the encodings of the SDM."""
    assert assemble(source, bits).hex() == code


@pytest.mark.parametrize("source", ["frobnicate eax", "push rbx", "call nowhere"])
def test_text_that_means_nothing_is_refused(source: str) -> None:
    """An unknown mnemonic, a register of the other word size and an undefined label are errors."""
    with pytest.raises(AssemblyError, match="cannot assemble"):
        assemble(source, 32)
