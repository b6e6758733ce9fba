"""The rules that tools can check, as tests, so that the README's one test command runs them all."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sysconfig.get_path("scripts"))
CHECKS = {
    "lint": ("ruff", "check", "."),
    "format": ("ruff", "format", "--check", "."),
    "types": ("mypy",),
    "imports": ("lint-imports",),
}
SKIPPING_TESTS = """
import pytest
def test_skips(): pytest.skip("no reason")
@pytest.mark.skipif(True, reason="none")
def test_is_marked(): pass
@pytest.mark.xfail
def test_fails_as_expected(): assert 0
def test_passes(): pass
"""


@pytest.mark.parametrize("check", CHECKS)
def test_tool_finds_nothing(check: str):
    """Ruff's rules and format, mypy's strict types, import-linter's contracts: all in pyproject.toml."""
    program, *arguments = CHECKS[check]
    done = subprocess.run([SCRIPTS / program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run_pytest(folder: Path, ci: str) -> subprocess.CompletedProcess[str]:
    """Another pytest over `folder`, with the plugin and none of our settings."""
    plugins = ("-p", "tests.support.noskip", "-p", "no:cacheprovider")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, "--rootdir", folder, "-c", "/dev/null", folder],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "CI": ci},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("ci", "counts"), [("true", "2 failed, 1 passed, 1 error"), ("false", "1 passed, 2 skipped, 1 xfailed")]
)
def test_skipped_tests_fail_under_ci(tmp_path: Path, ci: str, counts: str):
    """Whichever way they skip; elsewhere they may."""
    (tmp_path / "test_skips.py").write_text(SKIPPING_TESTS)
    done = run_pytest(tmp_path, ci)
    assert done.stdout.splitlines()[-1].startswith(counts), done.stdout + done.stderr


def test_a_module_that_skips_itself_fails_under_ci(tmp_path: Path):
    """It has no tests to report, so its collection does."""
    (tmp_path / "test_module.py").write_text("import pytest\npytest.skip('no', allow_module_level=True)\n")
    done = run_pytest(tmp_path, "true")
    assert done.returncode != 0
    assert "nothing may be skipped under CI=true" in done.stdout
