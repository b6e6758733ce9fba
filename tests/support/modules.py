"""A loadable module of each stock kernel: the dummy network driver, from the kernel's own package.

Rules: tests only. Kept beside the kernel in the user's cache; the network is asked once for each kernel.
"""

from __future__ import annotations

import base64
import functools
import gzip
import lzma
import textwrap
from pathlib import Path

from emu.boot import GuestMachine
from emu.images import deb
from emu.images.apt import Candidate, FetchError, archives
from emu.images.cache import cache_root, write_atomic
from tests.support.images import REAL_KERNELS, fetch_real_kernel
from tests.support.kernels import KERNELS, run_shell

MODULE = "/tmp/dummy.ko"
"""Where `bring_module` puts it in the guest."""


@functools.cache
def module_file(kernel: str) -> Path:
    """dummy.ko of one of KERNELS' names, on the host."""
    fetched = fetch_real_kernel(KERNELS[kernel]).fetched
    kept = fetched.kernel.with_name("dummy.ko")
    if not kept.is_file():
        package = _download(REAL_KERNELS[KERNELS[kernel]][0], Candidate(fetched.package, fetched.version))
        wanted = ("/drivers/net/dummy.ko", "/drivers/net/dummy.ko.xz")
        data = deb.extract(package, lambda name: name.endswith(wanted))
        write_atomic(kept, lzma.decompress(data) if data.startswith(b"\xfd7zXZ") else data)
        package.unlink()
    return kept


def _download(architecture: str, candidate: Candidate) -> Path:
    for apt in archives(architecture, cache_root() / "kernels" / architecture, print):
        if candidate.name in apt.names(candidate.name):
            return apt.download(candidate)
    raise FetchError(f"no {candidate.name} in what apt could verify")


def bring_module(machine: GuestMachine, kernel: str) -> None:
    """Type the module into the guest's shell, as MODULE."""
    text = base64.b64encode(gzip.compress(module_file(kernel).read_bytes(), mtime=0)).decode()
    for line in textwrap.wrap(text, 1000):
        run_shell(machine, f"echo {line} >> /tmp/typed")
    run_shell(machine, f"base64 -d /tmp/typed | gunzip > {MODULE}; rm /tmp/typed")
