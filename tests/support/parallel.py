"""A pytest plugin: the whole suite runs on all processors, with the tests of one stock kernel in one process.

A kernel is booted once in each process that wants it, so that its tests stay together; whoever runs one file or one
test gets no processes to wait for.
"""

from __future__ import annotations

import os

import pytest

from tests.support.coverage_floor import is_whole
from tests.support.kernels import KERNELS

_LINUX_OF_BITS = {"linux", "linux_machine", "shell"}
"""Fixtures of tests/gdb, whose parameter is `bits`."""
_MOST = 4
"""Processes: each holds two or three guests of 256 MiB."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What `-n auto` means; 0: this process does it all."""
    return min(os.cpu_count() or 1, _MOST) if is_whole(config) else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a kernel among their parameters go together, and those that boot one unnamed with amd64's."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        params = callspec.params if callspec is not None else {}
        kernel = next((value for value in params.values() if isinstance(value, str) and value in KERNELS), None)
        if kernel is None and _LINUX_OF_BITS.intersection(getattr(item, "fixturenames", ())):
            kernel = {64: "amd64", 32: "i386"}.get(params.get("bits"))
        if kernel is None and item.get_closest_marker("boots"):
            kernel = "amd64"
        if kernel is not None:
            item.add_marker(pytest.mark.xdist_group(kernel))
