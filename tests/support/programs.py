"""Programs for stock Linux guests: made by the machine's compiler, and put into a guest that is running already.

Rules: tests only. A file is brought in by its pages: the guest makes one of the right size, and its page cache gets the
bytes. So a kernel's shared snapshot serves for every program.
"""

from __future__ import annotations

import functools
import lzma
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from emu.boot import GuestMachine, restore
from emu.images.apt import Apt, Candidate
from emu.images.cache import write_atomic
from emu.images.deb import extract
from emu.snapshot import Snapshot
from probes.linux import Linux, linux_of
from tests.support.images import fetch_real_kernel
from tests.support.kernels import KERNELS, another, run_shell

SOURCES = Path(__file__).parents[1] / "probes" / "programs"
_PAGE = 4096
_NEEDED = re.compile(r"=> (/\S+) \(|^\s+(/\S*ld-linux\S*) \(", re.MULTILINE)


@functools.cache
def build(name: str, *options: str) -> bytes:
    """programs/NAME (.c or .cc) compiled and linked for this machine, a dynamic program where no option says other."""
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
        said = subprocess.run(["ldd", str(path)], check=True, capture_output=True, text=True).stdout
    paths = [one or other for one, other in _NEEDED.findall(said)]
    return {path: Path(path).read_bytes() for path in paths}


def kernel_module(name: str, module: str) -> bytes:
    """MODULE.ko of a kernel of KERNELS, from its package: asked for once, kept beside the kernel."""
    fetched = fetch_real_kernel(KERNELS[name]).fetched
    folder = fetched.kernel.parent
    kept = folder / f"{module}.ko"
    if not kept.is_file():
        apt = Apt("i386" if name == "i386" else "amd64", folder.parent / "apt-host", print)
        package = apt.download(Candidate(fetched.package, fetched.version))
        data = extract(package, lambda path: path.rpartition("/")[2] in (f"{module}.ko", f"{module}.ko.xz"))
        package.unlink()
        write_atomic(kept, lzma.decompress(data) if data[:4] == b"\xfd7zX" else data)
    return kept.read_bytes()


PROGRAMS = {
    "/bin/dynamic": ("dynamic.c", "-pthread"),
    "/bin/leaving": ("leaving.c", "-pthread", "-O2"),
    "/bin/throws": ("throws.cc", "-static-libstdc++"),
    "/bin/sleeper": ("sleeper.c",),
}
COLD = ("cold.c", "-nostdlib", "-fno-stack-protector", "-static-pie", "-fPIE")
COLD32 = ("cold.c", "-m32", "-nostdlib", "-fno-stack-protector", "-static", "-fno-pic", "-no-pie")
LIBC = "/lib/x86_64-linux-gnu/libc.so.6"


@functools.cache
def _equipped(name: str) -> Snapshot:
    machine = another(name)
    files: dict[str, bytes] = {}
    for path, (source, *options) in PROGRAMS.items():
        files[path] = build(source, *options)
        files |= libraries(files[path])
    bring(machine, linux_of(machine), files)
    return machine.snapshot()


def equipped(name: str) -> GuestMachine:
    """A new machine with that kernel at its prompt, and PROGRAMS with their libraries."""
    return restore(_equipped(name))


def bring(machine: GuestMachine, linux: Linux, files: Mapping[str, bytes]) -> None:
    """Make executable `files` in the guest, which waits at its prompt; folders come by themselves."""
    for path, data in files.items():
        pages = -(-len(data) // _PAGE)
        folder = path.rpartition("/")[0]
        run_shell(
            machine,
            f"mkdir -p {folder}; dd if=/dev/zero of={path} bs={_PAGE} count={pages} 2>/dev/null;"
            f" truncate -s {len(data)} {path}; chmod +x {path}",
        )
        inode = linux.inode(path)
        assert inode is not None, f"{path} could not be made"
        for index in range(pages):
            paddr = linux.page(inode, index)
            assert paddr is not None
            piece = data[index * _PAGE : (index + 1) * _PAGE]
            machine.memory.write_physical(paddr, piece.ljust(_PAGE, b"\0"))
