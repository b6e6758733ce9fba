"""A file of the host as bytes: whole, or an error that names it.

Rules: standard library and `emu.iface` only; reads what a user has named and nothing else.
"""

from __future__ import annotations

import os
from pathlib import Path

from emu.iface import ImageError


def read_file(path: Path, limit: int = 1 << 30) -> bytes:
    """Its bytes; ImageError where it cannot be read or has more than `limit`, as a device file has without end."""
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size  # 0 of a pipe or a device
            data = b"" if size > limit else stream.read((size or limit) + 1)
    except OSError as error:
        raise ImageError(str(path), (error.strerror or str(error)).lower()) from error
    if max(size, len(data)) > limit:
        raise ImageError(str(path), f"larger than {limit >> 20} MiB")
    return data
