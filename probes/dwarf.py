"""DWARF of a guest's ELF file: functions, the addresses of their lines, and where variables are at an address.

Rules: pure, reads bytes only; the reader is pyelftools. A place is given as a fetch argument of kprobe_events, so that
nothing else has to know DWARF: `%ax`, `+8(%sp)`, `@0x1000`. What compilers spread over pieces
or compute is Unavailable.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from elftools.common.exceptions import DWARFError, ELFError
from elftools.dwarf.callframe import CFARule
from elftools.dwarf.descriptions import describe_form_class
from elftools.dwarf.dwarf_expr import DWARFExprParser
from elftools.dwarf.locationlists import LocationEntry, LocationExpr, LocationParser
from elftools.elf.elffile import ELFFile

_REGISTERS: Final = {
    64: ("ax", "dx", "cx", "bx", "si", "di", "bp", "sp", *(f"r{number}" for number in range(8, 16))),
    32: ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di"),
}
"""By DWARF's numbers: System V ABI, AMD64 supplement figure 3.36, i386 supplement table 2.14."""
_LARGE: Final = 64 << 20
_MOST_LINKS: Final = 50  # from a name or an instance to what it stands for: a broken file may lead in circles
_SIGNED: Final = (0x05, 0x06, 0x0D)  # DW_ATE_signed, signed_char, signed_fixed
_OPTIMIZED: Final = re.compile(r"-O(?:[1-9gsz]|fast)")
_THROUGH: Final = ("DW_TAG_typedef", "DW_TAG_const_type", "DW_TAG_volatile_type", "DW_TAG_restrict_type")
_VARIABLES: Final = ("DW_TAG_formal_parameter", "DW_TAG_variable")
_AGGREGATES: Final = ("DW_TAG_structure_type", "DW_TAG_union_type")


class Unavailable(Exception):
    """What DWARF has, but no fetch argument can say; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Function:
    """One body of a function: its own, or a copy inlined into another. `die` is the concrete one."""

    name: str
    low: int
    high: int
    file: str
    line: int
    die: Any


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value is: `base` a fetch argument that is a number; `offset` into what it points to, None for itself."""

    base: str
    offset: int | None
    type: Any

    @property
    def fetch(self) -> str:
        return self.base if self.offset is None else f"{self.offset:+d}({self.base})"


class Dwarf:
    """The DWARF of one ELF file. ValueError where it has none, or a broken one."""

    def __init__(self, elf: bytes) -> None:
        try:
            file = ELFFile(io.BytesIO(elf))
            if not file.has_dwarf_info():
                raise ValueError("the guest's image has no DWARF")
            self._info = file.get_dwarf_info()
            self._bits: int = file.elfclass
            self._locations = LocationParser(self._info.location_lists())
            self._large = len(elf) > _LARGE
        except (ELFError, DWARFError, KeyError) as error:
            raise ValueError(f"the guest's DWARF cannot be read: {error}") from error

    def functions(self, name: str, source: str | None = None, near: int | None = None) -> list[Function]:
        """Every body of the function of that name, the one of its own first; in the file `source` alone if given.

        Of a large file only the unit that has code at the address `near`: reading all would take minutes.
        """
        found = []
        for unit in self._units(near):
            for die in unit.iter_DIEs():
                if die.tag in ("DW_TAG_subprogram", "DW_TAG_inlined_subroutine") and _name(die) == name:
                    found += self._body(unit, die, name)
        found.sort(key=lambda one: (one.die.tag != "DW_TAG_subprogram", one.low))
        return [one for one in found if source is None or f"/{one.file}".endswith(f"/{source.lstrip('/')}")]

    def _units(self, near: int | None) -> list[Any]:
        ranges = self._info.get_aranges() if self._large and near is not None else None
        at = ranges.cu_offset_at_addr(near) if ranges is not None else None
        return list(self._info.iter_CUs()) if at is None else [self._info.get_CU_at(at)]

    def _body(self, unit: Any, die: Any, name: str) -> list[Function]:
        low = die.attributes.get("DW_AT_low_pc")
        high = die.attributes.get("DW_AT_high_pc")
        if low is None or high is None:
            return []  # a declaration, or in pieces
        end = high.value if describe_form_class(high.form) == "address" else low.value + high.value
        number, line = _attribute(die, "DW_AT_decl_file"), _attribute(die, "DW_AT_decl_line")
        return [Function(name, low.value, end, self._file(unit, number), line, die)]

    def _file(self, unit: Any, number: int) -> str:
        program = self._info.line_program_for_CU(unit)
        files = program["file_entry"] if program is not None else []
        index = number if program is not None and program.header.version >= 5 else number - 1
        return str(files[index].name.decode("utf-8", "replace")) if 0 <= index < len(files) else ""

    def lines(self, function: Function) -> list[tuple[int, int]]:
        """(address, line) of every statement's beginning in `function`, of its own file, in address order."""
        unit = function.die.cu
        program = self._info.line_program_for_CU(unit)
        found = []
        for entry in program.get_entries() if program is not None else ():
            state = entry.state
            if state is None or state.end_sequence or not state.is_stmt:
                continue
            if function.low <= state.address < function.high and self._file(unit, state.file) == function.file:
                found.append((state.address, state.line))
        return sorted(found)

    def places(self, function: Function, line: int) -> list[int]:
        """Where the code of a line begins: of statements beside each other the first."""
        rows = self.lines(function)
        before = [0, *(number for _, number in rows)]
        return sorted(
            {address for (address, number), last in zip(rows, before, strict=False) if number == line != last}
        )

    def behind_prologue(self, function: Function) -> int:
        """Where parameters are in their places: of unoptimized code behind its first line, as gdb has it."""
        if _OPTIMIZED.search(str(_attribute(function.die.cu.get_top_DIE(), "DW_AT_producer"))):
            return function.low
        return next((address for address, _ in self.lines(function) if address > function.low), function.low)

    # ----------------------------------------------------------------------------------------------------- variables

    def variables(self, function: Function, pc: int) -> Iterator[tuple[str, bool]]:
        """(name, whether it is a parameter) of what is in scope at `pc`, as declared."""
        for die in self._in_scope(function, pc):
            yield _name(die), die.tag == "DW_TAG_formal_parameter"

    def place(self, function: Function, name: str, pc: int) -> Place:
        """Where the variable is at `pc`: the innermost of that name, or the unit's own. KeyError where there is none;
        Unavailable."""
        found = [die for die in self._in_scope(function, pc) if _name(die) == name]
        if not found:
            unit = function.die.cu.get_top_DIE()
            found = [die for die in unit.iter_children() if die.tag == "DW_TAG_variable" and _name(die) == name]
        if not found:
            raise KeyError(name)
        die = found[-1]
        kind = _type(_of_type(die))
        if "DW_AT_const_value" in die.attributes:
            return Place(f"\\{die.attributes['DW_AT_const_value'].value}", None, kind)
        return self._evaluate(self._expression(die, "DW_AT_location", pc), function, pc, kind)

    def argument(self, function: Function, name: str) -> Place:
        """A parameter as the kernel's `$argN`, which a return probe still knows. KeyError; Unavailable."""
        if self._bits != 64:
            raise Unavailable("at a function's return its parameters are gone")
        parameters = [die for die in function.die.iter_children() if die.tag == "DW_TAG_formal_parameter"]
        for number, die in enumerate(parameters, start=1):
            if _name(die) == name:
                return Place(f"$arg{number}", None, _type(_of_type(die)))
        raise KeyError(name)

    def _in_scope(self, function: Function, pc: int) -> Iterator[Any]:
        pending = [function.die]
        while pending:
            for child in pending.pop().iter_children():
                if child.tag in _VARIABLES and _name(child):
                    yield child
                elif child.tag == "DW_TAG_lexical_block" and self._covers(child, pc):
                    pending.append(child)

    def _covers(self, block: Any, pc: int) -> bool:
        low, high = block.attributes.get("DW_AT_low_pc"), block.attributes.get("DW_AT_high_pc")
        if low is None or high is None:
            return "DW_AT_ranges" in block.attributes  # where variables are is asked by address anyway
        end = high.value if describe_form_class(high.form) == "address" else low.value + high.value
        return bool(low.value <= pc < end)

    def _expression(self, die: Any, attribute: str, pc: int) -> Sequence[Any]:
        """The operations that give its location at `pc`."""
        value = die.attributes.get(attribute)
        if value is None:
            raise Unavailable("it was optimized out")
        located = self._locations.parse_from_attribute(value, die.cu["version"], die)
        parser = DWARFExprParser(die.cu.structs)
        if isinstance(located, LocationExpr):
            return list(parser.parse_expr(located.loc_expr))
        base = die.cu.get_top_DIE().attributes.get("DW_AT_low_pc")
        start = base.value if base is not None else 0
        for entry in located:
            if not isinstance(entry, LocationEntry):
                start = entry.base_address
                continue
            shift = 0 if getattr(entry, "is_absolute", False) else start
            if entry.begin_offset + shift <= pc < entry.end_offset + shift:
                return list(parser.parse_expr(entry.loc_expr))
        raise Unavailable("it is in no register and not in memory there")

    def _evaluate(self, operations: Sequence[Any], function: Function, pc: int, kind: Any) -> Place:
        if not operations:
            raise Unavailable("it was optimized out")
        first, *more = operations
        name, value = first.op_name, first.args[0] if first.args else 0
        if name in ("DW_OP_entry_value", "DW_OP_GNU_entry_value"):
            raise Unavailable("only its value at the function's entry is known there")
        is_value = [one.op_name for one in more] == ["DW_OP_stack_value"]
        if more and not (is_value and name.startswith(("DW_OP_lit", "DW_OP_const"))):
            raise Unavailable("it is computed, which no fetch argument can")
        if is_value:
            return Place(f"\\{int(name[9:]) if name.startswith('DW_OP_lit') else value}", None, kind)
        if name.startswith("DW_OP_reg"):
            return Place(f"%{self._register(int(name[9:]))}", None, kind)
        if name.startswith("DW_OP_breg"):
            return Place(f"%{self._register(int(name[10:]))}", value, kind)
        if name == "DW_OP_addr":
            return Place(f"\\{value:#x}", 0, kind)
        if name == "DW_OP_fbreg":
            base, offset = self._frame(function, pc)
            return Place(base, offset + value, kind)
        if name == "DW_OP_call_frame_cfa":
            base, offset = self._cfa(pc)
            return Place(base, offset, kind)
        raise Unavailable(f"{name} is nothing a fetch argument can do")

    def _frame(self, function: Function, pc: int) -> tuple[str, int]:
        die = function.die
        while die is not None and "DW_AT_frame_base" not in die.attributes:
            die = die.get_parent()
        if die is None:
            raise Unavailable("its function has no frame")
        place = self._evaluate(self._expression(die, "DW_AT_frame_base", pc), function, pc, None)
        return place.base, place.offset or 0

    def _cfa(self, pc: int) -> tuple[str, int]:
        """The canonical frame address as a register and what is added, from the call frame information."""
        tables = [self._info.CFI_entries()] if self._info.has_CFI() else []
        tables += [self._info.EH_CFI_entries()] if self._info.has_EH_CFI() else []
        for entry in (entry for table in tables for entry in table):
            header = getattr(entry, "header", {})
            if "initial_location" not in header:
                continue
            if not header["initial_location"] <= pc < header["initial_location"] + header["address_range"]:
                continue
            rows = [row for row in entry.get_decoded().table if row["pc"] <= pc]
            if rows and isinstance(rows[-1]["cfa"], CFARule) and rows[-1]["cfa"].reg is not None:
                rule = rows[-1]["cfa"]
                return f"%{self._register(rule.reg)}", rule.offset
        raise Unavailable("there is no call frame information for that place")

    def _register(self, number: int) -> str:
        names = _REGISTERS[self._bits]
        if number >= len(names):
            raise Unavailable(f"it is in register {number} of DWARF, which no fetch argument knows")
        return names[number]

    # --------------------------------------------------------------------------------------------------------- types

    def member(self, place: Place, name: str, *, through: bool) -> Place:
        """`.NAME`, or `->NAME` with `through`. ValueError says why there is none."""
        if through:
            if place.type is None or place.type.tag != "DW_TAG_pointer_type":
                raise ValueError(f"->{name}: that is no pointer")
            place = Place(place.fetch, 0, _type(_of_type(place.type)))
        kind = place.type
        if kind is None or kind.tag not in _AGGREGATES or place.offset is None:
            raise ValueError(f"{name}: that is no structure in memory")
        for die in kind.iter_children():
            if die.tag != "DW_TAG_member":
                continue
            at = die.attributes["DW_AT_data_member_location"].value if kind.tag == "DW_TAG_structure_type" else 0
            if _name(die) == name:
                if "DW_AT_bit_size" in die.attributes:
                    raise ValueError(f"{name} is a bit field")
                return Place(place.base, place.offset + at, _type(_of_type(die)))
            inner = _type(_of_type(die)) if not _name(die) else None
            if inner is not None and inner.tag in _AGGREGATES:
                try:
                    return self.member(Place(place.base, place.offset + at, inner), name, through=False)
                except ValueError:
                    continue
        raise ValueError(f"there is no member {name}")

    def element(self, place: Place, index: int) -> Place:
        """`[INDEX]` of an array or a pointer. ValueError."""
        if place.type is not None and place.type.tag == "DW_TAG_pointer_type":
            place = Place(place.fetch, 0, _type(_of_type(place.type)))
        elif place.type is not None and place.type.tag == "DW_TAG_array_type":
            place = Place(place.base, place.offset, _type(_of_type(place.type)))
        else:
            raise ValueError(f"[{index}]: that is no array")
        if place.offset is None:
            raise ValueError(f"[{index}]: that is not in memory")
        return Place(place.base, place.offset + index * self._size(place.type), place.type)

    def _size(self, kind: Any) -> int:
        if kind is None:
            return 1
        return int(_attribute(kind, "DW_AT_byte_size")) or self._bits // 8

    def fetch_type(self, place: Place) -> str:
        """The type of kprobe_events that shows it. ValueError for a structure."""
        kind = place.type
        if kind is None or kind.tag == "DW_TAG_pointer_type":
            return f"x{self._bits}"
        if kind.tag == "DW_TAG_enumeration_type":
            return f"s{8 * self._size(kind)}"
        if kind.tag == "DW_TAG_array_type":
            return f"x{self._bits}"
        if kind.tag != "DW_TAG_base_type" or self._size(kind) not in (1, 2, 4, 8):
            raise ValueError("that is a structure: name a member of it")
        signed = _attribute(kind, "DW_AT_encoding") in _SIGNED
        return f"{'s' if signed else 'u'}{8 * self._size(kind)}"

    def is_array(self, place: Place) -> bool:
        return place.type is not None and place.type.tag == "DW_TAG_array_type"


def _origin(die: Any) -> Any | None:
    for attribute in ("DW_AT_abstract_origin", "DW_AT_specification"):
        if attribute in die.attributes:
            return die.get_DIE_from_attribute(attribute)
    return None


def _attribute(die: Any, name: str) -> Any:
    """A number that the entry or what it is an instance of has; 0 where neither does."""
    for _ in range(_MOST_LINKS):
        if die is None:
            break
        if name in die.attributes:
            return die.attributes[name].value
        die = _origin(die)
    return 0


def _name(die: Any) -> str:
    found = _attribute(die, "DW_AT_name")
    return found.decode("utf-8", "replace") if found else ""


def _of_type(die: Any) -> Any | None:
    """The entry that its DW_AT_type names, None for void."""
    for _ in range(_MOST_LINKS):
        if die is None:
            break
        if "DW_AT_type" in die.attributes:
            return die.get_DIE_from_attribute("DW_AT_type")
        die = _origin(die)
    return None


def _type(die: Any | None) -> Any | None:
    """What a type is behind its names and qualifiers."""
    for _ in range(_MOST_LINKS):
        if die is None or die.tag not in _THROUGH:
            return die
        die = _of_type(die)
    return None
