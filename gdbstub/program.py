"""One run of a machine as a program: console, debugger's listener, probes, script, summary.

Rules: trio lives here (with `server`, `cli` and `emu.runner`). The machine is made by the caller; everything here
hangs off one nursery, and the run ends with the first stop that no debugger takes, or when the user says so.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import trio

from emu import iface
from emu.boot import GuestMachine
from emu.images.initramfs import EXEC_STATUS
from emu.images.symbolelf import symbol_elf
from emu.pace import WallPacer
from emu.runner import Runner, open_runner
from gdbstub.address import AddressError, Tcp, parse_address
from gdbstub.files import FileTree
from gdbstub.monitor import Monitor, Services
from gdbstub.server import Server
from gdbstub.services import MachineInspector, NamedSnapshots, TraceText
from gdbstub.session import Session
from gdbstub.terminal import HELP, Key, Keys, raw_terminal, say, writer
from probes.errors import ProbeError
from probes.manager import Manager
from probes.trace import Record

EXEC_FILE = "/vmlinux"
_PORTION = 0x4000


class UsageError(Exception):
    """What the user asked for cannot be done; one line, status 2."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. `stop` is None where the user ended it."""

    stop: iface.Stop | None
    status: int
    text: str


class Program:
    """Runs `machine` as `options` (see `options.parser`) say."""

    def __init__(self, machine: GuestMachine, options: argparse.Namespace) -> None:
        self.machine = machine
        self.options = options
        self.probes = Manager(machine, settled=machine.guest.settled)
        self._ended = trio.Event()
        self._closing: list[IO[str]] = []

    # -------------------------------------------------------------------------------------------------- preparing

    def prepare(self) -> None:
        """Everything that can be refused, before anything runs. UsageError, ProbeError."""
        machine, options = self.machine, self.options
        if options.budget is not None:
            machine.budget_end = machine.instructions + options.budget
        self._prepare_pace()
        self._prepare_script()
        self._prepare_trace()
        self._prepare_log()
        self._prepare_probes()

    def _prepare_pace(self) -> None:
        options = self.options
        person = options.console == "stdio" and sys.stdin.isatty()
        goal = options.until or getattr(options, "execute", None) or options.budget or options.send
        if options.pace == "real" or (options.pace is None and (person or not goal)):
            self.machine.pacer = WallPacer(lambda: self.machine.clock.now_ns)

    def _prepare_script(self) -> None:
        machine, console = self.machine, self.machine.console
        waiting = list(self.options.send)

        def await_next() -> None:
            if not waiting:
                return
            regex, text = waiting.pop(0)

            def typed(_match: object) -> None:
                withdraw()
                machine.devices.uart.receive(text.encode("utf-8", "surrogateescape"))
                await_next()

            withdraw = console.expect(regex, typed)

        await_next()
        if self.options.until is not None:
            console.expect(self.options.until, lambda match: iface.ConsoleMatch(match.string))
        if getattr(self.options, "execute", None) is not None:
            console.expect(EXEC_STATUS.pattern, lambda match: iface.GuestExit(int(match[1])))

    def _prepare_trace(self) -> None:
        if self.options.trace is None:
            return
        name, kind = self.options.trace
        try:
            file = sys.stdout if name == "-" else Path(name).open("w", encoding="utf-8")  # noqa: SIM115  # closed at the end
        except OSError as error:
            raise UsageError(f"{name}: {error.strerror}") from error
        if name != "-":
            self._closing.append(file)
        show: Callable[[Record], str] = Record.json if kind == "jsonl" else Record.text

        def write(record: Record) -> None:
            file.write(show(record) + "\n")
            if file is sys.stdout:
                file.flush()

        self.probes.trace.subscribe(write)

    def _prepare_log(self) -> None:
        options, machine = self.options, self.machine
        if not options.log:
            return
        try:
            file = options.log_file.open("w", encoding="utf-8") if options.log_file else sys.stderr
        except OSError as error:
            raise UsageError(f"{options.log_file}: {error.strerror}") from error
        if options.log_file:
            self._closing.append(file)

        def write(topic: str, text: str) -> None:
            if topic in options.log:
                file.write(f"{machine.instructions:>14} {topic}: {text}\n")

        self._log = write
        if options.log & {"int", "syscall"}:
            machine.log = write
        if "io" in options.log:
            machine.devices.bus.log = lambda way, port, size, value: write(
                "io", f"{way} {port:#x} {value:#0{2 + 2 * size}x}"
            )

    def _prepare_probes(self) -> None:
        guest, probes = self.machine.guest, self.probes
        definitions = [*self.options.probe]
        for path in self.options.probe_file:
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"{path}: {error}") from error
            definitions += [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        later = not guest.settled and not self.options.early
        names = set()
        for definition in definitions:
            before = {status.name for status in probes.status()}
            for line in probes.add("kprobe", definition, {"disabled": later})[1:]:
                say(line)
            names |= {status.name for status in probes.status()} - before

        def settle() -> None:
            probes.settled = True
            for name in sorted(names) if later else ():
                probes.enable(name)

        guest.on_settled(settle)

    # ---------------------------------------------------------------------------------------------------- running

    async def run(self) -> Outcome:
        """Until the guest ends or the user does. UsageError where a listener or the console cannot be had."""
        options = self.options
        try:
            async with open_runner(self.machine, paused=True) as runner, trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_signals)
                if options.listen is not None:
                    await self._listen(nursery, runner)
                await self._open_console(nursery, runner)
                if getattr(options, "execute", None) is not None and options.restore is not None:
                    from emu.images.initramfs import exec_line

                    await runner.call(self.machine.devices.uart.receive, exec_line(options.execute).encode())
                if not options.wait:
                    runner.resume()
                outcome = await self._until_end(runner)
                nursery.cancel_scope.cancel()
        except* (AddressError, UsageError) as group:
            first: BaseException = group
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise UsageError(str(first)) from None
        finally:
            for file in self._closing:
                file.close()
        return outcome

    async def _until_end(self, runner: Runner) -> Outcome:
        stop: iface.Stop | None = None
        async with trio.open_nursery() as nursery:

            async def wait_stop() -> None:
                nonlocal stop
                stop = await runner.wait_stop()
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait_stop)
            await self._ended.wait()
            nursery.cancel_scope.cancel()
        return await runner.call(self._finish, stop)

    def _finish(self, stop: iface.Stop | None) -> Outcome:
        options = self.options
        if isinstance(stop, iface.ConsoleMatch) and options.snapshot is not None:
            try:
                self.machine.save(options.snapshot)
            except OSError as error:
                raise UsageError(f"{options.snapshot}: {error.strerror}") from error
        status, text = judge(stop, self.machine.guest.crashed)
        if options.summary is not None:
            self._write_summary(stop, status)
        return Outcome(stop, status, text)

    def _write_summary(self, stop: iface.Stop | None, status: int) -> None:
        machine = self.machine
        read = machine.registers.read
        names = machine.registers.arch.names
        summary = {
            "stop": "user" if stop is None else type(stop).__name__,
            "exit": status,
            "instructions": machine.instructions,
            "virtual_ns": machine.clock.now_ns,
            "ram_sha256": machine.ram_sha256(),
            "cpu": {name: hex(read(name)) for name in names[: names.index("eflags") + 1]},
            "probes": [
                {"name": p.name, "kind": p.kind, "symbol": p.symbol, "hits": p.hits, "missed": p.missed}
                for p in self.probes.status()
            ],
        }
        text = json.dumps(summary, indent=1) + "\n"
        if self.options.summary == "-":
            sys.stdout.write(text)
            return
        try:
            Path(self.options.summary).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{self.options.summary}: {error.strerror}") from error

    def end(self) -> None:
        """End the run as the user's wish. From the trio thread."""
        self._ended.set()

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                self.end()

    # -------------------------------------------------------------------------------------------------- debuggers

    async def _listen(self, nursery: trio.Nursery, runner: Runner) -> None:
        machine, guest = self.machine, self.machine.guest
        token = trio.lowlevel.current_trio_token()
        services = Services(
            machine=machine,
            probes=self.probes,
            trace=TraceText(self.probes.trace),
            inspector=MachineInspector(machine, self.probes),
            snapshots=NamedSnapshots(machine),
            quit=lambda: token.run_sync_soon(self.end),
        )
        monitor = Monitor(services)
        files = FileTree({})
        if len(machine.symbols):

            def build() -> bytes:
                return symbol_elf(
                    machine.symbols,
                    bits=guest.bits,
                    sections=guest.sections,
                    build_id=guest.build_id,
                    frames=guest.frames(),
                )

            files = FileTree({EXEC_FILE: build}, exec_file=EXEC_FILE)

        def new_session(wake: Callable[[], None]) -> Session:
            return Session(machine, machine.registers.arch, files=files, monitor=monitor, wake=wake)

        server = Server(runner, new_session, on_kill=self.end, report=say, waiting=self.options.wait)
        await nursery.start(partial(server.serve, self.options.listen, say))

    # ---------------------------------------------------------------------------------------------------- console

    async def _open_console(self, nursery: trio.Nursery, runner: Runner) -> None:
        where, console = self.options.console, self.machine.console
        if where == "none":
            return
        if where == "stdio":
            token = trio.lowlevel.current_trio_token()
            console.sinks.append(writer(1, lambda: token.run_sync_soon(self.end)))
            if str(self.options.listen) != "standard input and output":
                nursery.start_soon(self._keyboard, runner)
            return
        if (address := _tcp(where)) is not None:
            await nursery.start(self._serve_console, address, runner)
            return
        try:
            file = Path(where).open("wb", buffering=0)  # noqa: SIM115  # the process's end closes it
        except OSError as error:
            raise UsageError(f"{where}: {error.strerror}") from error
        console.sinks.append(lambda data: void(file.write(data)))

    async def _keyboard(self, runner: Runner) -> None:
        keys = Keys()
        with raw_terminal(0):
            while True:
                data = await trio.to_thread.run_sync(os.read, 0, _PORTION, abandon_on_cancel=True)
                if not data:
                    return
                if not os.isatty(0):
                    await runner.call(self.machine.devices.uart.receive, data)
                    continue
                for part in keys.take(data):
                    await self._key(part, runner)

    async def _key(self, part: bytes | Key, runner: Runner) -> None:
        if isinstance(part, bytes):
            await runner.call(self.machine.devices.uart.receive, part)
        elif part is Key.END:
            self.end()
        elif part is Key.INTERRUPT:
            runner.interrupt()
        else:
            say(HELP)

    async def _serve_console(
        self, address: Tcp, runner: Runner, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """The console for one client at a time; what is printed while nobody is there is lost."""
        try:
            listeners = await trio.open_tcp_listeners(address.port, host=address.host)
        except OSError as error:
            raise UsageError(f"console at {address}: {error.strerror}") from error
        say(f"console on {address.host}:{listeners[0].socket.getsockname()[1]}")
        task_status.started()
        await trio.serve_listeners(partial(self._console_client, runner), listeners)

    async def _console_client(self, runner: Runner, stream: trio.SocketStream) -> None:
        sender, receiver = trio.open_memory_channel[bytes](1 << 16)
        token = trio.lowlevel.current_trio_token()

        def sink(data: bytes) -> None:
            token.run_sync_soon(_offer, sender, data)

        self.machine.console.sinks.append(sink)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_forward, receiver, stream)
                async for data in stream:
                    await runner.call(self.machine.devices.uart.receive, bytes(data))
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client went away
        finally:
            self.machine.console.sinks.remove(sink)


def _offer(sender: trio.MemorySendChannel[bytes], data: bytes) -> None:
    try:
        sender.send_nowait(data)
    except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
        return  # a client that does not read loses text, the guest loses no time


async def _forward(receiver: trio.MemoryReceiveChannel[bytes], stream: trio.SocketStream) -> None:
    async for data in receiver:
        await stream.send_all(data)


def _tcp(text: str) -> Tcp | None:
    """HOST:PORT, but no path that happens to have a colon."""
    if "/" in text or ":" not in text:
        return None
    try:
        address = parse_address(text)
    except AddressError:
        return None
    return address if isinstance(address, Tcp) else None


def void(_: object) -> None:
    """For callables whose result nobody wants."""


def judge(stop: iface.Stop | None, crashed: bool) -> tuple[int, str]:
    """(exit status, one line for the user) of how a run ended."""
    match stop:
        case None:
            return 3 if crashed else 0, ""
        case iface.ConsoleMatch(text=text):
            return 0, f"matched: {text.strip()}"
        case iface.GuestExit(status=status):
            return status, f"the guest ended with status {status}"
        case iface.PowerOff():
            return 3 if crashed else 0, "the guest powered off"
        case iface.Reset():
            return 3 if crashed else 0, "the guest reset the machine"
        case iface.Panic(pc=pc, message=message):
            return 3, f"the guest panicked at {pc:#x}: {message}"
        case iface.TripleFault(pc=pc, vector=vector):
            return 3, f"triple fault at {pc:#x}, begun by vector {vector}"
        case iface.Budget(instructions=count):
            return 1, f"the budget is used up at instruction {count:,}"
        case iface.Halted(pc=pc, reason=reason):
            return 1, f"halted for good at {pc:#x}: {reason}"
        case iface.Defect(report=report):
            return 4, f"a defect of gdbstub; please report this:\n{report}"
        case iface.Breakpoint(pc=pc) | iface.Step(pc=pc) | iface.Interrupted(pc=pc):
            return 0, f"stopped at {pc:#x}"


def run_program(machine: GuestMachine, options: argparse.Namespace) -> Outcome:
    """Prepare and run. UsageError and ProbeError say what was wrong with the command line."""

    async def main() -> Outcome:
        program = Program(machine, options)
        program.prepare()
        return await program.run()

    return trio.run(main)


__all__ = ["Outcome", "ProbeError", "Program", "UsageError", "judge", "run_program"]
