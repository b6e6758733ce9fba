"""A machine from a kernel, an image or a snapshot: the parts put together by what the guest is.

Rules: the composition that Python users and the command line share. What is known of a Linux guest from outside (where
it panics, where it switches off, when it has finished patching its own text) is kept here as watches on functions; the
machine itself knows nothing of Linux.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emu.hostfile import read_file
from emu.iface import ImageError, MachineError
from emu.images import facts, initramfs
from emu.images.cache import Progress, quiet
from emu.images.detect import load_image, load_kernel
from emu.images.embedded import embedded_guest
from emu.images.fetch import DEFAULT_PACKAGES, fetch
from emu.images.plan import Image, Section
from emu.machine import Machine
from emu.patching import PATCHERS, PatchingGuard
from emu.snapshot import Snapshot, check_members, check_row
from emu.stops import GuestExit, Panic, PowerOff, Stop
from emu.symbols import Symbol, SymbolTable, kallsyms, pack_symbols, unpack_symbols

KERNEL_MEMORY = 256 << 20
IMAGE_MEMORY = 64 << 20
_INITRAMFS_LIMIT = 1 << 30

# After mark_readonly() in kernel_init(), in the order they are called (Linux 5.10 to 6.12, init/main.c): the first that
# exists tells that alternatives, static calls, jump labels and ftrace nops of the boot are done.
_SETTLED_AT = ("rcu_end_inkernel_boot", "do_sysctl_args", "run_init_process")
_POWER_OFF_AT = ("machine_power_off", "machine_halt")

_ENDBR = (b"\xf3\x0f\x1e\xfa", b"\xf3\x0f\x1e\xfb")
_NOP5 = b"\x0f\x1f\x44\x00\x00"


@dataclass
class Guest:
    """What runs in a machine. `settled`: it no longer patches its own text (see `on_settled`)."""

    kind: str  # "linux", "elf", "multiboot", "flat", "embedded"
    title: str
    bits: int
    virtual_offset: int = 0
    build_id: bytes | None = None
    sections: tuple[Section, ...] = ()
    facts_key: str = ""  # of the kernel's unwind tables and types in the cache
    settled: bool = True
    crashed: bool = False  # it has entered its panic
    elf: Path | None = None  # the file it was loaded from, where that has DWARF
    _listeners: list[Callable[[], None]] = field(default_factory=list)

    def frames(self) -> bytes:
        """Call frame information for debuggers (.debug_frame), empty where this guest has none."""
        return facts.read(self.facts_key, facts.FRAMES)

    def btf(self) -> bytes:
        """The kernel's own type information (.BTF), empty where it has none."""
        return facts.read(self.facts_key, facts.BTF)

    def debug_image(self) -> bytes:
        """The ELF file with DWARF that it was loaded from, empty where there is none, or none any more."""
        try:
            return b"" if self.elf is None else self.elf.read_bytes()
        except OSError:
            return b""

    def on_settled(self, call: Callable[[], None]) -> None:
        """Call once the guest is done patching itself; at once if it is."""
        if self.settled:
            call()
        else:
            self._listeners.append(call)

    def settle(self) -> None:
        """Say so: `on_settled` listeners are called, in order, in the machine's thread."""
        self.settled = True
        listeners, self._listeners = self._listeners, []
        for call in listeners:
            call()


class GuestMachine(Machine):
    """A Machine that knows what it runs."""

    guest: Guest

    def snapshot(self, about: Mapping[str, Any] | None = None) -> Snapshot:
        """As Machine.snapshot, with everything `restore` needs to go on in another machine."""
        return super().snapshot({**_describe(self), **(about or {})})

    def restore(self, snapshot: Snapshot) -> None:
        """As Machine.restore; what is known of the guest goes back with it."""
        super().restore(snapshot)
        about = snapshot.state.get("about", {})
        self.guest.crashed = False
        if self.guest.settled and not about.get("settled", True):
            self.guest.settled = False
            _watch_settling(self)

    def save(self, path: Path) -> None:
        """The snapshot as a file, for another process; OSError as the file system says."""
        self.snapshot().save(path)


# ------------------------------------------------------------------------------------------------------------- starting


def boot(
    kernel: str | Path = "amd64",
    *,
    initrd: Path | None = None,
    append: str = "",
    memory: int = KERNEL_MEMORY,
    add: Sequence[tuple[Path, str]] = (),
    command: str | None = None,
    progress: Progress = quiet,
) -> GuestMachine:
    """A Linux kernel, a file or one of DEFAULT_PACKAGES' names, loaded and about to run its first instruction.

    A named kernel is fetched into the cache if it is not there, and gets the fetched initramfs unless `initrd` is
    given. `add` puts (host path, guest path) into it, `command` is run by its shell. ImageError, FetchError.
    """
    archive = b""
    if str(kernel) in DEFAULT_PACKAGES:
        fetched = fetch(str(kernel), progress=progress)
        path = fetched.kernel
        initrd = initrd or fetched.initramfs
    else:
        path = Path(kernel)
    if initrd is not None:
        archive = read_file(initrd, _INITRAMFS_LIMIT)
        if not archive:
            raise ImageError(str(initrd), "the file is empty")
    if command is not None:
        archive = bytes(archive) + bytes(-len(archive) % 4) + initramfs.command_archive(command)
    if add:
        archive = initramfs.append(archive, add)
    image = load_kernel(str(path), read_file(path), initrd=archive, append=append, memory=memory)
    if image.kernel is None:
        raise ImageError(str(path), "not a Linux kernel")
    symbols = _symbols(image, progress)
    machine = GuestMachine(memory, symbols=symbols, long_mode=image.kernel.bits == 64)
    known = image.kernel
    machine.guest = Guest(
        "linux",
        known.banner.strip() or str(path),
        known.bits,
        known.virtual_offset,
        known.build_id,
        known.sections,
        facts.keep(known, image.path, list(symbols), progress),
        settled=False,
    )
    machine.power_on(image)
    _watch_linux(machine)
    if command is not None:
        expect_status(machine)
    return machine


def expect_status(machine: GuestMachine) -> None:
    """End a run with GuestExit when the guest's shell reports the status of a command; see `initramfs.exec_line`."""
    machine.console.expect(initramfs.EXEC_STATUS.pattern, lambda match: GuestExit(int(match[1])))


_EMBEDDED = {"embedded": 64, "embedded32": 32}
"""What the command line calls our own kernel, with its bits."""


def load(
    path: str | Path,
    *,
    base: int | None = None,
    entry: int | None = None,
    bits: int | None = None,
    memory: int = IMAGE_MEMORY,
    initrd: Path | None = None,
    append: str = "",
) -> GuestMachine:
    """An ELF, multiboot or flat image, about to run its first instruction. ImageError."""
    module = read_file(initrd) if initrd is not None else b""
    name = str(path)
    if name in _EMBEDDED and not Path(path).exists():
        raise ImageError(name, f"no such file; the embedded guest is boot_embedded({_EMBEDDED[name]})")
    data = read_file(Path(path))
    image = load_image(name, data, memory=memory, base=base, entry=entry, bits=bits, initrd=module, append=append)
    machine = _start_image(image, name, memory)
    if data.startswith(b"\x7fELF") and b"\0.debug_info\0" in data:
        machine.guest.elf = Path(path)
    return machine


def boot_embedded(bits: int = 64, append: str = "", *, memory: int = 32 << 20, pae: bool = False) -> GuestMachine:
    """Our own small kernel, for tests and for where nothing can be fetched; see `emu.images.embedded`."""
    return _start_image(embedded_guest(bits, append, pae=pae), f"embedded guest, {bits} bits", memory)


_ABOUT = {"kind": str, "title": str, "bits": int, "virtual_offset": int, "sections": list, "facts_key": str}
_ABOUT |= {"settled": bool, "symbols": str}
_SECTION = (str, int, int, bool, bool)
"""What `_describe` writes of a guest and of a section, as a file gives it back."""


def restore(source: str | Path | Snapshot, progress: Progress = quiet) -> GuestMachine:
    """A new machine at the instruction where the snapshot, or the file that `save` wrote, was taken. ImageError."""
    name = "snapshot" if isinstance(source, Snapshot) else str(source)
    snapshot = source if isinstance(source, Snapshot) else Snapshot.open(Path(source))
    about = snapshot.state.get("about", {})
    try:
        check_members("the guest", about, _ABOUT)
        symbols = _unpacked(about["symbols"])
        guest = Guest(
            about["kind"],
            about["title"],
            about["bits"],
            about["virtual_offset"],
            bytes.fromhex(about["build_id"]) if about["build_id"] else None,
            tuple(Section(*check_row("a section", row, _SECTION)) for row in about["sections"]),
            about["facts_key"],
            about["settled"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ImageError(name, f"the snapshot does not say what it is of: {error!r}") from error
    machine = GuestMachine(snapshot.memory, symbols=symbols, long_mode=snapshot.long_mode)
    machine.guest = guest
    try:
        machine.restore(snapshot)
    except MachineError as error:
        raise ImageError(name, str(error)) from error
    progress(f"{name}: {guest.title}, {machine.instructions:,} instructions in")
    if guest.kind == "linux":
        _watch_linux(machine)
    return machine


@functools.lru_cache(maxsize=4)
def _unpacked(symbols: str) -> SymbolTable:
    """A snapshot's symbols; kept, because the same one is often restored many times and a table never changes."""
    return SymbolTable(unpack_symbols(base64.b64decode(symbols)))


def _start_image(image: Image, title: str, memory: int) -> GuestMachine:
    machine = GuestMachine(memory, symbols=SymbolTable(image.symbols))
    machine.guest = Guest(image.kind, title, image.start.bits, sections=_sections(image.symbols))
    machine.power_on(image)
    return machine


def _sections(symbols: Sequence[Symbol]) -> tuple[Section, ...]:
    """What the symbols span: gdb knows a name's type by the section it is in. What lies amid code counts as code."""
    text = [s for s in symbols if s.kind in "Tt"]
    data = [s for s in symbols if s.kind in "DdBbRr"]
    start = min((s.address for s in text), default=0)
    end = max((s.address + max(s.size, 1) for s in text), default=0)
    found = [Section(".text", start, end - start, False, True)] if text else []
    below, above = [s for s in data if s.address < start], [s for s in data if s.address >= end]
    for name, members, limit in ((".data.low", below, start), (".data", above, None)):
        if members:
            first = min(s.address for s in members)
            last = max(s.address + max(s.size, 1) for s in members)
            found.append(Section(name, first, (last if limit is None else min(last, limit)) - first, True, False))
    return tuple(found)


def _symbols(image: Image, progress: Progress) -> SymbolTable:
    if image.symbols:
        return SymbolTable(image.symbols)
    kernel = image.kernel
    if kernel is None:
        return SymbolTable()
    try:
        return kallsyms(bytes(kernel.vmlinux), path=image.path, progress=progress)
    except ImageError as error:
        progress(f"symbols not available: {error}")
        return SymbolTable()


def _describe(machine: GuestMachine) -> dict[str, Any]:
    guest = machine.guest
    return {
        "kind": guest.kind,
        "title": guest.title,
        "bits": guest.bits,
        "virtual_offset": guest.virtual_offset,
        "build_id": guest.build_id.hex() if guest.build_id else None,
        "sections": [[s.name, s.address, s.size, s.writable, s.executable] for s in guest.sections],
        "facts_key": guest.facts_key,
        "settled": guest.settled,
        "symbols": base64.b64encode(pack_symbols(list(machine.symbols.image))).decode(),
    }


# ------------------------------------------------------------------------------------------------- a Linux guest's life


def _watch_linux(machine: GuestMachine) -> None:
    """Stop at `panic` and at the end of the machine, and notice when the kernel has done patching itself."""

    def panic() -> Stop | None:
        machine.guest.crashed = True
        return Panic(machine.cpu.linear_pc, _panic_message(machine))

    def ended() -> Stop | None:
        return PowerOff()

    _watch_function(machine, ("panic",), panic)
    for name in _POWER_OFF_AT:
        _watch_function(machine, (name,), ended)
    machine.guest.on_settled(lambda: _watch_patching(machine))
    if not machine.guest.settled:
        _watch_settling(machine)


def _watch_settling(machine: GuestMachine) -> None:
    def settled() -> Stop | None:
        cancel()
        machine.guest.settle()
        return None

    cancel = _watch_function(machine, _SETTLED_AT, settled)


def _watch_patching(machine: GuestMachine) -> None:
    """From here on the guest patches itself at run time only; before, probes change no byte of it."""
    guard = PatchingGuard(machine)
    for name in PATCHERS:
        _watch_function(machine, (name,), guard.entered)


def _watch_function(machine: GuestMachine, names: Sequence[str], call: Callable[[], Stop | None]) -> Callable[[], None]:
    """Watch the first function of `names` that exists, past the bytes that ftrace rewrites while the kernel boots."""
    for name in names:
        found = machine.symbols.lookup(name)
        if not found:
            continue
        paddr = found[0].address - machine.guest.virtual_offset
        try:
            skip = _entry_size(machine.memory.read_physical(paddr, 9))
            return machine.watch(found[0].address + skip, call, paddr + skip)
        except MachineError:
            continue
    return lambda: None


def _entry_size(code: bytes) -> int:
    """Bytes of endbr and of the call to __fentry__ (or the nop it becomes) at a function's start."""
    size = 4 if code[:4] in _ENDBR else 0
    if code[size] == 0xE8 or code[size : size + 5] == _NOP5:
        size += 5
    return size


def _panic_message(machine: GuestMachine) -> str:
    """panic()'s first argument, a format string: in RDI (SysV), or on the stack of i386, where variadics pass it."""
    text = bytearray()
    try:
        if machine.guest.bits == 64:
            address = machine.cpu.gpr[7]
        else:
            address = int.from_bytes(machine.memory.read((machine.cpu.gpr[4] & 0xFFFFFFFF) + 4, 4), "little")
        while len(text) < 256:
            byte = machine.memory.read(address + len(text), 1)
            if byte == b"\0":
                break
            text += byte
    except MachineError:
        return ""
    return text.decode("latin-1").strip()
