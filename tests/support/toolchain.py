"""32-bit programs with their libraries from the machine's own compiler: what it lacks comes from the host's packages.

Rules: tests only. Nothing is installed: the packages are unpacked in the user's cache, as any user, once for each
version of the compiler.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
from pathlib import Path

from elftools.elf.elffile import ELFFile

from emu.images.apt import FetchError, archives
from emu.images.cache import cache_root

_PACKAGES = (
    "libc6-dev-i386",
    "libc6-i386",
    "lib32gcc-{}-dev",
    "lib32gcc-s1",
    "lib32stdc++-{}-dev",
    "lib32stdc++6",
)
_FOLDERS = ("lib", "lib32", "usr/lib32")


@functools.cache
def options32() -> tuple[str, ...]:
    """What cc and c++ need beside -m32 to compile and link against a C and a C++ library."""
    root, version = root32(), _compiler("-dumpversion")
    library = f"{root}/usr/lib/gcc/x86_64-linux-gnu/{version}/32"
    headers = f"{root}/usr/include/x86_64-linux-gnu"
    places = [word for folder in (f"{root}/usr/lib32", library) for word in (f"-B{folder}/", f"-L{folder}")]
    later = [
        word for folder in (headers, f"/usr/include/{_compiler('-print-multiarch')}") for word in ("-idirafter", folder)
    ]
    return ("-m32", f"-Wl,--sysroot={root}", *places, "-isystem", f"{headers}/c++/{version}/32", *later)


def libraries32(program: Path) -> dict[str, bytes]:
    """What the dynamic linker will want for a 32-bit program, by path in a Debian system."""
    found: dict[str, bytes] = {}
    wanted = [program]
    while wanted:
        with wanted.pop().open("rb") as stream:
            dynamic = ELFFile(stream).get_section_by_name(".dynamic")
            names = [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")]
        for name in ("ld-linux.so.2", *names):
            path = next(Path(root32(), folder, name) for folder in _FOLDERS if Path(root32(), folder, name).is_file())
            place = f"/{path.relative_to(root32())}"
            if place not in found:
                found[place] = path.read_bytes()
                wanted.append(path)
    return found


@functools.cache
def root32() -> Path:
    """A folder with the unpacked packages."""
    version = _compiler("-dumpversion")
    base = cache_root() / "toolchain32"
    root = base / f"gcc-{version}"
    base.mkdir(parents=True, exist_ok=True)
    with (base / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.is_dir():
            partial = base / "partial"
            shutil.rmtree(partial, ignore_errors=True)
            _unpack([name.format(version) for name in _PACKAGES], base, partial)
            link = partial / "lib/ld-linux.so.2"  # leads to the host's own
            target = os.readlink(link)
            link.unlink()
            link.symlink_to(f"..{target}")
            partial.rename(root)
    return root


def _unpack(names: list[str], base: Path, folder: Path) -> None:
    for apt in archives("amd64", base, print):
        found = apt.newest_first(names)
        if len(found) == len(names):
            break
    else:
        raise FetchError(f"not all of {', '.join(names)} are in what apt could verify")
    for candidate in found:
        package = apt.download(candidate)
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True, capture_output=True)
        package.unlink()


def _compiler(question: str) -> str:
    return subprocess.run(["cc", question], check=True, capture_output=True, text=True).stdout.strip()
