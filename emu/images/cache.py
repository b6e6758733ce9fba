"""Where what was fetched or computed once is kept, and how it gets there whole.

Rules: standard library only; any thread. Nothing here knows what the files hold. Everything in the cache can be deleted
at any time; a reader treats a file it cannot make sense of as absent.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

Progress: TypeAlias = Callable[[str], None]
"""Called with one line, without a newline, when a long operation has something to say."""


def quiet(line: str) -> None:
    """The Progress of a caller that wants to hear nothing."""


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/gdbstub`, else `~/.cache/gdbstub` (XDG base directory specification 0.8); need not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative values ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "gdbstub"


def write_atomic(path: Path, data: bytes) -> None:
    """Put `data` at `path`, making its folders: others see the old file or the new one, never a part. OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
