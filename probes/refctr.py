"""Reference counters of uprobes: words in programs that say how many tracers there are, as USDT's semaphores.

Rules: the machine's thread; a part of `uprobes`, which tells what happens to mappings. A program looks at its counter
to know whether the work for a probe is worth doing, so this is the one thing about a uprobe that the guest is to see:
16 bits at an offset of the file, one more for each probed place in every process that maps both, as update_ref_ctr() in
kernel/events/uprobes.c does it, and one less when the probe goes.

The word lies in a private writable mapping, where a store makes a page of the process's own. Nobody but the guest can
make that page. So a process whose page is another's still takes the page fault of a store to the word, where its
threads go on in user mode, or else before it next enters the kernel (`Machine.before_entry`); then the word is changed
here. A process that starts, or maps the file, cannot read the word without a fault of its own first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Final, Protocol, TypeAlias

from emu.iface import Machine
from probes.programs import FileId, Programs, Region

SIZE: Final = 2
"""Bytes of a counter, which is signed: `short *` in __update_ref_ctr()."""
_MAX_FAULTS: Final = 16  # for one counter of a process: a guest that resolves them and gives no page ends here

Word: TypeAlias = tuple[FileId, int]
"""A counter: a file and an offset in it."""


class Counted(Protocol):
    """A probed place with a counter at `reference`."""

    file: FileId
    offset: int
    reference: int

    @property
    def active(self) -> object:
        """True in a condition where a probe on it is enabled."""
        ...


class RefCounters:
    """The counters of one machine's processes.

    `use(vaddr, fresh)` makes an address a break in one more space, `unuse` in one less. `settled` is called when
    nothing is due any more.
    """

    def __init__(
        self,
        machine: Machine,
        programs: Programs,
        use: Callable[[int, bool], None],
        unuse: Callable[[int], None],
        settled: Callable[[], None],
    ) -> None:
        self._machine = machine
        self._programs = programs
        self._use = use
        self._unuse = unuse
        self._settled = settled
        self._places: list[Counted] = []
        self._sites: dict[int, dict[int, Counted]] = defaultdict(dict)  # space -> address of code
        self._homes: dict[int, dict[Word, int]] = defaultdict(dict)  # space -> where the word is
        self._held: dict[int, Counter[Word]] = defaultdict(Counter)  # space -> what is added to the word
        self._faults: dict[int, Counter[Word]] = defaultdict(Counter)  # space -> faults that were asked for
        self._awaited: dict[int, set[int]] = defaultdict(set)  # space -> where its threads will go on
        self._asked_at = -1  # instruction count of the last
        self._lost: dict[int, set[Word]] = defaultdict(set)  # space -> words that could not be changed
        self._by_space = (self._sites, self._homes, self._held, self._faults, self._lost)
        self._unmask: Callable[[], None] | None = None

    @property
    def due(self) -> bool:
        """Some process is still to get its counter changed."""
        return any(self._homes[space].keys() & self._owed(space).keys() for space in list(self._homes))

    def add(self, place: Counted) -> None:
        """Hold the counter of a place up from now on, wherever it is mapped."""
        self._places.append(place)
        if self._unmask is None:
            self._unmask = self._machine.mask(self._guests_own)
        for mapped in self._programs.mapped():
            self.mapped(mapped.region)
        self.changed()

    def remove(self, place: Counted) -> None:
        """No error for one that has no counter."""
        if place in self._places:
            self._places.remove(place)
            for sites in self._sites.values():
                for address in [address for address, known in sites.items() if known is place]:
                    del sites[address]
            self.changed()

    def changed(self) -> None:
        """Places were enabled, disabled or removed: what can be done at once is done."""
        for space in list(self._homes):
            if self._settle(space):
                self._await(space)
        due = self.due
        self._machine.before_entry(self._before_entry if due else None)
        if not due and not self._places and self._unmask is not None:
            self._unmask()
            self._unmask = None
            self.forget()
            self._settled()

    def describe(self, place: Counted) -> str:
        """For people: in how many processes it is up."""
        word = place.file, place.reference
        up = sum(1 for held in self._held.values() if held[word] > 0)
        due = sum(1 for space in self._homes if word in self._homes[space].keys() & self._owed(space).keys())
        text = f"counter at offset {place.reference:#x} held up in {up} processes"
        text += f", due in {due} when they run" if due else ""
        lost = sum(1 for words in self._lost.values() if word in words)
        return text + (f", {lost} could not be changed" if lost else "")

    def spaces(self, address: int) -> list[int]:
        """Those in which the address is a break of ours, for `Machine.before_entry` to be asked there."""
        return [space for space, awaited in self._awaited.items() if address in awaited]

    def _await(self, space: int) -> None:
        for address in self._programs.resumes(space):
            if address not in self._awaited[space]:
                self._awaited[space].add(address)
                self._use(address, False)

    def _await_no_more(self, space: int) -> None:
        for address in self._awaited.pop(space, ()):
            self._unuse(address)

    # ------------------------------------------------------------------------------------------- what programs do

    def mapped(self, region: Region) -> None:
        for place in self._places:
            if place.file != region.file or region.shared:
                continue
            if region.writable:
                home = region.address(place.reference)
                if home is not None:
                    self._homes[region.space].setdefault((place.file, place.reference), home)
            elif (address := region.address(place.offset)) is not None:
                self._sites[region.space][address] = place
        if self._places:
            self._machine.before_entry(self._before_entry if self.due else None)

    def code_unmapped(self, space: int, start: int, end: int) -> None:
        for address in [address for address in self._sites.get(space, ()) if start <= address < end]:
            del self._sites[space][address]

    def data_unmapped(self, space: int, start: int, end: int) -> None:
        """Or the process has given its pages back, and what was added with them: it is not added again, as on Linux."""
        for word in [word for word, home in self._homes.get(space, {}).items() if start <= home < end]:
            del self._homes[space][word]
            self._held[space].pop(word, None)
            self._lost[space].discard(word)

    def forked(self, parent: int, child: int) -> None:
        """The child gets the parent's memory as it is, its counters with it."""
        self.ended(child)
        if parent in self._homes or parent in self._sites:
            self._sites[child].update(self._sites[parent])
            self._homes[child].update(self._homes[parent])
            self._held[child].update(self._held[parent])
            self._lost[child].update(self._lost[parent])

    def ended(self, space: int) -> None:
        self._await_no_more(space)
        for known in self._by_space:
            known.pop(space, None)
        if not self._places and self._unmask is not None:
            self.changed()

    def forget(self) -> None:
        """The machine has gone to another moment: its counters are the guest's own, see `_guests_own`."""
        for space in list(self._awaited):
            self._await_no_more(space)
        for known in self._by_space:
            known.clear()

    # ------------------------------------------------------------------------------------------------- the counters

    def _owed(self, space: int) -> dict[Word, int]:
        """What is to be added to the words of a process."""
        owed = Counter((place.file, place.reference) for place in self._sites.get(space, {}).values() if place.active)
        owed.subtract(self._held.get(space, {}))
        lost = self._lost.get(space, ())
        return {word: count for word, count in owed.items() if count and word not in lost}

    def _settle(self, space: int) -> list[tuple[Word, int]]:
        """Change the words whose page is the process's own. -> (word, its address) of the others."""
        left = []
        for word, count in self._owed(space).items():
            home = self._homes[space].get(word)
            if home is None:
                continue  # not mapped yet
            paddr = self._programs.physical(space, home, store=True)
            if paddr is None:
                left.append((word, home))
                continue
            memory = self._machine.memory
            value = int.from_bytes(memory.read_physical(paddr, SIZE), "little", signed=True) + count
            if 0 <= value < 1 << 15:
                memory.write_physical(paddr, value.to_bytes(SIZE, "little"))
                self._held[space][word] += count
            else:
                self._lost[space].add(word)  # the program has changed it itself
        return left

    def _before_entry(self) -> int | None:
        """For Machine.before_entry: the address of a word that the running program is to get a page for."""
        space = self._programs.space(self._machine.cpu)
        if space not in self._homes:
            return None
        for word, home in self._settle(space):
            if not self._programs.may_store(home):
                continue  # made read-only, say: the fault would be the program's end
            if self._asked_at != self._machine.clock.instructions:
                self._asked_at = self._machine.clock.instructions
                self._faults[space][word] += 1
            if self._faults[space][word] <= _MAX_FAULTS:
                return home
            self._lost[space].add(word)
        self._await_no_more(space)
        if not self.due:
            self.changed()
        return None

    def _guests_own(self) -> Mapping[int, bytes]:
        """The words without what is added: a snapshot gets these, so that going back to it finds nothing of ours."""
        memory, found = self._machine.memory, {}
        for space, held in self._held.items():
            for word, count in held.items():
                paddr = self._programs.physical(space, self._homes[space][word])
                if count and paddr is not None:
                    value = int.from_bytes(memory.read_physical(paddr, SIZE), "little") - count
                    found[paddr] = (value % (1 << 16)).to_bytes(SIZE, "little")
        return found
