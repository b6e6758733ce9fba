"""Architectures as data: the registers GDB sees, in its order, and the target description generated from them.

Rules: frozen values only, standard library only; nothing here reads a machine, so any thread may use it. Names, sizes,
types and order are those of gdb's own `gdb/features/i386/{32,64}bit-{core,sse}.xml` and `64bit-segments.xml` (gdb 13 to
18): a description that moves a register out of its stock feature crashes gdb when it calls a guest function. What only
a whole machine has stands behind them, in a feature of its own that gdb takes as it is; control registers have the
names and bits that QEMU's stub gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape


@dataclass(frozen=True, slots=True)
class Register:
    """One register: GDB's name, its size in the `g` packet, and GDB's type (None lets gdb take an int of that size)."""

    name: str
    bits: int
    type: str | None = None
    group: str | None = None

    @property
    def size(self) -> int:
        """Bytes in the `g` packet."""
        return self.bits // 8


@dataclass(frozen=True, slots=True)
class Feature:
    """A named group of registers of the target description; `types` is the XML that defines the types they use."""

    name: str
    registers: tuple[Register, ...]
    types: str = ""


@dataclass(frozen=True)
class Arch:
    """A processor as GDB sees it.

    `gdb_name` is what `<architecture>` says; `word_size` is bytes of a general register; `expedited` are sent with each
    stop, so that gdb asks for nothing when it only looks at pc, sp and frame pointer; `pc` names the program counter.
    """

    name: str
    gdb_name: str
    word_size: int
    pc: str
    expedited: tuple[str, ...]
    features: tuple[Feature, ...]

    @cached_property
    def registers(self) -> tuple[Register, ...]:
        """Every register in `g` packet order: a register's GDB number is its index."""
        return tuple(register for feature in self.features for register in feature.registers)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of `registers`, in order."""
        return tuple(register.name for register in self.registers)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """GDB's number of each register name."""
        return {name: number for number, name in enumerate(self.names)}

    @cached_property
    def expedited_fields(self) -> bytes:
        """The fields of a stop reply for `expedited`, with places for their values in hex."""
        return b"".join(b"%02x:%%b;" % self.numbers[name] for name in self.expedited)

    @cached_property
    def packet_size(self) -> int:
        """Bytes of all registers together: half the length of a `g` reply."""
        return sum(register.size for register in self.registers)

    def pack(self, values: Sequence[int]) -> bytes:
        """`values` of `registers` in order, as the bytes of a `g` packet (little-endian, before hex)."""
        return b"".join(
            value.to_bytes(register.bits >> 3, "little") for register, value in zip(self.registers, values, strict=True)
        )

    def unpack(self, data: bytes) -> dict[str, int]:
        """Name to value from the bytes of a `G` packet; ValueError unless `data` is exactly `packet_size` long."""
        if len(data) != self.packet_size:
            raise ValueError(f"{self.packet_size} bytes of registers expected, not {len(data)}")
        values = {}
        offset = 0
        for register in self.registers:
            values[register.name] = int.from_bytes(data[offset : offset + register.size], "little")
            offset += register.size
        return values


_EFLAGS_BITS = (
    ("CF", 0),
    ("", 1),
    ("PF", 2),
    ("AF", 4),
    ("ZF", 6),
    ("SF", 7),
    ("TF", 8),
    ("IF", 9),
    ("DF", 10),
    ("OF", 11),
    ("NT", 14),
    ("RF", 16),
    ("VM", 17),
    ("AC", 18),
    ("VIF", 19),
    ("VIP", 20),
    ("ID", 21),
)
_MXCSR_BITS = (
    ("IE", 0),
    ("DE", 1),
    ("ZE", 2),
    ("OE", 3),
    ("UE", 4),
    ("PE", 5),
    ("DAZ", 6),
    ("IM", 7),
    ("DM", 8),
    ("ZM", 9),
    ("OM", 10),
    ("UM", 11),
    ("PM", 12),
    ("FZ", 15),
)


# SDM vol. 3, 2.5 and table 2-1 (IA32_EFER)
_CR0_BITS = (
    *zip(("PE", "MP", "EM", "TS", "ET", "NE"), range(6), strict=True),
    ("WP", 16),
    ("AM", 18),
    ("NW", 29),
    ("CD", 30),
    ("PG", 31),
)
_CR4_BITS = (
    *zip(
        ("VME", "PVI", "TSD", "DE", "PSE", "PAE", "MCE", "PGE", "PCE", "OSFXSR", "OSXMMEXCPT"), range(11), strict=True
    ),
    *(("UMIP", 11), ("LA57", 12), ("VMXE", 13), ("SMXE", 14), ("FSGSBASE", 16), ("PCIDE", 17), ("OSXSAVE", 18)),
    *(("SMEP", 20), ("SMAP", 21), ("PKE", 22)),
)
_EFER_BITS = (("SCE", 0), ("LME", 8), ("LMA", 10), ("NXE", 11), ("SVME", 12), ("LMSLE", 13), ("FFXSR", 14), ("TCE", 15))


def _flags(name: str, bits: Sequence[tuple[str, int] | tuple[str, int, int]], size: int = 4) -> str:
    """The type of a register whose bits have names; a field is one bit, or from a first to a last one."""
    fields = "".join(f'<field name="{field[0]}" start="{field[1]}" end="{field[-1]}"/>' for field in bits)
    return f'<flags id="{name}" size="{size}">{fields}</flags>'


_VECTORS = (
    '<vector id="v8bf16" type="bfloat16" count="8"/>'
    '<vector id="v4f" type="ieee_single" count="4"/>'
    '<vector id="v2d" type="ieee_double" count="2"/>'
    '<vector id="v16i8" type="int8" count="16"/>'
    '<vector id="v8i16" type="int16" count="8"/>'
    '<vector id="v4i32" type="int32" count="4"/>'
    '<vector id="v2i64" type="int64" count="2"/>'
    '<union id="vec128">'
    '<field name="v8_bfloat16" type="v8bf16"/>'
    '<field name="v4_float" type="v4f"/>'
    '<field name="v2_double" type="v2d"/>'
    '<field name="v16_int8" type="v16i8"/>'
    '<field name="v8_int16" type="v8i16"/>'
    '<field name="v4_int32" type="v4i32"/>'
    '<field name="v2_int64" type="v2i64"/>'
    '<field name="uint128" type="uint128"/>'
    "</union>"
)


def _core(general: Sequence[tuple[str, str]], pc: str, bits: int) -> Feature:
    return Feature(
        "org.gnu.gdb.i386.core",
        (
            *(Register(name, bits, kind) for name, kind in general),
            Register(pc, bits, "code_ptr"),
            Register("eflags", 32, "i386_eflags"),
            *(Register(name, 32, "int32") for name in ("cs", "ss", "ds", "es", "fs", "gs")),
            *(Register(f"st{index}", 80, "i387_ext") for index in range(8)),
            *(
                Register(name, 32, "int", "float")
                for name in ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")
            ),
        ),
        _flags("i386_eflags", _EFLAGS_BITS),
    )


def _sse(count: int) -> Feature:
    return Feature(
        "org.gnu.gdb.i386.sse",
        (
            *(Register(f"xmm{index}", 128, "vec128") for index in range(count)),
            Register("mxcsr", 32, "i386_mxcsr", "vector"),
        ),
        _VECTORS + _flags("i386_mxcsr", _MXCSR_BITS),
    )


def _system(bits: int) -> Feature:
    """Registers of the processor that no program sees."""
    wide, word = bits == 64, f"int{bits}"
    shown = {"cr0": "i386_cr0", "cr2": word, "cr3": "i386_cr3", "cr4": "i386_cr4"}
    bases = ["es", "cs", "ss", "ds"]
    msrs = [("sysenter_cs", 32), ("sysenter_esp", bits), ("sysenter_eip", bits)]
    if wide:
        shown = {"k_gs_base": "int", **shown, "cr8": word, "efer": "i386_efer"}
        msrs += [(name, 64) for name in ("star", "lstar", "cstar", "fmask")]
    else:
        bases += ["fs", "gs"]  # which have a feature of their own in the other
    hidden = (
        *((f"{name}_base", bits) for name in bases),
        *(("gdtr_base", bits), ("gdtr_limit", 32), ("idtr_base", bits), ("idtr_limit", 32)),
        *(("ldtr", 32), ("ldtr_base", bits), ("tr", 32), ("tr_base", bits)),
        *((f"dr{index}", bits) for index in (0, 1, 2, 3, 6, 7)),
        *msrs,
    )
    types = (
        _flags("i386_cr0", _CR0_BITS, bits // 8),
        _flags("i386_cr3", (("PWT", 3), ("PCD", 4), ("PDBR", 12, bits - 1)), bits // 8),
        _flags("i386_cr4", _CR4_BITS, bits // 8),
        _flags("i386_efer", _EFER_BITS, bits // 8) if wide else "",
    )
    return Feature(
        "org.gnu.gdb.i386.sys",
        (
            *(Register(name, bits, kind) for name, kind in shown.items()),
            *(Register(name, size, f"int{size}", "system") for name, size in hidden),
        ),
        "".join(types),
    )


I386 = Arch(
    name="i386",
    gdb_name="i386",
    word_size=4,
    pc="eip",
    expedited=("ebp", "esp", "eip"),
    features=(
        _core(
            (
                *((name, "int32") for name in ("eax", "ecx", "edx", "ebx")),
                ("esp", "data_ptr"),
                ("ebp", "data_ptr"),
                ("esi", "int32"),
                ("edi", "int32"),
            ),
            "eip",
            32,
        ),
        _sse(8),
        _system(32),
    ),
)

I8086 = replace(I386, name="i8086", gdb_name="i8086")
"""The same registers with 16-bit code: gdb disassembles by the description alone."""

X86_64 = Arch(
    name="x86_64",
    gdb_name="i386:x86-64",
    word_size=8,
    pc="rip",
    expedited=("rbp", "rsp", "rip"),
    features=(
        _core(
            (
                *((name, "int64") for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi")),
                ("rbp", "data_ptr"),
                ("rsp", "data_ptr"),
                *((f"r{index}", "int64") for index in range(8, 16)),
            ),
            "rip",
            64,
        ),
        _sse(16),
        Feature(
            "org.gnu.gdb.i386.segments",
            (Register("fs_base", 64, "int"), Register("gs_base", 64, "int")),
        ),
        _system(64),
    ),
)


def target_xml(arch: Arch) -> str:
    """The target description of `arch`, complete in one document (GDB manual, "Target Description Format")."""
    lines = [
        '<?xml version="1.0"?>',
        '<!DOCTYPE target SYSTEM "gdb-target.dtd">',
        '<target version="1.0">',
        f"<architecture>{arch.gdb_name}</architecture>",
        "<osabi>none</osabi>",
    ]
    number = 0
    for feature in arch.features:
        lines.append(f'<feature name="{escape(feature.name)}">{feature.types}')
        for register in feature.registers:
            kind = f' type="{escape(register.type)}"' if register.type else ""
            group = f' group="{escape(register.group)}"' if register.group else ""
            lines.append(f'<reg name="{register.name}" bitsize="{register.bits}" regnum="{number}"{kind}{group}/>')
            number += 1
        lines.append("</feature>")
    lines.append("</target>\n")
    # An element a line: gdb copies the document into trace files, and reads no line of these beyond 1000 bytes.
    return "\n".join(lines).replace("><", ">\n<")
