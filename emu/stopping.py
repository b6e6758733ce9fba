"""What ends a run: reasons found inside it, requests from outside, and the moment a replay stops at.

Rules: a part of `running.RunLoop`. A reason that the machine finds (`_stop`) ends the run before the next instruction,
one asked for (`request_stop`, `end_run`, `stop_at`) where none is being stepped out of line. The first one wins.
"""

from __future__ import annotations

from emu.clock import Clock
from emu.cpustate import CpuState
from emu.engine import Engine
from emu.pace import Pacer
from emu.stops import Defect, Interrupted, Stop


class Stopping:
    """The parts are the loop's. All but `request_stop` belongs to the machine's thread."""

    engine: Engine
    cpu: CpuState
    clock: Clock

    def __init__(self) -> None:
        self.pacer: Pacer | None = None
        self.stop_at: tuple[int, int] | None = None  # instruction count and virtual time of a stop to come, for replays
        self._stop: Stop | None = None
        self._stop_requested = False
        self._requested: Stop | None = None  # what the request says; None: Interrupted

    def request_stop(self) -> None:
        """From any thread: the run in progress, or the next one, ends with Interrupted."""
        self._stop_requested = True
        if self.pacer is not None:
            self.pacer.wake()

    def end_run(self, stop: Stop) -> None:
        """Inside a trap handler: the run ends with `stop` as soon as the instruction under way is over."""
        if not self._stop_requested:
            self._stop_requested, self._requested = True, stop
        if self.cpu.running:
            self.engine.stop_here()

    def cancel_stop(self) -> None:
        """Take back a `request_stop` that found the machine stopped already."""
        self._stop_requested, self._requested = False, None

    def _shall_stop(self) -> bool:
        """Somebody asked, or the moment of `stop_at` has come."""
        if self.stop_at is not None and (self.clock.instructions, self.clock.now_ns) >= self.stop_at:
            self.stop_at, self._stop_requested = None, True
        return self._stop_requested

    def _stop_as_requested(self) -> Stop:
        stop = self._requested or Interrupted(self.cpu.linear_pc)
        self.cancel_stop()
        return stop

    def _stop_for(self, stop: Stop) -> None:
        """End the run before the next instruction."""
        if self._stop is None:
            self._stop = stop
        if self.cpu.running:
            self.engine.stop_here()

    def _report_failure(self) -> None:
        """An error that a hook of the engine has raised."""
        error, self.engine.failure = self.engine.failure, None
        if isinstance(error, KeyboardInterrupt):
            raise error
        self._stop = Defect(self.cpu.linear_pc, self.engine.failure_text)
