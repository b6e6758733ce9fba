"""A uprobe: one probe on a file of the guest's, and the byte of the file that it stands on.

Rules: data, for the machine's thread; what it does is in `uprobes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from probes.planting import UserArm
from probes.programs import FileId
from probes.regs import Regs
from probes.uretprobe import End, Ends, UserReturn

Handler: TypeAlias = Callable[["Uprobe", Regs], object]
RetHandler: TypeAlias = Callable[[UserReturn, Regs], object]
Filter: TypeAlias = Callable[["Uprobe", Regs], object]

_UNDEFINED: Final = "AVX, which the guest's processor does not have: the instruction faults there (#UD)"


class Uprobe:
    """One probe on the file at `path` (absolute, as the guest has it), at a byte offset or at a function's name.

    `handler(up, regs)` runs before the instruction; it may set registers, and where it sets `regs.ip` (the probed
    address, until then) the guest goes on there. `ret_handler(instance, regs)` runs when a function that was entered
    there has returned, see `uretprobe`. `filter(up, regs)`: false means this hit is nobody's business; it is not
    counted. `offset` is in bytes from the symbol, or from the file's start. `ref_ctr_offset` is that of a counter in
    the file, which programs see one higher while the probe is there (see `refctr`); 0 for none. `arm` is how: in
    translated code ("auto", "hook"), by int3s in pages ("int3"), or in pages of the page cache as they are read
    ("aops"); see `planting`.

    After registration `hits` counts, `place` is where the last hit was, `ends` says what became of the calls that are
    followed, and `notes` tell what a user should know, as that nothing is known of the file yet.
    """

    def __init__(
        self,
        path: str,
        place: int | str,
        handler: Handler | None = None,
        ret_handler: RetHandler | None = None,
        filter: Filter | None = None,
        *,
        offset: int = 0,
        ref_ctr_offset: int = 0,
        disabled: bool = False,
        arm: UserArm = "auto",
    ) -> None:
        self.path = path
        self.arm: UserArm = arm
        self.symbol = place if isinstance(place, str) else None
        self.offset = offset if isinstance(place, str) else place + offset
        self.handler = handler
        self.ret_handler = ret_handler
        self.filter = filter
        self.ref_ctr_offset = ref_ctr_offset
        self.disabled = disabled
        self.registered = False
        self.hits = 0
        self.ends = Ends()
        self.places: list[Place] = []  # where it stands; more than one only where the path has led to several files
        self.place: Place | None = None  # ... of them that of the last hit, also for its handler and filter
        self.trouble: str | None = None  # why a file that has come later is not armed as was asked
        self.undefined = False  # the instruction is known, and the guest's processor has none like it

    @property
    def notes(self) -> tuple[str, ...]:
        if self.registered and not self.places:
            missing = "" if self.symbol is None else f", or no {self.symbol} in what is in memory of it"
            return (f"waiting: the guest's kernel has no file {self.path} in its cache of names{missing}",)
        trouble = () if self.trouble is None else (f"armed in translated code: {self.trouble}",)
        return (*trouble, _UNDEFINED) if self.registered and self.undefined else trouble

    def __repr__(self) -> str:
        where = f"{self.offset:#x}" if self.symbol is None else f"{self.symbol}+{self.offset:#x}"
        return f"<Uprobe {self.path}:{where} hits={self.hits}>"


@dataclass(slots=True, eq=False)
class Place:
    """A probed byte of a file and its probes, newest first.

    `program` is what the file was when this was made, see `FileSymbols.program`.
    """

    file: FileId
    offset: int
    program: bytes | None = None
    probes: list[Uprobe] = field(default_factory=list)
    reference: int = 0  # offset of the counter that is held up for it; 0: none
    arm: UserArm = "auto"
    leaves: End | None = None  # a function by which programs leave others, for return probes to know
    repeats: bool | None = None  # a string instruction under rep; None until it was looked at

    @property
    def active(self) -> list[Uprobe]:
        return [probe for probe in self.probes if not probe.disabled]

    @property
    def armed(self) -> bool:
        return self.leaves is not None or any(not probe.disabled for probe in self.probes)
