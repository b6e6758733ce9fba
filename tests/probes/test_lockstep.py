"""Probed and bare machines end alike: every instruction class, probed one by one and all at once, by either back end.

Compared are the stop, the count of retired instructions, registers, flags and the hash of all RAM.
"""

import os

import pytest
from hypothesis import HealthCheck, given, settings

from probes import Kprobe, Manager, ProbeError
from tests.probes.bodies import BODIES
from tests.probes.lockstep import Body, build, cut, executions, place, probe_all, run_bare, run_probed
from tests.probes.sequences import bodies, drawn

NAMES = [body.name for body in BODIES]
CUT = [body for body in BODIES if body.name.rpartition("_")[0] in ("strings", "frames", "call_register", "ports")]
SMALL = [body for body in BODIES if len(body.offsets) < 100]


def observable(body: Body) -> list[int]:
    """Offsets whose instruction a post-handler can follow."""
    manager = Manager(build(body))
    found = []
    for offset in body.offsets:
        try:
            manager.register(Kprobe(addr=place(body, offset), post_handler=lambda p, regs: None))
        except ProbeError:
            continue
        found.append(offset)
    return found


@pytest.mark.parametrize("body", SMALL, ids=[body.name for body in SMALL])
def test_each_instruction_probed_alone_changes_nothing(body: Body) -> None:
    """Every other instruction is also followed by a post-handler, where one can be."""
    bare, followed = run_bare(body), observable(body)
    for index, offset in enumerate(body.offsets):
        end, _ = run_probed(body, [offset], "auto", post=index % 2 == 0 and offset in followed)
        assert end == bare, f"probed at +{offset:#x}"


@pytest.mark.parametrize("body", BODIES, ids=NAMES)
def test_all_instructions_probed_and_followed_change_nothing(body: Body) -> None:
    """With post-handlers everything is emulated or stepped."""
    assert run_probed(body, observable(body), "auto", post=True)[0] == run_bare(body)


@pytest.mark.parametrize("body", BODIES, ids=NAMES)
def test_all_instructions_probed_are_hit_as_often_as_they_run(body: Body) -> None:
    """Hits equal executions counted by stepping a bare machine; a rep is one, a page fault's repetition another."""
    end, counts = run_probed(body, body.offsets, "auto", post=False)
    ran = executions(body)
    assert end == run_bare(body)
    assert [hits for hits, _ in counts] == [ran[place(body, offset)] for offset in body.offsets]


@pytest.mark.parametrize("body", BODIES, ids=NAMES)
def test_the_long_way_ends_the_same(body: Body) -> None:
    """Hits that find no shortcut, and steps under TF, come to what the others do."""
    for offsets, post in ((body.offsets, False), (observable(body), True)):
        long, short = (run_probed(body, offsets, "auto", post, short) for short in (False, True))
        assert long == short


@pytest.mark.parametrize("post", [False, True], ids=["plain", "followed"])
@pytest.mark.parametrize("body", SMALL, ids=[body.name for body in SMALL])
def test_both_back_ends_agree(body: Body, post: bool) -> None:
    """PC hooks give the hits that int3 gives, and the same machine."""
    offsets = observable(body) if post else body.offsets
    assert run_probed(body, offsets, "hook", post) == run_probed(body, offsets, "auto", post)


@pytest.mark.parametrize("post", [False, True], ids=["plain", "followed"])
@pytest.mark.parametrize("arm", ["auto", "hook"])
@pytest.mark.parametrize("body", CUT, ids=[body.name for body in CUT])
def test_a_run_in_pieces_is_cut_where_a_bare_one_is(body: Body, arm: str, post: bool) -> None:
    """Between two iterations of a string instruction too: each cut finds the bare run's registers and clock, and the
    hits are those of one piece."""
    offsets = observable(body) if post else body.offsets
    whole = run_probed(body, offsets, arm, post)[1]
    for size in (1, 3, 4):
        machine = build(body)
        counts = probe_all(machine, body, offsets, arm, post)
        assert cut(machine, size) == cut(build(body), size)
        assert counts() == whole


SEQUENCES = int(os.environ.get("GDBSTUB_SEQUENCES", "12"))


@pytest.mark.parametrize("bits", [64, 32])
def test_sequences_of_any_instructions_end_alike(bits: int) -> None:
    """Made by hypothesis: all probed at once and each alone, plain and followed, by either back end.

    GDBSTUB_SEQUENCES says how many are tried.
    """

    @settings(max_examples=SEQUENCES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(bodies(bits))
    def try_one(body: Body) -> None:
        bare, followed = run_bare(body), observable(body)
        for arm in ("auto", "hook"):
            assert run_probed(body, body.offsets, arm, post=False)[0] == bare
            assert run_probed(body, followed, arm, post=True)[0] == bare
        assert run_probed(body, followed, "auto", post=True, short=False)[0] == bare
        for index, offset in enumerate(drawn(body)):
            assert run_probed(body, [offset], "auto", post=index % 2 == 0 and offset in followed)[0] == bare

    try_one()


def test_a_post_handler_runs_once_for_a_page_that_came_on_demand() -> None:
    """[M] 6.12: the fault runs the pre-handler twice, the post-handler once."""
    body = next(body for body in BODIES if body.name == "demand_page_64")
    _, counts = run_probed(body, [body.offsets[-1]], "int3", post=True)
    assert counts == [(2, 1)]
