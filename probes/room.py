"""Room in monitor RAM for what a user brings into the guest: code in one half of the window, data in the other.

Rules: offsets into `emu.iface.Window`; handed out once, in order. The machine's thread only.
"""

from __future__ import annotations

import errno

from emu.iface import Window
from probes.errors import ProbeError


class Room:
    """What is left of the window's text and data."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._taken = [0, 0]  # bytes of the text and of the data half

    def take(self, text: int, data: int, align: int = 16) -> tuple[int, int]:
        """Offsets of so many bytes of code and of data; ProbeError ENOMEM, and then nothing is taken."""
        areas = self._window.text, self._window.data
        starts = [_aligned(area.start + taken, align) for area, taken in zip(areas, self._taken, strict=True)]
        ends = starts[0] + text, starts[1] + data
        for what, end, area in zip(("code", "data"), ends, areas, strict=True):
            if end > area.stop:
                raise ProbeError(errno.ENOMEM, f"no room for {what}: {len(area):,} bytes in all")
        self._taken = [end - area.start for end, area in zip(ends, areas, strict=True)]
        return starts[0], starts[1]


def _aligned(offset: int, align: int) -> int:
    return -(-offset // align) * align
