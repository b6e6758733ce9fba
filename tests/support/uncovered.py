"""A pytest plugin: no coverage is measured while a stock kernel runs.

Tracing each Python line doubles the time of a kernel's boot, and what kernels reach the small guests reach too. Whoever
makes a machine with a kernel says so, or the test is marked `boots`; after the test it is measured again. Every
measurement is stopped: pytest-xdist's processes have two.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest
from coverage import Coverage

_stopped: list[Coverage] = []


def stop_measuring() -> None:
    """To the end of the test that is running."""
    while (measurement := Coverage.current()) is not None:
        measurement.stop()
        _stopped.append(measurement)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Around a test with its fixtures."""
    if item.get_closest_marker("boots"):
        stop_measuring()
    try:
        return (yield)
    finally:
        while _stopped:
            _stopped.pop().start()
