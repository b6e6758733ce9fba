"""The monitor commands over small services: grammar, refusals, what reaches the services unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.arch import X86_64
from emu.iface import MachineError
from gdbstub.monitor import Monitor
from gdbstub.monitorservices import Services
from probes.errors import ProbeError
from tests.support.fake_machine import CODE, DATA, FakeMachine


class Recorder:
    """Every service at once: notes each call and answers with one line naming it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., list[str]]:
        def call(*values: Any) -> list[str]:
            self.calls.append((name, *values))
            return [f"did {name}"]

        return call


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def services(recorder: Recorder) -> Services:
    parts = {"probes": recorder, "trace": recorder, "inspector": recorder, "snapshots": recorder, "system": recorder}
    return Services(FakeMachine(X86_64), quit=lambda: recorder.calls.append(("quit",)), **parts)


@pytest.fixture
def monitor(services: Services) -> Monitor:
    return Monitor(services)


def lines(monitor: Monitor, text: str) -> Sequence[str]:
    answer = monitor.execute(text)
    assert not answer.refused, answer
    return answer.lines


def refusal(monitor: Monitor, text: str) -> str:
    answer = monitor.execute(text)
    assert answer.refused, answer
    return "\n".join(answer.lines)


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("info registers", ("lines", "registers")),
        ("info stats", ("lines", "stats")),
        ("snapshot save booted", ("save", "booted")),
        ("snapshot restore booted", ("restore", "booted")),
        ("snapshot list", ("list",)),
        ("ps", ("processes",)),
        ("maps 1", ("maps", 1)),
        ("files 0x10", ("files", 16)),
        ("lsmod", ("modules",)),
        ("dmesg", ("log",)),
        ("page-cache /a b", ("page_cache", "/a b")),
        ("kprobe list", ("list",)),
        ("kprobe info p1", ("info", "p1")),
        ("  kprobe   enable  p* ", ("enable", "p*")),
        ("kprobe disable all", ("disable", "all")),
        ("kprobe del p1", ("delete", "p1")),
        ("probe list", ("kernel_list",)),
        ("probe reset", ("reset",)),
        ("trace", ("lines", None)),
        ("trace 20", ("lines", 20)),
        ("trace on", ("enable", True)),
        ("trace off", ("enable", False)),
        ("trace clear", ("clear",)),
        ("trace save my file.txt", ("save", "my file.txt")),
        ("trace stream off", ("stream", None)),
        ("quit", ("quit",)),
    ],
)
def test_command_reaches_its_service(monitor: Monitor, recorder: Recorder, line: str, call: tuple[Any, ...]):
    """Each verb calls exactly one thing, with the user's words."""
    lines(monitor, line)
    assert recorder.calls == [call]


def test_definition_keeps_its_spaces_and_quotes(monitor: Monitor, recorder: Recorder):
    """DEF is the kernel's own line: nothing in it is an option or a quote of ours."""
    definition = 'p:g/e vfs_read  file=+0($arg1):string  s="a  b" --disabled'
    lines(monitor, f"kprobe add --disabled --arm hook {definition}")
    assert recorder.calls == [("add", "kprobe", definition, {"disabled": True, "arm": "hook"})]


@pytest.mark.parametrize("kind", ["kprobe", "kretprobe"])
def test_probes_take_the_options_of_the_interface(monitor: Monitor, recorder: Recorder, kind: str):
    """Whose hits count and what is called at one, each before the definition."""
    lines(monitor, f"{kind} add --pid 5 --comm sh* --pre before --post after r:e vfs_read")
    options = {"pid": "5", "comm": "sh*", "pre": "before", "post": "after"}
    assert recorder.calls == [("add", kind, "r:e vfs_read", options)]


def test_unknown_option_is_refused_with_a_suggestion(monitor: Monitor, recorder: Recorder):
    """Not taken for the start of the definition."""
    assert "did you mean --disabled?" in refusal(monitor, "kprobe add --disable p vfs_read")
    assert recorder.calls == []


def test_option_without_its_value_is_refused(monitor: Monitor):
    """At the end of the line."""
    assert refusal(monitor, "kprobe add --arm") == "--arm needs int3|hook"


def test_unknown_command_suggests_the_nearest(monitor: Monitor):
    """One line, with a way on."""
    known = "kprobe, probe, uprobe"
    assert refusal(monitor, "kprob list") == f"unknown command 'kprob'; did you mean {known}? (try `help`)"


def test_wrong_shape_shows_the_usage(monitor: Monitor):
    """Every form the verb has."""
    assert refusal(monitor, "snapshot keep x") == "usage: snapshot save|restore NAME\n       snapshot list"


def test_too_many_words_are_not_ignored(monitor: Monitor, recorder: Recorder):
    """`kprobe del a b` must not delete just a."""
    assert refusal(monitor, "kprobe del a b").startswith("usage:")
    assert recorder.calls == []


def test_help_lists_every_declared_grammar(monitor: Monitor):
    """The list is the declarations, so a new command cannot be missing from it."""
    shown = "\n".join(lines(monitor, "help"))
    assert all(command.grammar in shown for command in monitor.commands)
    assert lines(monitor, "") == lines(monitor, "help")


def test_help_of_one_command_shows_its_options(monitor: Monitor):
    """And nothing of the others."""
    shown = lines(monitor, "help kprobe")
    assert any("--arm int3|hook" in line for line in shown)
    assert not any("snapshot" in line for line in shown)


def test_help_of_further_words_is_of_what_begins_so(monitor: Monitor):
    """`help kprobe add` is the one grammar; words that lead nowhere get all of the verb's."""
    (grammar, options) = lines(monitor, "help kprobe add")
    assert grammar.startswith("kprobe add [OPTIONS] DEF")
    assert options.startswith("  OPTIONS: ")
    assert lines(monitor, "help kprobe del")[0].startswith("kprobe enable|disable|del")
    assert lines(monitor, "help kprobe nothing") == lines(monitor, "help kprobe")
    assert refusal(monitor, "help kprob add") == "no command 'kprob'; did you mean kprobe, probe, uprobe?"


def test_a_probe_error_is_shown_with_its_caret(services: Services):
    """The engine's own lines, not rephrased."""

    class Refusing(Recorder):
        def add(self, *_values: object) -> list[str]:
            raise ProbeError(22, "Unknown symbol", definition="p nosuch", column=2)

    text = refusal(Monitor(replace(services, probes=Refusing())), "kprobe add p nosuch")
    assert text == "Unknown symbol (EINVAL)\n  p nosuch\n    ^"


def test_a_machine_error_is_a_refusal(services: Services):
    """Any service may raise one."""

    class Refusing(Recorder):
        def save(self, *_values: object) -> list[str]:
            raise MachineError("no room for a snapshot")

    assert refusal(Monitor(replace(services, snapshots=Refusing())), "snapshot save x") == "no room for a snapshot"


@pytest.mark.parametrize("line", ["info mem", "kprobe list", "trace", "snapshot list", "quit", "xp/i 0"])
def test_a_missing_service_is_said(line: str):
    """A bare machine has none of them; the commands are still known."""
    assert len(Monitor(Services(FakeMachine(X86_64))).execute(line).lines) == 1
    assert Monitor(Services(FakeMachine(X86_64))).execute(line).refused


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (f"xp/2xw {DATA:#x}", [f"{DATA:016x}: 0x61746164 0x20666f20"]),
        (f"xp/1gx {DATA}", [f"{DATA:016x}: 0x20666f2061746164"]),
        (f"xp/2c {DATA:#x}", [f"{DATA:016x}: 'd' 'a'"]),
        (f"xp {DATA:#x}", [f"{DATA:016x}: 0x61746164"]),
        ("xp/5ub start", [f"{CODE:016x}: 144 255 192 144 255"]),
        ("xp/1db start_kernel+0x1", [f"{CODE + 7:016x}: -8"]),
        ("xp/9xb start", [f"{CODE:016x}: 0x90 0xff 0xc0 0x90 0xff 0xc0 0xeb 0xf8", f"{CODE + 8:016x}: 0x00"]),
    ],
)
def test_physical_memory_in_the_formats_of_qemu(monitor: Monitor, line: str, shown: list[str]):
    """Count, format and size in either order; numbers and symbols as addresses."""
    assert list(lines(monitor, line)) == shown


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("xp/4q 0", "format /4q"),
        ("xp/xx 0", "format /xx"),
        ("xp/99999g 0", "at most 65536 bytes"),
        ("xp/4xw 0x999000", "cannot read memory at 0x999000"),
        ("xp/4xw nosuch", "no symbol 'nosuch'"),
        ("xp/4xw start+q", "'q' is no offset"),
        ("trace many", "'many' is no number"),
        ("trace stream", "usage: trace stream on|off"),
        ("trace " + "9" * 5000, "is no number of records"),
        ("symbols nosuch*", "no symbol matches"),
        ("symbols start[", "a [ has its ] behind it"),
        ("symbols start[x[]", "no symbol matches 'start[x[]'"),
        ("trace stream on", "this client cannot be sent lines"),
    ],
)
def test_bad_operands_are_refused_in_one_line(monitor: Monitor, line: str, reason: str):
    """Each names what is wrong."""
    text = refusal(monitor, line)
    assert reason in text
    assert "\n" not in text


def test_symbols_are_listed_by_glob(monitor: Monitor):
    """Address, size, name."""
    assert lines(monitor, "symbols start_*") == (f"{CODE + 6:016x}      2 start_kernel",)


def test_stream_hands_the_sink_to_the_trace(monitor: Monitor, recorder: Recorder):
    """The sink is the client's own."""
    sink: list[str] = []
    monitor.execute("trace stream on", stream=sink.append)
    assert recorder.calls == [("stream", sink.append)]


@given(st.text(max_size=60))
def test_any_line_is_answered(line: str):
    """No input raises."""
    recorder = Recorder()
    monitor = Monitor(Services(FakeMachine(X86_64), probes=recorder, trace=recorder, snapshots=recorder))
    assert isinstance(monitor.execute(line).lines, tuple)
