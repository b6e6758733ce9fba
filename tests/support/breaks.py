"""A client of breaks in translated code and of planted int3s, and what the tests of both do with a tiny guest.

Rules: tests only.
"""

from __future__ import annotations

from collections.abc import Callable

from emu.iface import Cpu
from emu.stops import Stop
from tests.support.tiny import CODE, Tiny, assemble


class Client:
    """Counts what it is told; `act` may change the processor or stop the machine."""

    def __init__(self, act: Callable[[Cpu], Stop | None] = lambda cpu: None) -> None:
        self.hits: list[int] = []
        self.asked = 0  # how often `stands` was
        self.here = True
        self.act = act

    def stands(self, vaddr: int) -> bool:
        self.asked += 1
        return self.here

    def on_code_break(self, cpu: Cpu, vaddr: int) -> Stop | None:
        assert cpu.pc == vaddr
        self.hits.append(vaddr)
        return self.act(cpu)


def armed(guest: Tiny, *places: int, act: Callable[[Cpu], Stop | None] = lambda cpu: None) -> Client:
    """Breaks at the virtual addresses `places`."""
    client = Client(act)
    guest.machine.breaks.client = client
    for place in places:
        guest.machine.breaks.arm(place)
    return client


def planted(guest: Tiny, *paddrs: int) -> Client:
    """Int3s at the physical addresses `paddrs`."""
    client = Client()
    client.here = False  # nothing is armed by virtual address
    guest.machine.breaks.client = client
    for paddr in paddrs:
        guest.machine.planted.plant(paddr)
    return client


def after(source: str, bits: int) -> int:
    """The address behind the code of `source`."""
    return CODE + len(assemble(source, bits, CODE))


def go_back(guest: Tiny) -> None:
    """From the HLT of a fault's handler to where the fault was."""
    cpu, at = guest.machine.cpu, CODE + 0x800
    guest.machine.ram.write(at, b"\x48\xcf" if guest.bits == 64 else b"\xcf")  # iret
    cpu.gpr[4] = guest.stack + guest.word  # the error code
    cpu.pc = at
    guest.machine.halted = False
