"""What `monitor` commands work on, machine side: topics of `info`, named snapshots, the trace as text.

Rules: called in the machine's thread; implements the protocols of `monitorservices`. Text out, one line an item.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from emu.boot import GuestMachine
from emu.iface import MachineError
from emu.insn import MAX_INSN_SIZE, InvalidInstruction, decode
from emu.paging import Page, mappings
from emu.snapshot import CHUNK, Snapshot
from gdbstub.monitorservices import Scripts, Services
from gdbstub.threads import ThreadChoice
from gdbstub.tracefiles import TraceFolder
from probes.linux import report
from probes.manager import Manager
from probes.trace import Record
from probes.tracefs import Tracefs

_MAX_LINES = 4_000  # of one reply
_MAX_INSTRUCTIONS = 1_000  # of one disassembly
_MAX_SNAPSHOTS = 8  # each may hold as much as the guest's RAM


def services(
    machine: GuestMachine,
    probes: Manager,
    *,
    quit: Callable[[], None],
    folder: TraceFolder | None = None,
    scripts: Scripts | None = None,
    threads: ThreadChoice | None = None,
) -> Services:
    """All there is for a machine and its probes; `folder` is where traces may be saved."""
    return Services(
        machine=machine,
        probes=probes,
        trace=TraceText(probes, folder),
        tracefs=Tracefs(probes),
        inspector=MachineInspector(machine, probes),
        snapshots=NamedSnapshots(machine),
        disassemble=disassembler(machine),
        scripts=scripts,
        system=GuestSystem(probes),
        types=lambda: probes.types,
        threads=threads,
        quit=quit,
    )


class MachineInspector:
    """Implements monitorservices.Inspector."""

    def __init__(self, machine: GuestMachine, probes: Manager) -> None:
        self._machine = machine
        self._probes = probes
        self._started = time.monotonic()
        self._instructions_then = machine.instructions

    def lines(self, topic: str, /) -> Sequence[str]:
        """Of one of monitorservices.TOPICS."""
        return {
            "registers": self._registers,
            "mem": self._mem,
            "tlb": self._tlb,
            "pic": self._pic,
            "timers": self._timers,
            "stats": self._stats,
        }[topic]()

    def _registers(self) -> list[str]:
        machine, cpu = self._machine, self._machine.cpu
        read = machine.registers.read
        wide = cpu.long_mode
        names = machine.registers.arch.names
        general = names[: names.index("eflags")]
        width = 16 if wide else 8
        cells = [f"{name:>3} {read(name):0{width}x}" for name in general]
        lines = ["  ".join(cells[i : i + 4]) for i in range(0, len(cells), 4)]
        lines.append(
            f"eflags {cpu.eflags:08x}  cpl {cpu.cpl}  {cpu.bits}-bit code  {'halted' if machine.halted else 'running'}"
        )
        for index, name in enumerate(("es", "cs", "ss", "ds", "fs", "gs")):
            part = cpu.segment(index)
            lines.append(f"{name} {part.selector:04x}  base {part.base:0{width}x}  limit {part.limit:08x}")
        for name in ("ldt", "tr", "gdt", "idt"):
            part = cpu.system_segment(name)
            lines.append(f"{name:3} {part.selector:04x}  base {part.base:0{width}x}  limit {part.limit:08x}")
        lines.append("  ".join(f"cr{i} {cpu.cr(i):0{width}x}" for i in (0, 2, 3, 4)) + f"  efer {cpu.efer:x}")
        return lines

    def _mem(self) -> list[str]:
        """Ranges of equal rights, as QEMU's `info mem` shows them."""
        lines: list[str] = []
        start = end = 0
        rights = ""
        for vaddr, page in self._pages():
            if vaddr == end and _rights(page) == rights:
                end += page.size
                continue
            if rights:
                lines.append(f"{start:016x}-{end:016x} {end - start:016x} {rights}")
            start, end, rights = vaddr, vaddr + page.size, _rights(page)
            if len(lines) >= _MAX_LINES:
                return [*lines, f"... more than {_MAX_LINES} ranges"]
        if rights:
            lines.append(f"{start:016x}-{end:016x} {end - start:016x} {rights}")
        return lines

    def _tlb(self) -> list[str]:
        lines: list[str] = []
        for vaddr, page in self._pages():
            if len(lines) >= _MAX_LINES:
                return [*lines, f"... more than {_MAX_LINES} pages"]
            lines.append(f"{vaddr:016x}: {page.paddr:016x} {_rights(page)} {page.size >> 10}K")
        return lines

    def _pages(self) -> Iterator[tuple[int, Page]]:
        window = self._machine.window
        for vaddr, page in mappings(self._machine.ram, self._machine.cpu.tables()):
            if not window.contains(vaddr):
                yield vaddr, page

    def _pic(self) -> list[str]:
        return self._machine.devices.pic.lines()

    def _timers(self) -> list[str]:
        clock = self._machine.clock
        deadline = clock.next_deadline_ns()
        lines = [f"now {clock.now_ns:,} ns, {clock.instructions:,} instructions"]
        lines.append("no timer is set" if deadline is None else f"next timer in {deadline - clock.now_ns:,} ns")
        return [*lines, *self._machine.devices.pit.lines()]

    def _stats(self) -> list[str]:
        machine = self._machine
        elapsed = max(time.monotonic() - self._started, 1e-9)
        done = machine.instructions - self._instructions_then
        hits = sum(status.hits for status in self._probes.status())
        return [
            f"instructions {machine.instructions:,}",
            f"virtual time {machine.clock.now_ns / 1e9:.6f} s",
            f"speed {done / elapsed / 1e6:.1f} MIPS over {elapsed:.1f} s, idle time included",
            f"probe hits {hits:,}, {hits / elapsed:,.0f} a second",
            f"time in probe handlers {machine.handler_ns / 1e9:.3f} s",
        ]


def disassembler(machine: GuestMachine) -> Callable[[int, int], Sequence[str]]:
    """What `xp/i` is made of: `count` instructions from a physical address on, as the processor's mode is now."""

    def disassemble(paddr: int, count: int) -> Sequence[str]:
        lines = []
        for _ in range(min(count, _MAX_INSTRUCTIONS)):
            room = max(machine.ram.size - paddr, 1)  # so that an address beyond RAM is refused like any other
            data = machine.memory.read_physical(paddr, min(MAX_INSN_SIZE, room))
            try:
                insn = decode(data, paddr, machine.bits)
            except InvalidInstruction:
                lines.append(f"{paddr:016x}: (bad)")
                break
            lines.append(f"{paddr:016x}: {insn.text}")
            paddr = insn.end
        return lines

    return disassemble


def _rights(page: Page) -> str:
    return ("u" if page.user else "-") + "r" + ("w" if page.writable else "-") + ("x" if page.executable else "-")


class GuestSystem:
    """Implements monitorservices.System. The guest's operating system is looked for when it is first asked about."""

    def __init__(self, probes: Manager) -> None:
        self._probes = probes

    def processes(self) -> Sequence[str]:
        return report.processes(self._probes.linux)

    def maps(self, pid: int, /) -> Sequence[str]:
        return report.maps(self._probes.linux, pid)

    def files(self, pid: int, /) -> Sequence[str]:
        return report.files(self._probes.linux, pid)

    def modules(self) -> Sequence[str]:
        return report.modules(self._probes.linux)

    def log(self) -> Sequence[str]:
        return report.log(self._probes.linux)

    def page_cache(self, path: str, /) -> Sequence[str]:
        return report.page_cache(self._probes.linux, path)


class NamedSnapshots:
    """Implements monitorservices.Snapshots: states kept in memory, by name. A debugger writes no host file."""

    def __init__(self, machine: GuestMachine) -> None:
        self._machine = machine
        self._kept: dict[str, Snapshot] = {}

    def save(self, name: str, /) -> Sequence[str]:
        """MachineError beyond the limit."""
        if name not in self._kept and len(self._kept) >= _MAX_SNAPSHOTS:
            raise MachineError(f"{_MAX_SNAPSHOTS} snapshots are kept already: use one of their names again")
        self._kept[name] = self._machine.snapshot()
        return [f"{name}: saved at instruction {self._machine.instructions:,}"]

    def restore(self, name: str, /) -> Sequence[str]:
        if name not in self._kept:
            raise MachineError(f"no snapshot {name!r}: " + (", ".join(sorted(self._kept)) or "none is kept"))
        self._machine.restore(self._kept[name])
        done = f"{name}: restored at instruction {self._machine.instructions:,}"
        return [done, "gdb shows the registers of before until `maintenance flush register-cache`"]

    def list(self) -> Sequence[str]:
        return [
            f"{name}  instruction {snapshot.state['instructions']:,}  {len(snapshot.ram) * CHUNK >> 20} MiB"
            for name, snapshot in sorted(self._kept.items())
        ] or ["no snapshots"]


class TraceText:
    """Implements monitorservices.Trace; `folder` is where traces may be saved."""

    def __init__(self, probes: Manager, folder: TraceFolder | None = None) -> None:
        self._probes = probes
        self._ring = probes.trace
        self._folder = folder
        self._unsubscribe: Callable[[], None] | None = None

    def lines(self, count: int | None, /) -> Sequence[str]:
        """The newest `count`, in ftrace's format, oldest first."""
        lost = [f"# {self._ring.overwritten:,} older records were overwritten"] if self._ring.overwritten else []
        return [*lost, *(record.text() for record in self._ring.last(count))]

    def clear(self) -> None:
        self._ring.clear()

    def enable(self, on: bool, /) -> None:
        self._ring.enabled = on

    def save(self, path: str, /) -> Sequence[str]:
        """Refused: a debugger may not write host files unless the person who started the server allowed a folder."""
        if self._folder is None:
            raise MachineError(f"cannot save to {path}: the server was started without --trace-dir DIR")
        return [f"saved to {self._folder.save(path, self._ring.last(), self._probes.unfinished())}"]

    def stream(self, sink: Callable[[str], None] | None, /) -> None:
        """Each new record to `sink`; None ends it."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        if sink is not None:
            show = sink

            def tell(record: Record) -> None:
                show(record.text())

            self._unsubscribe = self._ring.subscribe(tell)
