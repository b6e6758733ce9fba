"""BTF's types as drgn's: what a drgn Program asks for by name or by id.

Rules: pure but for the Program that types belong to; each type is made when it is first asked for, its members later
still. Source of what a kind means: btf.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

import drgn

from probes.btf import Btf, BtfError, Kind, Member, Type

_ORDER: Final = "little"
_KINDS: Final = {
    drgn.TypeKind.INT: (Kind.INT,),
    drgn.TypeKind.BOOL: (Kind.INT,),
    drgn.TypeKind.FLOAT: (Kind.FLOAT,),
    drgn.TypeKind.STRUCT: (Kind.STRUCT,),
    drgn.TypeKind.UNION: (Kind.UNION,),
    drgn.TypeKind.ENUM: (Kind.ENUM, Kind.ENUM64),
    drgn.TypeKind.TYPEDEF: (Kind.TYPEDEF,),
}
_QUALIFIERS: Final = {
    Kind.VOLATILE: drgn.Qualifiers.VOLATILE,
    Kind.CONST: drgn.Qualifiers.CONST,
    Kind.RESTRICT: drgn.Qualifiers.RESTRICT,
}
# drgn's names of C's integers -> gcc's, which BTF has from DWARF
_GCC: Final = {
    "short": "short int",
    "unsigned short": "short unsigned int",
    "long": "long int",
    "unsigned long": "long unsigned int",
    "long long": "long long int",
    "unsigned long long": "long long unsigned int",
}


class TypeMaker:
    """The types of one Program, from one Btf. Methods may raise BtfError for data that contradicts itself."""

    def __init__(self, program: drgn.Program, btf: Btf) -> None:
        self._program = program
        self._btf = btf
        self._made: dict[int, drgn.Type] = {}

    def find(self, _program: drgn.Program, kinds: drgn.TypeKindSet, name: str, _file: str | None) -> drgn.Type | None:
        """drgn's type finder."""
        for kind in kinds:
            wanted = _KINDS.get(kind, ())
            found = self._btf.find(name, *wanted) or self._btf.find(_GCC.get(name, name), *wanted)
            if found is not None and (found.kind is not Kind.INT or found.boolean is (kind == drgn.TypeKind.BOOL)):
                return self.make(found.id)
        return None

    def constant(self, name: str) -> drgn.Object | None:
        """The enumerator of that name, of whichever enum has it first."""
        found = _constants(self._btf).get(name)
        if found is None:
            return None
        return drgn.Object(self._program, self.make(found[0]), found[1])

    def function(self, name: str) -> drgn.Type | None:
        """The type of the kernel's function of that name."""
        found = self._btf.functions(name)
        return self.make(found[0].target) if found else None

    def make(self, type_id: int) -> drgn.Type:
        """The drgn Type of a BTF id."""
        made = self._made.get(type_id)
        if made is None:
            made = self._made[type_id] = self._make(self._btf[type_id])
        return made

    def _make(self, type_: Type) -> drgn.Type:
        program = self._program
        match type_.kind:
            case Kind.INT if type_.boolean:
                return program.bool_type(type_.name, type_.size, _ORDER)
            case Kind.INT:
                return program.int_type(type_.name, type_.size, type_.signed, _ORDER)
            case Kind.FLOAT:
                return program.float_type(type_.name, type_.size, _ORDER)
            case Kind.PTR:
                return program.pointer_type(self.make(type_.target), type_.size, _ORDER)
            case Kind.ARRAY:
                return program.array_type(self.make(type_.target), type_.detail)
            case Kind.STRUCT:
                return program.struct_type(type_.name or None, type_.size, self._members(type_))
            case Kind.UNION:
                return program.union_type(type_.name or None, type_.size, self._members(type_))
            case Kind.FWD:
                return program.union_type(type_.name) if type_.flag else program.struct_type(type_.name)
            case Kind.ENUM | Kind.ENUM64:
                return self._enum(type_)
            case Kind.TYPEDEF:
                return program.typedef_type(type_.name, self.make(type_.target))
            case Kind.VOLATILE | Kind.CONST | Kind.RESTRICT:
                inner = self.make(type_.target)
                return inner.qualified(inner.qualifiers | _QUALIFIERS[type_.kind])
            case Kind.TYPE_TAG:
                return self.make(type_.target)
            case Kind.FUNC_PROTO:
                return self._prototype(type_)
            case Kind.VOID:
                return program.void_type()
        raise BtfError(f"type {type_.id} ({type_.kind.name}) is no type of data")

    def _members(self, type_: Type) -> list[drgn.TypeMember]:
        return [
            drgn.TypeMember(self._member(member), member.name or None, member.bit_offset)
            for member in self._btf.members(type_)
        ]

    def _member(self, member: Member) -> Callable[[], drgn.Type | drgn.Object]:
        def make() -> drgn.Type | drgn.Object:
            made = self.make(member.type_id)
            if not member.bit_size:
                return made
            return drgn.Object(self._program, made, bit_field_size=member.bit_size)

        return make

    def _enum(self, type_: Type) -> drgn.Type:
        name = "unsigned long" if type_.size == 8 else "unsigned int"
        compatible = self._program.int_type(name, type_.size, False, _ORDER)
        values = [drgn.TypeEnumerator(name, value) for name, value in self._btf.enumerators(type_)]
        return self._program.enum_type(type_.name or None, compatible, values)

    def _prototype(self, type_: Type) -> drgn.Type:
        parameters = self._btf.parameters(type_)
        variadic = bool(parameters) and not parameters[-1].type_id
        made = [drgn.TypeParameter(self._later(one.type_id), one.name or None) for one in parameters if one.type_id]
        return self._program.function_type(self.make(type_.target), made, variadic)

    def _later(self, type_id: int) -> Callable[[], drgn.Type]:
        return lambda: self.make(type_id)


@functools.lru_cache(maxsize=4)
def _constants(btf: Btf) -> dict[str, tuple[int, int]]:
    """Enumerator -> (type, value), for all Programs of machines with the same kernel: a kernel has 20,000."""
    found: dict[str, tuple[int, int]] = {}
    for type_id in range(1, len(btf)):
        type_ = btf[type_id]
        if type_.kind in (Kind.ENUM, Kind.ENUM64):
            for enumerator, value in btf.enumerators(type_):
                found.setdefault(enumerator, (type_id, value))
    return found
