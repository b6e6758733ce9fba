"""Uprobes: probes on programs in the guest, by file and offset, set before anything of the file is in memory.

Rules: runs in the engine's thread; knows the guest's operating system only as `Programs`. A probe belongs to an inode
and an offset, as in kernel/events/uprobes.c, and so to every process that maps that byte, now or later: `Programs`
tells of each mapping before anything in it runs, and an address is armed in that address space from then on. Breaks in
translated code arm it (`emu.iface.CodeBreaks`), so no page need be there, none is changed, and an evicted page that
comes back is armed still. Whoever asks for it has int3s in the pages themselves instead (`planting`).

A path that leads nowhere yet, or to another file later, is looked up again at each mapping of a file.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final, assert_never

from emu.iface import Cpu, Machine, MemoryFault
from emu.insn import MAX_INSN_SIZE, Encoding, InvalidInstruction, decode
from emu.stops import Stop
from probes.arch import ProbeArch
from probes.blame import ask
from probes.errors import ProbeError
from probes.filesymbols import FileSymbols
from probes.planting import PLANTED, Planting
from probes.programs import (
    Copies,
    Ended,
    Event,
    Exited,
    FileId,
    Forked,
    Mapped,
    ProgramFile,
    Programs,
    Unmapped,
    absent_text,
    read_program,
)
from probes.refctr import SIZE, RefCounters
from probes.regs import Regs
from probes.sites import Sites
from probes.uprobe import Place, Uprobe
from probes.uretprobe import LEAVING, Ends, UserReturns

_SHOWN: Final = 8  # addresses in a listing
_REP: Final = frozenset((0xF2, 0xF3))
_HEAD: Final = 5  # bytes of a program's file, of which the last says how wide its code is (gABI 4.1, EI_CLASS)
_CLASS32: Final = b"\1"


class Uprobes:
    """All uprobes of a machine, and its BreakClient. `copies` have the symbols that are not in the guest's memory."""

    def __init__(
        self, machine: Machine, arch: ProbeArch, programs: Programs, planting: Planting, copies: Copies | None = None
    ) -> None:
        self._machine = machine
        self.planting = planting
        self._arch = arch
        self._programs = programs
        self._symbols = FileSymbols(copies)
        self._probes: list[Uprobe] = []
        self._files: dict[FileId, dict[int, Place]] = {}
        self._sites: Sites[Place] = Sites(machine, self._left)
        self._following = False  # some probe wants returns
        self._unread: dict[int, set[FileId]] = {}  # address space -> its files whose symbols were not in memory
        self._unwatch: Callable[[], None] | None = None
        self._returns = UserReturns(machine, programs, self._sites.use, self._sites.unuse)
        self._counters = RefCounters(machine, programs, self._sites.use, self._sites.unuse, self._stop_unused)

    # ------------------------------------------------------------------------------------------------ registration

    def register(self, probe: Uprobe) -> None:
        """ProbeError with the kernel's errno where it is refused: then nothing has changed.

        A file that is not there yet is no error, see `Uprobe.notes`.
        """
        if probe.registered:
            raise ProbeError(errno.EINVAL, "this probe is registered already")
        if not probe.path.startswith("/"):
            raise ProbeError(errno.EINVAL, f"{probe.path} is no absolute path")
        if probe.offset < 0:
            raise ProbeError(errno.EINVAL, "an offset is not negative")
        if probe.ref_ctr_offset % SIZE:
            raise ProbeError(errno.EINVAL, f"a reference counter is at a multiple of {SIZE}")
        file = self._programs.open(probe.path)
        if file is not None and not file.regular:
            raise ProbeError(errno.EINVAL, f"{probe.path} is no regular file: it has no code")
        offset = None if file is None else self._offset(probe, file, strict=True)
        if file is not None and offset is None:
            self._symbols.check_absence(probe.path, probe.symbol or "", file)
            file = None
        elif file is not None and not self._fits(probe, self._files.get(file.id, {}).get(offset or 0)):
            raise ProbeError(
                errno.EINVAL, "a probe there has another reference counter, or none: all of a place have one"
            )
        if self._unwatch is None:
            self._unwatch = self._programs.watch(self._tell)
            self._machine.breaks.client = self
        probe.hits, probe.ends, probe.undefined, probe.trouble = 0, Ends(), False, None
        probe.registered = True
        self._probes.append(probe)
        if file is not None:
            try:
                self._attach(probe, file)
            except ProbeError:
                self.unregister(probe)
                raise
        if probe.ret_handler is not None and not self._following:
            self._following = True
            for mapped in self._programs.mapped():
                self._find_leaving(mapped)

    def unregister(self, probe: Uprobe) -> None:
        """Calls under way return as ever; their handler does not run. Allowed inside a handler."""
        if not probe.registered:
            raise ProbeError(errno.EINVAL, "this probe is not registered")
        self._probes.remove(probe)
        probe.registered = False
        self._returns.unregister(probe)
        for place in probe.places:
            place.probes.remove(probe)
            if place.probes:
                self.planting.refresh(place, self._sites.of(place))
                continue
            self._counters.remove(place)
            place.reference = 0
            self.planting.remove(place, self._sites.of(place))
            place.arm = "auto"
            if place.leaves is None:
                self._drop(place)
        probe.places.clear()
        self._counters.changed()
        if self._following and not any(known.ret_handler is not None for known in self._probes):
            self._forget_leaving()
        self._stop_unused()

    def enable(self, probe: Uprobe) -> None:
        self._switch(probe, disabled=False)

    def disable(self, probe: Uprobe) -> None:
        self._switch(probe, disabled=True)

    @property
    def programs(self) -> Programs:
        return self._programs

    def open(self, path: str) -> ProgramFile | None:
        """What the guest has under that path now."""
        return self._programs.open(path)

    def read(self, address: int, size: int) -> bytes:
        """See programs.read_program."""
        try:
            return self._machine.memory.read(address, size)
        except MemoryFault:
            return read_program(self._programs, self._machine.memory, address, size)

    def absent_text(self, address: int) -> str | None:
        """See programs.absent_text."""
        return absent_text(self._programs, address)

    def info(self, probe: Uprobe) -> list[str]:
        """Where it stands now and what became of what it follows."""
        file = self._programs.open(probe.path)
        if file is not None:
            self._look_at_instruction(probe, file)
        armed, lines = self.addresses(probe), []
        for place in probe.places:
            name = self._symbols.name(probe.path, file, place.offset) if file and file.id == place.file else None
            called = "" if name is None else f", {name},"
            lines.append(f"offset {place.offset:#x}{called} of device {place.file.device:#x} inode {place.file.inode}")
            if file is not None and file.id == place.file:
                lines += self._changes(probe, place, file)
        shown = ", ".join(f"{address:#x} in space {space:#x}" for space, address in armed[:_SHOWN])
        more = f" and {len(armed) - _SHOWN} more" if len(armed) > _SHOWN else ""
        where = "mapped" if any(place.arm in PLANTED for place in probe.places) else "in translated code"
        lines.append(f"{where} at {shown}{more}" if armed else "mapped nowhere")
        lines += [self._counters.describe(place) for place in probe.places if place.reference]
        lines += [self.planting.describe(place) for place in probe.places if place.arm in PLANTED]
        if probe.ret_handler is not None:
            lines.append(f"by shadow: {probe.ends}")
        return lines + [f"note: {note}" for note in probe.notes]

    def _changes(self, probe: Uprobe, place: Place, file: ProgramFile) -> list[str]:
        """Where another program has been written into the file: the probe stays at its offset, as on Linux."""
        now = self._symbols.program(file)
        if None in (now, place.program) or now == place.program:
            return []
        offset = self._offset(probe, file) if probe.symbol is not None else None
        moved = "" if offset in (None, place.offset) else f"; {probe.symbol} is at offset {offset:#x} now"
        return [
            f"note: another program has been written into {probe.path} since{moved}: remove the probe and add it again"
        ]

    def addresses(self, probe: Uprobe) -> list[tuple[int, int]]:
        """(address space, address) of every mapping it is armed in."""
        for space, address in self._sites.doubtful:
            self._look_again(space, address)
        return [site for place in probe.places for site in self._sites.of(place)]

    def after_restore(self) -> None:
        """The machine has gone to another moment: other processes, other mappings, nothing under way."""
        self._returns.restored()
        self._counters.forget()
        self._unread.clear()
        self.planting.restored()
        for space in self._sites.spaces():
            self._sites.end(space)
        for mapped in self._programs.mapped():
            self._mapped(mapped)
        for probe in self._probes:
            if (file := self._programs.open(probe.path)) is not None:
                for place in probe.places:
                    self._plant_again(place, file)
        self._counters.changed()
        self._machine.breaks.refresh()

    def _switch(self, probe: Uprobe, disabled: bool) -> None:
        if not probe.registered:
            raise ProbeError(errno.EINVAL, "this probe is not registered")
        probe.disabled = disabled
        self._counters.changed()
        for place in probe.places:
            self.planting.refresh(place, self._sites.of(place))
        self._machine.breaks.refresh()

    def _stop_unused(self) -> None:
        """With the last probe gone and every counter as the program has it, nothing of programs is watched any more."""
        if self._probes or self._counters.due:
            return
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None
        self._returns.forget()
        self._machine.breaks.client = None
        self._symbols.clear()

    # ------------------------------------------------------------------------------------------- files and mappings

    def _offset(self, probe: Uprobe, file: ProgramFile, strict: bool = False) -> int | None:
        """Of the probe in that file; None where its symbol is not to be found now. `strict`: ProbeError if never."""
        offset = probe.offset
        if probe.symbol is not None:
            base = self._symbols.offset(probe.path, probe.symbol, file, strict=strict)
            if base is None:
                return None
            offset += base
        if offset >= file.size:
            if strict:
                raise ProbeError(errno.EINVAL, f"{probe.path} has {file.size:#x} bytes, so none at {offset:#x}")
            return None
        return offset

    def _attach(self, probe: Uprobe, file: ProgramFile) -> None:
        """Put a probe on a file, unless it is on it."""
        if any(place.file == file.id for place in probe.places):
            return
        offset = self._offset(probe, file) if file.regular else None
        if offset is None:
            return
        place = self._place(file, offset)
        if not self._fits(probe, place):
            return
        if probe.arm in PLANTED and place.arm not in (probe.arm, "auto"):
            raise ProbeError(errno.EINVAL, f"a probe there is armed by {place.arm}: remove it first, or arm both so")
        place.probes.insert(0, probe)
        probe.places.append(place)
        if probe.arm in PLANTED and place.arm == "auto":
            place.arm = probe.arm
            try:
                self.planting.add(place, file)
            except ProbeError:
                place.arm = "auto"
                raise
        if len(place.probes) == 1 and probe.ref_ctr_offset:
            place.reference = probe.ref_ctr_offset
            self._counters.add(place)
        self._counters.changed()
        self._look_at_instruction(probe, file)
        self._machine.breaks.refresh()  # the page may have run in processes that are gone, at addresses that come again

    @staticmethod
    def _fits(probe: Uprobe, place: Place | None) -> bool:
        """All probes of a place have one counter, or none."""
        return place is None or not place.probes or place.reference == probe.ref_ctr_offset

    def _attach_late(self, probe: Uprobe, file: ProgramFile) -> None:
        """A file has come that was not there: nobody can be told that it is refused, so it is armed as it can be."""
        try:
            self._attach(probe, file)
        except ProbeError as error:
            probe.trouble = error.reason

    def _plant_again(self, place: Place, file: ProgramFile) -> None:
        """Where a machine that has gone back has forgotten it."""
        if place.arm in PLANTED and file.id == place.file and not self.planting.has(place):
            try:
                self.planting.add(place, file)
            except ProbeError as error:
                for probe in place.probes:
                    probe.trouble = error.reason

    def _look_at_instruction(self, probe: Uprobe, file: ProgramFile) -> None:
        """Where its page is in memory, know whether the processor has it."""
        place = next((place for place in probe.places if place.file == file.id), None)
        if place is None:
            return
        try:
            bits = 32 if file.read(0, _HEAD)[-1:] == _CLASS32 else 64
            insn = decode(file.read(place.offset, MAX_INSN_SIZE), place.offset, bits)
        except (MemoryFault, InvalidInstruction):
            return
        probe.undefined = insn.encoding in (Encoding.VEX, Encoding.EVEX, Encoding.XOP)

    def _place(self, file: ProgramFile, offset: int) -> Place:
        """The one there, or a new one in every mapping there is."""
        places = self._files.setdefault(file.id, {})
        if offset not in places:
            places[offset] = Place(file.id, offset, program=self._symbols.program(file))
            for mapped in self._programs.mapped():
                if mapped.region.file == file.id:
                    self._sites.enter(mapped.region, places[offset])
        return places[offset]

    def _find_leaving(self, mapped: Mapped) -> None:
        """Watch the functions of a file by which frames are left without a return."""
        file = mapped.content
        names = self._symbols.names(file, again=False)
        if not names:
            self._unread.setdefault(mapped.region.space, set()).add(file.id)
        for name, end in LEAVING.items():
            if name in names:
                self._place(file, names[name]).leaves = end

    def _find_leaving_late(self, space: int) -> None:
        """A call is followed in this process, whose dynamic linker has had its libraries' symbols read by now."""
        unread = self._unread.pop(space)
        for mapped in self._programs.mapped(space):
            if mapped.region.file in unread:
                unread.discard(mapped.region.file)
                self._symbols.names(mapped.content)
                self._find_leaving(mapped)
        self._unread.pop(space, None)  # what is still not there: programs that have no symbols, or never read them

    def _forget_leaving(self) -> None:
        self._following = False
        self._unread.clear()
        for place in [place for places in self._files.values() for place in places.values() if place.leaves]:
            place.leaves = None
            if not place.probes:
                self._drop(place)
        self._symbols.clear()

    def _drop(self, place: Place) -> None:
        """Nobody wants it any more."""
        self._forget(place)
        self._sites.drop(place)

    def _forget(self, place: Place) -> None:
        places = self._files[place.file]
        del places[place.offset]
        if not places:
            del self._files[place.file]

    def _left(self, place: Place, space: int, address: int) -> None:
        """A mapping has gone; with its last one what only told how calls are left, which the next will tell again."""
        self.planting.left(place, space, address)
        if place.leaves is not None and not place.probes and not self._sites.is_mapped(place):
            self._forget(place)

    def _tell(self, event: Event) -> None:
        """From `Programs`, as it happens."""
        match event:
            case Mapped():
                self._mapped(event)
            case Unmapped():
                self._unmapped(event)
            case Forked(parent, child):
                self._sites.fork(parent, child)
                self._returns.forked(parent, child)
                self._counters.forked(parent, child)
            case Ended(space):
                self._sites.end(space)
                self._unread.pop(space, None)
                self._returns.ended(space)
                self._counters.ended(space)
            case Exited(thread):
                self._returns.exited(thread)
            case _:
                assert_never(event)

    def _unmapped(self, event: Unmapped) -> None:
        space, start, end, kept = event.space, event.start, event.end, False
        here = self._sites.within(space, start, end)
        if here or self._returns.expects(space, start, end):
            kept = event.kept()
        for address, place in here:
            if kept:
                self.planting.left(place, space, address)
                self._sites.doubt(space, address)
            else:
                self._sites.leave(space, address)
        if not kept:
            self._returns.unmapped(space, start, end)
            self._counters.code_unmapped(space, start, end)
        self._counters.data_unmapped(space, start, end)

    def _look_again(self, space: int, address: int) -> None:
        """As `_is_there`, of any space."""
        place = self._sites.at(space, address)
        regions = [mapped.region for mapped in self._programs.mapped(space)]
        if place is not None and any(
            region.file == place.file and region.address(place.offset) == address for region in regions
        ):
            self._sites.confirm(space, address)
        else:
            self._sites.leave(space, address)

    def _is_there(self, space: int, address: int, place: Place) -> bool:
        """For the space in force: where pages were taken away without a munmap(), look whether it is mapped."""
        if self._sites.is_doubtful(space, address):
            file, offset = self._programs.file_at(address) or (None, 0)
            if file is None or (file.id, offset) != (place.file, place.offset):
                return False
            self._sites.confirm(space, address)
        return True

    def _mapped(self, mapped: Mapped) -> None:
        region = mapped.region
        for path in dict.fromkeys(probe.path for probe in self._probes):
            if (file := self._programs.open(path)) is not None:
                for probe in [probe for probe in self._probes if probe.path == path]:
                    if file.id == region.file or not probe.places:  # it may be another file by now, by a link too
                        self._attach_late(probe, file)
        if self._following:
            self._find_leaving(mapped)
        for place in list(self._files.get(region.file, {}).values()):
            self._plant_again(place, mapped.content)
            self._sites.enter(region, place)
        self._counters.mapped(region)

    # --------------------------------------------------------------------------------------------- the BreakClient

    def stands(self, vaddr: int) -> bool:
        space = self._programs.space(self._machine.cpu)
        place = self._sites.at(space, vaddr)
        if place is not None and not self._is_there(space, vaddr, place):
            place = None
        if place is not None and place.arm in PLANTED and self.planting.covers(place, vaddr):
            return False
        armed = place is not None and place.armed
        return armed or any(
            other == space or self._is_shared(other, vaddr)
            for other in (*self._returns.spaces(vaddr), *self._counters.spaces(vaddr))
        )

    def _is_shared(self, other: int, vaddr: int) -> bool:
        """That process may run this very page there: one translation serves both, whoever has it made."""
        paddr = self._programs.physical(other, vaddr)
        return paddr is None or paddr == self._machine.memory.translate(vaddr)

    def on_code_break(self, cpu: Cpu, vaddr: int) -> Stop | None:
        space = self._programs.space(cpu)
        regs = Regs(self._machine, self._arch.user_convention(cpu.bits), cpu, vaddr)
        self._returns.arrive(space, vaddr, regs)
        place = self._standing(space, vaddr)
        if place is None or (self._repeats(cpu, place, vaddr) and regs.ip == vaddr):
            cpu.pc = regs.ip & regs.convention.mask
            return None
        if place.leaves is not None:
            self._returns.cause(self._programs.thread(cpu), place.leaves)
        for probe in place.active:
            accepts, probe.place = probe.filter, place
            if not probe.registered or (accepts is not None and not ask(self._machine, vaddr, accepts, probe, regs)):
                continue  # a handler before it has unregistered it
            probe.hits += 1
            if probe.handler is not None:
                ask(self._machine, vaddr, probe.handler, probe, regs)
            if probe.ret_handler is not None and probe.registered:
                if space in self._unread:
                    self._find_leaving_late(space)
                self._returns.enter(probe, place.offset, space, regs)
        cpu.pc = regs.ip & regs.convention.mask
        return None

    def _standing(self, space: int, vaddr: int) -> Place | None:
        """The place that the running program has at an address, or that an int3 there is of."""
        place = self._sites.at(space, vaddr)
        if place is not None and not self._is_there(space, vaddr, place):
            self._sites.leave(space, vaddr)
            place = None
        planted = self.planting.at(vaddr)
        if planted is not None:
            assert isinstance(planted, Place)
            return planted
        if place is not None and place.armed and place.arm in PLANTED:
            self.planting.reached(place, vaddr)
        return place

    def _repeats(self, cpu: Cpu, place: Place, vaddr: int) -> bool:
        """This is a further iteration of a string instruction, whose first was the hit."""
        if place.repeats is None:
            try:
                insn = decode(self._machine.memory.read(vaddr, MAX_INSN_SIZE), vaddr, cpu.bits)
                place.repeats = insn.map == 0 and bool(_REP.intersection(insn.prefixes))
            except (MemoryFault, InvalidInstruction):
                place.repeats = False
        return place.repeats and self._arch.is_repeat(cpu, self._arch.arch_prepare(vaddr, None))
