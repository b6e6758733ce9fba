"""Loadable modules of the stock kernels, from the kernels' own packages.

Rules: tests only. Kept beside the kernel in the user's cache; the network is asked once for each kernel and module.
"""

from __future__ import annotations

import lzma
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from emu.boot import GuestMachine
from emu.images.apt import Candidate, FetchError, archives
from emu.images.cache import cache_root, write_atomic
from probes.linux import linux_of
from tests.support.images import REAL_KERNELS, fetch_real_kernel
from tests.support.kernels import KERNELS
from tests.support.programs import bring

_KEPT = ("dummy", "brd", "crc16", "mbcache", "crc32c_generic", "jbd2", "ext4")
"""What the tests load, of kernels that do not have it built in: all of it is kept when one is asked for."""
MODULE = "/tmp/dummy.ko"
"""Where `bring_module` puts it in the guest."""


def kernel_modules(kernel: str, names: Sequence[str]) -> dict[str, bytes]:
    """NAME.ko of each name, all of _KEPT, for one of KERNELS' names."""
    fetched = fetch_real_kernel(KERNELS[kernel]).fetched
    kept = {name: fetched.kernel.with_name(f"{name}.ko") for name in _KEPT}
    if not all(kept[name].is_file() for name in names):
        package = _download(REAL_KERNELS[KERNELS[kernel]][0], Candidate(fetched.package, fetched.version))
        for name, data in _unpack(package).items():
            write_atomic(kept[name], lzma.decompress(data) if data.startswith(b"\xfd7zXZ") else data)
        package.unlink()
    return {name: kept[name].read_bytes() for name in names}


def _download(architecture: str, candidate: Candidate) -> Path:
    for apt in archives(architecture, cache_root() / "kernels" / architecture, print):
        if candidate.name in apt.names(candidate.name):
            return apt.download(candidate)
    raise FetchError(f"no {candidate.name} in what apt could verify")


def _unpack(package: Path) -> dict[str, bytes]:
    """Those of _KEPT that are there, in one pass over the package: it has thousands, and unpacks to 300 MB."""
    found: dict[str, bytes] = {}
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            name = member.name.rpartition("/")[2].removesuffix(".xz").removesuffix(".ko")
            if ".ko" in member.name and name in _KEPT and (stream := archive.extractfile(member)) is not None:
                found[name] = stream.read()
    return found


def bring_module(machine: GuestMachine, kernel: str) -> None:
    """Put the dummy network driver into the guest, as MODULE."""
    bring(machine, linux_of(machine), {MODULE: kernel_modules(kernel, ["dummy"])["dummy"]})
