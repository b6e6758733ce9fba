"""Substituted words: the guest reads ours, debuggers, hashes and snapshots the guest's own."""

import pytest

from emu.iface import MemoryFault
from emu.machine import Machine
from tests.support.embedded import Guest, power_on

OURS = 0x1122334455667788.to_bytes(8, "little")


class Stack:
    """A word of the embedded guest's data, seen from all sides."""

    def __init__(self) -> None:
        self.machine: Machine = power_on(64)
        assert self.machine.run(5_000) is not None
        self.vaddr = Guest(self.machine, 64).address("copy_source")
        paddr = self.machine.memory.translate(self.vaddr)
        assert paddr is not None
        self.paddr = paddr
        self.original = self.machine.memory.read(self.vaddr, 8)

    @property
    def raw(self) -> bytes:
        """What the guest reads."""
        return self.machine.ram.read(self.paddr, 8)


@pytest.fixture
def stack() -> Stack:
    return Stack()


def test_guest_reads_ours_and_everybody_else_its_own(stack: Stack) -> None:
    """RAM holds the substitute; a debugger's read over it, and the hash of RAM, do not."""
    bare = stack.machine.ram_sha256()
    stack.machine.words.substitute(stack.vaddr, OURS)
    assert stack.raw == OURS
    assert stack.machine.memory.read(stack.vaddr - 2, 12)[2:10] == stack.original
    assert stack.machine.memory.read(stack.vaddr + 3, 2) == stack.original[3:5]
    assert stack.machine.ram_sha256() == bare


def test_last_release_puts_the_guests_word_back(stack: Stack) -> None:
    """Two users share one word; it goes with the second."""
    words = stack.machine.words
    first, second = words.substitute(stack.vaddr, OURS), words.substitute(stack.vaddr, OURS)
    words.release(first)
    assert stack.raw == OURS
    words.release(second)
    assert stack.raw == stack.original


def test_word_the_guest_has_overwritten_is_left_alone(stack: Stack) -> None:
    """It stands no longer: shown as it is, and not put back."""
    words = stack.machine.words
    word = words.substitute(stack.vaddr, OURS)
    stack.machine.ram.write(stack.paddr, b"gueststo")
    assert not words.stands(word)
    assert stack.machine.memory.read(stack.vaddr, 8) == b"gueststo"
    words.release(word)
    assert stack.raw == b"gueststo"


def test_word_substituted_again_after_the_guest_wrote_remembers_the_new_one(stack: Stack) -> None:
    """The first holder's release then changes nothing."""
    words = stack.machine.words
    stale = words.substitute(stack.vaddr, OURS)
    stack.machine.ram.write(stack.paddr, b"gueststo")
    fresh = words.substitute(stack.vaddr, OURS)
    words.release(stale)
    assert (stack.raw, fresh.guest) == (OURS, b"gueststo")
    words.release(fresh)
    assert stack.raw == b"gueststo"


def test_debuggers_write_becomes_the_guests_word(stack: Stack) -> None:
    """Part of it written: the substitute stays, and what is put back has the new bytes."""
    word = stack.machine.words.substitute(stack.vaddr, OURS)
    stack.machine.memory.write(stack.vaddr + 6, b"XYZ")
    assert stack.raw == OURS
    assert stack.machine.memory.read(stack.vaddr, 9) == stack.original[:6] + b"XYZ"
    stack.machine.words.release(word)
    assert stack.raw == stack.original[:6] + b"XY"


def test_snapshot_has_the_guests_word_and_a_restore_forgets_ours(stack: Stack) -> None:
    """A release after it is without effect."""
    word = stack.machine.words.substitute(stack.vaddr, OURS)
    stack.machine.restore(stack.machine.snapshot())
    assert stack.raw == stack.original
    stack.machine.words.release(word)
    assert stack.raw == stack.original


@pytest.mark.parametrize("where", ["unmapped", "two pages"])
def test_word_without_one_page_of_ram_is_refused(stack: Stack, where: str) -> None:
    """Nothing is at 0, and a word in two pages has two physical addresses."""
    vaddr = 0 if where == "unmapped" else (stack.vaddr & ~4095) + 4092
    with pytest.raises(MemoryFault):
        stack.machine.words.substitute(vaddr, OURS)
