"""Type profiles: text in, the same types as a kernel's own BTF would give; damaged ones are refused by line."""

from __future__ import annotations

import pytest

from probes.btf import Btf, Kind
from probes.linux.profile import ProfileError, find_profile, read_profile

HEAD = "kernel 6.1.0-test 32 abcd\nint 4 u unsigned int\nint 1 s char\n"


def test_text_becomes_types() -> None:
    """Members, pointers, arrays, bit fields and sizes; what is never described is incomplete."""
    profile = read_profile(
        HEAD + "variable c1000000 first struct node [2]\nconstant 7 SEVEN\n"
        "struct 40 node  # with a comment\n 0 next struct node *\n 4 name char [16]\n"
        " 20 names char *[4]\n 36.3:5 bits unsigned int\n 8 other struct unknown *\n"
    )
    types = Btf(profile.btf, 4)
    node = types.find("node", Kind.STRUCT)
    assert node is not None
    members = {member.name: member for member in types.members(node)}
    spelled = {name: types.spell(member.type_id) for name, member in members.items()}
    assert spelled == {
        "next": "struct node *",
        "name": "char[16]",
        "names": "char *[4]",
        "bits": "unsigned int",
        "other": "struct unknown *",
    }
    assert (node.size, types.size(members["names"].type_id)) == (40, 16)
    assert (members["bits"].bit_offset, members["bits"].bit_size) == (36 * 8 + 3, 5)
    assert types.find("unknown", Kind.FWD) is not None
    assert profile.variables == {"first": (0xC1000000, "struct node [2]")}
    constants = next(types[index] for index in range(len(types)) if types[index].kind is Kind.ENUM)
    assert list(types.enumerators(constants)) == [("SEVEN", 7)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (" 0 a char", "no member"),
        ("struct 4 a\n x b char", "no member"),
        ("struct 4 a\n 0 b floating *", "no type floating"),
        ("int 4 x short", "'x'"),
        ("nonsense", "not enough values"),
        ("struct 99999999999 a", "format"),
    ],
)
def test_damaged_text_is_refused_with_its_line(line: str, reason: str) -> None:
    """A person has written it, or half a file is there."""
    with pytest.raises(ProfileError, match=r"line \d+ of the type profile is wrong") as refused:
        read_profile(HEAD + line + "\nint 4 s int\n")
    assert reason in str(refused.value)


def test_profile_without_its_kernel_is_refused() -> None:
    with pytest.raises(ProfileError, match="whose it is"):
        read_profile("int 4 s int\n")


def test_the_profiles_in_the_package_are_whole() -> None:
    """Debian's i386 kernel that we test is there, and no other build gets its types."""
    profile = find_profile(bytes.fromhex("e53bebc4fd9b0992c212d7b0f7f84237a970890d"))
    assert profile is not None
    types = Btf(profile.btf, 4)
    assert types.offset("task_struct", "comm") > 0
    assert profile.variables["init_task"][1] == "struct task_struct"
    assert find_profile(bytes(20)) is None
    assert find_profile(None) is None
