"""One run of a machine as a program: what `RunOptions` ask for, put together around the machine and carried out.

Rules: trio lives here. The machine is made by the caller; everything here hangs off one nursery, and the run ends with
the first stop that no debugger takes, or when the user says so. Whatever can be refused is refused before the guest
runs its first instruction.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from emu import iface, stops
from emu.boot import GuestMachine, expect_status
from emu.images.initramfs import exec_line
from emu.pace import WallPacer
from emu.runner import Runner, open_runner
from gdbstub.address import AddressError, Stdio, Tcp
from gdbstub.commands import LogTopic, RunOptions
from gdbstub.console import ConsoleError, Keyboard, serve_tcp
from gdbstub.outcome import Outcome, judge, summary
from gdbstub.outputs import Output, open_output, reader_is_gone
from gdbstub.recording import Event, Recorder, Start, event_line, start_line
from gdbstub.replay import Difference, Replay
from gdbstub.scripts import HostScripts, ScriptFolder
from gdbstub.servedir import ServedFolder, open_copy
from gdbstub.server import Server
from gdbstub.session import Session
from gdbstub.sessions import Sessions
from gdbstub.status import SUCCESS, USAGE, UsageError
from gdbstub.terminal import say, show_status
from gdbstub.threads import ThreadChoice
from gdbstub.tracefiles import TraceFolder
from probes.errors import ProbeError
from probes.export import Export, open_export
from probes.linux.threads import TaskThreads
from probes.manager import Manager
from probes.spec import is_uprobe

_STATUS_SECONDS = 0.5
_LONGEST_LOG_TEXT = 2000  # characters, so that a line is written in one piece; a packet may have 16 Ki


class Program:
    """Runs `machine` as `options` say, once. Made inside trio, for it is told things from the machine's thread.

    `start` makes such a machine anew, for debuggers who go back to where it began. UsageError where the folder of
    `sysroot` cannot be opened.
    """

    def __init__(self, machine: GuestMachine, options: RunOptions, start: Callable[[], GuestMachine]) -> None:
        self.machine = machine
        self._begin = start
        self.options = options
        copies = None if options.sysroot is None else partial(open_copy, _host_folder(options.sysroot))
        self.probes = Manager(machine, arm=options.arm, linux_limits=options.linux_limits, copies=copies)
        self._threads = ThreadChoice(TaskThreads(machine, lambda: self.probes.linux))
        self._ended = trio.Event()
        self._stop: stops.Stop | None = None  # what ended the run; None: the user
        self._outputs: list[Output] = []
        self._screen: Output | None = None  # standard output, where the console is there
        self._lost = False  # a file that was asked for could not be written to its end
        self._log: Callable[[LogTopic, str], None] | None = None
        self._record: Output | None = None
        self._recorder: Recorder | None = None
        self._scripts: HostScripts | None = None
        self._served: ServedFolder | None = None
        self._export: Export | None = None
        self._withdraw_send: Callable[[], None] = lambda: None  # what is awaited for the next of `sends`
        self._token = trio.lowlevel.current_trio_token()

    # -------------------------------------------------------------------------------------------------- preparing

    def prepare(self) -> None:
        """Everything that can be refused, before anything runs. UsageError."""
        machine, options = self.machine, self.options
        if options.budget is not None:
            machine.budget_end = machine.instructions + options.budget
        if options.pace == "real" or (options.pace is None and self._is_for_a_person()):
            machine.pacer = WallPacer(lambda: machine.clock.now_ns)
        _check_writable(options.snapshot)
        _check_writable(options.summary)
        self._prepare_script()
        self._prepare_outputs()
        self._prepare_objects()
        self._prepare_probes()
        try:
            self._threads.choose(options.threads)
        except (iface.MachineError, ProbeError) as error:
            raise UsageError(f"--threads {options.threads}: {error}") from error
        if options.serve_dir is not None:
            self._served = _host_folder(options.serve_dir)

    def _is_for_a_person(self) -> bool:
        """Somebody types, or nothing would ever end a guest that skips its idle time at full speed."""
        options = self.options
        return not options.has_goal or (options.console == "stdio" and os.isatty(0))

    def _prepare_script(self) -> None:
        options, console = self.options, self.machine.console
        self._send_next(list(options.sends))
        if options.until is not None:
            console.expect(options.until, lambda match: stops.ConsoleMatch(match.string))
        if options.execute is not None and options.restore is not None:
            expect_status(self.machine)  # `boot` has done so for a kernel that starts

    def _send_next(self, waiting: list[tuple[str, bytes]]) -> None:
        """Type the first of `waiting` when the console matches, and then go on with the others."""
        if not waiting:
            return
        (regex, text), later = waiting[0], waiting[1:]
        console = self.machine.console

        def matched(_match: object) -> None:
            withdraw()
            self.machine.devices.uart.receive(text)
            self._send_next(later)

        withdraw = self._withdraw_send = console.expect(regex, matched)
        line = console.text.rpartition("\n")[2].replace("\r", "")
        if len(waiting) == len(self.options.sends) and re.search(regex, line):
            matched(None)  # the prompt of a restored machine stands there already and is not printed again

    def _prepare_outputs(self) -> None:
        machine, options = self.machine, self.options
        if isinstance(options.console, Path):
            machine.console.sinks.append(self._open(options.console).write)
        elif options.console == "stdio":
            self._screen = self._open(None)
            machine.console.sinks.append(self._screen.write)
        if (target := options.trace) is not None:
            trace = self._open(target.path)
            try:
                self._export = open_export(target.format, trace.write)
            except ProbeError as error:
                raise UsageError(f"--trace: {error.reason}") from error
            self.probes.trace.subscribe(self._export.add)
        if options.log_rsp is not None:
            self._record = self._open(options.log_rsp)
        if options.log:
            self._prepare_log(self._open(options.log_file) if options.log_file is not None else Output(2, void))

    def _open(self, path: Path | None) -> Output:
        def failed(error: OSError) -> None:
            if path is not None:
                self._lost = True
                say(f"gdbstub: {path}: {error.strerror}; nothing more is written to it")
            elif not reader_is_gone(error):
                self._lost = True
                say(f"gdbstub: standard output: {error.strerror}")
            if path is None:
                self._token.run_sync_soon(self.end)

        try:
            output = open_output(path, failed)
        except OSError as error:
            raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}") from error
        self._outputs.append(output)
        return output

    def _prepare_log(self, output: Output) -> None:
        machine, topics = self.machine, self.options.log

        def write(topic: str, text: str) -> None:
            # The count is only read, so that trio's thread may do so too for packets while the guest runs.
            if topic in topics:
                cut = f"... ({len(text)} characters)" if len(text) > _LONGEST_LOG_TEXT else ""
                output.write_line(f"{machine.instructions:>14} {topic}: {text[:_LONGEST_LOG_TEXT]}{cut}")

        self._log = write
        if topics & {"int", "syscall"}:
            machine.log = write
        if "io" in topics:
            machine.devices.bus.log = lambda way, port, size, value: write(
                "io", f"{way} {port:#x} {value:#0{2 + 2 * size}x}"
            )

    def _prepare_objects(self) -> None:
        folder = self.options.allow_scripts
        if folder is None:
            return
        try:
            self._scripts = HostScripts(ScriptFolder(folder), self.machine, self.probes)
            for path in self.options.objects:
                self._scripts.load_object(str(path.absolute()))
        except iface.MachineError as error:
            raise UsageError(str(error)) from error
        except ProbeError as error:
            raise UsageError("\n".join(error.lines())) from error

    def _prepare_probes(self) -> None:
        guest, probes = self.machine.guest, self.probes
        later = not guest.settled and not self.options.early
        names: set[str] = set()
        for source, definition in self._definitions():
            before = {status.name for status in probes.status()}
            try:
                said = probes.add("uprobe" if is_uprobe(definition) else "kprobe", definition, {"disabled": later})
            except ProbeError as error:
                first, *more = error.lines()
                raise UsageError("\n".join((f"{source}: {first}", *more))) from error
            for line in said[1:]:
                say(line)
            names |= {status.name for status in probes.status()} - before

        def settle() -> None:
            for name in sorted(names) if later else ():
                try:
                    probes.enable(name)
                except ProbeError as error:
                    say(f"gdbstub: {name} is not armed: {error.lines()[0]}")

        guest.on_settled(settle)

    def _definitions(self) -> list[tuple[str, str]]:
        """(where it was written, definition) of --probe and --probe-file."""
        found = [("--probe", definition) for definition in self.options.probes]
        for path in self.options.probe_files:
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except OSError as error:
                raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}") from error
            except UnicodeDecodeError as error:
                raise UsageError(f"{path}: not a text file, at offset {error.start:#x}") from error
            for number, line in enumerate(lines, start=1):
                if line.strip() and not line.lstrip().startswith("#"):
                    found.append((f"{path}:{number}", line))
        return found

    # ---------------------------------------------------------------------------------------------------- running

    async def run(self) -> Outcome:
        """Until the guest ends or the user does. UsageError where a listener, the console or a file cannot be had."""
        try:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
                async with open_runner(self.machine, paused=True) as runner, trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch_signals, signals)
                    nursery.start_soon(self._watch_guest, runner)
                    server = self._server(runner)
                    await self._start(nursery, runner, server)
                    await self._ended.wait()
                    outcome = await runner.call(self._finish)
                    await server.finish_answers()
                    nursery.cancel_scope.cancel()
            return outcome
        except* (AddressError, ConsoleError, UsageError) as group:
            raise UsageError(str(_first(group))) from group
        finally:
            show_status("")
            for output in self._outputs:
                output.close()

    async def _start(self, nursery: trio.Nursery, runner: Runner, server: Server) -> None:
        options, machine = self.options, self.machine
        if isinstance(options.listen, Stdio):
            await nursery.start(self._serve_pipe, server)
        elif options.listen is not None:
            await nursery.start(partial(server.serve, options.listen, say))
        if options.observe is not None:
            await nursery.start(partial(server.serve, options.observe, say, observe=True))
        if isinstance(options.console, Tcp):
            await nursery.start(serve_tcp, options.console, machine, runner)
        elif options.console == "stdio":
            nursery.start_soon(Keyboard(machine, runner, self.end, partial(_interrupt, server)).run)
        elif not self._writes_terminal():
            nursery.start_soon(self._show_status, runner)
        await runner.call(self._type_command)
        if not options.wait:
            runner.resume()

    def _type_command(self) -> None:
        """On a machine that is up: before it goes on, at the same instruction whatever the host is doing."""
        if self.options.execute is not None and self.options.restore is not None:  # no argument fills the queue
            self.machine.devices.uart.receive(exec_line(self.options.execute).encode("utf-8", "surrogateescape"))

    def _restarted(self) -> None:
        """A debugger has taken the machine back to where it began: what is typed there is typed again."""
        self._withdraw_send()
        self._send_next(list(self.options.sends))
        self._type_command()

    async def _serve_pipe(self, server: Server, *, task_status: trio.TaskStatus[object]) -> None:
        """The debugger that has started us: with its end of the pipe gone nobody can attach, and without a goal nothing
        else would end the run."""
        await server.serve(Stdio(), say, task_status=task_status)
        if not self.options.has_goal:
            self.end()

    def end(self) -> None:
        """End the run as the user's wish, even where the guest waits for somebody to read what it prints."""
        for output in self._outputs:
            if output is not self._record:  # whose last line is to come
                output.give_up()
        self._ended.set()

    async def _watch_signals(self, signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            self.end()

    async def _watch_guest(self, runner: Runner) -> None:
        self._stop = await runner.wait_stop()
        self._ended.set()

    def _finish(self) -> Outcome:
        """The machine's thread, after the last instruction."""
        stop, options = self._stop, self.options
        if self._recorder is not None:
            self._recorder.note_end()
        if self._export is not None:
            self._export.close(self.probes.unfinished())
        if isinstance(stop, stops.ConsoleMatch) and options.snapshot is not None:
            with _writing(options.snapshot):
                self.machine.save(options.snapshot)
        outcome = judge(stop, self.machine.guest.crashed or self._halted_in_panic())
        if self._lost and outcome.status == SUCCESS:
            outcome = replace(outcome, status=USAGE)
        if self._screen is not None and os.isatty(1) and not self.machine.console.text.endswith("\n"):
            self._screen.write(b"\n")  # what is said next begins a line of its own
        if options.summary is not None:
            text = summary(self.machine, self.probes.status(), outcome)
            if options.summary == "-":
                Output(1, void).write(text.encode())
            else:
                with _writing(options.summary):
                    Path(options.summary).write_text(text, encoding="utf-8")
        return outcome

    def _halted_in_panic(self) -> bool:
        """A guest that is not Linux says itself that it panicked, and then halts for good in its function `panic`."""
        found = self.machine.symbols.find(self._stop.pc) if isinstance(self._stop, stops.Halted) else None
        return found is not None and found[0].name == "panic"

    def _trace_folder(self) -> TraceFolder | None:
        return None if self.options.trace_dir is None else TraceFolder(self.options.trace_dir)

    def _writes_terminal(self) -> bool:
        return isinstance(self.options.listen, Stdio) or (
            self.options.trace is not None and self.options.trace.path is None
        )

    async def _show_status(self, runner: Runner) -> None:
        """Where the console goes elsewhere, a line on the terminal says how far the guest is."""
        while os.isatty(2):
            await trio.sleep(_STATUS_SECONDS)
            instructions, now_ns = await runner.call(lambda: (self.machine.instructions, self.machine.clock.now_ns))
            show_status(f"{instructions / 1e6:,.0f} M instructions, {now_ns / 1e9:.1f} s of the guest's time")

    # -------------------------------------------------------------------------------------------------- debuggers

    def _server(self, runner: Runner) -> Server:
        if (record := self._record) is not None:
            record.write_line(start_line(self._beginning()))
            self._recorder = Recorder(self.machine, lambda event: record.write_line(event_line(event)))
        sessions = self._sessions()
        return Server(
            runner,
            sessions.debugger,
            on_kill=self.end,
            report=say,
            waiting=self.options.wait,
            log=partial(self._log, "rsp") if self._log is not None else None,
            new_observer=sessions.observer,
        )

    def _beginning(self) -> Start:
        return Start(self.options.words, self.machine.instructions, self.machine.ram_sha256())

    def _sessions(self) -> Sessions:
        """The recorder, where there is one, makes and notes the debuggers'."""
        return Sessions(
            self.machine,
            self.probes,
            self._threads,
            quit=partial(self._token.run_sync_soon, self.end),
            again=self._begin,
            restarted=self._restarted,
            scripts=self._scripts,
            traces=self._trace_folder(),
            folder=self._served,
            make=Session if self._recorder is None else self._recorder.session,
        )

    def replay(self, start: Start, events: Sequence[Event]) -> Difference | str | None:
        """In place of `run`: what is different from the record, None if nothing is."""
        now = self._beginning()
        if (now.instructions, now.ram_sha256) != (start.instructions, start.ram_sha256):
            return "the machine is another one than was recorded, before its first instruction"
        replay = Replay(self.machine, events, waiting=self.options.wait, progress=say)
        self._recorder = Recorder(self.machine, replay.record)
        return replay.run(self._recorder, self._sessions().debugger)


def _interrupt(server: Server) -> None:
    if not server.interrupt():
        say("no debugger is waiting for the guest to stop")


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def void(_: object) -> None:
    """For callables whose argument nobody wants."""


def _host_folder(path: Path) -> ServedFolder:
    try:
        return ServedFolder(path)
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}") from error


@contextmanager
def _writing(path: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}") from error


def _check_writable(path: Path | str | None) -> None:
    """UsageError for a file that the end of the run could not write: found out now, not after a long boot."""
    if path is None or str(path) == "-":
        return
    file = Path(path)
    if file.is_dir():
        raise UsageError(f"{path}: is a directory")
    if not file.parent.is_dir():
        raise UsageError(f"{path}: there is no directory {file.parent}")


def run_program(start: Callable[[], GuestMachine], options: RunOptions) -> Outcome:
    """Prepare and run what `start` makes; a debugger may have it made again. UsageError: a wrong command line."""
    machine = start()
    ended: list[Outcome] = []

    async def main() -> None:
        program = Program(machine, options, start)
        program.prepare()
        ended.append(await program.run())

    try:
        trio.run(main)
    except (KeyboardInterrupt, trio.TrioInternalError):
        # A second signal (`timeout` sends two) while trio closes, and none is listened for any more.
        if not ended:
            raise
    return ended[0]


def run_replay(
    start: Callable[[], GuestMachine], options: RunOptions, beginning: Start, events: Sequence[Event]
) -> str | None:
    """Do again what was recorded of a run of what `start` makes. -> the first difference, as text."""
    machine = start()
    quiet = replace(
        options, listen=None, console="none", pace="none", trace=None, snapshot=None, summary=None, log_rsp=None
    )

    async def main() -> Difference | str | None:
        program = Program(machine, replace(quiet, log=frozenset(), log_file=None), start)
        program.prepare()
        return program.replay(beginning, events)

    difference = trio.run(main)
    return None if difference is None else str(difference)
