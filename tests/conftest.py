"""What holds for every test: Hypothesis repeats itself, and our own plugins for kernels, coverage and processes.

The user's cache (kernels, symbol tables) is used as it is: tests never point XDG_CACHE_HOME elsewhere for them.
"""

from __future__ import annotations

from hypothesis import settings

pytest_plugins = [
    "tests.support.coverage_floor",
    "tests.support.kernels",
    "tests.support.noskip",
    "tests.support.parallel",
    "tests.support.uncovered",
]

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
