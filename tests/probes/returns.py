"""The embedded guest with return probes on it: one run, and what became of every entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emu.stops import GuestExit, Stop
from probes import Kprobe, Kretprobe, Manager
from probes.kprobe import Arm
from probes.kretprobe import End
from tests.support.embedded import Guest, power_on

ENOUGH = 60_000_000
STEP = 200
"""Instructions between two looks, where a test waits for a state."""


@dataclass(frozen=True)
class Way:
    """A word size and how returns are caught."""

    bits: int
    shadow: bool

    def __str__(self) -> str:
        return f"{self.bits}-{'shadow' if self.shadow else 'trampoline'}"


WAYS = [Way(bits, shadow) for bits in (64, 32) for shadow in (False, True)]


class Returns:
    """A machine with the embedded guest at its start_kernel, paging on, about to carry out `append`, then `exit=0`."""

    def __init__(self, way: Way, append: str) -> None:
        self.way = way
        self.machine = power_on(way.bits, f"{append} exit=0")
        self.guest = Guest(self.machine, way.bits)
        self.breakpoint(self.guest.address("start_kernel"))
        self.manager = Manager(self.machine)

    def probe(
        self,
        symbol: str,
        handler: Callable[..., object] | None = None,
        entry_handler: Callable[..., object] | None = None,
        *,
        maxactive: int = 50,
        data_size: int = 0,
        arm: Arm = "int3",
    ) -> Kretprobe:
        """A registered return probe on `symbol`."""
        rp = Kretprobe(
            kp=Kprobe(symbol=symbol, arm=arm),
            handler=handler,
            entry_handler=entry_handler,
            maxactive=maxactive,
            data_size=data_size,
            shadow=self.way.shadow,
        )
        self.manager.register(rp)
        return rp

    def run(self) -> None:
        assert self.machine.run(ENOUGH) == GuestExit(0)

    def run_until(self, reached: Callable[[], bool]) -> None:
        """In small pieces; the guest's end before that is a failure."""
        while not reached():
            stop: Stop = self.machine.run(STEP)
            assert not isinstance(stop, GuestExit), "the guest ended first"

    def breakpoint(self, address: int) -> None:
        """Run to `address`."""
        self.machine.insert_breakpoint(address)
        self.machine.run(ENOUGH)
        self.machine.remove_breakpoint(address)
        assert self.machine.cpu.pc == address

    def function_at(self, address: int) -> str:
        found = self.machine.symbols.find(address)
        return "?" if found is None else found[0].name

    def callers(self, ip: int, frame: int) -> list[str]:
        """Functions from `ip` outward by the chain of frame pointers that starts at `frame`, as a debugger walks it."""
        names, word = [self.function_at(ip)], self.way.bits // 8
        while frame:
            names.append(self.function_at(self.guest.word(frame + word)))
            frame = self.guest.word(frame)
        return names


def add_up(rps: Sequence[Kretprobe]) -> bool:
    """Every entry is accounted for."""
    return all(rp.entries == rp.live + rp.missed + rp.declined + sum(rp.ends.values()) for rp in rps)


__all__ = ["ENOUGH", "STEP", "WAYS", "End", "Returns", "Way", "add_up"]
