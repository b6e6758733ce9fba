"""Loadable modules of the stock kernels, from the kernels' own packages.

Rules: tests only. Kept beside the kernel in the user's cache; the network is asked once for each kernel and module.
"""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from pathlib import Path

from emu.boot import GuestMachine
from emu.images import deb
from emu.images.apt import Candidate, FetchError, archives
from emu.images.cache import cache_root, write_atomic
from probes.linux import linux_of
from tests.support.images import REAL_KERNELS, fetch_real_kernel
from tests.support.kernels import KERNELS
from tests.support.programs import bring

MODULE = "/tmp/dummy.ko"
"""Where `bring_module` puts it in the guest."""


def kernel_modules(kernel: str, names: Sequence[str]) -> dict[str, bytes]:
    """NAME.ko of each name, of one of KERNELS' names."""
    fetched = fetch_real_kernel(KERNELS[kernel]).fetched
    kept = {name: fetched.kernel.with_name(f"{name}.ko") for name in names}
    if not all(path.is_file() for path in kept.values()):
        package = _download(REAL_KERNELS[KERNELS[kernel]][0], Candidate(fetched.package, fetched.version))
        for name, path in kept.items():
            wanted = (f"/{name}.ko", f"/{name}.ko.xz")
            data = deb.extract(package, lambda member, wanted=wanted: member.endswith(wanted))
            write_atomic(path, lzma.decompress(data) if data.startswith(b"\xfd7zXZ") else data)
        package.unlink()
    return {name: path.read_bytes() for name, path in kept.items()}


def _download(architecture: str, candidate: Candidate) -> Path:
    for apt in archives(architecture, cache_root() / "kernels" / architecture, print):
        if candidate.name in apt.names(candidate.name):
            return apt.download(candidate)
    raise FetchError(f"no {candidate.name} in what apt could verify")


def bring_module(machine: GuestMachine, kernel: str) -> None:
    """Put the dummy network driver into the guest, as MODULE."""
    bring(machine, linux_of(machine), {MODULE: kernel_modules(kernel, ["dummy"])["dummy"]})
