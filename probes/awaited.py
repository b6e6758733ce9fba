"""Records that wait for a page: `:ustring!`, a string of a program whose page is not in memory at the hit.

Rules: the machine's thread, inside hits. A record waits until the page is there, the program has mapped something else
in its place, its thread ends or it becomes another program; then it is what it would have been, in its place in time,
behind those that did not wait. The page comes in the kernel's own good time: nothing is read for it, and nothing but
silent probes on the kernel's page-fault handler, while a record waits, looks for it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from emu.iface import Machine
from probes import rawtext
from probes.errors import ProbeError
from probes.hit import Hit
from probes.kprobe import Kprobe
from probes.kretprobe import Kretprobe, ReturnInstance
from probes.programs import Ended, Event, Exited, NotPresent, Programs, Unmapped, absent_text
from probes.regs import PATH_MAX, Regs

MAX_WAITING: Final = 1024
"""Records; further ones are made at once, as they are."""
_FAULT: Final = "handle_mm_fault"  # mm/memory.c: every page that a fault brings is there when it returns
_PAGE: Final = 4096


class Recorder(Protocol):
    """An event."""

    def record(self, hit: Hit) -> None: ...


@dataclass(frozen=True, slots=True)
class _Waiting:
    """`missing`: the arguments, by their numbers, and where their strings begin."""

    event: Recorder
    hit: Hit
    space: int
    thread: int
    missing: tuple[tuple[int, int], ...]


class Awaited:
    """The waiting records of one machine. `register(probe, ours=True)` and `unregister` are the registry's."""

    def __init__(
        self,
        machine: Machine,
        programs: Callable[[], Programs],
        register: Callable[..., None],
        unregister: Callable[[Kretprobe], None],
    ) -> None:
        self._machine = machine
        self._programs = programs
        self._register = register
        self._unregister = unregister
        self._waiting: list[_Waiting] = []
        self._end: Callable[[], None] | None = None
        self._returns = Kretprobe(kp=Kprobe(symbol=_FAULT), handler=self._on_return, shadow=True)

    def text(self, address: int) -> str | None:
        """For FetchContext.awaited: a string of the running program that could not be read."""
        return absent_text(self._programs(), address)

    def check(self) -> None:
        """ProbeError where nobody knows this guest's programs, or its kernel tells of no page."""
        self._programs()
        if not self._machine.symbols.lookup(_FAULT):
            raise ProbeError(errno.EOPNOTSUPP, f"ustring! needs the kernel's {_FAULT}")

    def defer(self, hit: Hit, event: Recorder) -> bool:
        """Keep a hit for later if one of its strings is not present; False where it can be recorded now."""
        missing = tuple((at, value.address) for at, value in enumerate(hit.values) if isinstance(value, NotPresent))
        if not missing or len(self._waiting) >= MAX_WAITING:
            return False
        hit.keep()
        programs, cpu = self._programs(), hit.regs.cpu
        self._waiting.append(_Waiting(event, hit, programs.space(cpu), programs.thread(cpu), missing))
        if self._end is None:
            self._register(self._returns, ours=True)
            self._end = programs.watch(self._tell)
        return True

    def give_up(self, event: Recorder) -> None:
        """The event is about to go: its records are made as they are."""
        self._finish(lambda one: one.event is event)

    def _on_return(self, ri: ReturnInstance, regs: Regs) -> None:
        now, space = self._machine.clock.instructions, self._programs().space(regs.cpu)
        # The machine may have gone back to before a hit: that one has not been.
        left = [one for one in self._waiting if one.hit.instructions <= now]
        done = [one for one in left if one.space == space and self._complete(one)]
        self._waiting = [one for one in left if one not in done]
        for one in done:
            one.event.record(one.hit)
        self._rest()

    def _complete(self, one: _Waiting) -> bool:
        """Put the strings into the hit's values; False where one is not wholly there yet."""
        values = list(one.hit.values)
        for at, address in one.missing:
            text = self._read(one.space, address)
            if text is None:
                return False
            values[at] = text
        one.hit.values = tuple(values)
        return True

    def _read(self, space: int, address: int) -> str | None:
        found = bytearray()
        while len(found) < PATH_MAX - 1 and b"\0" not in found:
            paddr = self._programs().physical(space, address + len(found))
            if paddr is None:
                return None
            found += self._machine.memory.read_physical(paddr, _PAGE - paddr % _PAGE)
        return rawtext.decode(bytes(found[: PATH_MAX - 1]).partition(b"\0")[0])

    def _tell(self, event: Event) -> None:
        """From `Programs`, as it happens."""
        match event:
            case Ended(space):
                self._finish(lambda one: one.space == space)
            case Exited(thread):
                self._finish(lambda one: one.thread == thread)
            case Unmapped(space, start, end, kept):

                def is_of(one: _Waiting) -> bool:
                    return one.space == space and any(start <= address < end for _, address in one.missing)

                if any(is_of(one) for one in self._waiting) and not kept():
                    self._finish(is_of)
            case _:
                pass  # what is mapped or forked is nobody's page yet

    def _finish(self, which: Callable[[_Waiting], bool]) -> None:
        """Their pages will not come any more."""
        done = [one for one in self._waiting if which(one)]
        self._waiting = [one for one in self._waiting if one not in done]
        for one in done:
            one.event.record(one.hit)
        self._rest()

    def _rest(self) -> None:
        if not self._waiting and self._end is not None:
            self._end()
            self._end = None
            self._unregister(self._returns)
