"""Sole owner of armed places: int3 bytes, by physical address, and PC hooks, by virtual address.

Rules: the machine's thread only. An address may have several owners (the probe engine, a debugger, the machine itself);
its byte changes with the first and the last. Nobody reads guest code without `reveal` or writes it without `cover`, so
that no int3 of ours is ever seen and none is lost under a write of a debugger's. A PC hook costs the whole engine (one
15 %, fifty 5x: measured) from when its code is first translated, so INT3 is the rule and HOOK is for what is not mapped
or must not be touched.

A guest that looks at its own text, or writes it by another mapping, finds it untouched between `withdraw` and
`put_back`: meanwhile every int3 is a PC hook.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from emu.addresses import AddressSet
from emu.covered import INT3, CoveredBytes
from emu.cpustate import CpuState
from emu.engine import Engine
from emu.iface import BackEnd, MemoryFault
from emu.memory import reachable
from emu.paging import walk
from emu.ram import PAGE, Ram
from emu.shortcuts import Shortcuts
from emu.walks import Walks


@dataclass(slots=True)
class Place:
    """One armed address. `paddr` belongs to INT3 and is -1 for a PC hook.

    `fixed`: the physical address was given, not found by a walk. `cr3`: the address space it was found in.
    """

    vaddr: int
    back_end: BackEnd
    owners: list[object] = field(default_factory=list)
    paddr: int = -1
    fixed: bool = False
    cr3: int = 0


class ArmedText:
    """Implements iface.Text."""

    def __init__(
        self,
        ram: Ram,
        cpu: CpuState,
        engine: Engine,
        walks: Walks,
        shortcuts: Shortcuts,
        on_hook: Callable[[int], None],
    ) -> None:
        self._ram = ram
        self._cpu = cpu
        self._engine = engine
        self._walks = walks
        self._shortcuts = shortcuts
        self._on_hook = on_hook
        self._places: dict[tuple[int, BackEnd], Place] = {}
        self._sharing: dict[int, list[Place]] = {}  # INT3 places by physical address: one a mapping that armed it
        self._covered = CoveredBytes()  # by the int3s, those too that are lifted or withdrawn
        self._vaddrs = AddressSet()  # of the int3 places
        self._lost: set[int] = set()  # where `look` has seen the guest's code instead of an int3
        self._hooks: set[int] = set()  # where the engine is to have a PC hook of ours
        self._waiting = AddressSet()  # those of them that it gets when it translates a block with them
        self._due: set[int] = set()  # those that `look` has seen in a block
        self._lifted = -1  # physical address of the place between `lift` and `settle`
        self.withdrawn = False

    # ------------------------------------------------------------------------------------------- arming and disarming

    def arm(self, vaddr: int, owner: object, back_end: BackEnd, paddr: int | None = None) -> None:
        """MemoryFault where INT3 is asked for and `vaddr` is not mapped now. Idempotent per (vaddr, owner).

        `paddr`: for INT3, where `vaddr` will be mapped, if the guest has not done it yet.
        """
        place = self._places.get((vaddr, back_end))
        if place is None:
            place = self._arm_byte(vaddr, paddr) if back_end is BackEnd.INT3 else Place(vaddr, BackEnd.HOOK)
            self._places[vaddr, back_end] = place
            if back_end is BackEnd.INT3:
                self._vaddrs.add(vaddr)
            self._update_hook(vaddr)
        if not any(known is owner for known in place.owners):
            place.owners.append(owner)
        self._shortcuts.drop(vaddr)

    def shorten(
        self, vaddr: int, owner: object, code: bytes, to: int, call: Callable[[], int | None], uncount: int
    ) -> None:
        """See iface.Text.shorten."""
        place = self._places.get((vaddr, BackEnd.INT3))
        self._shortcuts.drop(vaddr)
        if place is None or place.owners != [owner] or vaddr in self._hooks:
            return
        room = PAGE - (vaddr & PAGE - 1)
        self._shortcuts.make(vaddr, place.paddr, b"\xcc" + code[1:room], to, call, uncount)

    def disarm(self, vaddr: int, owner: object) -> None:
        """Of both back ends; no error where it is not armed."""
        self._shortcuts.drop(vaddr)
        for back_end in BackEnd:
            place = self._places.get((vaddr, back_end))
            if place is None:
                continue
            place.owners = [known for known in place.owners if known is not owner]
            if not place.owners:
                del self._places[vaddr, back_end]
                self._drop_place(place)
                self._update_hook(vaddr)

    def disarm_all(self, owner: object) -> None:
        """Everything of an owner: a debugger that went away."""
        for vaddr, _ in list(self._places):
            self.disarm(vaddr, owner)

    def owners(self, vaddr: int) -> list[object]:
        """Of both back ends."""
        return [owner for back_end in BackEnd if (p := self._places.get((vaddr, back_end))) for owner in p.owners]

    def place_at(self, vaddr: int) -> Place | None:
        """The int3 place that a trap at `vaddr` comes from, through whichever mapping it was armed.

        None where the int3 is the guest's own: nothing is armed, or the place is lifted or withdrawn.
        """
        if self.withdrawn:
            return None
        place = self._places.get((vaddr, BackEnd.INT3))
        paddr = self._walks.locate(vaddr)
        if paddr is None or paddr == self._lifted:
            return None
        if place is not None and place.paddr == paddr:
            return place
        sharing = self._sharing.get(paddr)
        return sharing[0] if sharing else None

    def hooked(self, vaddr: int) -> Place | None:
        """The place that a PC hook at `vaddr` stands for, a withdrawn int3's owners included."""
        place = self._places.get((vaddr, BackEnd.HOOK))
        byte = self._places.get((vaddr, BackEnd.INT3)) if self.withdrawn else None
        if byte is None:
            return place
        return Place(vaddr, BackEnd.HOOK, [*(place.owners if place is not None else ()), *byte.owners])

    def has_byte(self, vaddr: int) -> bool:
        return not self.withdrawn and (vaddr, BackEnd.INT3) in self._places

    def code(self, vaddr: int, size: int) -> bytes | None:
        """See iface.Text.code."""
        place = self._places.get((vaddr, BackEnd.INT3))
        if place is None or self.withdrawn:
            return None
        paddr = place.paddr
        data = self._ram.map[paddr : min(paddr + size, (paddr | PAGE - 1) + 1)]
        return bytes((self._covered[paddr],)) + data[1:] if data[0] == INT3 else data

    def _arm_byte(self, vaddr: int, paddr: int | None) -> Place:
        fixed = paddr is not None
        if paddr is None:
            paddr = self._paddr_of(vaddr)
        if paddr is None or not 0 <= paddr < self._ram.size:
            raise MemoryFault(vaddr, "arm a breakpoint in")
        place = Place(vaddr, BackEnd.INT3, paddr=paddr, fixed=fixed, cr3=self._cpu.cr3)
        sharing = self._sharing.setdefault(paddr, [])
        sharing.append(place)
        if len(sharing) == 1:  # else the same byte through another mapping
            self._covered.keep(paddr, self._ram.map[paddr])
            if not self.withdrawn:
                self._poke(place, INT3)
        return place

    def _paddr_of(self, vaddr: int) -> int | None:
        """Where `vaddr` lies in guest RAM now."""
        paddr = self._walks.locate(vaddr)
        return paddr if paddr is not None and paddr < self._ram.size else None

    def _update_hook(self, vaddr: int) -> None:
        """Have the engine hook `vaddr`, or no longer, as the places there ask."""
        wanted = (vaddr, BackEnd.HOOK) in self._places or (self.withdrawn and (vaddr, BackEnd.INT3) in self._places)
        if wanted == (vaddr in self._hooks):
            return
        if wanted:
            self._waiting.add(vaddr)
            self._hooks.add(vaddr)
        else:
            if not self._waiting.discard(vaddr):
                with self._cpu.hidden_faults():
                    self._engine.remove_pc_hook(vaddr)
            self._hooks.discard(vaddr)
        self._drop_code(vaddr)

    def _drop_place(self, place: Place) -> None:
        if place.back_end is BackEnd.HOOK:
            return
        self._vaddrs.discard(place.vaddr)
        sharing = self._sharing[place.paddr]
        sharing.remove(place)
        if sharing:
            return
        del self._sharing[place.paddr]
        if self._stands(place.paddr):  # else the guest has written over it: its byte stays
            self._poke(place, self._covered[place.paddr])
        self._covered.drop(place.paddr)

    def _stands(self, paddr: int) -> bool:
        return not self.withdrawn and self._ram.map[paddr] == INT3

    def _poke(self, place: Place, byte: int) -> None:
        self._ram.map[place.paddr] = byte
        if self._paddr_of(place.vaddr) in (place.paddr, None):
            self._drop_code(place.vaddr)
        else:  # the address is another page's now, and its translation elsewhere would outlive the byte
            self._engine.drop_code(0, 0, False)

    def _drop_code(self, vaddr: int) -> None:
        self._engine.drop_code(vaddr, 1, reachable(self._cpu, self._walks.page(vaddr)))

    # --------------------------------------------------------------------------------------------- around one address

    def lift(self, place: Place) -> None:
        """Put the guest's byte back for one execution; `settle` follows."""
        self._lifted = place.paddr
        if self._stands(place.paddr):
            self._poke(place, self._covered[place.paddr])

    def settle(self, place: Place) -> None:
        """Arm a lifted place again, over what the instruction may have made of its own byte."""
        self._lifted = -1
        if not self.withdrawn and place.paddr in self._covered:
            self._put_over(place)

    # ------------------------------------------------------------------------------- a guest that looks at its own text

    def withdraw(self) -> None:
        """Until `put_back`, no byte of ours stands in guest memory: owners of an int3 are told of a HOOK meanwhile.

        Not from a hook: what is armed at the pc would be met twice.
        """
        if self.withdrawn:
            return
        for paddr, byte in self._covered.items():
            if self._stands(paddr):
                self._poke(self._sharing[paddr][0], byte)
        self.withdrawn = True
        self._update_hooks()

    def put_back(self) -> None:
        """Arm every byte again, over what the guest has put there. Not from a hook."""
        if not self.withdrawn:
            return
        self.withdrawn = False
        self._update_hooks()
        for sharing in self._sharing.values():
            self._put_over(sharing[0])

    def _put_over(self, place: Place) -> None:
        """An int3 over what stands there now."""
        self._covered.keep(place.paddr, self._ram.map[place.paddr])
        self._poke(place, INT3)

    def look(self, pc: int, code: bytes) -> None:
        """From the engine, about a new block: where an int3 of ours should stand, the guest may have stored something,
        or mapped another page, and is about to run that.

        Then it stops before the block's first instruction; `reclaim` follows. So it does for PC hooks that wait.
        """
        end = pc + len(code)
        due = self._waiting.within(pc, end)
        if due:
            self._due.update(due)
            self._engine.stop_here()
        for vaddr in self._vaddrs.within(pc, end):
            if code[vaddr - pc] != INT3 and self._is_lost(self._places[vaddr, BackEnd.INT3]):
                self._lost.add(vaddr)
                self._engine.stop_here()

    def reclaim(self) -> bool:
        """Arm what `look` has found; False where it has found nothing. Not from a hook."""
        if not self._due and not self._lost:
            return False
        due, self._due = self._due.intersection(self._waiting), set()
        for vaddr in due:
            self._waiting.discard(vaddr)
            self._engine.add_pc_hook(vaddr, functools.partial(self._on_hook, vaddr))
            self._drop_code(vaddr)
        lost, self._lost = self._lost, set()
        for vaddr in lost:
            place = self._places.get((vaddr, BackEnd.INT3))
            if place is None or not self._is_lost(place):
                continue
            if self._paddr_of(vaddr) != place.paddr:
                self._move(place)
            else:
                self._put_over(place)
        return bool(lost or due)

    def _is_lost(self, place: Place) -> bool:
        """No int3 stands where the address is mapped now, though it is meant there.

        Page tables of one address space say nothing of another's, but all share the kernel's pages.
        """
        page = walk(self._ram, self._cpu.tables(), place.vaddr)
        if self.withdrawn or page is None or page.paddr >= self._ram.size or self._ram.map[page.paddr] == INT3:
            return False
        if page.paddr == place.paddr:
            return page.paddr != self._lifted
        return not place.fixed and (place.cr3 == self._cpu.cr3 or not page.user)

    def _move(self, place: Place) -> None:
        """The guest has mapped another page at the address of `place`."""
        vaddr = place.vaddr
        self._shortcuts.drop(vaddr)
        del self._places[vaddr, BackEnd.INT3]
        self._drop_place(place)
        moved = self._arm_byte(vaddr, None)
        moved.owners = place.owners
        self._places[vaddr, BackEnd.INT3] = moved
        self._vaddrs.add(vaddr)

    def _update_hooks(self) -> None:
        for vaddr, back_end in self._places:
            if back_end is BackEnd.INT3:
                self._update_hook(vaddr)

    # ------------------------------------------------------------------------------------------- what others may see

    def reveal(self, paddr: int, data: bytes) -> bytes:
        """See memory.Layer."""
        return data if self.withdrawn else self._covered.reveal(paddr, data)

    def cover(self, paddr: int, data: bytes) -> bytes:
        """See memory.Layer."""
        return data if self.withdrawn else self._covered.cover(paddr, data)

    def armed_bytes(self) -> dict[int, int]:
        """Physical address -> the guest's byte, for hashes and snapshots."""
        return {paddr: byte for paddr, byte in self._covered.items() if self._stands(paddr)}

    def rearm(self) -> None:
        """After RAM was replaced: put every place that is mapped there back over the new bytes."""
        places = [place for place in self._places.values() if place.back_end is BackEnd.INT3]
        self.withdrawn = False
        for place in places:
            del self._places[place.vaddr, BackEnd.INT3]
            self._vaddrs.discard(place.vaddr)
            self._update_hook(place.vaddr)
        self._sharing.clear()
        self._covered.clear()
        for place in places:
            mapped = place.fixed or self._paddr_of(place.vaddr) is not None
            for owner in place.owners:
                self.arm(
                    place.vaddr,
                    owner,
                    BackEnd.INT3 if mapped else BackEnd.HOOK,
                    place.paddr if place.fixed else None,
                )
