"""Returns of functions in programs, followed from outside: the stack is never touched, and depth has no limit.

Rules: runs in the engine's thread; a part of `uprobes`, which owns the breaks. A call is bound to the thread that made
it. Its return is met at its return address: an arrival with the stack pointer that the call left there. Programs may
leave a function otherwise, and each way is an end of its own:

- *tail call*: another probed function is entered with the same return address at the same place of the stack; the
  return is that of both.
- *moved*: the return address was popped, but not from where it was pushed, or not by the thread that entered: a
  program that copies its stack, or hands it to another thread.
- *longjmp*, *exception*: what went through longjmp() or the unwinder since, and was then found to have left frames.
  *skipped*: left by a jump of another kind.
- *died* with its thread, *exec*: with its address space; or still *live*.

A frame that seems to have been left may belong to a coroutine whose stack lies beside: until its thread ends it only
counts as left, and its return is a return after all.

Every entry is accounted for: entries + forked (calls that a fork has doubled) = the sum of all ends + live + missed.
"""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol

from emu.iface import Machine, MemoryFault
from probes.blame import ask
from probes.callers import Callers
from probes.programs import Programs
from probes.regs import Regs

MAX_IDLE: Final = 64
"""Return addresses that stay breaks while nobody is expected: what makes them costs more than what passes them."""
MAX_POPPED: Final = 256
"""Bytes of arguments that a `ret imm16` takes along; compilers' are the arguments of one call."""


class End(enum.Enum):
    """How a followed call came to its end."""

    RETURNED = "returned"
    TAIL = "tail-called"
    MOVED = "moved"
    LONGJMP = "longjmp"
    EXCEPTION = "exception"
    SKIPPED = "skipped"
    DIED = "died"
    EXEC = "exec"
    UNREGISTERED = "unregistered"
    RESTORED = "restored"


RETURNS: Final = frozenset((End.RETURNED, End.TAIL, End.MOVED))
"""Those at which the handler runs."""


LEAVING: Final = {
    **dict.fromkeys(("longjmp", "_longjmp", "siglongjmp", "__longjmp_chk", "__libc_longjmp"), End.LONGJMP),
    **dict.fromkeys(("_Unwind_RaiseException", "_Unwind_Resume", "_Unwind_Resume_or_Rethrow"), End.EXCEPTION),
}
"""Functions of the C library and the unwinder (Itanium C++ ABI, 1.2) by which frames are left."""


class Ends:
    """What became of the entries of one probe."""

    def __init__(self) -> None:
        self.entries = 0
        self.forked = 0
        self.missed = 0  # no stack to return by
        self.live = 0
        self.by = dict.fromkeys(End, 0)

    @property
    def returned(self) -> int:
        """Returns, whichever way: how often the handler has run."""
        return sum(self.by[end] for end in RETURNS)

    def __str__(self) -> str:
        """One line in which every entry has its place; what is 0 and rare is left out."""
        left = f"{self.entries} entries" + (f" + {self.forked} forked" if self.forked else "")
        parts = [f"{self.by[End.RETURNED]} returned", f"{self.live} live", f"{self.missed} missed"]
        parts += [f"{count} {end.value}" for end, count in self.by.items() if count and end is not End.RETURNED]
        return f"{left} = {' + '.join(parts)}"


class Followed(Protocol):
    """What is needed of a uprobe."""

    ends: Ends
    registered: bool
    disabled: bool

    @property
    def ret_handler(self) -> Callable[[UserReturn, Regs], object] | None: ...


@dataclass(slots=True, eq=False)
class UserReturn:
    """One call that is followed: what `ret_handler` gets.

    `function` is the address it was entered at, `ret_addr` where it returns to, `slot` where on the stack that stands.
    """

    probe: Followed
    offset: int  # of the probed place in its file
    thread: int
    space: int
    function: int
    ret_addr: int
    slot: int
    at: int  # instruction count of the entry
    at_ns: int  # its time
    word: int
    end: End | None = None
    left: End | None = None  # how it seems to have been left


class UserReturns:
    """All calls that are followed. `use` and `unuse` count who wants a break at an address."""

    def __init__(
        self, machine: Machine, programs: Programs, use: Callable[[int, bool], None], unuse: Callable[[int], None]
    ) -> None:
        self._machine = machine
        self._callers = Callers(machine)
        self._programs = programs
        self._use = use
        self._unuse = unuse
        self._live: dict[int, list[UserReturn]] = {}  # by thread, oldest first
        self._orphans: dict[int, list[UserReturn]] = {}  # by address space: of a forked thread that has not run yet
        self._sites: dict[int, Counter[int]] = {}  # address space -> return address -> calls that expect it
        self._idle: OrderedDict[tuple[int, int], None] = OrderedDict()  # of them those nobody expects, oldest first
        self._causes: dict[int, tuple[End, int]] = {}  # thread -> what it last left frames by, and when

    # --------------------------------------------------------------------------------------------- entries and returns

    def stands(self, space: int, vaddr: int) -> bool:
        return vaddr in self._sites.get(space, ())

    def spaces(self, vaddr: int) -> list[int]:
        """Those in which `vaddr` is a return address."""
        return [space for space, sites in self._sites.items() if vaddr in sites]

    def enter(self, probe: Followed, offset: int, space: int, regs: Regs) -> None:
        """The first instruction of a function is about to run."""
        probe.ends.entries += 1
        thread = self._programs.thread(regs.cpu)
        word = 8 if regs.cpu.bits == 64 else 4
        slot = regs.sp
        try:
            ret_addr = int.from_bytes(self._machine.memory.read(slot, word), "little")
        except MemoryFault:
            probe.ends.missed += 1
            return
        now = self._machine.clock.instructions
        self._adopt(space, thread)
        call = UserReturn(probe, offset, thread, space, regs.ip, ret_addr, slot, now, self._machine.clock.now_ns, word)
        self._look_back(call)
        self._live.setdefault(thread, []).append(call)
        self._watch(call)

    def arrive(self, space: int, vaddr: int, regs: Regs) -> None:
        """The instruction at `vaddr` is about to run: by a return of a call that is followed, or otherwise."""
        if not self.stands(space, vaddr):
            return
        thread = self._programs.thread(regs.cpu)
        self._adopt(space, thread)
        chain = self._returning(thread, space, vaddr, regs)
        if not chain:
            return
        for call in reversed(chain):
            self._end(call, self._how(call, thread, regs))
        self._leave_deeper(thread, space, chain[0].slot)
        for call in reversed(chain):  # the newest first, as the kernel has it
            if call.probe.ret_handler is not None and call.probe.registered and not call.probe.disabled:
                ask(self._machine, vaddr, call.probe.ret_handler, call, regs)

    def cause(self, thread: int, end: End) -> None:
        """The thread is in longjmp() or the unwinder."""
        self._causes[thread] = end, self._machine.clock.instructions

    def _returning(self, thread: int, space: int, vaddr: int, regs: Regs) -> list[UserReturn]:
        """The calls that end here, oldest first: all of one stack word."""
        mine = [call for call in self._live.get(thread, ()) if call.space == space and call.ret_addr == vaddr]
        sp = regs.sp
        exact = [call for call in mine if call.slot + call.word == sp]
        if exact:
            return exact
        popped = [call for call in mine if 0 < sp - call.slot - call.word <= MAX_POPPED and self._stood(call, regs)]
        if popped:
            return [call for call in popped if call.slot == popped[-1].slot]
        others = [
            call
            for thread_, calls in self._live.items()
            for call in calls
            if thread_ != thread and call.space == space and call.ret_addr == vaddr and call.slot + call.word == sp
        ]
        if others:
            return [call for call in others if call.thread == others[-1].thread]
        if mine and self._just_popped(mine[-1], sp):
            return [call for call in mine if call.slot == mine[-1].slot]
        return []

    def _stood(self, call: UserReturn, regs: Regs) -> bool:
        """The return address is where the call left it, above a stack pointer that a `ret imm16` has moved."""
        return self._word(call.slot, call.word) == call.ret_addr

    def _just_popped(self, call: UserReturn, sp: int) -> bool:
        """The word below the stack pointer is the return address: it was a `ret` that led here."""
        return self._word(sp - call.word, call.word) == call.ret_addr

    def _word(self, address: int, size: int) -> int | None:
        try:
            return int.from_bytes(self._machine.memory.read(address, size), "little")
        except MemoryFault:
            return None

    def _how(self, call: UserReturn, thread: int, regs: Regs) -> End:
        popped = regs.sp - call.slot - call.word
        if call.thread != thread or not 0 <= popped <= MAX_POPPED:
            return End.MOVED
        return End.TAIL if call.left is End.TAIL else End.RETURNED

    def _look_back(self, new: UserReturn) -> None:
        """A call has come in: what stood in its place on the stack, or below, has been left."""
        for old in reversed(self._live.get(new.thread, ())):
            if old.space != new.space:
                self._end(old, End.EXEC)
            elif old.slot != new.slot or old.at == new.at:
                continue  # at the same moment: another probe on this function
            elif old.left is None and self._is_tail_call(old, new):
                old.left = End.TAIL
            elif old.left is not End.TAIL or not self._is_tail_call(old, new):
                self._end(old, self._by(old) if old.left in (None, End.TAIL) else old.left)
        self._leave_deeper(new.thread, new.space, new.slot)

    def _is_tail_call(self, old: UserReturn, new: UserReturn) -> bool:
        """`old` was left by a jump to `new`; else its caller has called again, which only the code can tell."""
        if old.ret_addr != new.ret_addr or old.function == new.function or self._by(old) is not End.SKIPPED:
            return False
        target = self._callers.target(new.ret_addr)
        return target is None or target != new.function

    def _leave_deeper(self, thread: int, space: int, slot: int, *, only_mark: bool = False) -> None:
        """The thread runs at `slot`, so what it has entered below it on this stack is over, but for coroutines."""
        mine = self._live.get(thread, ())
        if not any(call.slot < slot and call.left in (None, End.TAIL) for call in mine):
            return
        stack = self._programs.stack(space, slot)
        for call in list(mine):
            if call.slot >= slot or call.space != space or self._programs.stack(space, call.slot) != stack:
                continue
            if call.left is None or call.left is End.TAIL:
                call.left = self._by(call)
            if not only_mark and self._word(call.slot, call.word) != call.ret_addr:
                self._end(call, call.left)

    def _look_at_stack(self, thread: int, space: int) -> None:
        """The thread is in the kernel: what lies below the stack it came with, or is written over, has been left."""
        if thread in self._live and (sp := self._programs.user_stack()) is not None:
            self._leave_deeper(thread, space, sp, only_mark=True)
        for call in self._live.get(thread, ()):
            if call.left is None and call.space == space and self._word(call.slot, call.word) != call.ret_addr:
                call.left = self._by(call)

    def _by(self, call: UserReturn) -> End:
        cause = self._causes.get(call.thread)
        return cause[0] if cause is not None and cause[1] > call.at else End.SKIPPED

    # ------------------------------------------------------------------------------------------- what happens to others

    def forked(self, parent: int, child: int) -> None:
        """The current thread's calls in `parent` will return in `child` too."""
        self.ended(child)
        thread = self._programs.thread(self._machine.cpu)
        self._look_at_stack(thread, parent)
        for call in self._live.get(thread, ()):
            if call.space == parent and call.left in (None, End.TAIL):
                copy = replace(call, thread=-1, space=child)
                call.probe.ends.forked += 1
                self._orphans.setdefault(child, []).append(copy)
                self._watch(copy)

    def ended(self, space: int) -> None:
        """Nobody runs in the space any more."""
        for call in [call for calls in self._lists() for call in calls if call.space == space]:
            self._end(call, call.left or End.EXEC)
        self._drop_idle(space)

    def expects(self, space: int, start: int, end: int) -> bool:
        """Something returns into that range."""
        return any(start <= address < end for address in self._sites.get(space, ()))

    def unmapped(self, space: int, start: int, end: int) -> None:
        """Stacks and code of threads go with them; what returns into nothing never does."""
        for call in [call for calls in self._lists() for call in calls if call.space == space]:
            if start <= call.ret_addr < end:
                self._end(call, call.left or End.SKIPPED)
        self._drop_idle(space, start, end)

    def exited(self, thread: int) -> None:
        standing = [call for call in self._live.get(thread, ()) if call.left in (None, End.TAIL)]
        for space in {call.space for call in standing}:
            self._look_at_stack(thread, space)
        for call in standing:
            if call.end is None and call.left in (None, End.TAIL, End.SKIPPED):
                self._end(call, End.DIED)  # pthread_exit() leaves them, too, on its way
        for call in list(self._live.get(thread, ())):
            self._end(call, call.left or End.DIED)
        self._causes.pop(thread, None)

    def unregister(self, probe: Followed) -> None:
        for call in [call for calls in self._lists() for call in calls if call.probe is probe]:
            self._end(call, End.UNREGISTERED)

    def forget(self) -> None:
        """The last probe has gone."""
        self._drop_idle()
        self._causes.clear()

    def restored(self) -> None:
        for call in [call for calls in self._lists() for call in calls]:
            self._end(call, End.RESTORED)
        self.forget()

    def _lists(self) -> list[list[UserReturn]]:
        return [*self._live.values(), *self._orphans.values()]

    def _adopt(self, space: int, thread: int) -> None:
        """The first thread seen in a forked space is the one that was forked."""
        for call in self._orphans.pop(space, ()):
            call.thread = thread
            self._live.setdefault(thread, []).append(call)

    def _watch(self, call: UserReturn) -> None:
        call.probe.ends.live += 1
        sites = self._sites.setdefault(call.space, Counter())
        known = call.ret_addr in sites
        sites[call.ret_addr] += 1
        self._idle.pop((call.space, call.ret_addr), None)
        if not known:
            self._use(call.ret_addr, False)  # the caller may have run through it often

    def _end(self, call: UserReturn, end: End) -> None:
        call.end = end
        lists, key = (self._orphans, call.space) if call.thread == -1 else (self._live, call.thread)
        lists[key].remove(call)
        if not lists[key]:
            del lists[key]
        call.probe.ends.live -= 1
        call.probe.ends.by[end] += 1
        sites = self._sites[call.space]
        sites[call.ret_addr] -= 1
        if not sites[call.ret_addr]:
            self._idle[call.space, call.ret_addr] = None
            if len(self._idle) > MAX_IDLE:
                self._drop_site(*next(iter(self._idle)))

    def _drop_site(self, space: int, address: int) -> None:
        del self._idle[space, address]
        sites = self._sites[space]
        del sites[address]
        if not sites:
            del self._sites[space]
        self._unuse(address)

    def _drop_idle(self, space: int | None = None, start: int = 0, end: int = 1 << 64) -> None:
        for at, address in list(self._idle):
            if space in (None, at) and start <= address < end:
                self._drop_site(at, address)
