"""Pages of chosen files as the guest reads them: their address_space_operations replaced by a copy with our entries.

This is the mechanism of the 2006 patch "Insert probes on non-memory resident pages", from outside. Rules: the machine's
thread; knows the kernel only as `programs.PageCache`. Who wants to know is told when the *read* of a page is over,
before anybody can map it, and when a page leaves the cache. Only files with a copy pay, and who waits for a disk waits
for nothing of ours: an entry notes which pages are about to be read and goes on to the original at once, and the
kernel's function for a read that is over is probed only while such pages are under way.

A copy is made once for each table and serves every file that has it; it stays when the last file is let go of, because
somebody may be about to call through it. The guest's pointer is a substituted word (`emu.iface.Words`).
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from emu.iface import Machine, MachineError, MemoryFault, Word
from probes.arch import ProbeArch
from probes.core import Kprobes
from probes.errors import ProbeError
from probes.kprobe import Kprobe
from probes.programs import CachedPage, Entry, PageCache, ProgramFile
from probes.regs import Regs
from probes.room import Room

_BUSY = -errno.EBUSY


@dataclass(slots=True)
class _Copy:
    """Of one table: its offset in the window, and the probes on the gates that its entries lead to, by entry."""

    offset: int
    gates: dict[int, Kprobe] = field(default_factory=dict)
    stands: bool = False


@dataclass(slots=True)
class _Hooked:
    """A file whose pointer leads to a copy."""

    word: Word
    users: int = 1


class PageReads:
    """The files of a machine whose reads are followed, by the address of their address_space.

    `arrived` is told of pages that have just been read; `left` of those that have just left the cache.
    """

    def __init__(
        self,
        machine: Machine,
        arch: ProbeArch,
        kprobes: Kprobes,
        room: Room,
        cache: PageCache,
        arrived: Callable[[CachedPage], None],
        left: Callable[[CachedPage], None],
    ) -> None:
        self._machine = machine
        self._arch = arch
        self._kprobes = kprobes
        self._room = room
        self._cache = cache
        self._arrived = arrived
        self._left = left
        self._word = arch.convention.word
        self._copies: dict[int, _Copy] = {}  # by the table's address
        self._hooked: dict[int, _Hooked] = {}
        self._awaited: set[tuple[int, int]] = set()  # (address_space, index) of pages whose read is under way
        self._completions: list[Kprobe] = []

    def hook(self, file: ProgramFile) -> None:
        """Follow a file's reads; one more user where they are followed already. ProbeError, and nothing has changed."""
        reason = self._cache.unread(file)
        if reason is not None:
            raise ProbeError(errno.EOPNOTSUPP, f"--arm aops is not available for this file: {reason}")
        mapping = self._cache.mapping(file)
        if (hooked := self._hooked.get(mapping)) is not None:
            hooked.users += 1
            return
        try:
            pointer = self._cache.pointer(mapping)
            original = int.from_bytes(self._machine.memory.read(pointer, self._word), "little")
            copy = self._copy_of(original).to_bytes(self._word, "little")
            self._hooked[mapping] = _Hooked(self._machine.words.substitute(pointer, copy))
        except MemoryFault as error:
            raise ProbeError(errno.EAGAIN, "the guest is in a program: stop it in its kernel for this") from error
        except MachineError as error:
            raise ProbeError(errno.ENOMEM, str(error)) from error

    def unhook(self, file: ProgramFile) -> None:
        """One user less; the last puts the original pointer back. Reads under way end as ever."""
        mapping = self._cache.mapping(file)
        hooked = self._hooked.get(mapping)
        if hooked is None:
            return
        hooked.users -= 1
        if hooked.users:
            return
        del self._hooked[mapping]
        self._machine.words.release(hooked.word)
        self._awaited = {page for page in self._awaited if page[0] != mapping}
        self._settle()

    def expect(self, mapping: int, pages: range) -> None:
        """A read of these pages is under way, whoever began it."""
        self._awaited.update((mapping, index) for index in pages)
        if not self._completions:
            for name in self._cache.completions():
                probe = Kprobe(symbol=name, pre_handler=self._on_completion)
                self._kprobes.register(probe)
                self._completions.append(probe)

    def restored(self) -> None:
        """The machine has gone to another moment, in which no pointer of ours stands."""
        self._hooked.clear()
        self._awaited.clear()
        self._settle()
        for copy in self._copies.values():
            copy.stands = False

    def _settle(self) -> None:
        """Where nothing is under way, nobody pays for reads."""
        if not self._awaited:
            for probe in self._completions:
                self._kprobes.unregister(probe)
            self._completions.clear()

    def _copy_of(self, original: int) -> int:
        """The address of the copy of a table."""
        copy = self._copies.get(original)
        if copy is None:
            copy = self._copies[original] = _Copy(self._room.take(0, self._cache.table_size)[1])
        if not copy.stands:
            table = bytearray(self._machine.memory.read(original, self._cache.table_size))
            for at, entry in self._cache.entries.items():
                target = int.from_bytes(table[at : at + self._word], "little")
                if target or entry is Entry.FREE:
                    gate = self._gate(copy, original, at, functools.partial(self._through, entry, target))
                    table[at : at + self._word] = gate.to_bytes(self._word, "little")
            self._machine.window.write(copy.offset, bytes(table))
            copy.stands = True
        return self._machine.window.address(copy.offset)

    def _gate(self, copy: _Copy, original: int, at: int, handler: Callable[[Kprobe, Regs], bool]) -> int:
        address = self._arch.gate((original, at))
        known = copy.gates.get(at)
        if known is not None:
            self._kprobes.unregister(known)
        copy.gates[at] = Kprobe(addr=address, pre_handler=handler, arm="int3")
        self._kprobes.register(copy.gates[at])
        return address

    # ------------------------------------------------------------------------------------------ when the guest comes by

    def _through(self, entry: Entry, target: int, kp: Kprobe, regs: Regs) -> bool:
        """An entry of a copy was called; with our part done, the original goes on as if it had been called itself."""
        try:
            if self._is_kept(entry, regs):
                regs.ax, target = _BUSY, 0
        except ProbeError as error:
            kp.notes = (error.reason,)  # the guest's kernel has destroyed what it calls this with
        if target:
            regs.ip = target
        else:
            regs.ip, regs.sp = regs.stack(0), regs.sp + self._word
        return True

    def _is_kept(self, entry: Entry, regs: Regs) -> bool:
        """Note what is read and what goes; whether a page must stay where it is, as what is in it would be copied."""
        if entry is Entry.MOVE:
            return self._cache.subject(entry, regs).mapping in self._hooked
        if entry is Entry.FREE:
            self._left(self._cache.subject(entry, regs))
            return False
        mapping, pages = self._cache.started(entry, regs)
        if mapping in self._hooked:
            self._started(mapping, pages)
        return False

    def _started(self, mapping: int, pages: range) -> None:
        self.expect(mapping, pages)

    def _on_completion(self, kp: Kprobe, regs: Regs) -> None:
        try:
            page = self._cache.completed(kp.symbol or "", regs)
        except ProbeError as error:
            kp.notes = (error.reason,)
            return
        if page is None or page.mapping not in self._hooked:
            return
        self._awaited.difference_update((page.mapping, page.index + n) for n in range(page.count))
        if page.uptodate:
            self._arrived(page)
        self._settle()
