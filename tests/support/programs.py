"""Programs for stock Linux guests: made by the machine's compiler, and put into a guest that is running already.

Rules: tests only. A file is brought in by its pages: the guest makes one of the right size, and its page cache gets the
bytes. So a kernel's shared snapshot serves for every program.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from emu.boot import GuestMachine, restore
from emu.snapshot import Snapshot
from probes.linux import Linux, linux_of
from tests.support.kernels import another, run_shell
from tests.support.toolchain import libraries32, options32

SOURCES = Path(__file__).parents[1] / "probes" / "programs"
_PAGE = 4096
_CLASS, _CLASS32 = 4, 1  # of an ELF file: EI_CLASS
_NEEDED = re.compile(r"=> (/\S+) \(|^\s+(/\S*ld-linux\S*) \(", re.MULTILINE)


@functools.cache
def build(name: str, *options: str) -> bytes:
    """programs/NAME (.c or .cc) compiled and linked for this machine, a dynamic program where no option says other.

    -m32 among the options makes a 32-bit one.
    """
    if "-m32" in options and "-nostdlib" not in options:
        options = (*options, *options32())
    with tempfile.TemporaryDirectory() as folder:
        compiler = "c++" if name.endswith(".cc") else "cc"
        command = [compiler, "-O1", "-g0", *options, "-o", f"{folder}/program", str(SOURCES / name)]
        subprocess.run(command, check=True, capture_output=True)
        return Path(folder, "program").read_bytes()


@functools.cache
def libraries(program: bytes) -> dict[str, bytes]:
    """What the dynamic linker will want for it, by path: this machine's own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program")
        path.write_bytes(program)
        path.chmod(0o755)
        if program[_CLASS] == _CLASS32:
            return libraries32(path)
        said = subprocess.run(["ldd", str(path)], check=True, capture_output=True, text=True).stdout
    paths = [one or other for one, other in _NEEDED.findall(said)]
    return {path: Path(path).read_bytes() for path in paths}


PROGRAMS = {
    "/bin/dynamic": ("dynamic.c", "-pthread"),
    "/bin/leaving": ("leaving.c", "-pthread", "-O2"),
    "/bin/throws": ("throws.cc", "-static-libstdc++"),
    "/bin/sleeper": ("sleeper.c",),
    "/bin/signals": ("signals.c",),
    "/bin/mappings": ("mappings.c",),
    "/lib/place.so": ("place.c", "-shared", "-fPIC"),
}
COLD = ("cold.c", "-nostdlib", "-fno-stack-protector", "-static-pie", "-fPIE")
COLD32 = ("cold.c", "-m32", "-nostdlib", "-fno-stack-protector", "-static", "-fno-pic", "-no-pie")
LIBC = "/lib/x86_64-linux-gnu/libc.so.6"
LIBC32 = "/lib32/libc.so.6"
GUESTS = (("amd64", 64), ("amd64", 32), ("i386", 32))
"""Kernels of KERNELS and the word size of programs: 32-bit processes run on either."""


@functools.cache
def _equipped(name: str, bits: int) -> Snapshot:
    machine = another(name)
    files: dict[str, bytes] = {}
    for path, (source, *options) in PROGRAMS.items():
        files[path] = build(source, *options, f"-m{bits}")
        files |= libraries(files[path])
    bring(machine, linux_of(machine), files)
    return machine.snapshot()


def equipped(name: str, bits: int = 64) -> GuestMachine:
    """A new machine with that kernel at its prompt, and PROGRAMS of that word size with their libraries."""
    return restore(_equipped(name, bits))


def bring(machine: GuestMachine, linux: Linux, files: Mapping[str, bytes]) -> None:
    """Make executable `files` in the guest, which waits at its prompt; folders come by themselves."""
    for path, data in files.items():
        folder = path.rpartition("/")[0]
        run_shell(
            machine,
            f"mkdir -p {folder}; dd if=/dev/zero of={path} bs={_PAGE} count={-(-len(data) // _PAGE)} 2>/dev/null;"
            f" truncate -s {len(data)} {path}; chmod +x {path}",
        )
    for path, data in files.items():  # after all commands: what the engine has translated goes with each write
        inode = linux.inode(path)
        assert inode is not None, f"{path} could not be made"
        for index, paddr in linux.pages(inode):
            piece = data[index * _PAGE : (index + 1) * _PAGE]
            machine.memory.write_physical(paddr, piece.ljust(_PAGE, b"\0"))
        assert linux.read_file(inode, 0, len(data)) == data
