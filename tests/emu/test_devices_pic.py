"""The 8259A pair against its datasheet (Intel 231468)."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.devices.pic import Pic
from emu.devices.state import StateError

EOI = 0x20


def initialise(pic: Pic, icw4: int = 0x01) -> Pic:
    """As Linux does: vectors 0x30 and 0x38, all lines unmasked."""
    for base, vector, cascade in ((0x20, 0x30, 0x04), (0xA0, 0x38, 0x02)):
        pic.write(base, 1, 0x11)
        for value in (vector, cascade, icw4, 0x00):
            pic.write(base + 1, 1, value)
    return pic


@pytest.fixture
def pic() -> Pic:
    return initialise(Pic())


def isr(pic: Pic, base: int = 0x20) -> int:
    pic.write(base, 1, 0x0B)
    return pic.read(base, 1)


def irr(pic: Pic, base: int = 0x20) -> int:
    pic.write(base, 1, 0x0A)
    return pic.read(base, 1)


def drain(pic: Pic) -> list[int]:
    """The vectors of all that is pending, without any EOI."""
    vectors = []
    while pic.pending():
        vectors.append(pic.acknowledge())
    return vectors


def test_edge_moves_from_irr_to_isr_at_acknowledge(pic: Pic) -> None:
    """And the line, still up, does not ask again."""
    pic.set_irq(4, True)
    assert irr(pic) == 0x10
    assert pic.acknowledge() == 0x34
    assert (irr(pic), isr(pic)) == (0, 0x10)
    pic.write(0x20, 1, EOI)
    assert not pic.pending()


def test_edge_needs_the_line_low_first(pic: Pic) -> None:
    """Down and up again is a second request."""
    pic.set_irq(4, True)
    pic.acknowledge()
    pic.write(0x20, 1, EOI)
    pic.set_irq(4, False)
    pic.set_irq(4, True)
    assert pic.acknowledge() == 0x34


def test_request_that_falls_before_acknowledge_is_spurious_irq_7(pic: Pic) -> None:
    """INTA finds nothing: vector of IR7, and nothing in service to end."""
    pic.set_irq(4, True)
    pic.set_irq(4, False)
    assert not pic.pending()
    assert pic.acknowledge() == 0x37
    assert isr(pic) == 0


def test_power_on_state_delivers_nothing() -> None:
    """Without firmware, no line is open before a guest has set the vectors."""
    pic = Pic()
    for line in range(16):
        pic.set_irq(line, True)
    assert not pic.pending()


def test_mask_holds_a_request_back_without_losing_it(pic: Pic) -> None:
    """The request stays in IRR until its mask bit goes."""
    pic.write(0x21, 1, 0x10)
    pic.set_irq(4, True)
    assert not pic.pending()
    assert pic.read(0x21, 1) == 0x10
    pic.write(0x21, 1, 0)
    assert pic.acknowledge() == 0x34


def test_higher_priority_interrupts_a_lower_one_and_not_the_reverse(pic: Pic) -> None:
    """Fully nested mode."""
    pic.set_irq(4, True)
    pic.acknowledge()
    pic.set_irq(5, True)
    assert not pic.pending()
    pic.set_irq(0, True)
    assert pic.acknowledge() == 0x30


def test_nonspecific_eoi_ends_the_highest_in_service(pic: Pic) -> None:
    """The one served last in fully nested mode."""
    for line in (4, 0):
        pic.set_irq(line, True)
        pic.acknowledge()
    pic.write(0x20, 1, EOI)
    assert isr(pic) == 0x10


def test_specific_eoi_ends_the_one_it_names(pic: Pic) -> None:
    """0x60 + line, as Linux sends it."""
    for line in (4, 0):
        pic.set_irq(line, True)
        pic.acknowledge()
    pic.write(0x20, 1, 0x64)
    assert isr(pic) == 0x01


def test_slave_is_served_through_ir2_of_the_master(pic: Pic) -> None:
    """Both chips have it in service and both must be told its end."""
    pic.set_irq(8, True)
    assert pic.acknowledge() == 0x38
    assert (isr(pic), isr(pic, 0xA0)) == (0x04, 0x01)
    pic.write(0xA0, 1, EOI)
    pic.set_irq(9, True)
    assert not pic.pending()
    pic.write(0x20, 1, EOI)
    assert pic.acknowledge() == 0x39


def test_slave_outranks_irq_3_and_not_irq_1(pic: Pic) -> None:
    """IRQ 8 to 15 stand at the place of IRQ 2."""
    for line in (3, 15, 1):
        pic.set_irq(line, True)
    vectors = []
    while pic.pending():
        vectors.append(pic.acknowledge())
        pic.write(0xA0, 1, EOI)
        pic.write(0x20, 1, EOI)
    assert vectors == [0x31, 0x3F, 0x33]


def test_slave_request_that_falls_takes_the_cascade_down(pic: Pic) -> None:
    """INT of the slave follows its requests."""
    pic.set_irq(12, True)
    pic.set_irq(12, False)
    assert irr(pic) == 0


def test_irq_2_is_redirected_to_irq_9(pic: Pic) -> None:
    """The AT's wiring of the XT's bus pin."""
    pic.set_irq(2, True)
    assert pic.acknowledge() == 0x39


def test_special_fully_nested_master_takes_a_higher_slave_request() -> None:
    """Without it the slave would wait for the master's EOI."""
    pic = initialise(Pic(), icw4=0x11)
    pic.set_irq(9, True)
    pic.acknowledge()
    pic.set_irq(8, True)
    assert pic.acknowledge() == 0x38


def test_slave_request_behind_the_acknowledged_one_makes_a_new_edge() -> None:
    """INT of the slave falls with INTA; in automatic EOI mode IRQ 9 asks at once after IRQ 8."""
    pic = initialise(Pic(), icw4=0x03)
    for line in (8, 9):
        pic.set_irq(line, True)
    assert drain(pic) == [0x38, 0x39]


def test_line_that_is_up_asks_when_it_is_made_level_triggered(pic: Pic) -> None:
    """No edge is needed any more."""
    pic.set_irq(5, True)
    pic.acknowledge()
    pic.write(0x20, 1, EOI)
    pic.write(0x4D0, 1, 0x20)
    assert pic.acknowledge() == 0x35


def test_level_line_asks_again_after_eoi_while_it_is_up(pic: Pic) -> None:
    """ELCR bit 5: what PCI lines use."""
    pic.write(0x4D0, 1, 0x20)
    pic.set_irq(5, True)
    pic.acknowledge()
    pic.write(0x20, 1, EOI)
    assert pic.acknowledge() == 0x35
    pic.set_irq(5, False)
    pic.write(0x20, 1, EOI)
    assert not pic.pending()


def test_elcr_keeps_the_lines_that_are_always_edge(pic: Pic) -> None:
    """Timer, keyboard, cascade; clock and coprocessor."""
    pic.write(0x4D0, 1, 0xFF)
    pic.write(0x4D1, 1, 0xFF)
    assert (pic.read(0x4D0, 1), pic.read(0x4D1, 1)) == (0xF8, 0xDE)


def test_automatic_eoi_leaves_nothing_in_service() -> None:
    """ICW4 bit 1."""
    pic = initialise(Pic(), icw4=0x03)
    pic.set_irq(4, True)
    assert pic.acknowledge() == 0x34
    assert isr(pic) == 0


def test_rotation_on_eoi_makes_the_served_line_the_last() -> None:
    """OCW2 0xa0: after IRQ 4 the order is 5, 6, 7, 0 ... 4."""
    pic = initialise(Pic(), icw4=0x01)
    pic.set_irq(4, True)
    pic.acknowledge()
    pic.write(0x20, 1, 0xA0)
    pic.set_irq(4, False)
    for line in (4, 0, 6):
        pic.set_irq(line, True)
    assert pic.acknowledge() == 0x36


def test_rotation_in_automatic_eoi_mode() -> None:
    """OCW2 0x80 rotates at each acknowledge, 0x00 ends it."""
    pic = initialise(Pic(), icw4=0x03)
    pic.write(0x20, 1, 0x80)
    for line in (0, 1):
        pic.set_irq(line, True)
    assert drain(pic) == [0x30, 0x31]
    for line in (0, 3):
        pic.set_irq(line, False)
        pic.set_irq(line, True)
    assert drain(pic) == [0x33, 0x30]


def test_set_priority_names_the_lowest(pic: Pic) -> None:
    """OCW2 0xc0 + line."""
    pic.write(0x20, 1, 0xC3)
    for line in (0, 4):
        pic.set_irq(line, True)
    assert pic.acknowledge() == 0x34


def test_special_mask_mode_lets_lower_priorities_through(pic: Pic) -> None:
    """A line that is in service and masked no longer blocks those below it."""
    pic.set_irq(3, True)
    pic.acknowledge()
    pic.set_irq(6, True)
    pic.write(0x21, 1, 0x08)
    assert not pic.pending()
    pic.write(0x20, 1, 0x68)
    assert pic.acknowledge() == 0x36


def test_nonspecific_eoi_spares_masked_lines_in_special_mask_mode(pic: Pic) -> None:
    """Datasheet, "Special Mask Mode"."""
    pic.set_irq(3, True)
    pic.acknowledge()
    pic.write(0x21, 1, 0x08)
    pic.write(0x20, 1, 0x68)
    pic.write(0x20, 1, EOI)
    assert isr(pic) == 0x08


def test_poll_is_an_acknowledge_by_a_read(pic: Pic) -> None:
    """OCW3 bit 2; without a request it reads 0, and the read after it is IRR again."""
    pic.set_irq(4, True)
    pic.write(0x20, 1, 0x0C)
    assert pic.read(0x20, 1) == 0x84
    assert not pic.pending()
    pic.write(0x20, 1, 0x0C)
    assert pic.read(0x20, 1) == 0
    assert isr(pic) == 0x10


def test_initialisation_forgets_requests_and_masks(pic: Pic) -> None:
    """ICW1 resets the edge latches: a line that stays up must go down first."""
    pic.set_irq(4, True)
    pic.write(0x21, 1, 0xFF)
    initialise(pic)
    pic.set_irq(4, True)
    assert (pic.pending(), pic.read(0x21, 1)) == (False, 0)


def test_single_chip_without_icw4_takes_two_words() -> None:
    """ICW1 with SNGL and without IC4: the second write after ICW2 is the mask."""
    pic = Pic()
    for port, value in ((0x20, 0x12), (0x21, 0x40), (0x21, 0xEF)):
        pic.write(port, 1, value)
    assert pic.read(0x21, 1) == 0xEF


def test_on_raise_is_called_when_pending_turns_true(pic: Pic) -> None:
    """Not again for a second request while the first waits."""
    raised: list[bool] = []
    pic.on_raise = lambda: raised.append(pic.pending())
    pic.set_irq(4, True)
    pic.set_irq(1, True)
    assert raised == [True]


def test_damaged_state_is_refused(pic: Pic) -> None:
    """The message names the chip and the register."""
    state = pic.state()
    state["slave"] = {"lines": 300}
    with pytest.raises(StateError, match="pic slave: lines is out of range"):
        pic.load(state)


def test_the_chips_are_described_by_their_registers() -> None:
    """A request that waits behind the one in service, and a mode."""
    pic = initialise(Pic())
    pic.write(0x21, 1, 0)
    pic.set_irq(0, True)
    pic.acknowledge()
    pic.set_irq(3, True)
    pic.write(0x20, 1, 0x68)  # OCW3: special mask
    master, slave = pic.lines()
    assert master.startswith("pic master: IRR 08, ISR 01, IMR 00, inputs 09, level-triggered 00; vectors 0x30 to 0x37")
    assert master.endswith(", IR7 last, special mask")
    assert slave.startswith("pic slave: IRR 00, ISR 00, IMR ")
    assert pic.lines() == [master, slave], "looking changes nothing"


OPERATIONS = st.one_of(
    st.tuples(st.just("line"), st.integers(0, 15), st.booleans()),
    st.tuples(st.just("write"), st.sampled_from([0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1]), st.integers(0, 255)),
    st.tuples(st.just("read"), st.sampled_from([0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1]), st.none()),
    st.tuples(st.just("acknowledge"), st.none(), st.none()),
)


def apply(pic: Pic, operation: tuple[str, int, int | bool]) -> object:
    name, where, value = operation
    if name == "line":
        pic.set_irq(where, bool(value))
    elif name == "write":
        pic.write(where, 1, int(value))
    elif name == "read":
        return pic.read(where, 1)
    elif pic.pending():
        return pic.acknowledge()
    return pic.pending()


@given(st.lists(OPERATIONS), st.lists(OPERATIONS))
def test_restored_pair_behaves_as_the_one_that_never_stopped(first: list, then: list) -> None:
    """Any history, then saved through JSON, then any future."""
    pic, other = initialise(Pic()), Pic()
    for operation in first:
        apply(pic, operation)
    other.load(json.loads(json.dumps(pic.state())))
    assert [apply(pic, operation) for operation in then] == [apply(other, operation) for operation in then]
