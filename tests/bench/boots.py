"""Booting stock kernels: against qemu-system with TCG, the memory it takes, and coming back from a snapshot.

Rules: each boot of ours is a process of its own, so that its peak memory is its own and no boot warms the next. Kernels
come from the user's cache, or are fetched into it.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from emu import boot, restore
from emu.boot import KERNEL_MEMORY
from emu.iface import MachineError
from emu.images.fetch import fetch
from emu.images.linux import DEFAULT_APPEND
from emu.snapshot import Snapshot
from emu.stops import ConsoleMatch, Stop
from tests.bench.row import Effort, Row, Skipped, interleaved, seconds

FIRST, LAST = "Linux version", "Run /init"
_QEMU = {"amd64": ("qemu-system-x86_64", "Nehalem"), "i386": ("qemu-system-i386", "pentium3")}
_QEMU_LIMIT_S = 60


def boots(effort: Effort) -> Iterator[Row | Skipped]:
    """Both kernels up to init, then one of them out of a snapshot."""
    with tempfile.TemporaryDirectory() as folder:
        for name in _QEMU:
            try:
                yield from _boot_rows(name, effort, Path(folder, name))
            except MachineError as error:
                yield Skipped(f"boot {name}", str(error))
        saved = Path(folder, "amd64")
        if saved.exists():
            yield from _restore_rows(saved, effort)


def _boot_rows(name: str, effort: Effort, save_to: Path) -> Iterator[Row | Skipped]:
    files = fetch(name)
    peaks: list[int] = []

    def ours() -> float:
        duration, peak = _in_process(files.kernel, files.initramfs, save_to)
        peaks.append(peak)
        return duration

    what, limit = f"boot {name}, {FIRST!r} to {LAST!r}", "ratio 8"
    qemu, model = _QEMU[name]
    if shutil.which(qemu) is None:
        yield Skipped(f"boot {name} against {qemu}", f"{qemu} is not installed")
        yield Row(what, interleaved(effort.boots, ours)[0], "s")
    else:
        command = [qemu, "-accel", "tcg", "-cpu", model, "-m", str(KERNEL_MEMORY >> 20), "-nographic", "-no-reboot"]
        command += ["-nodefaults", "-serial", "stdio", "-kernel", str(files.kernel), "-initrd", str(files.initramfs)]
        command += ["-append", DEFAULT_APPEND]
        taken = interleaved(effort.boots, ours, lambda: _qemu_boot(command))
        yield Row(what, taken[0], "s", taken[1], "qemu-system, TCG", limit)
    most = (KERNEL_MEMORY >> 20) + 250
    yield Row(
        f"peak resident memory of that boot, {KERNEL_MEMORY >> 20} MiB of it RAM", max(peaks), "MiB", limit=f"{most}"
    )


def _in_process(kernel: Path, initramfs: Path, save_to: Path) -> tuple[float, int]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_boot, kernel, initramfs, save_to).result()


def _boot(kernel: Path, initramfs: Path, save_to: Path) -> tuple[float, int]:
    """-> (CPU seconds between the two lines, peak resident MiB of this process)."""
    machine = boot(kernel, initrd=initramfs)
    times: list[float] = []

    def first(_: object) -> Stop | None:
        times.append(time.process_time())
        return None

    machine.console.expect(FIRST, first)
    machine.console.expect(LAST, lambda match: ConsoleMatch(match.string))
    stop = machine.run(2_000_000_000)
    end = time.process_time()
    if not isinstance(stop, ConsoleMatch):
        raise MachineError(f"{kernel}: ended before {LAST!r}: {stop}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    if not save_to.exists():
        machine.save(save_to)
    return end - times[0], peak


def _qemu_boot(command: list[str]) -> float:
    """CPU seconds of all its threads between the two lines."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as qemu:
        assert qemu.stdout is not None
        started, limit = 0.0, time.monotonic() + _QEMU_LIMIT_S
        try:
            for line in qemu.stdout:
                if FIRST.encode() in line:
                    started = _cpu_seconds(qemu.pid)
                elif LAST.encode() in line:
                    return _cpu_seconds(qemu.pid) - started
                if time.monotonic() > limit:
                    break
            raise MachineError(f"{command[0]} did not reach {LAST!r} in {_QEMU_LIMIT_S} s")
        finally:
            qemu.kill()


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process: fields 14 and 15 of proc(5)'s stat."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _restore_rows(path: Path, effort: Effort) -> Iterator[Row]:
    yield _one("restore amd64 from disk, in a running process", lambda: restore(path), effort, "1")
    snapshot, machine = Snapshot.open(path), restore(path)
    yield _one("restore amd64 from memory", lambda: machine.restore(snapshot), effort, "0.3")


def _one(what: str, call: Callable[[], object], effort: Effort, limit: str) -> Row:
    return Row(what, interleaved(effort.rounds, lambda: seconds(call))[0], "s", limit=limit)
