"""A probe as its user writes it: where, and what is called there.

Rules: data; no machine. `core` registers it, its clients bring handlers of their own.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias, TypeVar

from probes.errors import ProbeError
from probes.regs import Regs

_Probe = TypeVar("_Probe")

PreHandler: TypeAlias = Callable[["Kprobe", Regs], object]
PostHandler: TypeAlias = Callable[["Kprobe", Regs], object]
FaultHandler: TypeAlias = Callable[["Kprobe", Regs, int], object]
Arm: TypeAlias = Literal["auto", "int3", "hook"]


class Kprobe:
    """One probe: where, and what is called there.

    Give `symbol` (and `offset`) or `addr`; ProbeError EINVAL for neither or both. `pre_handler(p, regs)` runs before
    the instruction; true means it has set the registers and the instruction is skipped. `post_handler(p, regs)` runs
    after it. `fault_handler(p, regs, vector)` runs when the instruction faults, or guest code that a handler of the
    probe calls; true means the guest need not know, and goes on at `regs.ip`. `arm` picks the back end.

    After registration `address` is the probed address, `hits` and `nmissed` count, `notes` say what Linux would have
    done otherwise.
    """

    def __init__(
        self,
        *,
        symbol: str | None = None,
        offset: int = 0,
        addr: int | None = None,
        pre_handler: PreHandler | None = None,
        post_handler: PostHandler | None = None,
        fault_handler: FaultHandler | None = None,
        disabled: bool = False,
        arm: Arm = "auto",
    ) -> None:
        self.symbol = symbol
        self.offset = offset
        self.addr = addr
        self.pre_handler = pre_handler
        self.post_handler = post_handler
        self.fault_handler = fault_handler
        self.disabled = disabled
        self.arm: Arm = arm
        self.last = False  # a client's: its pre-handler runs after all others, and an address takes one such probe
        self.first = False  # a client's: its pre-handler runs before all others, which so cannot skip it
        self.on_skip: PreHandler | None = None  # a client's: a later handler has set where the guest goes, at `regs`
        self.address: int | None = None
        self.gone = False  # the guest has freed the code
        self.waits = False  # a client's: the module in `symbol` ("MODULE:NAME") is not loaded; armed when it is
        self.waiting = False  # for that
        self.hits = 0
        self.nmissed = 0
        self.notes: tuple[str, ...] = ()
        self.check_place()

    def check_place(self) -> None:
        """ProbeError EINVAL unless it has one place."""
        if (self.addr is None) == (self.symbol is None):
            raise ProbeError(errno.EINVAL, "a probe takes a symbol or an address, and only one of them")

    @property
    def registered(self) -> bool:
        return self.waiting or self.address is not None

    def __repr__(self) -> str:
        where = (
            f"{self.addr:#x}" if self.symbol is None and self.addr is not None else f"{self.symbol}+{self.offset:#x}"
        )
        return f"<Kprobe {where} hits={self.hits} nmissed={self.nmissed}>"


def register_together(
    probes: Iterable[_Probe], register: Callable[[_Probe], None], unregister: Callable[[_Probe], None]
) -> None:
    """All or nothing, as register_kprobes(); ProbeError EINVAL for none at all."""
    wanted = list(probes)
    if not wanted:
        raise ProbeError(errno.EINVAL, "no probes to register")
    done: list[_Probe] = []
    try:
        for probe in wanted:
            register(probe)
            done.append(probe)
    except ProbeError:
        for probe in reversed(done):
            unregister(probe)
        raise
