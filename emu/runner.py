"""The trio side of the machine: the one thread that may touch it, and who may say when it runs.

Rules: trio lives here; everything public belongs to the trio thread. Work for the machine is a queue that one worker
thread takes in order. The guest's run is itself such a piece of work, one that ends early when somebody calls
`Machine.request_stop`: so whoever wants to look at a running machine queues up behind the run, asks it to stop, and the
guest goes on right after. Nothing else ever touches the machine, hence no locks. The trio thread may do so itself while
the machine's thread has nothing to do (`is_idle`): only it gives out work, so that stays so meanwhile.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, Generic, ParamSpec, TypeAlias, TypeVar

import trio

from emu.iface import Machine
from emu.stops import Budget, ConsoleMatch, GuestExit, Interrupted, PowerOff, Reset, Stop

Args = ParamSpec("Args")
Result = TypeVar("Result")

ENDINGS: Final = (PowerOff, Reset, GuestExit, ConsoleMatch, Budget)
"""Stops after which the program has no guest to go on with: `wait_stop` has them even if a debugger had them first."""

_ASK_AGAIN: Final = 0.05  # seconds between requests to a run that must end; one is enough unless it was just beginning
_KEPT_STOPS: Final = 16  # for a `wait_stop` that nobody is waiting in
_BLINK: Final = 0.001
"""Seconds that trio's thread waits for a piece of work itself before it does something else meanwhile. Most take 10 us;
a switch of threads then costs 24 us, and one by way of trio's loop 75 us: that is the difference in steps a second."""


class _Work(Generic[Result]):
    """One piece of work for the machine's thread, and what became of it."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self._claim = threading.Lock()
        self._done = threading.Lock()
        self._done.acquire()
        self._wake: Callable[[], object] | None = None
        self._result: Result
        self._error: BaseException | None = None
        self.over = False
        """The machine's thread is not in there any more, nor will be."""

    def claim(self) -> bool:
        """True for the first who asks: the machine's thread before it begins, or a canceller."""
        return self._claim.acquire(blocking=False)

    def perform(self) -> None:
        """The machine's thread: do it, and tell."""
        try:
            self._result = self._function()
        except BaseException as error:  # noqa: BLE001  it is raised again in the task that awaits the work
            self._error = error
        self.over = True
        self._done.release()
        if self._wake is not None:
            self._wake()

    def wait(self, seconds: float) -> bool:
        """Whether it is done within so long; True once only. 0 just looks."""
        return self._done.acquire(timeout=seconds) if seconds else self._done.acquire(blocking=False)

    def call_when_done(self, wake: Callable[[], object]) -> None:
        """`wake` is called in the machine's thread, or here and now if the work is done; perhaps in both."""
        self._wake = wake
        if self.wait(0):
            wake()

    def result(self) -> Result:
        """What the function returned or raised."""
        if self._error is not None:
            raise self._error
        return self._result


_Queue: TypeAlias = "queue.SimpleQueue[_Work[object] | None]"


class Runner:
    """Runs `machine`; made by `open_runner`, which also ends it.

    The guest runs freely while nobody holds it: `pause` and `resume` nest. `call` looks in between at any time. A stop
    of the free run goes to `wait_stop`, and the guest then stands still until a hold is taken and given back.
    """

    def __init__(self, machine: Machine, *, holds: int = 0) -> None:
        self.machine = machine
        self._queue: _Queue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._take_work, name="machine")
        self._holds = holds
        self._at_stop = False  # the free run ended by itself
        self._at_end = False  # a debugger's run ended with one of ENDINGS
        self._untold_end: Stop | None = None  # ... which `wait_stop` is not told of before the hold is given back
        self._gate = trio.lowlevel.ParkingLot()  # where the free run waits for the two above
        self._running = False  # a run is queued or in progress
        self._last: _Work[Any] | None = None
        self._break_requested = False
        self._stop_sender, self._stop_receiver = trio.open_memory_channel[Stop](_KEPT_STOPS)

    # ------------------------------------------------------------------------------------------------- for everybody

    async def call(self, function: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs) -> Result:
        """`function(*args)` in the machine's thread, between two instructions of the guest, which then goes on.

        Raises what it raises. Cancelled before it began, it never runs; once begun it is waited for (a run of the guest
        inside it is asked to end).
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        work = self._submit(lambda: function(*args, **kwargs))
        if self._running:
            self.machine.request_stop()
        elif work.wait(_BLINK):
            return work.result()
        return await self._wait(work)

    def is_idle(self) -> bool:
        """Somebody holds the machine, and its thread has nothing to do: then `at_once` is possible."""
        return self._holds > 0 and not self._running and (self._last is None or self._last.over)

    async def pause(self) -> None:
        """End the free run and hold the guest until `resume` has been called as often. Cancelled, it holds nothing.

        It does not hold up an `advance`: that is the debugger's own run.
        """
        self._holds += 1
        try:
            await self.call(int)  # does nothing, but behind the run
        except trio.Cancelled:
            self.resume()
            raise

    def resume(self) -> None:
        """Give back one hold; with the last one the guest runs on, also from a stop of the free run.

        Not from one of ENDINGS that a debugger's run came to. RuntimeError without a hold.
        """
        if not self._holds:
            raise RuntimeError("resume without pause")
        self._holds -= 1
        self._at_stop = False
        if self._untold_end is not None:
            self._report(self._untold_end)
            self._untold_end = None
        self._gate.unpark_all()

    async def wait_stop(self) -> Stop:
        """The next stop of the free run, or of a debugger's run if it is one of ENDINGS. Cancelled, it loses none."""
        return await self._stop_receiver.receive()

    # -------------------------------------------------------------------------------------- for who holds the machine

    async def advance(
        self, function: Callable[[], Stop], tell: Callable[[Stop], Result], *, final: bool = True
    ) -> Result:
        """Let `function`, which runs or steps the machine, have it until a stop of its own; what `tell` makes of it.

        Both in the machine's thread; one `advance` at a time. `function` is called again where a `call` of somebody
        else ended it: Interrupted comes from `interrupt` alone. Cancelled, the guest is stopped first. RuntimeError
        unless the caller holds the machine (`pause`). Not `final`: after one of ENDINGS the caller may have the machine
        begin again (`begin_again`), so `wait_stop` has it only with the hold given back.
        """
        if not self._holds:
            raise RuntimeError("advance without pause")
        told: list[Result] = []

        def run() -> Stop:
            stop = function()
            if not isinstance(stop, Interrupted) or self._break_requested:
                told.append(tell(stop))
            return stop

        try:
            while not told:
                stop = await self._run(run)
        finally:
            self._break_requested = False
        self._note_end(stop, final)
        return told[0]

    def advance_at_once(
        self, function: Callable[[], Stop | None], tell: Callable[[Stop], Result], *, final: bool = True
    ) -> Result | None:
        """As `advance`, in this thread, for what takes no longer than a blink: two switches of threads take as long as
        a step. None where `advance` must go on: `function` returned None, being not done, or somebody has asked the
        machine to stop.

        RuntimeError unless `is_idle`.
        """
        if not self.is_idle():
            raise RuntimeError("advance_at_once while the machine's thread is busy")
        stop = function()
        if stop is None or (isinstance(stop, Interrupted) and not self._break_requested):
            return None
        self._break_requested = False
        told = tell(stop)
        self._note_end(stop, final)
        return told

    def _note_end(self, stop: Stop, final: bool) -> None:
        self._at_end = isinstance(stop, ENDINGS)
        if self._at_end and final:
            self._report(stop)
        elif self._at_end:
            self._untold_end = stop

    def begin_again(self) -> None:
        """Whoever holds the machine has taken it back to where it began: it is at no end any more."""
        self._at_end, self._untold_end = False, None

    def interrupt(self) -> None:
        """Ctrl-C: the `advance` that is under way, or is about to begin, returns Interrupted."""
        self._break_requested = True
        self.machine.request_stop()

    # ------------------------------------------------------------------------------------------------------ internals

    async def run_freely(self) -> None:
        """Run the guest whenever nobody holds it; never returns. `open_runner` has it running already."""
        while True:
            while self._holds or self._at_stop or self._at_end:
                await self._gate.park()
            stop = await self._run(self.machine.run, blink=0)
            if not isinstance(stop, Interrupted):
                self._at_stop = True
                self._report(stop)

    async def _run(self, function: Callable[[], Stop], blink: float = _BLINK) -> Stop:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._running = True
        try:
            work = self._submit(function)
            return work.result() if work.wait(blink) else await self._wait(work)
        finally:
            self._running = False

    def _report(self, stop: Stop) -> None:
        with contextlib.suppress(trio.WouldBlock):  # nobody waits; the first stops say enough
            self._stop_sender.send_nowait(stop)

    def _submit(self, function: Callable[[], Result]) -> _Work[Result]:
        work = self._last = _Work(function)
        self._queue.put(work)
        return work

    async def _wait(self, work: _Work[Result]) -> Result:
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()
        work.call_when_done(lambda: token.run_sync_soon(done.set))
        try:
            await done.wait()
        except trio.Cancelled:
            if work.claim():
                work.over = True
            else:
                await self._see_end(done)
            raise
        return work.result()

    async def _see_end(self, done: trio.Event) -> None:
        """Shielded: wait for work that has begun, asking the guest to stop if it is in there."""
        with trio.CancelScope(shield=True):
            while not done.is_set():
                self.machine.request_stop()
                with trio.move_on_after(_ASK_AGAIN):
                    await done.wait()

    def _take_work(self) -> None:
        """The machine's thread."""
        while (work := self._queue.get()) is not None:
            if work.claim():
                work.perform()

    def start(self) -> None:
        """Start the machine's thread. `open_runner` has done so already."""
        self._thread.start()

    async def close(self) -> None:
        """End the machine's thread, shielded; `open_runner` calls it on leaving."""
        self._queue.put(None)
        with trio.CancelScope(shield=True):
            while self._thread.is_alive():
                self.machine.request_stop()  # for a run that a KeyboardInterrupt left there
                await trio.to_thread.run_sync(self._thread.join, _ASK_AGAIN)


@contextlib.asynccontextmanager
async def open_runner(machine: Machine, *, paused: bool = False) -> AsyncIterator[Runner]:
    """A Runner whose guest runs from now on; with `paused` it begins with one hold, for `resume` to give back.

    On leaving, also by cancellation or KeyboardInterrupt, the guest is stopped and the machine's thread has ended. What
    leaves the block, or the machine's `run`, as an exception arrives in an exception group (it holds a nursery).
    """
    runner = Runner(machine, holds=int(paused))
    runner.start()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runner.run_freely)
            yield runner
            nursery.cancel_scope.cancel()
    finally:
        await runner.close()
