"""Trace events: what a hit costs that is fetched, filtered, counted and recorded, against the kernel's own ftrace.

Rules: the yardstick is a stock kernel that traces itself under QEMU's TCG, where that is installed: wall time of the
same reads with and without its probe.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import IO, Final

from probes.manager import Manager
from tests.bench.guests import loop
from tests.bench.row import Effort, Row, Skipped, interleaved, seconds
from tests.support.images import fetch_real_kernel
from tests.support.trapping import CODE

_ARGUMENTS: Final = ("a=%ax", "b=%bx:u32", "c=%cx:s16", "d=%dx", "e=%si:x8", "f=%di:u64", "g=%bp", "h=%sp")
_CALLS: Final = "l: call f; jmp l; f: add rax, rbx; ret"
_FUNCTION: Final = CODE + 7  # f: after a 5-byte call and a 2-byte jmp
_ROUND: Final = 4  # instructions
_HITS: Final = 20_000
_READS: Final = 20_000
_QEMU: Final = "qemu-system-x86_64"
_BOOT_SECONDS: Final = 240.0


def events(effort: Effort) -> Iterator[Row | Skipped]:
    """A function of two instructions that is called again and again."""
    cases: list[tuple[str, int, str, str]] = [
        ("event without arguments, recorded", 0, "", ""),
        ("event with 3 arguments, recorded", 3, "", ""),
        ("event with 8 arguments, recorded", 8, "", ""),
        ("event whose filter rejects it", 3, "a == 12345", ""),
        ("event counted by a histogram", 3, "", "hist:keys=b:vals=a"),
    ]
    taken = interleaved(effort.rounds, *(_ours(count, filtered, trigger) for _, count, filtered, trigger in cases))
    theirs = {} if shutil.which(_QEMU) is None else _in_guest([case[1:] for case in cases])
    for (what, *case), ours in zip(cases, taken, strict=True):
        yield Row(f"{what}: hits", 1 / ours, "/s", theirs.get(tuple(case)), "ftrace in the guest, QEMU TCG")
    if not theirs:
        yield Skipped("events against ftrace under QEMU", f"{_QEMU} is not installed")


def _ours(count: int, filtered: str, trigger: str) -> Callable[[], float]:
    """Seconds of each hit, the bare loop included."""
    machine = loop(_CALLS)
    manager = Manager(machine)
    manager.add("kprobe", f"p:e {_FUNCTION:#x} {' '.join(_ARGUMENTS[:count])}")
    event = manager.events.get("kprobes/e")
    assert event is not None  # as just defined
    if filtered:
        event.set_filter(filtered)
    if trigger:
        event.triggers.write(trigger, append=True)
        manager.disable("e")
    return lambda: seconds(lambda: machine.run(_HITS * _ROUND)) / _HITS


def _in_guest(cases: list[tuple[int, str, str]]) -> dict[tuple[int | str, ...], float]:
    """Hits a second of each case; of reads that a shell's dd makes, less what they take without a probe."""
    files = fetch_real_kernel("amd64 6.12").fetched
    command = [_QEMU, "-accel", "tcg", "-m", "512", "-nographic", "-no-reboot", "-kernel", str(files.kernel)]
    command += ["-initrd", str(files.initramfs), "-append", "console=ttyS0 quiet"]
    found: dict[tuple[int | str, ...], float] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as qemu:
        try:
            guest = _Shell(qemu)
            guest.run("mkdir -p /t; mount -t tracefs t /t")
            work = f"dd if=/dev/zero of=/dev/null bs=1 count={_READS}"
            guest.timed(work)
            bare = min(guest.timed(work) for _ in range(3))
            for count, filtered, trigger in cases:
                guest.run(f"echo 'p:e vfs_read {' '.join(_ARGUMENTS[:count])}' > /t/kprobe_events")
                if filtered:
                    guest.run(f"echo '{filtered}' > /t/events/kprobes/e/filter")
                if trigger:
                    guest.run(f"echo '{trigger}' > /t/events/kprobes/e/trigger")
                else:
                    guest.run("echo 1 > /t/events/kprobes/e/enable")
                taken = min(guest.timed(work) for _ in range(3))
                found[count, filtered, trigger] = _READS / max(taken - bare, 1e-6)
                guest.run(f"echo '!{trigger}' > /t/events/kprobes/e/trigger; echo 0 > /t/events/kprobes/e/enable")
                guest.run("echo > /t/kprobe_events")
        finally:
            with contextlib.suppress(ProcessLookupError):
                qemu.kill()
    return found


class _Shell:
    """The shell of a guest that QEMU runs, on its serial line."""

    def __init__(self, qemu: subprocess.Popen[bytes]) -> None:
        assert qemu.stdin is not None  # both are pipes
        assert qemu.stdout is not None
        self._in: IO[bytes] = qemu.stdin
        self._out = qemu.stdout.fileno()
        self._until(rb"/ # ", _BOOT_SECONDS)

    def run(self, command: str) -> None:
        self._in.write(f"{command}; echo do''ne\n".encode())
        self._until(rb"done\r\n", _BOOT_SECONDS)

    def timed(self, command: str) -> float:
        """Wall seconds."""
        began = time.perf_counter()
        self.run(command)
        return time.perf_counter() - began

    def _until(self, pattern: bytes, limit: float) -> None:
        seen, end = b"", time.monotonic() + limit
        while re.search(pattern, seen) is None:
            ready, _, _ = select.select([self._out], [], [], max(end - time.monotonic(), 0))
            piece = os.read(self._out, 4096) if ready else b""
            if not piece:
                raise RuntimeError(f"the guest under QEMU does not answer: {seen[-200:]!r}")
            seen += piece
