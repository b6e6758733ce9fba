"""A pytest plugin: no coverage is measured while a stock kernel runs.

Tracing each Python line doubles the time of a kernel's boot, and what kernels reach the small guests reach too.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytest_cov.engine import CovController

_KERNEL_FIXTURES = {"kernel", "linux"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark every test that gets a kernel, or boots one itself (marked `boots`), where coverage is measured at all."""
    if _controller(config) is None:
        return
    for item in items:
        if _KERNEL_FIXTURES.intersection(getattr(item, "fixturenames", ())) or item.get_closest_marker("boots"):
            item.add_marker("no_cover")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """pytest-cov honours the mark in the test alone; here its fixtures are set up, which is where kernels boot."""
    controller = _controller(item.config)
    if controller is None or item.get_closest_marker("no_cover") is None:
        yield
        return
    controller.pause()
    yield
    controller.resume()


def _controller(config: pytest.Config) -> CovController | None:
    return getattr(config.pluginmanager.get_plugin("_cov"), "cov_controller", None)
