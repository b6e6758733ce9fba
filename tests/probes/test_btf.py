"""BTF is read as the format says, on data made here and on a stock kernel's."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.btf import Btf, BtfError, Kind, Member


class Maker:
    """Builds a .BTF section type by type; `add` returns the new type's id."""

    def __init__(self) -> None:
        self.types = b""
        self.strings = b"\0"
        self.count = 0

    def name(self, text: str) -> int:
        if not text:
            return 0
        at = len(self.strings)
        self.strings += text.encode() + b"\0"
        return at

    def add(self, kind: Kind, name: str = "", third: int = 0, vlen: int = 0, rest: bytes = b"", flag: int = 0) -> int:
        self.types += struct.pack("<III", self.name(name), flag << 31 | kind << 24 | vlen, third) + rest
        self.count += 1
        return self.count

    def struct(self, name: str, size: int, members: list[tuple[str, int, int]], kind: Kind = Kind.STRUCT) -> int:
        rest = b"".join(struct.pack("<III", self.name(n), t, bits) for n, t, bits in members)
        return self.add(kind, name, size, len(members), rest)

    def data(self) -> bytes:
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        return header + self.types + self.strings


@pytest.fixture
def made() -> tuple[Btf, dict[str, int]]:
    """struct task { int pid; union { char c; struct { int deep; }; }; const u32 array[3]; int bit:3; }"""
    m = Maker()
    ids = {"int": m.add(Kind.INT, "int", 4, rest=struct.pack("<I", 1 << 24 | 32))}
    ids["char"] = m.add(Kind.INT, "char", 1, rest=struct.pack("<I", 1 << 24 | 8))
    ids["u32"] = m.add(Kind.TYPEDEF, "u32", ids["int"])
    ids["const"] = m.add(Kind.CONST, third=ids["u32"])
    ids["array"] = m.add(Kind.ARRAY, rest=struct.pack("<III", ids["const"], ids["int"], 3))
    inner = m.struct("", 4, [("deep", ids["int"], 0)])
    union = m.struct("", 4, [("c", ids["char"], 0), ("", inner, 0)], Kind.UNION)
    ids["task"] = m.struct("task", 24, [("pid", ids["int"], 0), ("", union, 32), ("array", ids["array"], 64)])
    ids["pointer"] = m.add(Kind.PTR, third=ids["task"])
    rest = struct.pack("<IIII", m.name("t"), ids["pointer"], m.name("n"), ids["const"])
    ids["proto"] = m.add(Kind.FUNC_PROTO, third=ids["int"], vlen=2, rest=rest)
    ids["func"] = m.add(Kind.FUNC, "wake", ids["proto"])
    ids["enum"] = m.add(Kind.ENUM, "state", 4, 2, struct.pack("<IiIi", m.name("A"), 1, m.name("B"), -1))
    return Btf(m.data()), ids


def test_types_are_found_by_name_and_followed_through_typedefs(made: tuple[Btf, dict[str, int]]) -> None:
    """A typedef of a qualified type has the size of what it names."""
    btf, ids = made
    assert btf.find("task", Kind.STRUCT, Kind.UNION) == btf[ids["task"]]
    assert btf.resolve(ids["const"]) == btf[ids["int"]]
    assert (btf.size(ids["array"]), btf.size(ids["pointer"])) == (12, 8)
    assert btf[ids["int"]].signed


def test_a_member_of_an_anonymous_union_counts_from_the_outer_struct(made: tuple[Btf, dict[str, int]]) -> None:
    """As C has it: task.deep without naming what it is in."""
    btf, ids = made
    assert btf.member(btf[ids["task"]], "deep") == Member("deep", ids["int"], 32)
    assert btf.offset("task", "array") == 8
    with pytest.raises(BtfError, match="struct task has no gone"):
        btf.offset("task", "gone")


def test_a_prototype_names_and_spells_its_parameters(made: tuple[Btf, dict[str, int]]) -> None:
    """What $arg1 becomes for a person: the name and the C type."""
    btf, _ = made
    prototype = btf.prototype(btf.functions("wake")[0])
    assert [(p.name, btf.spell(p.type_id)) for p in btf.parameters(prototype)] == [
        ("t", "struct task *"),
        ("n", "const u32"),
    ]
    assert btf.spell(prototype.target) == "int"


def test_enumerators_keep_their_values(made: tuple[Btf, dict[str, int]]) -> None:
    """As unsigned numbers of the enum's size."""
    btf, ids = made
    assert list(btf.enumerators(btf[ids["enum"]])) == [("A", 1), ("B", 0xFFFFFFFF)]


def test_a_type_that_refers_to_itself_is_an_error() -> None:
    """Hostile data must not hang the reader."""
    m = Maker()
    m.add(Kind.TYPEDEF, "a", 1)
    with pytest.raises(BtfError, match="refers to itself"):
        Btf(m.data()).resolve(1)


@given(st.data())
def test_damaged_data_raises_nothing_but_its_own_error(data: st.DataObject) -> None:
    """Any bytes in any place of a good section."""
    m = Maker()
    m.struct("task", 24, [("pid", m.add(Kind.INT, "int", 4, rest=struct.pack("<I", 32)), 0)])
    good = bytearray(m.data())
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        btf = Btf(bytes(good[: data.draw(st.integers(0, len(good)))]))
        for type_id in range(len(btf)):
            btf.spell(type_id)
            btf.size(type_id)
        btf.offset("task", "pid")
    except BtfError:
        pass
