"""Return probes: a handler when a function returns, for each call that entered it while the probe was there.

Rules: runs in the engine's thread; a client of `core`, as kernel/kprobes.c has it, and knows no other client. Instances
are bound to the task that called, newest first. There are two ways to meet a return:

- *trampoline*, the kernel's: the return address on the stack is replaced by the address of an int3 in the slot window.
  The kprobe there does all the work and is not single-stepped. Debuggers are shown the true return address.
- *shadow*: the stack is left alone and the return is caught at the return address, by a kprobe that stays only as long
  as somebody is expected there. An arrival is a return if task and stack pointer are those of a call. It also serves
  where there can be no trampoline: for ring 3, and until a kernel has settled.

Every entry is accounted for: entries = returned + live + missed + declined + skipped + died + unregistered + restored.
"""

from __future__ import annotations

import enum
import errno
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from emu.iface import BackEnd, Machine, MachineError, MemoryFault, Word
from emu.insn import spans
from probes.arch import ProbeArch
from probes.blame import ask
from probes.callers import Callers
from probes.core import Kprobes
from probes.errors import ProbeError
from probes.kprobe import Kprobe
from probes.regs import Regs
from probes.scope import ENDBR_SIZE, starts_with_endbr
from probes.tasks import Tasks

ReturnHandler: TypeAlias = Callable[["ReturnInstance", Regs], object]

MAX_DATA_SIZE: Final = 4096  # KRETPROBE_MAX_DATA_SIZE, include/linux/kprobes.h
NR_CPUS: Final = 1  # the machine has one processor
DEFAULT_MAXACTIVE: Final = max(10, 2 * NR_CPUS)  # register_kretprobe() of kernels that preempt, and of all since 5.17
MAX_IDLE_SITES: Final = 64
_TRAMPOLINE: Final = "kretprobe_trampoline"
NO_RETURN: Final = ("__switch_to",)  # kretprobe_blacklist, arch/x86/kernel/kprobes/core.c
_NO_ADDRESS: Final = "missed where it was entered without a return address on the stack"
_ENTRY_CODE: Final = "followed by shadow: what looks like a return address in entry code may be an interrupt's"


class End(enum.Enum):
    """How an instance came to its end."""

    RETURNED = "returned"
    SKIPPED = "skipped"  # its frame was left by a jump, as longjmp does
    DIED = "died"  # its task ended inside
    UNREGISTERED = "unregistered"  # the probe went away first; the function returns all the same
    RESTORED = "restored"  # the machine went to another moment


class Kretprobe:
    """A return probe on the function that `kp` names.

    `entry_handler(ri, regs)` runs at the entry; true declines this call. `handler(ri, regs)` runs after the function's
    `ret`, before the caller goes on: `regs.ip` is the return address, `regs.retval` may be changed. At most `maxactive`
    calls are followed at a time (0: as many as the kernel would), the others are counted in `nmissed`. Each instance
    has `data_size` zeroed bytes. `shadow` picks the way; None is the kernel's, the trampoline.

    As in the kernel, `kp`'s handlers are ours from the registration on. `ends` counts instances by how they ended.
    """

    def __init__(
        self,
        *,
        kp: Kprobe,
        handler: ReturnHandler | None = None,
        entry_handler: ReturnHandler | None = None,
        maxactive: int = 0,
        data_size: int = 0,
        shadow: bool | None = None,
    ) -> None:
        self.kp = kp
        self.handler = handler
        self.entry_handler = entry_handler
        self.maxactive = maxactive
        self.data_size = data_size
        self.shadow = shadow
        self.notes: tuple[str, ...] = ()
        self.reset()

    def reset(self) -> None:
        """All counts to 0, as a registration begins."""
        self.nmissed = 0
        self.declined = 0
        self.live = 0
        self.ends = dict.fromkeys(End, 0)

    @property
    def registered(self) -> bool:
        return self.kp.registered

    @property
    def entries(self) -> int:
        """Calls of the function while the probe was armed."""
        return self.kp.hits + self.kp.nmissed

    @property
    def returned(self) -> int:
        return self.ends[End.RETURNED]

    @property
    def skipped(self) -> int:
        return self.ends[End.SKIPPED]

    @property
    def died(self) -> int:
        return self.ends[End.DIED]

    @property
    def missed(self) -> int:
        """Entries without an instance: the pool was empty, or the entry was met inside another probe's handler."""
        return self.nmissed + self.kp.nmissed

    def accounting(self) -> str:
        """One line in which every entry has its place; what is 0 and rare is left out."""
        parts = [f"{self.returned} returned", f"{self.live} live", f"{self.missed} missed"]
        rare = {"declined": self.declined} | {end.value: n for end, n in self.ends.items() if end is not End.RETURNED}
        parts += [f"{count} {name}" for name, count in rare.items() if count]
        return f"{self.entries} entries = {' + '.join(parts)}"

    def __repr__(self) -> str:
        return f"<Kretprobe {self.kp!r} {self.accounting()}>"


class ReturnInstance:
    """One call that is being followed: struct kretprobe_instance.

    `task` is the caller's number (see `tasks`), `ret_addr` the true return address, `data` bytes of the handlers' own.
    `arguments` are those of the call, by number, that an event's entry handler has kept.
    """

    __slots__ = ("arguments", "at", "at_ns", "data", "live", "ret_addr", "rp", "slot", "task", "word")

    def __init__(self, rp: Kretprobe, task: int, slot: int, ret_addr: int, at: int, at_ns: int) -> None:
        self.rp = rp
        self.task = task
        self.ret_addr = ret_addr
        self.data = bytearray(rp.data_size)
        self.arguments: dict[int, int] = {}
        self.slot = slot  # linear address of the return address on the stack
        self.at = at  # instruction count of the entry
        self.at_ns = at_ns  # ... and the guest's time
        self.word: Word | None = None  # the substituted return address; None for a shadow
        self.live = False


@dataclass(slots=True, eq=False)
class _Site:
    """A return address that is watched, and how many shadows expect a return there."""

    probe: Kprobe
    users: int = 0


class Kretprobes:
    """All return probes of a machine."""

    def __init__(self, machine: Machine, arch: ProbeArch, kprobes: Kprobes, tasks: Tasks) -> None:
        self._machine = machine
        self._callers = Callers(machine, tasks.kernel_start)
        self._arch = arch
        self._kprobes = kprobes
        self._tasks = tasks
        self._word = arch.convention.word
        self._registered: list[Kretprobe] = []
        self._live: dict[int, list[ReturnInstance]] = {}  # by task, oldest first
        self._trampoline: Kprobe | None = None
        self._sites: dict[int, _Site] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # sites nobody expects, longest idle first
        self._exit: Kprobe | None = None
        self._switch: Kprobe | None = None
        self._doomed: set[int] = set()
        self._buried: tuple[int, frozenset[int]] = (-1, frozenset())  # at which instruction, and whom
        self._pops: dict[int, frozenset[int] | None] = {}
        kprobes.after_restore(self._forget)

    # ------------------------------------------------------------------------------------------------ registration

    def register(self, rp: Kretprobe) -> None:
        """As register_kretprobe(): ProbeError with its errno, and then nothing has changed."""
        self._check_entry(rp.kp)
        if rp.registered:
            raise ProbeError(errno.EINVAL, "this probe is registered already")
        if rp.data_size > MAX_DATA_SIZE or rp.data_size < 0:
            raise ProbeError(errno.E2BIG, f"data_size is at most {MAX_DATA_SIZE}")
        kept = rp.kp.pre_handler, rp.kp.post_handler
        rp.kp.pre_handler, rp.kp.post_handler = (lambda kp, regs: self._enter(rp, regs)), None
        rp.kp.on_skip = lambda kp, regs: self._leave(regs)
        try:
            self._kprobes.register(rp.kp)
        except ProbeError:
            rp.kp.pre_handler, rp.kp.post_handler = kept
            rp.kp.on_skip = None
            raise
        if rp.maxactive <= 0:
            rp.maxactive = DEFAULT_MAXACTIVE if self._tasks.preemptible else NR_CPUS
        rp.reset()
        blacklisted = rp.kp.symbol in NO_RETURN
        rp.notes = rp.kp.notes + (("Linux would refuse: EINVAL, returns into another task",) if blacklisted else ())
        if not rp.shadow and self._callers.in_entry_code(rp.kp.address or 0):
            rp.shadow = True
            rp.notes += (_ENTRY_CODE,)
        if not self._registered:
            self._watch_exits()
        self._registered.append(rp)

    def unregister(self, rp: Kretprobe) -> None:
        """Take a probe away. Calls that are under way return as ever; their handler does not run."""
        self._kprobes.unregister(rp.kp)
        self._registered.remove(rp)
        for instance in [ri for stack in self._live.values() for ri in stack if ri.rp is rp]:
            self._end(instance, End.UNREGISTERED)
        if not self._registered:
            self._forget_sites()
            self._unwatch_exits()

    def _check_entry(self, kp: Kprobe) -> None:
        """kprobe_on_func_entry(): at a function's start, or behind its ENDBR."""
        if (kp.addr is None) == (kp.symbol is None):
            raise ProbeError(errno.EINVAL, "a probe takes a symbol or an address, and only one of them")
        offset = kp.offset
        if kp.symbol is None:
            found = self._machine.symbols.find((kp.addr or 0) + kp.offset)
            if found is None:
                return  # an image without symbols: its user knows
            offset = found[1]
        if offset and not (offset == ENDBR_SIZE and self._is_behind_endbr(kp)):
            raise ProbeError(errno.EINVAL, "a return probe must be at the entry of a function")

    def _is_behind_endbr(self, kp: Kprobe) -> bool:
        symbols = self._machine.symbols.lookup(kp.symbol) if kp.symbol is not None else ()
        start = symbols[0].address if symbols else (kp.addr or 0) + kp.offset - ENDBR_SIZE
        return starts_with_endbr(self._machine, start)

    def instances(self, rp: Kretprobe) -> list[ReturnInstance]:
        """The calls that have not returned yet, oldest first."""
        return sorted((ri for stack in self._live.values() for ri in stack if ri.rp is rp), key=lambda ri: ri.at)

    # ----------------------------------------------------------------------------------------------------- entries

    def _enter(self, rp: Kretprobe, regs: Regs) -> None:
        """arch_prepare_kretprobe(): the function's first instruction is about to run."""
        slot = self._stack_pointer(regs)
        try:
            task = self._tasks.identify(regs.cpu, slot)
            ret_addr = int.from_bytes(self._machine.memory.read(slot, self._word), "little")
        except MemoryFault:
            self._miss(rp)  # no stack to return by
            return
        now = self._machine.clock.instructions
        if now == self._buried[0] and task in self._buried[1]:
            rp.ends[End.DIED] += 1  # a probe on the switch itself
            return
        if not self._callers.is_return_address(ret_addr, regs.cpu.cpl):
            self._miss(rp)  # entry code: a vector or a saved register stands there, and the guest is to find it
            return
        self._drop_stale(rp, task, slot, ret_addr)
        if rp.live >= rp.maxactive:
            rp.nmissed += 1
            return
        instance = ReturnInstance(rp, task, slot, ret_addr, now, self._machine.clock.now_ns)
        entry = rp.kp.address or 0
        if rp.entry_handler is not None and ask(self._machine, entry, rp.entry_handler, instance, regs):
            rp.declined += 1
        elif not rp.registered:  # it has unregistered its own probe
            rp.ends[End.UNREGISTERED] += 1
        elif self._catch(instance, regs.cpu.cpl):
            instance.live = True
            rp.live += 1
            self._live.setdefault(task, []).append(instance)
        else:
            rp.nmissed += 1

    def _miss(self, rp: Kretprobe) -> None:
        """An entry that has no return, and the probe says so."""
        rp.nmissed += 1
        if _NO_ADDRESS not in rp.notes:
            rp.notes += (_NO_ADDRESS,)

    def _catch(self, instance: ReturnInstance, cpl: int) -> bool:
        """See to it that the return is noticed; False where there is no way."""
        # Ring 3 cannot execute the window, and a kernel that still sets up its page tables finds our entry in them.
        if not instance.rp.shadow and cpl != 3 and self._kprobes.settled:
            try:
                trampoline = self._trampoline_address()
                instance.word = self._machine.words.substitute(instance.slot, trampoline.to_bytes(self._word, "little"))
                return True
            except (ProbeError, MachineError):
                instance.word = None  # no window, or a stack word in two pages: the other way serves
        try:
            site = self._site(instance.ret_addr)
        except ProbeError:
            return False
        site.users += 1
        self._idle.pop(instance.ret_addr, None)
        return True

    def _leave(self, regs: Regs) -> None:
        """A handler behind `_enter` has left the function: by the return address, if it goes where that leads."""
        slot = self._stack_pointer(regs) - self._word
        for instance in (ri for stack in self._live.values() for ri in stack if ri.slot == slot):
            if instance.word is not None and regs.ip == instance.ret_addr:
                regs.ip = self._trampoline_address()
                return

    def _drop_stale(self, rp: Kretprobe, task: int, slot: int, ret_addr: int) -> None:
        """A call has come in at `slot`: what the task entered below it, or in its place, was left without a return."""
        for old in list(self._live.get(task, ())):
            if not self._tasks.same_stack(old.slot, slot) or old.slot > slot:
                continue
            if old.slot < slot or not self._shares_return(old, rp, ret_addr):
                self._end(old, End.SKIPPED)

    def _shares_return(self, old: ReturnInstance, rp: Kretprobe, ret_addr: int) -> bool:
        """Two entries with one return: several probes on a function, or a function left by a jump to the next.

        A substituted word says so itself, because a call would have written over it. Without one, a function that is
        entered a second time, or that the call before the return address names, has been called anew.
        """
        if old.word is not None:
            return self._machine.words.stands(old.word)
        if old.at == self._machine.clock.instructions:
            return True
        if old.ret_addr != ret_addr or old.rp.kp.address == rp.kp.address:
            return False
        target, entry = self._callers.target(ret_addr), rp.kp.address or 0
        return target is None or target & self._arch.convention.mask not in (entry, entry - ENDBR_SIZE)

    # ----------------------------------------------------------------------------------------------------- returns

    def _on_trampoline(self, kp: Kprobe, regs: Regs) -> bool:
        """trampoline_probe_handler(): run the handlers of one return, newest first, and go where it leads."""
        top = self._stack_pointer(regs) - self._word
        chain = self._returning(regs, top, lambda ri: ri.word is not None)
        if not chain:
            raise ProbeError(errno.EFAULT, f"the return trampoline was reached by no return, sp {top + self._word:#x}")
        word = chain[0].word
        assert word is not None  # as asked for
        target = int.from_bytes(word.guest, "little")
        regs.cpu.pc = target
        self._finish(chain, regs, target)
        regs.ip = target
        return True

    def _on_site(self, kp: Kprobe, regs: Regs) -> None:
        """A watched return address is about to run: by a return, or by whatever else leads there."""
        address = kp.address
        assert address is not None  # it is registered
        top = self._stack_pointer(regs) - self._word
        chain = self._returning(regs, top, lambda ri: ri.word is None and ri.ret_addr == address)
        if chain and not self._is_return(chain[0].rp, top - chain[0].slot):
            for instance in chain:
                self._end(instance, End.SKIPPED)
            chain = []
        if chain:
            kept = regs.ip
            self._finish(chain, regs, address)
            regs.ip = kept
            return
        if address in self._idle:
            self._drop_site(address)

    def _returning(self, regs: Regs, top: int, wanted: Callable[[ReturnInstance], bool]) -> list[ReturnInstance]:
        """Those whose call returns with the stack word `top`, newest first; what was called inside it is skipped."""
        try:
            task = self._tasks.identify(regs.cpu, top)
        except MemoryFault:
            task = -1
        same = self._tasks.same_stack
        over = [ri for ri in self._live.get(task, ()) if ri.slot <= top and same(ri.slot, top)]
        chosen = [ri for ri in over if wanted(ri)]
        if not chosen and regs.cpu.cpl != 3:
            # A context switch returns in another task than it was entered in; kernel stacks are one task's alone.
            chosen = [ri for stack in self._live.values() for ri in stack if ri.slot == top and wanted(ri)]
        slot = max((ri.slot for ri in chosen), default=-1)
        for instance in over:
            if instance.slot < slot:
                self._end(instance, End.SKIPPED)
        return [ri for ri in reversed(chosen) if ri.slot == slot]

    def _finish(self, chain: Iterable[ReturnInstance], regs: Regs, target: int) -> None:
        for instance in chain:
            if not instance.live:
                continue  # a handler before it has unregistered its probe
            self._end(instance, End.RETURNED)
            instance.ret_addr = target
            regs.ip = target
            if instance.rp.handler is not None:
                ask(self._machine, target, instance.rp.handler, instance, regs)

    def _end(self, instance: ReturnInstance, end: End) -> None:
        """The instance goes back to its pool, and its stack word or site to the guest."""
        stack = self._live[instance.task]
        stack.remove(instance)
        if not stack:
            del self._live[instance.task]
        instance.live = False
        instance.rp.live -= 1
        instance.rp.ends[end] += 1
        if instance.word is not None:
            self._machine.words.release(instance.word)
            return
        site = self._sites[instance.ret_addr]
        site.users -= 1
        if site.users:
            return
        self._idle[instance.ret_addr] = None
        if self._kprobes.back_end(site.probe) is BackEnd.HOOK:
            self._drop_site(instance.ret_addr)  # it slows the whole engine, which an int3 does not
        elif len(self._idle) > MAX_IDLE_SITES:
            self._drop_site(next(iter(self._idle)))

    def _is_return(self, rp: Kretprobe, popped: int) -> bool:
        """`popped` bytes of arguments went with the return address: some `ret imm16` of the function does that."""
        if popped == 0:
            return True
        start = rp.kp.address or 0
        if start not in self._pops:
            self._pops[start] = self._find_pops(start)
        known = self._pops[start]
        return known is None or popped in known

    def _find_pops(self, start: int) -> frozenset[int] | None:
        """The operands of every `ret imm16` of a function; None where its extent is not known."""
        found = self._machine.symbols.find(start)
        if found is None or not found[0].size:
            return None
        try:
            code = self._machine.memory.read(start, found[0].size - found[1])
        except MemoryFault:
            return None
        rets = (code[at:end] for at, end in spans(code, self._arch.convention.bits) if end - at >= 3)
        return frozenset(int.from_bytes(ret[-2:], "little") for ret in rets if ret[-3] == 0xC2 and len(ret) <= 4)

    # ------------------------------------------------------------------------------------- what is armed for returns

    def _trampoline_address(self) -> int:
        """The trampoline, with its kprobe on it. It has an address only once the guest has page tables to map it."""
        address = self._arch.gate(_TRAMPOLINE)
        if self._trampoline is None or self._trampoline.address != address:
            if self._trampoline is not None:
                self._kprobes.unregister(self._trampoline)
            self._trampoline = Kprobe(addr=address, pre_handler=self._on_trampoline, arm="int3")
            self._kprobes.register(self._trampoline)
        return address

    def _site(self, address: int) -> _Site:
        site = self._sites.get(address)
        if site is not None and site.probe.gone and not site.users:
            self._drop_site(address)  # the guest has freed the code there, and has other code there now
            site = None
        if site is None:
            site = _Site(Kprobe(addr=address, pre_handler=self._on_site))
            site.probe.first = True
            self._kprobes.register(site.probe, check_boundary=False)
            self._sites[address] = site
        return site

    def _drop_site(self, address: int) -> None:
        self._idle.pop(address, None)
        self._kprobes.unregister(self._sites.pop(address).probe)

    def _forget_sites(self) -> None:
        for address in list(self._sites):
            self._drop_site(address)

    def _forget(self) -> None:
        """The machine is at another moment: its stacks know nothing of our calls."""
        for instance in [ri for stack in self._live.values() for ri in stack]:
            self._end(instance, End.RESTORED)
        self._forget_sites()
        self._doomed.clear()
        self._pops.clear()

    # ------------------------------------------------------------------------------------------------ tasks that end

    def _watch_exits(self) -> None:
        self._exit = self._watch_first(self._tasks.exits, self._on_exit)

    def _unwatch_exits(self) -> None:
        for probe in (self._exit, self._switch):
            if probe is not None:
                self._kprobes.unregister(probe)
        self._exit = self._switch = None
        self._doomed.clear()

    def _watch_first(self, names: Iterable[str], call: Callable[[Kprobe, Regs], None]) -> Kprobe | None:
        """A kprobe on the first function of `names` that there is and that can be probed."""
        for name in names:
            if not self._machine.symbols.lookup(name):
                continue
            probe = Kprobe(symbol=name, pre_handler=call)
            try:
                self._kprobes.register(probe)
            except ProbeError:
                continue
            return probe
        return None

    def _on_exit(self, kp: Kprobe, regs: Regs) -> None:
        """The current task will not come back from here; what it calls on its way out is still followed."""
        try:
            self._doomed.add(self._tasks.identify(regs.cpu, self._stack_pointer(regs)))
        except MemoryFault:
            return
        if self._switch is None:
            self._switch = self._watch_first(self._tasks.switches, self._on_switch)
        if self._switch is None:
            self._bury()

    def _on_switch(self, kp: Kprobe, regs: Regs) -> None:
        """kprobe_flush_task(): the doomed task has given the processor away."""
        self._bury()
        self._kprobes.unregister(kp)
        self._switch = None

    def _bury(self) -> None:
        for task in self._doomed:
            for instance in list(self._live.get(task, ())):
                self._end(instance, End.DIED)
        self._buried = self._machine.clock.instructions, frozenset(self._doomed)
        self._doomed.clear()

    def _stack_pointer(self, regs: Regs) -> int:
        return (regs.cpu.segment_base("ss") + regs.sp) & self._arch.convention.mask
