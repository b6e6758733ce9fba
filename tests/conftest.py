"""What holds for every test: Hypothesis repeats itself, and the fixtures that boot stock kernels are known.

The user's cache (kernels, symbol tables) is used as it is: tests never point XDG_CACHE_HOME elsewhere for them.
"""

from __future__ import annotations

from hypothesis import settings

from tests.support.coverage_floor import pytest_configure
from tests.support.kernels import kernel, linux
from tests.support.noskip import pytest_make_collect_report, pytest_runtest_makereport
from tests.support.uncovered import pytest_collection_modifyitems, pytest_runtest_setup

__all__ = [
    "kernel",
    "linux",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_make_collect_report",
    "pytest_runtest_makereport",
    "pytest_runtest_setup",
]

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
