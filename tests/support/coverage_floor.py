"""A pytest plugin: the floor under the coverage (pyproject.toml, `fail_under`) is one of the whole suite.

Whoever runs one file or one test gets the report, but not a failure for all that this does not reach.
"""

from __future__ import annotations

import pytest


def is_whole(config: pytest.Config) -> bool:
    """Whether every test was asked for."""
    narrowed = any(config.getoption(name, None) for name in ("keyword", "markexpr", "lf", "deselect", "maxfail"))
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not narrowed


def pytest_configure(config: pytest.Config) -> None:
    """Take the floor away where only some tests were asked for."""
    coverage = config.pluginmanager.get_plugin("_cov")
    if coverage is not None and not is_whole(config):
        coverage.options.cov_fail_under = 0
