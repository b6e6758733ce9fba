"""The command line, declared once: `--help`, usage errors and the README's option table come from here.

Rules: standard library only; nothing is opened or started, only checked for sense. A wrong command line ends with
status 2 and one line that says what to write instead.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from gdbstub.address import AddressError, parse_address

LOG_TOPICS = ("int", "syscall", "io", "rsp")
_TRACE_SUFFIXES = {".txt": "text", ".jsonl": "jsonl"}
_SIZE = re.compile(r"(\d+)([KMG]?)i?B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

EXIT_STATUS = """exit status:
  0  matched, powered off, --exec succeeded, or ended by the user
  1  ended without the match (budget used up, halted for good); --exec gives the command's own status
  2  usage, unreadable or wrong file
  3  the guest crashed (panic, triple fault)
  4  our own defect, with a report to send
"""


def size(text: str) -> int:
    """Bytes: 256M, 1G, 65536."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 256M or 1G")
    return int(match[1]) * _UNITS[match[2].upper()]


def number(text: str) -> int:
    """Decimal, 0x hexadecimal or 0 octal; K, M and G count in thousands."""
    scale = {"K": 1_000, "M": 1_000_000, "G": 1_000_000_000}.get(text[-1:].upper(), 1)
    try:
        return int((text[:-1] if scale > 1 else text).replace("_", ""), 0) * scale
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def pattern(text: str) -> str:
    """A regular expression, checked."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def send(text: str) -> tuple[str, str]:
    """REGEX=>TEXT; in TEXT \\n, \\t, \\e, \\\\ and \\xHH are understood."""
    awaited, arrow, typed = text.partition("=>")
    if not arrow:
        raise argparse.ArgumentTypeError(f"{text!r}: write 'REGEX=>TEXT'")
    escapes = {"n": "\n", "r": "\r", "t": "\t", "e": "\x1b", "\\": "\\"}
    typed = re.sub(
        r"\\(x[0-9a-fA-F]{2}|[nrte\\])",
        lambda m: chr(int(m[1][1:], 16)) if m[1][0] == "x" else escapes[m[1]],
        typed,
    )
    return pattern(awaited), typed


def added(text: str) -> tuple[Path, str]:
    """HOST[:GUEST]."""
    host, _, guest = text.partition(":")
    path = Path(host)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{host!r} does not exist")
    return path, guest or "/" + path.resolve().name


def address(text: str) -> object:
    try:
        return parse_address(text)
    except AddressError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def topics(text: str) -> frozenset[str]:
    chosen = frozenset(text.split(","))
    if not chosen <= set(LOG_TOPICS):
        raise argparse.ArgumentTypeError(f"{text!r}: a comma-separated list of {', '.join(LOG_TOPICS)}")
    return chosen


def trace_file(text: str) -> tuple[str, str]:
    """(file or -, format)."""
    if text == "-":
        return text, "text"
    suffix = Path(text).suffix
    if suffix not in _TRACE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r}: the suffix picks the format, one of {', '.join(_TRACE_SUFFIXES)}")
    return text, _TRACE_SUFFIXES[suffix]


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="gdbstub",
        description="Boot a stock Linux kernel, or any image, under emulation; attach stock gdb; probe any function.",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_boot(commands)
    _add_load(commands)
    _sub(commands, "demo", "the guided main job, unattended: boot, attach gdb, set a kprobe, watch file names arrive")
    fetch = _sub(commands, "fetch", "a kernel and BusyBox from Debian's packages into the cache, as any user")
    fetch.add_argument("arch", nargs="?", choices=("amd64", "i386"), default="amd64", help="default: %(default)s")
    fetch.add_argument("--package", metavar="NAME", help="this package, or the newest that a pattern matches")
    fetch.add_argument("--print", dest="show", action="store_true", help="print the files' paths, one a line")
    monitor = _sub(commands, "monitor", "a monitor command without gdb; the guest runs on")
    monitor.add_argument("address", metavar="HOST:PORT", type=address, help="where a stub listens; unix:PATH too")
    monitor.add_argument("words", metavar="COMMAND", nargs=argparse.REMAINDER, help="default: help")
    return top


def _sub(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_boot(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    boot = _sub(commands, "boot", "boot a Linux kernel")
    boot.add_argument(
        "kernel",
        metavar="KERNEL",
        nargs="?",
        default="amd64",
        help="a bzImage or vmlinux file, or amd64 or i386 for the fetched one with its initramfs (default: amd64)",
    )
    boot.add_argument("--initrd", metavar="FILE", type=Path, help="an initramfs, instead of the fetched one")
    boot.add_argument("--append", metavar="TEXT", default="", help="after the default kernel command line")
    boot.add_argument("--memory", metavar="SIZE", type=size, default=256 << 20, help="guest RAM (default: 256M)")
    boot.add_argument("--exec", dest="execute", metavar="CMD", help="run in the guest's shell; its status becomes ours")
    boot.add_argument(
        "--add",
        metavar="HOST[:GUEST]",
        type=added,
        action="append",
        default=[],
        help="a host file or folder, put into the initramfs (repeatable)",
    )
    _add_common(boot)


def _add_load(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    load = _sub(commands, "load", "start an ELF, multiboot or flat image")
    load.add_argument("image", metavar="IMAGE", help="the file; embedded or embedded32 for our own small kernel")
    load.add_argument("--base", metavar="A", type=number, help="load address of a flat binary")
    load.add_argument("--entry", metavar="A", type=number, help="first instruction, instead of the image's own")
    load.add_argument("--bits", type=int, choices=(16, 32, 64), help="processor mode for a flat binary")
    load.add_argument("--memory", metavar="SIZE", type=size, default=64 << 20, help="guest RAM (default: 64M)")
    _add_common(load)


def _add_common(sub: argparse.ArgumentParser) -> None:
    stub = sub.add_argument_group("debugger")
    stub.add_argument(
        "--listen",
        metavar="ADDRESS",
        type=address,
        help="HOST:PORT, unix:PATH or - (default: 127.0.0.1:1234; port 0 picks one)",
    )
    stub.add_argument("--no-listen", action="store_true", help="no debugger can attach")
    stub.add_argument("--wait", action="store_true", help="start stopped, until a debugger has come")
    probes = sub.add_argument_group("probes")
    probes.add_argument(
        "--probe",
        metavar="DEF",
        action="append",
        default=[],
        help="a kprobe_events line, e.g. 'p:open do_sys_openat2 file=+0($arg2):ustring' (repeatable)",
    )
    probes.add_argument("--probe-file", metavar="FILE", type=Path, action="append", default=[], help="such lines")
    probes.add_argument(
        "--early",
        action="store_true",
        help="arm at the first instruction, not when the kernel has done patching itself",
    )
    probes.add_argument(
        "--trace", metavar="FILE", type=trace_file, help="hits as they come: .txt, .jsonl, or - for text"
    )
    console = sub.add_argument_group("console and script")
    console.add_argument(
        "--console",
        metavar="WHERE",
        default="stdio",
        help="stdio (Ctrl-A h helps), none, a file, or HOST:PORT to connect to (default: stdio)",
    )
    console.add_argument(
        "--send",
        metavar="'REGEX=>TEXT'",
        type=send,
        action="append",
        default=[],
        help="type TEXT when the console matches; in order (repeatable)",
    )
    console.add_argument("--until", metavar="REGEX", type=pattern, help="end with status 0 when the console matches")
    console.add_argument("--budget", metavar="N", type=number, help="end after N instructions (K, M, G understood)")
    console.add_argument(
        "--pace",
        choices=("real", "none"),
        help="idle time: as on the wall clock, or skipped (default: skipped for a script, real for a person)",
    )
    files = sub.add_argument_group("files")
    files.add_argument("--snapshot", metavar="FILE", type=Path, help="save the machine when --until matches")
    files.add_argument(
        "--restore", metavar="FILE", type=Path, help="go on from a saved machine instead of starting one"
    )
    files.add_argument("--summary", metavar="FILE", help="JSON at the end: how it ended, counts, RAM hash, probes")
    files.add_argument("--log", metavar="TOPICS", type=topics, default=frozenset(), help=f"of {','.join(LOG_TOPICS)}")
    files.add_argument("--log-file", metavar="FILE", type=Path, help="where the log goes (default: standard error)")


def check(top: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what contradicts itself; ends the program with status 2."""
    if options.command not in ("boot", "load"):
        return
    if options.listen is None and not options.no_listen:
        options.listen = parse_address("127.0.0.1:1234")
    if options.no_listen:
        options.listen = None
        if options.wait:
            top.error("--wait waits for a debugger, --no-listen lets none in")
    writers = [
        name
        for name, uses in (
            ("--console stdio", options.console == "stdio"),
            ("--trace -", options.trace is not None and options.trace[0] == "-"),
            ("--listen -", options.listen is not None and str(options.listen) == "standard input and output"),
            ("--summary -", options.summary == "-"),
        )
        if uses
    ]
    if len(writers) > 1:
        top.error(f"{' and '.join(writers)} both write standard output: choose another place, e.g. --console none")
    if options.snapshot is not None and options.until is None:
        top.error("--snapshot saves when --until matches: say --until REGEX")
    if options.restore is not None and (getattr(options, "add", None) or getattr(options, "append", "")):
        top.error("--add and --append are for a kernel that starts; --restore goes on with one that runs")
