"""The `monitor` commands: a line of text in, lines of text out.

Rules: synchronous, called in the machine's thread between slices; no protocol, no I/O of its own. A verb is declared
once, with its grammar, by `@command`; parsing, `help` and the "usage" of a refusal are derived from that grammar. What
a command works on is a narrow service (`monitorservices`); where it is None the command says so.

A grammar is words separated by spaces: `word` or `one|another` literally, `NAME` one word of the user's, `[NAME]` the
same but optional, `[OPTIONS]` the options the declaration lists, `DEF`, `FILE`, `PATH`, `TEXT` and `COMMAND` the raw
rest of the line: a probe definition is the kernel's own line and keeps its spaces and quotes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from emu.iface import MachineError
from gdbstub.dumps import dump
from gdbstub.examples import MONITOR_EXAMPLES
from gdbstub.monitorservices import TOPICS, Probes, Scripts, Services, Snapshots, System, Trace, Tracefs
from gdbstub.threads import ThreadChoice
from probes.discovery import find_symbols
from probes.errors import ProbeError
from probes.tracefs import redirection

# ------------------------------------------------------------------------------------------------------------- grammar


class CommandError(Exception):
    """A command that is refused; the text, which may have several lines, is for the user."""


@dataclass(slots=True)
class Arguments:
    """What a line gave for its grammar: `words` by the grammar's own token, `choice` the last `one|another` taken."""

    words: dict[str, str] = field(default_factory=dict)
    choice: str = ""
    options: dict[str, str | bool] = field(default_factory=dict)
    stream: Callable[[str], None] | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """A declared command. `options` maps an option's name to what stands for its value, or None for a bare one.

    `looks`: it changes nothing, not even for other clients.
    """

    grammar: str
    help: str
    options: Mapping[str, str | None]
    method: str
    looks: bool = False

    @property
    def verb(self) -> str:
        """The first word, without what is glued to it by `/`."""
        return self.grammar.split()[0].partition("/")[0]


Handler = TypeVar("Handler", bound=Callable[..., Sequence[str]])
_MARK = "_command_declarations"
_RAW = ("DEF", "FILE", "PATH", "TEXT", "COMMAND")
_WORD = re.compile(r"\s*(\S+)")


def command(
    grammar: str, help_text: str, options: Mapping[str, str | None] | None = None, *, looks: bool = False
) -> Callable[[Handler], Handler]:
    """Declare the decorated method the handler of `grammar`; may be given several times on one method."""

    def mark(handler: Handler) -> Handler:
        declared = Command(grammar, help_text, options or {}, handler.__name__, looks)
        setattr(handler, _MARK, (declared, *getattr(handler, _MARK, ())))
        return handler

    return mark


def _match(command: Command, line: str) -> Arguments | None:
    """What `line` says in the grammar of `command`, None where it has another shape; CommandError for a bad option."""
    arguments = Arguments()
    rest = line
    for token in command.grammar.split():
        name = token.strip("[]")
        if token == "[OPTIONS]":
            rest = _take_options(command, rest, arguments)
            continue
        if name in _RAW:
            if not rest.strip():
                if token != name:
                    continue
                return None
            arguments.words[name], rest = rest.strip(), ""
            continue
        match = _WORD.match(rest)
        if match is None:
            if token != name:
                continue
            return None
        word, rest = match[1], rest[match.end() :]
        literal, slash, glued = name.partition("/")
        if slash:
            word, _, arguments.words[glued] = word.partition("/")
        if literal.islower():
            if word not in literal.split("|"):
                return None
            arguments.choice = word
        else:
            arguments.words[name] = word
    return None if rest.strip() else arguments


def _take_options(command: Command, rest: str, arguments: Arguments) -> str:
    while (match := _WORD.match(rest)) is not None and match[1].startswith("--"):
        name = match[1][2:]
        if name not in command.options:
            raise CommandError(f"no option --{name} here{_did_you_mean(name, command.options, '--')}")
        rest = rest[match.end() :]
        if command.options[name] is None:
            arguments.options[name] = True
            continue
        value = _WORD.match(rest)
        if value is None:
            raise CommandError(f"--{name} needs {command.options[name]}")
        arguments.options[name] = value[1]
        rest = rest[value.end() :]
    return rest


def _did_you_mean(word: str, known: Mapping[str, object] | Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, dict.fromkeys(known), n=3)
    return f"; did you mean {', '.join(prefix + name for name in close)}?" if close else ""


# ------------------------------------------------------------------------------------------------------------ commands

_MAX_SYMBOLS = 500
_EXCEPTIONS = 32  # the vectors that the processor itself raises
_MAX_DUMP = 0x10000
_FORMAT = re.compile(r"(\d*)([xduoci]?)([bhwg]?)([xduoci]?)")
_SIZES = {"b": 1, "h": 2, "w": 4, "g": 8}
_HITS = {"disabled": None, "pid": "N", "comm": "GLOB"}
_ARMING = {**_HITS, "arm": "int3|hook"}
_KPROBE_OPTIONS = {**_ARMING, "pre": "SYMBOL", "post": "SYMBOL"}
_UPROBE_OPTIONS = {**_HITS, "arm": "hook|int3|aops"}
_JPROBE_OPTIONS = {**_ARMING, "entry": "SYMBOL"}
_KRETPROBE_OPTIONS = {**_KPROBE_OPTIONS, "maxactive": "N", "shadow": None, "trampoline": None}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command said. `refused` where it was not carried out: then the lines are the reason."""

    lines: tuple[str, ...]
    refused: bool = False


class Monitor:
    """The commands over one set of services, shared by all connections; it remembers only who the trace streams to."""

    commands: Sequence[Command]

    def __init__(self, services: Services) -> None:
        self._services = services
        self._streaming: Callable[[str], None] | None = None
        self.commands = _declared(type(self))

    def execute(self, line: str, stream: Callable[[str], None] | None = None, *, looks_only: bool = False) -> Answer:
        """Carry out one line. `stream` takes the lines of `trace stream on`, where the client can be sent them.

        With `looks_only` what changes anything is refused.
        """
        try:
            command, arguments = self._parse(line)
            if looks_only and not command.looks:
                raise CommandError("this endpoint only shows the machine; what changes it is for a debugger")
            arguments.stream = stream
            return Answer(tuple(getattr(self, command.method)(arguments)))
        except (CommandError, MachineError) as error:
            return Answer(tuple(str(error).splitlines()), refused=True)
        except ProbeError as error:
            return Answer(tuple(error.lines()), refused=True)

    def end_stream(self, sink: Callable[[str], None]) -> None:
        """End the trace's stream if it goes to `sink`: its client is gone."""
        if self._streaming == sink:
            self._trace().stream(None)
            self._streaming = None

    def _parse(self, line: str) -> tuple[Command, Arguments]:
        verb = (line.split() or ["help"])[0].partition("/")[0]
        candidates = [command for command in self.commands if command.verb == verb]
        if not candidates:
            known = [command.verb for command in self.commands]
            raise CommandError(f"unknown command {verb!r}{_did_you_mean(verb, known)} (try `help`)")
        for command in candidates:
            arguments = _match(command, line or "help")
            if arguments is not None:
                return command, arguments
        raise CommandError(_usage(candidates))

    def _about(self, words: Sequence[str]) -> list[Command]:
        """The commands that begin with `words`; all of the verb where no command goes on like that."""
        candidates = [command for command in self.commands if command.verb == words[0].partition("/")[0]]
        return [command for command in candidates if _begins(command, words)] or candidates

    @command("help [COMMAND]", "the commands, or all about one of them", looks=True)
    def help(self, arguments: Arguments) -> Sequence[str]:
        words = arguments.words.get("COMMAND", "").split()
        verb = words[0].partition("/")[0] if words else None
        chosen = self._about(words) if words else self.commands
        if not chosen:
            known = [command.verb for command in self.commands]
            raise CommandError(f"no command {verb!r}{_did_you_mean(str(verb), known)}")
        lines: list[str] = []
        for command in chosen:
            lines.append(f"{command.grammar:<42} {command.help}")
            if verb is not None and command.options:
                shown = (f"--{name} {value}" if value else f"--{name}" for name, value in command.options.items())
                lines.append("  OPTIONS: " + "  ".join(shown))
        return lines + MONITOR_EXAMPLES.get(verb or "", "").splitlines()

    @command(f"info {'|'.join(TOPICS)}", "the machine's own state", looks=True)
    def info(self, arguments: Arguments) -> Sequence[str]:
        return _need(self._services.inspector, "this machine cannot be inspected").lines(arguments.choice)

    @command(
        "xp/FMT ADDR", "physical memory; FMT is a count, a format of x d u o c i and a size of b h w g", looks=True
    )
    def physical_memory(self, arguments: Arguments) -> Sequence[str]:
        count, style, size = _parse_format(arguments.words["FMT"])
        address = self._address(arguments.words["ADDR"])
        if style == "i":
            disassemble = _need(self._services.disassemble, "format i is not available here; use x/i in gdb")
            return disassemble(address, count)
        if count * size > _MAX_DUMP:
            raise CommandError(f"at most {_MAX_DUMP} bytes at a time")
        data = self._services.machine.memory.read_physical(address, count * size)
        return dump(address, data, style, size)

    @command("symbols GLOB", "symbols whose name matches, functions with their prototype", looks=True)
    def symbols(self, arguments: Arguments) -> Sequence[str]:
        types = self._services.types
        machine, pattern = self._services.machine, arguments.words["GLOB"]
        found = find_symbols(machine, pattern, types=types() if types is not None else None, limit=_MAX_SYMBOLS)
        if not found.count:
            raise CommandError(found.lines[0])
        return found.lines

    @command("catch exception N|all [off]", "stop the debugger before the guest's handler of an exception, 0 to 31")
    def catch_exception(self, arguments: Arguments) -> Sequence[str]:
        if arguments.stream is None:
            raise CommandError("this is for the debugger that is attached: it is who stops")
        machine, word = self._services.machine, arguments.words["N|all"]
        number = _number(word)
        if word == "all":
            named = frozenset(range(_EXCEPTIONS))
        elif number is not None and number < _EXCEPTIONS:
            named = frozenset({number})
        else:
            raise CommandError(f"an exception is 0 to {_EXCEPTIONS - 1}, or all; not {word!r}")
        caught = machine.caught_exceptions
        caught = caught - named if arguments.choice == "off" else caught | named
        machine.catch_exceptions(caught)
        return [f"caught: {' '.join(map(str, sorted(caught))) or 'none'}"]

    @command("snapshot save|restore NAME", "keep the machine's whole state under a name, or go back to it")
    def snapshot(self, arguments: Arguments) -> Sequence[str]:
        snapshots = self._snapshots()
        act = snapshots.save if arguments.choice == "save" else snapshots.restore
        return act(arguments.words["NAME"])

    @command("snapshot list", "the states kept", looks=True)
    def snapshot_list(self, _arguments: Arguments) -> Sequence[str]:
        return self._snapshots().list()

    @command("kprobe add [OPTIONS] DEF", "register a probe: a line of kprobe_events, or perf probe's", _KPROBE_OPTIONS)
    def probe_add(self, arguments: Arguments) -> Sequence[str]:
        return self._probes().add("kprobe", arguments.words["DEF"], arguments.options)

    @command("jprobe add [OPTIONS] DEF", "call guest code, --entry, with a function's arguments", _JPROBE_OPTIONS)
    def jprobe_add(self, arguments: Arguments) -> Sequence[str]:
        return self._probes().add("jprobe", arguments.words["DEF"], arguments.options)

    @command("kretprobe add [OPTIONS] DEF", "register a return probe: `r` line or SYMBOL%return", _KRETPROBE_OPTIONS)
    def return_probe_add(self, arguments: Arguments) -> Sequence[str]:
        return self._probes().add("kretprobe", arguments.words["DEF"], arguments.options)

    @command("uprobe add [OPTIONS] DEF", "probe a program: uprobe_events line, PATH:SYMBOL[+OFF]", _UPROBE_OPTIONS)
    def program_probe_add(self, arguments: Arguments) -> Sequence[str]:
        return self._probes().add("uprobe", arguments.words["DEF"], arguments.options)

    @command("jprobe list", "the probes, their state and hits", looks=True)
    @command("kprobe list", "the probes, their state and hits", looks=True)
    @command("kretprobe list", "the same", looks=True)
    @command("uprobe list", "the same", looks=True)
    def probe_list(self, _arguments: Arguments) -> Sequence[str]:
        return self._probes().list()

    @command("probe list", "probes of all kinds, as the kernel's /sys/kernel/debug/kprobes/list", looks=True)
    def kernel_list(self, _arguments: Arguments) -> Sequence[str]:
        return self._probes().kernel_list()

    @command("probe reset", "remove every probe of every kind")
    def probe_reset(self, _arguments: Arguments) -> Sequence[str]:
        return self._probes().reset()

    @command("jprobe info NAME", "all about one probe", looks=True)
    @command("kprobe info NAME", "all about one probe", looks=True)
    @command("kretprobe info NAME", "the same, with what became of every entry", looks=True)
    @command("uprobe info NAME", "the same, with where it is mapped", looks=True)
    def probe_info(self, arguments: Arguments) -> Sequence[str]:
        return self._probes().info(arguments.words["NAME"])

    @command("jprobe enable|disable|del NAME|GLOB|all", "switch probes on or off, or remove them")
    @command("kprobe enable|disable|del NAME|GLOB|all", "switch probes on or off, or remove them")
    @command("kretprobe enable|disable|del NAME|GLOB|all", "the same")
    @command("uprobe enable|disable|del NAME|GLOB|all", "the same")
    def probe_change(self, arguments: Arguments) -> Sequence[str]:
        probes = self._probes()
        act = {"enable": probes.enable, "disable": probes.disable, "del": probes.delete}[arguments.choice]
        return act(arguments.words["NAME|GLOB|all"])

    @command("trace save FILE", "write the trace to a host file")
    def trace_save(self, arguments: Arguments) -> Sequence[str]:
        return self._trace().save(arguments.words["FILE"])

    @command("trace stream on|off", "show records as they come, while the guest runs")
    def trace_stream(self, arguments: Arguments) -> Sequence[str]:
        sink = None
        if arguments.choice == "on":
            sink = _need(arguments.stream, "this client cannot be sent lines while the guest runs")
        self._trace().stream(sink)
        self._streaming = sink
        return []

    @command("trace clear|on|off", "empty the trace; record hits in it or not")
    def trace_switch(self, arguments: Arguments) -> Sequence[str]:
        if arguments.choice == "clear":
            self._trace().clear()
        else:
            self._trace().enable(arguments.choice == "on")
        return []

    @command("trace [N]", "the trace, or its last N records", looks=True)
    def trace(self, arguments: Arguments) -> Sequence[str]:
        word = arguments.words.get("N")
        count = None if word is None else _number(word)
        if word is not None and count is None:
            meant = self._about(["trace", word])[:1]
            raise CommandError(f"trace: {word!r} is no number of records; {_usage(meant)}")
        return self._trace().lines(count)

    @command("ps", "the guest's processes", looks=True)
    def ps(self, _arguments: Arguments) -> Sequence[str]:
        return self._system().processes()

    @command("maps PID", "a process's memory, as /proc/PID/maps", looks=True)
    def maps(self, arguments: Arguments) -> Sequence[str]:
        return self._system().maps(_pid(arguments))

    @command("files PID", "a process's open files, as /proc/PID/fd", looks=True)
    def files(self, arguments: Arguments) -> Sequence[str]:
        return self._system().files(_pid(arguments))

    @command("lsmod", "the kernel's modules", looks=True)
    def lsmod(self, _arguments: Arguments) -> Sequence[str]:
        return self._system().modules()

    @command("dmesg", "what the kernel has printed", looks=True)
    def dmesg(self, _arguments: Arguments) -> Sequence[str]:
        return self._system().log()

    @command("page-cache PATH", "a file's pages in the guest's memory: offsets and physical addresses", looks=True)
    def page_cache(self, arguments: Arguments) -> Sequence[str]:
        return self._system().page_cache(arguments.words["PATH"])

    @command("threads cpus|tasks", "what a debugger's threads are, from its next stop on")
    def threads(self, arguments: Arguments) -> Sequence[str]:
        return (self._services.threads or ThreadChoice()).choose(arguments.choice)

    @command("echo TEXT", "'TEXT' > FILE or >> FILE: write to a file of tracefs, e.g. kprobe_events")
    def echo(self, arguments: Arguments) -> Sequence[str]:
        text, file, append = redirection(arguments.words["TEXT"])
        return self._tracefs().write(file, text, append=append)

    @command("cat FILE", "read a file of tracefs, e.g. trace, events/kprobes/open/hist")
    def cat(self, arguments: Arguments) -> Sequence[str]:
        return self._tracefs().read(arguments.words["FILE"]).split("\n")[:-1]

    @command("ls [DIR]", "the names in a directory of tracefs")
    def list_directory(self, arguments: Arguments) -> Sequence[str]:
        return self._tracefs().list(arguments.words.get("DIR", ""))

    @command("script FILE", "run a Python file from --allow-scripts; it has `machine` and `probes`")
    def script(self, arguments: Arguments) -> Sequence[str]:
        return self._scripts().run(arguments.words["FILE"])

    @command("object load FILE", "take in a relocatable object from --allow-scripts, for --pre, --post, --entry")
    def object_load(self, arguments: Arguments) -> Sequence[str]:
        return self._scripts().load_object(arguments.words["FILE"])

    @command("quit", "end the machine and this program")
    def quit(self, _arguments: Arguments) -> Sequence[str]:
        _need(self._services.quit, "quit is not available here")()
        return []

    def _probes(self) -> Probes:
        return _need(self._services.probes, "this machine has no probe engine")

    def _trace(self) -> Trace:
        return _need(self._services.trace, "this machine has no trace")

    def _tracefs(self) -> Tracefs:
        return _need(self._services.tracefs, "this machine has no trace")

    def _scripts(self) -> Scripts:
        return _need(self._services.scripts, "the server was started without --allow-scripts DIR")

    def _system(self) -> System:
        return _need(self._services.system, "this guest's operating system is not known")

    def _snapshots(self) -> Snapshots:
        return _need(self._services.snapshots, "snapshots are not available here")

    def _address(self, text: str) -> int:
        """Physical address: a number as C writes it, or where SYMBOL or SYMBOL+OFFSET is mapped now."""
        number = _number(text)
        if number is not None:
            return number
        name, _, tail = text.partition("+")
        offset = _number(tail or "0")
        if offset is None:
            raise CommandError(f"{tail!r} is no offset")
        table = self._services.machine.symbols
        found = table.lookup(name)
        if not found:
            raise CommandError(f"no symbol {name!r}{_suggestion(table.suggest(name))}")
        vaddr = found[0].address + offset
        paddr = self._services.machine.memory.translate(vaddr)
        if paddr is None:
            raise CommandError(f"{text} ({vaddr:#x}) is not mapped now")
        return paddr


def _begins(command: Command, words: Sequence[str]) -> bool:
    """The literal words of its grammar, up to the first of the user's, are what `words` has there."""
    for token, word in zip(command.grammar.split()[1:], words[1:], strict=False):
        if not token.islower():
            return True
        if word not in token.split("|"):
            return False
    return True


def _usage(commands: Sequence[Command]) -> str:
    return "usage: " + "\n       ".join(command.grammar for command in commands)


def _pid(arguments: Arguments) -> int:
    text = arguments.words["PID"]
    number = _number(text)
    if number is None or number >= 1 << 31:
        raise CommandError(f"{text!r} is no process id")
    return number


def _number(text: str) -> int | None:
    """`text` as a decimal or 0x number below 2**64, or None."""
    if re.fullmatch(r"0[xX][0-9a-fA-F]{1,16}", text):
        return int(text, 16)
    return int(text) if re.fullmatch(r"[0-9]{1,19}", text) else None


Service = TypeVar("Service")


def _need(service: Service | None, reason: str) -> Service:
    if service is None:
        raise CommandError(reason)
    return service


def _suggestion(names: Sequence[str]) -> str:
    return f"; did you mean {', '.join(names[:3])}?" if names else ""


def _declared(owner: type) -> list[Command]:
    return [command for member in vars(owner).values() for command in getattr(member, _MARK, ())]


def _parse_format(text: str) -> tuple[int, str, int]:
    """Count, style and size in bytes of "16xw", "4gx", "i" or ""; defaults 1, x, w."""
    match = _FORMAT.fullmatch(text)
    if match is None or (match[2] and match[4]) or len(match[1]) > 6:
        raise CommandError(f"format /{text}: a count, then one of x d u o c i, then one of b h w g")
    style = match[2] or match[4] or "x"
    size = 1 if style == "c" else _SIZES[match[3] or "w"]
    return int(match[1] or 1), style, size
