"""Kprobes: the table of probed addresses, handlers and their order, and what happens between a trap and the next
instruction, as kernel/kprobes.c has it.

Rules: runs in the engine's thread; knows a processor only as `ProbeArch`, a machine only as `emu.iface`. Return probes,
jprobes and trace events are clients that bring handlers; they are not known here.
"""

from __future__ import annotations

import contextlib
import errno
import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Final

from emu.iface import BackEnd, CallAborted, Cpu, Machine, MemoryFault, Verdict
from emu.stops import ProbeStop, Stop
from probes.arch import Begin, Finish, ProbeArch, Short
from probes.calls import Calls
from probes.errors import ProbeError, errno_name
from probes.kprobe import Arm, Kprobe
from probes.limits import LinuxLimits, Refusal
from probes.lookup import resolve
from probes.place import HIT_ACTIVE, HIT_SS, HIT_SSDONE, Hit, Place, Status
from probes.regs import Regs

MAX_HOOKS: Final = 200  # each PC hook slows translation and every hit of the others; measured, see the engine's notes
COMFORTABLE_HOOKS: Final = 8
_CODE: Final = frozenset("TtWwi?")  # kinds of symbols, as nm prints them, that may be code
_MAX_DIVIDED: Final = 64  # one a stack; an interrupt's handler may never come back


class Kprobes:
    """All kprobes of a machine, and its TrapClient.

    `settled`: the guest has finished patching its own code, so that an int3 is safe in it; until then `arm="auto"`
    means PC hooks, which move to int3 when it becomes true. `linux_limits`: refuse what the guest's kernel would;
    else that is a note on the probe.
    """

    def __init__(
        self, machine: Machine, arch: ProbeArch, arm: Arm = "auto", settled: bool = True, *, linux_limits: bool = False
    ) -> None:
        self._machine = machine
        self._arch = arch
        self._arm: Arm = arm
        self._settled = settled
        self._limits = LinuxLimits(machine)
        self._linux_limits = linux_limits
        self._places: dict[int, Place] = {}
        self._waiting: list[Kprobe] = []
        self._hits: list[Hit] = []
        self._divided: dict[int, set[Hashable]] = {}  # string instructions that were left between two iterations
        self._hooks = 0
        self._halting: Place | None = None  # a handler asked for a stop there
        self._stopped: tuple[int, int] | None = None  # where and when the run ended for it, before the instruction
        self.calls = Calls(machine, arch.convention.word, self._nested)
        self._after_restore: list[Callable[[], None]] = []
        arch.arch_init()

    # ------------------------------------------------------------------------------------------------ registration

    def register(self, probe: Kprobe, *, check_boundary: bool = True) -> None:
        """Check in the kernel's order, then arm; on error nothing has changed. ProbeError with the kernel's errno.

        `check_boundary` False: an instruction is known to start there, as at a return address.
        """
        if probe.registered:
            raise ProbeError(errno.EINVAL, "this probe is registered already")
        if probe.waits:
            self._wait(probe)
            return
        address, function = self._locate(probe)
        if not check_boundary:
            function = None
        ours = not check_boundary or self._machine.window.contains(address)  # a return site or trampoline
        if self._settled and not ours and self._limits.in_init(address):
            raise ProbeError(errno.EINVAL, "the kernel has freed this code at the end of its boot (.init.text)")
        refusal = None if ours else self._limits.refusal(address, init_freed=self._settled)
        if self._linux_limits and refusal is not None:
            raise ProbeError(refusal[0], f"Linux refuses this place: {refusal[1]}")
        place = self._places.get(address) or Place(self._machine, address, self._arch.arch_prepare(address, function))
        if refusal is None and not ours:
            refusal = place.prepared.linux_refusal
        if self._linux_limits and refusal is not None:
            raise ProbeError(refusal[0], f"Linux refuses this instruction: {refusal[1]}")
        if probe.post_handler is not None and (reason := place.prepared.needs_hook) is not None:
            raise ProbeError(errno.EOPNOTSUPP, f"no post_handler can follow this instruction: {reason}")
        if probe.last and any(known.last for known in place.probes):
            raise ProbeError(errno.EEXIST, "one such probe stands there already")
        probe.gone = False
        place.insert(probe)
        try:
            self._update(place)
        except ProbeError:
            place.probes.remove(probe)
            place.refresh()
            if not place.probes:
                self._arch.arch_remove(place.prepared)
            raise
        self._places[address] = place
        probe.address = address
        probe.hits = probe.nmissed = 0
        probe.notes = self._notes(place, refusal)

    def unregister(self, probe: Kprobe) -> None:
        """Take a probe away; the last one at an address restores its byte. Allowed inside a handler."""
        if probe.waiting:
            self._waiting.remove(probe)
            probe.waiting = False
            return
        place = self._place_of(probe)
        place.probes.remove(probe)
        probe.address = None
        self._update(place)
        if not place.probes:
            del self._places[place.address]
            self._arch.arch_remove(place.prepared)

    def enable(self, probe: Kprobe) -> None:
        self._switch(probe, disabled=False)

    def disable(self, probe: Kprobe) -> None:
        self._switch(probe, disabled=True)

    @property
    def settled(self) -> bool:
        return self._settled

    @settled.setter
    def settled(self, value: bool) -> None:
        self._settled = value
        for place in self._places.values():
            if value and self._limits.in_init(place.address):
                self._discard(place)
            elif place.armed is BackEnd.HOOK:
                self._update(place)

    def _wait(self, probe: Kprobe) -> None:
        probe.waits = probe.waiting = True
        probe.gone = False
        probe.hits = probe.nmissed = 0
        self._waiting.append(probe)

    def follow_modules(self) -> None:
        """Modules have come, or the machine has gone to another moment: their probes stand where they lie now.

        Those of modules that are not loaded wait; one that cannot be armed waits too, with a note.
        """
        standing = [probe for place in self._places.values() for probe in place.probes]
        for probe in [probe for probe in (*standing, *self._waiting) if ":" in (probe.symbol or "")]:
            found = self._machine.symbols.lookup(str(probe.symbol))
            if found and probe.address == found[0].address + probe.offset and not probe.gone:
                continue
            hits, nmissed = probe.hits, probe.nmissed
            self.unregister(probe)
            probe.waits = not found
            try:
                self.register(probe)
            except ProbeError as error:
                self._wait(probe)
                probe.notes = (f"not armed: {error.reason}",)
            probe.hits, probe.nmissed = hits, nmissed

    def discard(self, start: int, end: int) -> None:
        """The guest frees the code between two addresses: probes there are GONE."""
        for address in [address for address in self._places if start <= address < end]:
            self._discard(self._places[address])

    def _discard(self, place: Place) -> None:
        """The guest has freed the code there: the probes are GONE, and can only be unregistered."""
        for probe in place.probes:
            probe.gone = True
        self._update(place)

    def back_end(self, probe: Kprobe) -> BackEnd | None:
        """How the probe's address is armed now; None while it is not."""
        return None if probe.waiting else self._place_of(probe).armed

    # ----------------------------------------------------------------------------------------------- the TrapClient

    def on_break(self, cpu: Cpu, pc: int, back_end: BackEnd) -> Verdict | Stop:
        place = self._places.get(pc)
        if place is None:
            return Verdict.NOT_MINE
        if self._divided and self._continues(cpu, pc):
            hit = Hit(place, Status.REENTER if self._hits else Status.HIT_SS)
            self._hits.append(hit)
            return self._execute(cpu, hit, back_end, hit.status is not Status.REENTER and place.observed)
        if back_end is BackEnd.HOOK:
            if self._arch.is_repeat(cpu, place.prepared):
                return Verdict.HANDLED
        elif cpu.cpl == 3 or cpu.pc != pc or not self._arch.arch_refresh(place.prepared):
            # Slots belong to the kernel, its flat segments and what can be copied. A hook needs none: it fires next,
            # at this very place.
            self._rearm(place, BackEnd.HOOK)
            self._arch.skip(back_end)
            return Verdict.HANDLED
        if self._hits:
            return self._reenter(cpu, place, back_end)
        hit = Hit(place, Status.HIT_ACTIVE)
        self._hits.append(hit)
        try:
            if not self._goes_on(pc):
                regs = self._regs(cpu, place.address + 1)
                skipped = self._halting is not place and place.run_pre(regs)
                if self._halting is place or regs.stop:
                    self._hits.pop()
                    self._halting = None
                    self._stopped = None if skipped else (pc, self._machine.clock.instructions)
                    return ProbeStop(cpu.pc)
                if skipped:
                    self._arch.skip(back_end)
                    self._hits.pop()
                    return Verdict.HANDLED
            hit.status = Status.HIT_SS
            verdict = self._execute(cpu, hit, back_end, place.observed)
        except BaseException:
            self._hits.clear()
            raise
        if back_end is BackEnd.INT3:
            place.long_hits += 1
            if not place.long_hits & (place.long_hits - 1):  # 1, 2, 4 ...: some have no shortcut for long
                self._shorten(place)
        return verdict

    def on_debug(self, cpu: Cpu) -> Verdict | Stop:
        if not self._hits or not self._hits[-1].stepping:
            return Verdict.NOT_MINE
        hit = self._hits[-1]
        finish = self._arch.finish_step(cpu, hit.place.prepared)
        if finish is Finish.AGAIN:
            return Verdict.HANDLED
        if finish is Finish.DIVIDED:
            self._divide(cpu)
            return Verdict.DELIVER
        hit.stepping = False
        self._complete(cpu, hit)
        return Verdict.DELIVER if finish is Finish.DONE_TRAP else Verdict.HANDLED

    def leave_slot(self, cpu: Cpu) -> bool:
        hit = self._hits[-1] if self._hits and self._hits[-1].stepping else None
        finish = None if hit is None else self._arch.leave_slot(cpu, hit.place.prepared)
        if hit is None or finish is None:
            return False
        if finish is Finish.DIVIDED:
            self._divide(cpu)
        else:
            hit.stepping = False
            self._complete(cpu, hit)
        return True

    def on_fault(self, cpu: Cpu, vector: int) -> Verdict | Stop:
        trampoline = self._arch.gate_trap(cpu, vector)
        if trampoline is not None:
            address, back_end = trampoline
            verdict = self.on_break(cpu, address, back_end)
            return verdict if back_end is BackEnd.INT3 else Verdict.DELIVER
        hit = self._hits[-1] if self._hits and self._hits[-1].stepping else None
        if hit is not None and self._arch.is_over(cpu, vector, hit.place.prepared):
            hit.stepping = False
            self._complete(cpu, hit)
            return Verdict.HANDLED
        prepared = hit.place.prepared if hit is not None else self._arch.find_slot(cpu.pc)
        if prepared is None:
            return self._fault_in_handler(cpu, vector)
        self._arch.abort_step(cpu, prepared)
        place = self._places.get(prepared.address)
        if cpu.pc != prepared.address:
            # A trap (int n, into): it is over, and its handler is where the guest goes next.
            if hit is not None:
                hit.stepping = False
                self._complete(cpu, hit)
            return Verdict.DELIVER
        try:
            handled = place is not None and place.run_fault(self._regs(cpu, cpu.pc), vector)
        finally:
            if hit is not None:
                self._hits.pop()
        return Verdict.HANDLED if handled else Verdict.DELIVER

    def _fault_in_handler(self, cpu: Cpu, vector: int) -> Verdict:
        """In guest code that a handler calls: kprobe_fault_handler() for HIT_ACTIVE and HIT_SSDONE."""
        places = (hit.place for hit in reversed(self._hits) if hit.status in (HIT_ACTIVE, HIT_SSDONE))
        place = next(places, None)
        return (
            Verdict.HANDLED
            if place is not None and place.run_fault(self._regs(cpu, cpu.pc), vector)
            else Verdict.NOT_MINE
        )

    def on_rewritten(self) -> None:
        for place in self._places.values():
            if place.armed is BackEnd.INT3 and not self._arch.arch_persists(place.prepared):
                self._discard(place)

    def on_restore(self) -> None:
        self._hits.clear()
        self._halting = self._stopped = None
        self._divided.clear()
        self._limits.forget()
        for call in self._after_restore:
            call()

    def after_restore(self, call: Callable[[], None]) -> None:
        """Have `call` called whenever the machine has gone to another moment."""
        self._after_restore.append(call)

    # --------------------------------------------------------------------------------------------------- one hit

    def _shorten(self, place: Place) -> None:
        if place.armed is BackEnd.INT3:
            arrive, finish = functools.partial(self._arriver, place), functools.partial(self._finisher, place)
            self._arch.shorten(place.prepared, place.observed, arrive, finish)

    def _arriver(self, place: Place, short: Short) -> Callable[[], int | None]:
        """A usual hit, as `on_break` has the others."""
        hits, hit, cpu, flag = self._hits, Hit(place, HIT_ACTIVE), self._machine.cpu, self._arch.step_flag
        regs, ip = self._regs(cpu, 0), place.address + 1
        observe, emulate, over, to, divided = short.observe, short.emulate, short.over, short.to, self._divided

        def arrive() -> int | None:
            if hits or self._stopped is not None or (divided and place.address in divided):
                return None
            hit.status = HIT_ACTIVE
            hits.append(hit)
            try:
                regs.ip = ip
                skipped = place.run_pre(regs)
                if regs.stop and self._halt(place, regs, skipped):
                    hits.pop()
                    return None
                if skipped:
                    self._machine.uncount(1 - short.uncount)
                    hits.pop()
                    return cpu.pc
                if place.observed is not observe or cpu.system_flags & flag:
                    hit.status = HIT_SS
                    self._machine.uncount(-short.uncount)  # a handler has changed what is usual
                    self._execute(cpu, hit, BackEnd.INT3, place.observed)
                    return cpu.pc
                if emulate is not None:
                    emulate(cpu)
                    self._complete(cpu, hit)
                    return cpu.pc
                if over < 0:
                    hits.pop()
                    return to
                hit.status = HIT_SS
                hit.stepping = True
                return to
            except BaseException:
                hits.clear()
                raise

        return arrive

    def _finisher(self, place: Place, short: Short) -> Callable[[], int | None]:
        """The end of a step that such a hit has begun."""
        hits, cpu, end, mask = self._hits, self._machine.cpu, short.end, self._arch.convention.mask
        regs = self._regs(cpu, 0)

        def finish() -> int | None:
            hit = hits[-1] if hits else None
            if hit is None or hit.place is not place or not hit.stepping:
                return None
            hit.stepping = False
            hit.status = HIT_SSDONE
            cpu.pc = regs.ip = end
            try:
                place.run_post(regs)
            finally:
                hits.pop()
            return regs.ip & mask

        return finish

    def _halt(self, place: Place, regs: Regs, skipped: bool) -> bool:
        """A handler of a usual hit wants a stop: `on_break` is to make it, which can where the guest still is there."""
        regs.stop = False
        if skipped:
            self._machine.end_run(ProbeStop(place.address))
            return False
        self._halting = place
        return True

    def _divide(self, cpu: Cpu) -> None:
        """The rest of the string instruction is met again, which is no new hit."""
        self._hits.pop()
        if sum(map(len, self._divided.values())) >= _MAX_DIVIDED:
            self._divided.clear()
        self._divided.setdefault(cpu.pc, set()).add(self._arch.position(cpu))

    def _continues(self, cpu: Cpu, pc: int) -> bool:
        known, position = self._divided.get(pc), self._arch.position(cpu)
        if known is None or position not in known:
            return False
        known.remove(position)
        if not known:
            del self._divided[pc]
        return True

    def _goes_on(self, pc: int) -> bool:
        """The guest goes on where a handler had it stopped: the handlers have run for this hit."""
        if self._stopped is None:
            return False
        stopped, self._stopped = self._stopped, None
        return stopped == (pc, self._machine.clock.instructions)

    def _reenter(self, cpu: Cpu, place: Place, back_end: BackEnd) -> Verdict:
        """A probe met while another's handlers run: executed without its handlers and counted."""
        for probe in place.active:
            probe.nmissed += 1
        hit = Hit(place, Status.REENTER)
        self._hits.append(hit)
        return self._execute(cpu, hit, back_end, observe=False)

    def _execute(self, cpu: Cpu, hit: Hit, back_end: BackEnd, observe: bool) -> Verdict:
        begin = self._arch.begin_step(cpu, hit.place.prepared, back_end, observe)
        if begin is Begin.STEPPING:
            hit.stepping = True
            return Verdict.HANDLED
        if begin is Begin.EXECUTED:
            self._complete(cpu, hit)
        else:
            self._hits.pop()
        return Verdict.DELIVER if begin is Begin.TRAP else Verdict.HANDLED

    def _complete(self, cpu: Cpu, hit: Hit) -> None:
        """The instruction is over: post-handlers, unless this was a probe inside a probe."""
        try:
            if hit.status is not Status.REENTER and hit.place.observed:
                hit.status = Status.HIT_SSDONE
                regs = self._regs(cpu, cpu.pc)
                hit.place.run_post(regs)
                cpu.pc = regs.ip & self._arch.convention.mask
        finally:
            self._hits.pop()

    def _regs(self, cpu: Cpu, ip: int) -> Regs:
        return Regs(self._machine, self._arch.convention, cpu, ip, self.calls)

    @contextlib.contextmanager
    def _nested(self) -> Iterator[None]:
        """Around a call into the guest from a handler: hits in it that a call given up leaves open are forgotten."""
        depth = len(self._hits)
        try:
            yield
        except CallAborted:
            if len(self._hits) > depth:
                self._arch.cancel_step()
                del self._hits[depth:]
            raise

    # ---------------------------------------------------------------------------------------------------- internals

    def _locate(self, probe: Kprobe) -> tuple[int, int | None]:
        """The address to probe and its function's start (None where no symbol covers it)."""
        probe.check_place()  # it may have been changed since it was made
        symbols = self._machine.symbols
        if probe.symbol is None:
            address = (probe.addr or 0) + probe.offset
        else:
            address = resolve(self._machine, probe.symbol) + probe.offset
        found = symbols.find(address)
        if found is None and probe.symbol is not None:
            raise ProbeError(errno.ENOENT, f"{probe.symbol}+{probe.offset:#x} lies outside every symbol")
        if found is not None and probe.symbol is not None and found[0].kind not in _CODE:
            # An int3 there would be read as data; whoever means an address of code in it can give that.
            raise ProbeError(errno.EINVAL, f"{found[0].name} is data (symbol kind {found[0].kind}), not code")
        return address & self._arch.convention.mask, None if found is None else found[0].address

    def _place_of(self, probe: Kprobe) -> Place:
        if probe.address is None or probe not in self._places[probe.address].probes:
            raise ProbeError(errno.EINVAL, "this probe is not registered")
        return self._places[probe.address]

    def _switch(self, probe: Kprobe, disabled: bool) -> None:
        if probe.waiting:
            probe.disabled = disabled
            return
        place = self._place_of(probe)
        if probe.gone:
            raise ProbeError(errno.EINVAL, "the guest has freed the code this probe stood on")
        before, probe.disabled = probe.disabled, disabled
        try:
            self._update(place)
        except ProbeError:
            probe.disabled = before
            place.refresh()
            raise

    def _update(self, place: Place) -> None:
        """Arm, move or disarm an address as its probes now ask."""
        place.refresh()
        if not place.active:
            self._rearm(place, None)
            return
        wanted, may_fall_back = self._choose(place)
        try:
            self._rearm(place, wanted)
        except ProbeError:
            if not may_fall_back:
                raise
            self._rearm(place, BackEnd.HOOK)
        self._shorten(place)

    def _choose(self, place: Place) -> tuple[BackEnd, bool]:
        """The back end for an address, and whether a hook will do where it fails."""
        asked = {self._arm if probe.arm == "auto" else probe.arm for probe in place.active}
        if "hook" in asked:
            return BackEnd.HOOK, False
        if "int3" in asked:
            return BackEnd.INT3, False
        unsafe = place.prepared.needs_hook is not None or not self._settled
        if unsafe or self._machine.memory.translate(place.address) is None:
            return BackEnd.HOOK, False
        return BackEnd.INT3, place.armed is not BackEnd.INT3

    def _rearm(self, place: Place, back_end: BackEnd | None) -> None:
        if place.armed is back_end:
            return
        if back_end is BackEnd.HOOK and self._hooks >= MAX_HOOKS:
            raise ProbeError(errno.ENOSPC, f"{MAX_HOOKS} PC hooks are in use; the engine would crawl with more")
        before, place.armed = place.armed, None
        if before is not None:
            self._arch.arch_disarm(place.prepared)
            self._hooks -= before is BackEnd.HOOK
        if back_end is None:
            return
        try:
            self._arch.arch_arm(place.prepared, back_end)
        except MemoryFault as error:
            raise ProbeError(errno.EFAULT, f"{place.address:#x} is not mapped: use a PC hook") from error
        place.armed = back_end
        self._hooks += back_end is BackEnd.HOOK

    def _notes(self, place: Place, refusal: Refusal | None) -> tuple[str, ...]:
        notes = []
        if refusal is not None:
            notes.append(f"Linux would refuse: {errno_name(refusal[0])}, {refusal[1]}")
        if place.armed is BackEnd.HOOK and self._hooks > COMFORTABLE_HOOKS:
            notes.append(f"{self._hooks} probes are armed by PC hook; each slows the whole engine")
        return tuple(notes)
