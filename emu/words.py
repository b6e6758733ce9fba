"""Words of guest data that hold a value of ours: return addresses on stacks, tables of operations, counts we share in.

Rules: the machine's thread only. The guest itself reads our value; a debugger, a hash and a snapshot are shown the
guest's own. What a debugger writes there becomes the guest's value and ours stays. Of a count that the guest goes on
changing a share is ours: hashes and snapshots leave it out, a debugger sees the count as the guest does. Data only: no
translated code is dropped, so nothing that may be executed is kept here (that is `text`).
"""

from __future__ import annotations

from collections.abc import Callable

from emu import iface
from emu.addresses import AddressSet
from emu.iface import MemoryFault
from emu.ram import Ram
from emu.walks import Walks

_LONGEST = 8  # bytes of a word


class Word:
    """One substituted word: iface.Word. `guest` is what stood there, or what a debugger has written since."""

    __slots__ = ("guest", "ours", "paddr", "users")

    def __init__(self, paddr: int, ours: bytes, guest: bytes) -> None:
        self.paddr = paddr
        self.ours = ours
        self.guest = guest
        self.users = 1


class SubstitutedWords:
    """Implements iface.Words."""

    def __init__(self, ram: Ram, walks: Walks) -> None:
        self._ram = ram
        self._walks = walks
        self._words: dict[int, Word] = {}
        self._paddrs = AddressSet()
        self._shares: dict[tuple[int, int], int] = {}  # (physical address, size) of a count -> what of it is ours

    def substitute(self, vaddr: int, ours: bytes) -> Word:
        """Have the guest read `ours` at `vaddr`. Where it stands already, the same Word with one more user.

        MemoryFault where the word has no RAM, or parts of it on two pages.
        """
        size = len(ours)
        paddr = self._walks.locate(vaddr)
        if paddr is None or paddr + size > self._ram.size or paddr % 4096 + size > 4096:
            raise MemoryFault(vaddr, "replace a word of")
        known = self._words.get(paddr)
        if known is not None and known.ours == ours and self.stands(known):
            known.users += 1
            return known
        word = Word(paddr, ours, self.reveal(paddr, self._ram.read(paddr, size)))
        self._paddrs.add(paddr)
        self._words[paddr] = word
        self._ram.write(paddr, ours)
        return word

    def stands(self, word: iface.Word) -> bool:
        """Our value is there: the guest has not written over it."""
        assert isinstance(word, Word)  # we made it
        return self._words.get(word.paddr) is word and self._ram.read(word.paddr, len(word.ours)) == word.ours

    def release(self, word: iface.Word) -> None:
        """One user less; after the last the guest's value is put back, unless the guest has written over ours."""
        assert isinstance(word, Word)
        word.users -= 1
        if word.users or self._words.get(word.paddr) is not word:
            return
        if self.stands(word):
            self._ram.write(word.paddr, word.guest)
        del self._words[word.paddr]
        self._paddrs.discard(word.paddr)

    def share(self, vaddr: int, size: int, change: int) -> Callable[[], None]:
        """See iface.Words.share."""
        paddr = self._walks.locate(vaddr)
        if paddr is None or paddr + size > self._ram.size or paddr % 4096 + size > 4096:
            raise MemoryFault(vaddr, "take a share of")
        key, shares = (paddr, size), self._shares
        self._add(key, change)
        shares[key] = shares.get(key, 0) + change

        def give_back() -> None:
            if self._shares is shares and key in shares:
                self._add(key, -change)
                shares[key] -= change
                if not shares[key]:
                    del shares[key]

        return give_back

    def _add(self, key: tuple[int, int], change: int) -> None:
        self._ram.write(key[0], self._changed(key, change))

    def _changed(self, key: tuple[int, int], change: int) -> bytes:
        paddr, size = key
        value = int.from_bytes(self._ram.read(paddr, size), "little") + change
        return (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def forget(self) -> None:
        """RAM was replaced by RAM without our values; words given out before are released without effect."""
        self._words.clear()
        self._paddrs.clear()
        self._shares = {}

    def guest_bytes(self) -> dict[int, int]:
        """Physical address -> the guest's byte, of every word that stands and every count."""
        values = [(word.paddr, word.guest) for word in self._words.values() if self.stands(word)]
        values += [(key[0], self._changed(key, -change)) for key, change in self._shares.items()]
        return {paddr + index: byte for paddr, value in values for index, byte in enumerate(value)}

    # ------------------------------------------------------------------------------------- between a debugger and RAM

    def reveal(self, paddr: int, data: bytes) -> bytes:
        """`data` read from `paddr`, with the guest's values where ours stand."""
        if not self._words:
            return data
        touched = self._touched(paddr, len(data))
        if not touched:
            return data
        shown = bytearray(data)
        for word in touched:
            for index, byte in enumerate(word.guest):
                if 0 <= (at := word.paddr + index - paddr) < len(shown):
                    shown[at] = byte
        return bytes(shown)

    def cover(self, paddr: int, data: bytes) -> bytes:
        """`data` about to be written to `paddr`: our values stay and remember the new ones."""
        touched = self._touched(paddr, len(data))
        if not touched:
            return data
        written = bytearray(data)
        for word in touched:
            guest = bytearray(word.guest)
            for index, byte in enumerate(word.ours):
                if 0 <= (at := word.paddr + index - paddr) < len(written):
                    guest[index], written[at] = written[at], byte
            word.guest = bytes(guest)
        return bytes(written)

    def _touched(self, paddr: int, size: int) -> list[Word]:
        """Words that stand and have a byte in [paddr, paddr + size)."""
        near = [self._words[at] for at in self._paddrs.within(paddr - _LONGEST + 1, paddr + size)]
        return [word for word in near if word.paddr + len(word.ours) > paddr and self.stands(word)]
