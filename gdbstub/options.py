"""The command line, declared once: `--help`, usage errors and the README's option tables come from here.

Rules: standard library and this package's values; nothing is opened or started, only checked for sense. A wrong command
line ends with status 2 and one line that says what to write instead.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from gdbstub.address import Stdio, parse_address
from gdbstub.commands import (
    Boot,
    Check,
    Command,
    Demo,
    DrgnShell,
    Fetch,
    Load,
    MonitorCommand,
    Replay,
    Report,
    RunOptions,
    Symbols,
)
from gdbstub.examples import EXAMPLES
from gdbstub.values import (
    LOG_TOPICS,
    added,
    address,
    console,
    count,
    endpoint,
    number,
    pattern,
    send,
    size,
    topics,
    trace_target,
)

DEFAULT_LISTEN = "127.0.0.1:1234"

EXIT_STATUS = """\
exit status:
  0  matched, powered off, --exec succeeded, or ended by the user
  1  ended without the match (budget used up, halted for good); --exec gives the command's own status
  2  usage, unreadable or wrong file
  3  the guest crashed (panic, triple fault, reset without being asked)
  4  our own defect, with a report to send
"""


_ANSWERS = {
    "demo": ("every step worked", "one did not, and is named"),
    "fetch": ("the kernel is in the cache", None),
    "symbols": ("something matches", "nothing does"),
    "report": ("the report is printed", None),
    "check": ("every line is accepted", "one is rejected"),
    "monitor": ("the command was carried out", "it was refused, for the reason that is printed"),
    "drgn": ("the shell was left", None),
    "replay": ("everything happened again", "something was different"),
}
"""What 0 and 1 say of the commands that run no guest of the user's; None: there is no 1."""


def _exit_status(name: str) -> str:
    if name not in _ANSWERS:
        return EXIT_STATUS
    success, failure = _ANSWERS[name]
    return (
        f"exit status:\n  0  {success}\n"
        + ("" if failure is None else f"  1  {failure}\n")
        + "  2  usage, or a file, package or server that cannot be had\n  4  our own defect, with a report to send\n"
    )


_KERNEL_HELP = "a bzImage or vmlinux file, amd64 or i386, or a Debian package linux-image-... (default: amd64)"

_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


# -------------------------------------------------------------------------------------------------------- declarations


class _Parser(argparse.ArgumentParser):
    """argparse, but a usage error is one line that says what may have been meant."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see `{self.prog} --help`)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(action, f"{value!r} is not known here{_hint(str(value), known, known)}")


def _hint(text: str, known: Sequence[str], otherwise: Sequence[str] = ()) -> str:
    """What of `known` may have been meant; else all of `otherwise`."""
    close = difflib.get_close_matches(text, known, n=1)
    if close:
        return f": did you mean {close[0]}?"
    return f": {', '.join(otherwise)}" if otherwise else ""


class _Version(argparse.Action):
    """`--version`, which looks for the installed package only when it is asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"gdbstub {version('gdbstub')}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="gdbstub",
        description="Boot a stock Linux kernel, or any image, under emulation; attach stock gdb; probe any function.",
        epilog="`gdbstub COMMAND --help` tells more, with examples and its exit status: of boot and load, this.\n\n"
        + EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_boot(commands)
    _add_load(commands)
    _sub(commands, "demo", "the guided main job, unattended: boot, attach gdb, set a kprobe, watch file names arrive")
    fetch = _sub(commands, "fetch", "a kernel and BusyBox from Debian's packages into the cache, as any user")
    fetch.add_argument("arch", nargs="?", choices=("amd64", "i386"), default="amd64", help="default: %(default)s")
    fetch.add_argument("--package", metavar="NAME", help="this package, or the newest that a pattern matches")
    fetch.add_argument("--debug", action="store_true", help="also learn its types from its debug package (800 MB)")
    fetch.add_argument("--print", dest="show", action="store_true", help="print the files' paths, one a line")
    symbols = _sub(commands, "symbols", "what can be probed in a kernel: its symbols by glob, with prototypes")
    symbols.add_argument("kernel", metavar="KERNEL", nargs="?", default="amd64", help=_KERNEL_HELP)
    symbols.add_argument("glob", metavar="GLOB", help="a name, or a pattern of * ? []")

    report = _sub(commands, "report", "what a trace adds up to: top functions, latencies, stacks")
    report.add_argument("file", metavar="FILE", type=Path, help="a trace: .jsonl, or ftrace's text")
    report.add_argument("--flame", metavar="FILE.svg", type=Path, help="write a flame graph of its stack traces")
    _add_check(commands)
    monitor = _sub(commands, "monitor", "a monitor command without gdb; the guest runs on")
    monitor.add_argument("address", metavar="HOST:PORT", type=address, help="where a stub listens; unix:PATH too")
    monitor.add_argument("words", metavar="COMMAND", nargs=argparse.REMAINDER, help="default: help")
    shell = _sub(commands, "drgn", "a drgn shell on the kernel in a snapshot")
    shell.add_argument("snapshot", metavar="SNAPSHOT", type=Path, help="what --snapshot saved")
    replay = _sub(commands, "replay", "run a recorded session again and show the first difference")
    replay.add_argument(
        "file", metavar="FILE", type=Path, help="what --log-rsp wrote; its machine is made as it was then"
    )
    return top


def _sub(commands: _Commands, name: str, text: str) -> _Parser:
    sub = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"{EXAMPLES[name]}\n{_exit_status(name)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sub.set_defaults(parser=sub)
    return sub


def _add_check(commands: _Commands) -> None:
    check = _sub(commands, "check", "what a kernel would say to probe definitions, without booting it")
    check.add_argument("file", metavar="FILE", help="kprobe_events and uprobe_events lines; - for standard input")
    check.add_argument("--kernel", metavar="K", default="amd64", help=_KERNEL_HELP)
    check.add_argument(
        "--kind",
        choices=("kprobe", "uprobe", "auto"),
        default="auto",
        help="the file the lines are meant for; auto: uprobe_events where the place has a slash (default: auto)",
    )
    check.add_argument(
        "--sysroot", metavar="DIR", type=Path, help="where the guest's files lie (default: the fetched initramfs)"
    )
    check.add_argument("--each", action="store_true", help="every line alone; else they build on each other")
    check.add_argument("--json", action="store_true", help="one JSON object a line: verdict, errno, error, caret ...")


def _add_boot(commands: _Commands) -> None:
    boot = _sub(commands, "boot", "boot a Linux kernel")
    boot.add_argument(
        "kernel",
        metavar="KERNEL",
        nargs="?",
        help="a bzImage or vmlinux file, or amd64 or i386 for the fetched one with its initramfs (default: amd64)",
    )
    boot.add_argument("--initrd", metavar="FILE", type=Path, help="an initramfs, instead of the fetched one")
    boot.add_argument("--append", metavar="TEXT", default="", help="after the default kernel command line")
    boot.add_argument("--memory", metavar="SIZE", type=size, help="guest RAM (default: 256M)")
    boot.add_argument(
        "--exec",
        dest="execute",
        metavar="CMD",
        help="run in the shell of the fetched initramfs; its status becomes ours",
    )
    boot.add_argument(
        "--add",
        metavar="HOST[:GUEST]",
        type=added,
        action="append",
        default=[],
        help="a host file or folder, put into the initramfs (repeatable)",
    )
    _add_common(boot)


def _add_load(commands: _Commands) -> None:
    load = _sub(commands, "load", "start an ELF, multiboot or flat image")
    load.add_argument(
        "image", metavar="IMAGE", nargs="?", help="the file; embedded or embedded32 for our own small kernel"
    )
    load.add_argument("--base", metavar="A", type=number, help="load address of a flat binary")
    load.add_argument("--entry", metavar="A", type=number, help="first instruction, instead of the image's own")
    load.add_argument("--bits", type=int, choices=(16, 32, 64), help="processor mode for a flat binary")
    load.add_argument("--memory", metavar="SIZE", type=size, help="guest RAM (default: 64M)")
    load.add_argument("--append", metavar="TEXT", default="", help="command line of a multiboot or embedded kernel")
    load.add_argument("--initrd", metavar="FILE", type=Path, help="module of a multiboot kernel")
    load.set_defaults(execute=None)
    _add_common(load)


def _add_common(sub: _Parser) -> None:
    """What every command that runs a guest takes, in the groups of its help."""
    _add_debugger(sub)
    _add_probes(sub)
    _add_script(sub)
    _add_files(sub)


def _add_debugger(sub: _Parser) -> None:
    stub = sub.add_argument_group("debugger")
    stub.add_argument(
        "--listen",
        metavar="ADDRESS",
        type=address,
        help=f"HOST:PORT, unix:PATH or - (default: {DEFAULT_LISTEN}; port 0 picks one)",
    )
    stub.add_argument("--no-listen", action="store_true", help="no debugger can attach")
    stub.add_argument("--wait", action="store_true", help="start stopped, until a debugger has come")
    stub.add_argument(
        "--trace-dir", metavar="DIR", type=Path, help="let debuggers write traces into this folder (trace save)"
    )
    stub.add_argument(
        "--serve-dir",
        metavar="DIR",
        type=Path,
        help="let debuggers read files of this folder (gdb: `remote get`, target:), and never beyond it",
    )
    stub.add_argument(
        "--threads",
        choices=("cpus", "tasks"),
        default="cpus",
        help="what a debugger's threads are: processors (default), or the tasks of a Linux guest",
    )
    stub.add_argument(
        "--observe",
        metavar="ADDRESS",
        type=endpoint,
        help="HOST:PORT or unix:PATH, where any number of clients may look, and change or stop nothing",
    )


def _add_probes(sub: _Parser) -> None:
    probes = sub.add_argument_group("probes")
    probes.add_argument(
        "--probe",
        metavar="DEF",
        action="append",
        default=[],
        help="a kprobe_events line, e.g. 'p:open do_sys_openat2 file=+0($arg2):string' (repeatable)",
    )
    probes.add_argument(
        "--probe-file", metavar="FILE", type=Path, action="append", default=[], help="such lines; # begins a comment"
    )
    probes.add_argument(
        "--early",
        action="store_true",
        help="arm at the first instruction, not when the kernel has done patching itself",
    )
    probes.add_argument(
        "--arm",
        choices=("auto", "int3", "hook"),
        default="auto",
        help="by an int3 and a slot, by hooks that change no byte but slow the machine, or by what fits (default)",
    )
    probes.add_argument(
        "--linux-limits", action="store_true", help="refuse the probes that the guest's own kernel would refuse"
    )
    probes.add_argument(
        "--object",
        metavar="FILE.o",
        dest="objects",
        type=Path,
        action="append",
        default=[],
        help="a relocatable object in the folder of --allow-scripts, for handlers of guest code (repeatable)",
    )
    probes.add_argument(
        "--allow-scripts",
        metavar="DIR",
        type=Path,
        help="let debuggers run Python files and load objects from this folder, as you",
    )
    probes.add_argument(
        "--sysroot",
        metavar="DIR",
        type=Path,
        help="copies of the guest's files, for the symbols of programs that are stripped or not in its memory",
    )
    probes.add_argument(
        "--trace",
        metavar="FILE",
        type=trace_target,
        help="hits: .txt or - for ftrace text, .jsonl, .pftrace, .parquet",
    )


def _add_script(sub: _Parser) -> None:
    script = sub.add_argument_group("console and script")
    script.add_argument(
        "--console",
        metavar="WHERE",
        type=console,
        help="stdio (Ctrl-A h helps), none, a file, or HOST:PORT for one client to connect to (default: stdio, "
        "or none where something else writes standard output)",
    )
    script.add_argument(
        "--send",
        metavar="'REGEX=>TEXT'",
        type=send,
        action="append",
        default=[],
        help="type TEXT when the console matches; in order (repeatable)",
    )
    script.add_argument("--until", metavar="REGEX", type=pattern, help="end with status 0 when the console matches")
    script.add_argument(
        "--budget", metavar="N", type=count, help="end after N instructions, with status 1 (K, M, G understood)"
    )
    script.add_argument(
        "--pace",
        choices=("real", "none"),
        help="idle time: as on the wall clock, or skipped (default: skipped where --until, --exec or --budget will "
        "end the run and nobody types)",
    )


def _add_files(sub: _Parser) -> None:
    files = sub.add_argument_group("files")
    files.add_argument("--snapshot", metavar="FILE", type=Path, help="save the machine when --until matches")
    files.add_argument(
        "--restore", metavar="FILE", type=Path, help="go on from a saved machine instead of starting one"
    )
    files.add_argument(
        "--summary", metavar="FILE", help="JSON at the end, - for here: how it ended, counts, RAM hash, probes"
    )
    files.add_argument("--log", metavar="TOPICS", type=topics, default=frozenset(), help=f"of {','.join(LOG_TOPICS)}")
    files.add_argument("--log-file", metavar="FILE", type=Path, help="where the log goes (default: standard error)")
    files.add_argument(
        "--log-rsp",
        metavar="FILE",
        type=Path,
        help="record debuggers' packets and what is typed, with their moments, for `gdbstub replay`",
    )


# ------------------------------------------------------------------------------------------------------------- parsing


def parse(arguments: Sequence[str] | None = None) -> Command:
    """What the command line asks for. SystemExit: 2 with one line for one that makes no sense, 0 for --help."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    given, unknown = parser().parse_known_args(words)
    given.command_line = tuple(words)
    if unknown:
        known = [option for action in given.parser._actions for option in action.option_strings]
        given.parser.error(f"{unknown[0]!r} is not known here{_hint(unknown[0].partition('=')[0], known)}")
    match given.command:
        case "boot":
            return _boot(given)
        case "load":
            return _load(given)
        case "fetch":
            return Fetch(given.arch, given.package, given.show, given.debug)
        case "drgn":
            return DrgnShell(given.snapshot)
        case "check":
            file = None if given.file == "-" else Path(given.file)
            return Check(file, given.kernel, given.kind, given.sysroot, given.each, given.json)
        case "symbols":
            if _names_package(given.glob) or "/" in given.glob:
                given.parser.error(f"{given.glob!r} is a KERNEL: which symbols of it? Add a GLOB, '*' for all")
            return Symbols(given.glob, given.kernel)
        case "report":
            return Report(given.file, given.flame)
        case "monitor":
            return MonitorCommand(given.address, " ".join(given.words) or "help")
        case "replay":
            return Replay(given.file)
        case _:
            return Demo()


def _names_package(text: str | None) -> bool:
    return text is not None and text.startswith("linux-image-") and not Path(text).exists()


def _boot(given: argparse.Namespace) -> Boot:
    fresh = {
        "KERNEL": given.kernel,
        "--initrd": given.initrd,
        "--append": given.append,
        "--memory": given.memory,
        "--add": given.add,
    }
    if _names_package(given.kernel):
        given.parser.error(
            f"KERNEL is a file, amd64 or i386: `gdbstub fetch --package '{given.kernel}' --print` gets the files of a "
            "package and says where they are"
        )
    run = _run_options(given, fresh)
    return Boot(run, given.kernel or "amd64", given.initrd, given.append, given.memory, tuple(given.add))


def _load(given: argparse.Namespace) -> Load:
    fresh = {
        "IMAGE": given.image,
        "--base": given.base,
        "--entry": given.entry,
        "--bits": given.bits,
        "--memory": given.memory,
        "--append": given.append,
        "--initrd": given.initrd,
    }
    if given.image is None and given.restore is None:
        given.parser.error("which IMAGE? Name a file, or embedded for our own small kernel")
    run = _run_options(given, fresh)
    return Load(
        run,
        given.image or "",
        given.base,
        given.entry,
        given.bits,
        given.memory,
        given.initrd,
        given.append,
    )


def _run_options(given: argparse.Namespace, fresh: dict[str, object]) -> RunOptions:
    """The common options; `fresh` are those of a machine that starts, with what was given for them."""
    _refuse_contradictions(given, fresh)
    listen = None if given.no_listen else given.listen or parse_address(DEFAULT_LISTEN)
    place = given.console
    if place is None:
        place = "none" if _standard_output(given) else "stdio"
    return RunOptions(
        listen=listen,
        observe=given.observe,
        threads=given.threads,
        wait=given.wait,
        probes=tuple(given.probe),
        probe_files=tuple(given.probe_file),
        objects=tuple(given.objects),
        allow_scripts=given.allow_scripts,
        serve_dir=given.serve_dir,
        sysroot=given.sysroot,
        trace_dir=given.trace_dir,
        early=given.early,
        arm=given.arm,
        linux_limits=given.linux_limits,
        trace=given.trace,
        console=place,
        sends=tuple(given.send),
        until=given.until,
        budget=given.budget,
        pace=given.pace,
        execute=given.execute,
        snapshot=given.snapshot,
        restore=given.restore,
        summary=given.summary,
        log=given.log,
        log_file=given.log_file,
        log_rsp=given.log_rsp,
        words=given.command_line,
    )


def _refuse_contradictions(given: argparse.Namespace, fresh: dict[str, object]) -> None:
    error = given.parser.error
    writers = _standard_output(given)
    if len(writers) > 1:
        error(f"{' and '.join(writers)} both write standard output: choose another place for one")
    if given.no_listen and given.listen is not None:
        error("--listen lets debuggers in, --no-listen lets none in: leave one out")
    if given.no_listen and given.wait:
        error("--wait waits for a debugger, --no-listen lets none in: leave one out")
    if given.early and not (given.probe or given.probe_file):
        error("--early is about probes: add --probe or --probe-file")
    if given.objects and given.allow_scripts is None:
        error("--object brings code of yours into the guest: add --allow-scripts DIR, the folder it lies in")
    if given.log_file is not None and not given.log:
        error(f"--log-file says where the log goes: add --log, of {','.join(LOG_TOPICS)}")
    if given.snapshot is not None and given.until is None:
        error("--snapshot saves when --until matches: add --until REGEX")
    if given.restore is not None:
        for name, value in fresh.items():
            if value not in (None, "", []):
                error(f"{name} is for a machine that starts, --restore goes on with a saved one: leave {name} out")
    _refuse_one_file_twice(given)


def _standard_output(given: argparse.Namespace) -> list[str]:
    """What the user asked to write standard output, each as it was written."""
    uses = {
        "--console stdio": given.console == "stdio",
        "--trace -": given.trace is not None and given.trace.path is None,
        "--listen -": isinstance(given.listen, Stdio),
        "--summary -": given.summary == "-",
    }
    return [name for name, used in uses.items() if used]


def _refuse_one_file_twice(given: argparse.Namespace) -> None:
    files = {
        "--console": given.console if isinstance(given.console, Path) else None,
        "--trace": given.trace.path if given.trace is not None else None,
        "--snapshot": given.snapshot,
        "--summary": Path(given.summary) if given.summary not in (None, "-") else None,
        "--log-file": given.log_file,
        "--log-rsp": given.log_rsp,
    }
    seen: dict[Path, str] = {}
    for name, path in files.items():
        if path is None or path.is_char_device():  # /dev/null, /dev/stderr take any number of writers
            continue
        if path in seen:
            given.parser.error(f"{seen[path]} and {name} both write {path}: choose another place for one")
        seen[path] = name
