"""DWARF of a guest's ELF file: functions, the addresses of their lines, and where variables are at an address.

Rules: pure, reads bytes only; the reader is pyelftools. A place is given as a fetch argument of kprobe_events, so that
nothing else has to know DWARF: `%ax`, `+8(%sp)`, `@0x1000`. What compilers spread over pieces
or compute is Unavailable. Files come from strangers: any method may raise BrokenDwarf.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

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
_MOST_LINKS: Final = 50  # from a name, an instance or a member to what it is: a broken file may lead in circles
_IN_REGISTER: Final = re.compile(r"DW_OP_reg(\d+)")
_BEHIND_REGISTER: Final = re.compile(r"DW_OP_breg(\d+)")
_LITERAL: Final = re.compile(r"DW_OP_lit(\d+)")
_SIGNED: Final = (0x05, 0x06, 0x0D)  # DW_ATE_signed, signed_char, signed_fixed
_OPTIMIZED: Final = re.compile(r"-O(?:[1-9gsz]|fast)")
_THROUGH: Final = ("DW_TAG_typedef", "DW_TAG_const_type", "DW_TAG_volatile_type", "DW_TAG_restrict_type")
_VARIABLES: Final = ("DW_TAG_formal_parameter", "DW_TAG_variable")
_AGGREGATES: Final = ("DW_TAG_structure_type", "DW_TAG_union_type")


class Unavailable(Exception):
    """What DWARF has, but no fetch argument can say; the text is the reason."""


class BrokenDwarf(ValueError):
    """The file contradicts itself or the format. The text says so to a person."""

    def __init__(self, what: object) -> None:
        super().__init__(f"the guest's DWARF cannot be read: {what}"[:200])


@contextlib.contextmanager
def _library() -> Iterator[None]:
    """Around calls of pyelftools and nothing else."""
    try:
        yield
    except Exception as error:  # the boundary to pyelftools, which ends with whatever comes of a broken file
        raise BrokenDwarf(repr(error)) from error


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
        with _library():
            file = ELFFile(io.BytesIO(elf))
            has_dwarf = file.has_dwarf_info()
        if not has_dwarf:
            raise ValueError("the guest's image has no DWARF")
        with _library():
            self._info = file.get_dwarf_info()
            self._bits: int = file.elfclass
            self._locations = LocationParser(self._info.location_lists())
        self._large = len(elf) > _LARGE

    def functions(self, name: str, source: str | None = None, near: int | None = None) -> list[Function]:
        """Every body of the function of that name, the one of its own first; in the file `source` alone if given.

        Of a large file only the unit that has code at the address `near`: reading all would take minutes.
        """
        found = []
        for unit in self._units(near):
            with _library():
                entries = list(unit.iter_DIEs())
            for die in entries:
                if die.tag in ("DW_TAG_subprogram", "DW_TAG_inlined_subroutine") and _name(die) == name:
                    found += self._body(unit, die, name)
        found.sort(key=lambda one: (one.die.tag != "DW_TAG_subprogram", one.low))
        return [one for one in found if source is None or f"/{one.file}".endswith(f"/{source.lstrip('/')}")]

    def _units(self, near: int | None) -> list[Any]:
        with _library():
            ranges = self._info.get_aranges() if self._large and near is not None else None
            at = ranges.cu_offset_at_addr(near) if ranges is not None else None
            return list(self._info.iter_CUs()) if at is None else [self._info.get_CU_at(at)]

    def _body(self, unit: Any, die: Any, name: str) -> list[Function]:
        span = _span(die)
        if span is None:
            return []  # a declaration, or in pieces
        number, line = _number(die, "DW_AT_decl_file"), _number(die, "DW_AT_decl_line")
        return [Function(name, *span, self._file(unit, number), line, die)]

    def _file(self, unit: Any, number: int) -> str:
        with _library():
            program = self._info.line_program_for_CU(unit)
            files = program["file_entry"] if program is not None else []
            index = number if program is not None and program.header.version >= 5 else number - 1
            return str(files[index].name.decode("utf-8", "replace")) if 0 <= index < len(files) else ""

    def lines(self, function: Function) -> list[tuple[int, int]]:
        """(address, line) of every statement's beginning in `function`, of its own file, in address order."""
        unit = function.die.cu
        with _library():
            program = self._info.line_program_for_CU(unit)
            entries = program.get_entries() if program is not None else ()
        found = []
        for entry in entries:
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
        if _OPTIMIZED.search(_text(_top(function.die), "DW_AT_producer")):
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
            found = [
                die for die in _children(_top(function.die)) if die.tag == "DW_TAG_variable" and _name(die) == name
            ]
        if not found:
            raise KeyError(name)
        die = found[-1]
        kind = _type(_of_type(die))
        if "DW_AT_const_value" in die.attributes:
            return Place(f"\\{_number(die, 'DW_AT_const_value')}", None, kind)
        return self._evaluate(self._expression(die, "DW_AT_location", pc), function, pc, kind)

    def argument(self, function: Function, name: str) -> Place:
        """A parameter as the kernel's `$argN`, which a return probe still knows. KeyError; Unavailable."""
        if self._bits != 64:
            raise Unavailable("at a function's return its parameters are gone")
        parameters = [die for die in _children(function.die) if die.tag == "DW_TAG_formal_parameter"]
        for number, die in enumerate(parameters, start=1):
            if _name(die) == name:
                return Place(f"$arg{number}", None, _type(_of_type(die)))
        raise KeyError(name)

    def _in_scope(self, function: Function, pc: int) -> Iterator[Any]:
        pending = [function.die]
        while pending:
            for child in _children(pending.pop()):
                if child.tag in _VARIABLES and _name(child):
                    yield child
                elif child.tag == "DW_TAG_lexical_block" and _covers(child, pc):
                    pending.append(child)

    def _expression(self, die: Any, attribute: str, pc: int) -> Sequence[Any]:
        """The operations that give its location at `pc`."""
        value = die.attributes.get(attribute)
        if value is None:
            raise Unavailable("it was optimized out")
        with _library():
            located = self._locations.parse_from_attribute(value, die.cu["version"], die)
            parser = DWARFExprParser(die.cu.structs)
            if isinstance(located, LocationExpr):
                return list(parser.parse_expr(located.loc_expr))
        start = _number(_top(die), "DW_AT_low_pc")
        for entry in located:
            if not isinstance(entry, LocationEntry):
                start = entry.base_address
                continue
            shift = 0 if getattr(entry, "is_absolute", False) else start
            if entry.begin_offset + shift <= pc < entry.end_offset + shift:
                with _library():
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
            literal = _LITERAL.fullmatch(name)
            return Place(f"\\{literal[1] if literal is not None else value}", None, kind)
        if (register := _IN_REGISTER.fullmatch(name)) is not None:
            return Place(f"%{self._register(int(register[1]))}", None, kind)
        if (register := _BEHIND_REGISTER.fullmatch(name)) is not None:
            return Place(f"%{self._register(int(register[1]))}", value, kind)
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
            with _library():
                die = die.get_parent()
        if die is None:
            raise Unavailable("its function has no frame")
        operations = self._expression(die, "DW_AT_frame_base", pc)
        if operations and operations[0].op_name == "DW_OP_fbreg":
            raise BrokenDwarf("a frame's base is said by itself")
        place = self._evaluate(operations, function, pc, None)
        return place.base, place.offset or 0

    def _cfa(self, pc: int) -> tuple[str, int]:
        """The canonical frame address as a register and what is added, from the call frame information."""
        with _library():
            tables = [self._info.CFI_entries()] if self._info.has_CFI() else []
            tables += [self._info.EH_CFI_entries()] if self._info.has_EH_CFI() else []
        for entry in (entry for table in tables for entry in table):
            header = getattr(entry, "header", {})
            if "initial_location" not in header:
                continue
            if not header["initial_location"] <= pc < header["initial_location"] + header["address_range"]:
                continue
            with _library():
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
        found = _find_member(kind, name, _MOST_LINKS)
        if found is None:
            raise ValueError(f"there is no member {name}")
        offset, die = found
        if "DW_AT_bit_size" in die.attributes:
            raise ValueError(f"{name} is a bit field")
        return Place(place.base, place.offset + offset, _type(_of_type(die)))

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
        return _number(kind, "DW_AT_byte_size") or self._bits // 8

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
        signed = _number(kind, "DW_AT_encoding") in _SIGNED
        return f"{'s' if signed else 'u'}{8 * self._size(kind)}"

    def is_array(self, place: Place) -> bool:
        return place.type is not None and place.type.tag == "DW_TAG_array_type"


def _children(die: Any) -> list[Any]:
    with _library():
        return list(die.iter_children())


def _top(die: Any) -> Any:
    """The entry of its unit."""
    with _library():
        return die.cu.get_top_DIE()


def _linked(die: Any, attribute: str) -> Any:
    """The entry that an attribute of `die` refers to."""
    with _library():
        return die.get_DIE_from_attribute(attribute)


def _origin(die: Any) -> Any | None:
    for attribute in ("DW_AT_abstract_origin", "DW_AT_specification"):
        if attribute in die.attributes:
            return _linked(die, attribute)
    return None


def _attribute(die: Any, name: str) -> object:
    """What the entry or what it is an instance of has by that name; None where neither does."""
    for _ in range(_MOST_LINKS):
        if die is None:
            break
        if name in die.attributes:
            found: object = die.attributes[name].value
            return found
        die = _origin(die)
    return None


def _number(die: Any, name: str) -> int:
    """A number that the entry or what it is an instance of has; 0 where neither does."""
    found = _attribute(die, name)
    if not isinstance(found, int | None):
        raise BrokenDwarf(f"{name} of an entry is no number")
    return found or 0


def _text(die: Any, name: str) -> str:
    found = _attribute(die, name)
    if not isinstance(found, bytes | None):
        raise BrokenDwarf(f"{name} of an entry is no text")
    return (found or b"").decode("utf-8", "replace")


def _name(die: Any) -> str:
    return _text(die, "DW_AT_name")


def _span(die: Any) -> tuple[int, int] | None:
    """Where the code of an entry begins and ends; None where it has none or is in pieces."""
    high = die.attributes.get("DW_AT_high_pc")
    if high is None or "DW_AT_low_pc" not in die.attributes:
        return None
    low, end = _number(die, "DW_AT_low_pc"), _number(die, "DW_AT_high_pc")
    with _library():
        is_size = describe_form_class(high.form) != "address"
    return low, low + end if is_size else end


def _covers(block: Any, pc: int) -> bool:
    span = _span(block)
    if span is None:
        return "DW_AT_ranges" in block.attributes  # where variables are is asked by address anyway
    return span[0] <= pc < span[1]


def _find_member(kind: Any, name: str, depth: int) -> tuple[int, Any] | None:
    """The offset and the entry of a member of a structure or union, or of one without a name inside it."""
    for die in _children(kind):
        if die.tag != "DW_TAG_member":
            continue
        offset = _number(die, "DW_AT_data_member_location")  # a union's members have none
        if _name(die) == name:
            return offset, die
        inner = _type(_of_type(die)) if not _name(die) else None
        if inner is not None and inner.tag in _AGGREGATES and depth:
            found = _find_member(inner, name, depth - 1)
            if found is not None:
                return offset + found[0], found[1]
    return None


def _of_type(die: Any) -> Any | None:
    """The entry that its DW_AT_type names, None for void."""
    for _ in range(_MOST_LINKS):
        if die is None:
            break
        if "DW_AT_type" in die.attributes:
            return _linked(die, "DW_AT_type")
        die = _origin(die)
    return None


def _type(die: Any | None) -> Any | None:
    """What a type is behind its names and qualifiers."""
    for _ in range(_MOST_LINKS):
        if die is None or die.tag not in _THROUGH:
            return die
        die = _of_type(die)
    return None
