"""Tiers and marks come from fixtures, `-m` switches no other tier on, and no test starts a Ray in secret."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

CONFTEST = """
import pytest
from tests.conftest import own_ray, patience, pytest_addoption, registries
from tests.helpers.tiers import RayWatch, Tiers


def pytest_configure(config):
    config.pluginmanager.register(Tiers(config.getoption("--tier")))
    config.pluginmanager.register(RayWatch(period_s=0.05, process="no-raylet"))


@pytest.fixture(scope="session")
def shared_ray():
    pass


@pytest.fixture
def run(shared_ray):
    pass


@pytest.fixture(scope="module")
def run_of_its_own(own_ray):
    pass
"""

TESTS = """
def test_plain():
    pass


def test_of_a_fixture(run):
    pass


def test_of_two(run, run_of_its_own):
    pass


def test_soak(patience):
    pass


def test_download(registries, patience):
    pass
"""

SECRET = """
import subprocess, time


def raylet():
    process = subprocess.Popen(["{raylet}", "0.4"])
    process.wait()


def test_in_secret():
    raylet()


def test_openly(shared_ray):
    raylet()


def test_without():
    time.sleep(0.2)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with tests of its own, under our plugins."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_tree.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  ray\n  xla\n")
    return tmp_path


class Outcomes:
    """A pytest plugin: `passed` or `failed` by test; of one that fails after it passed, `failed`."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2]
        if self.of.get(name) != "failed":
            self.of[name] = report.outcome


def outcomes(tree: Path, *arguments: str) -> dict[str, str]:
    found = Outcomes()
    # Two of pytest's plugins collect garbage of this whole process, five times, at the end of each run.
    plugins = ["cacheprovider", "terminal", "unraisableexception", "threadexception"]
    options = [*(f"-pno:{plugin}" for plugin in plugins), "--import-mode=importlib", f"--rootdir={tree}"]
    assert pytest.main([*options, *arguments, str(tree)], plugins=[found]) in (0, 1)
    return found.of


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"test_plain", "test_of_a_fixture"}),
        (["-m", "not ray"], {"test_plain"}),
        (["-m", "ray"], {"test_of_a_fixture"}),
        (["--tier", "long"], {"test_of_two"}),
        (["--tier", "long", "-m", "ray"], {"test_of_two"}),
        (["--tier", "soak"], {"test_soak"}),
        (["--tier", "network", "-m", "not ray"], {"test_download"}),
    ],
)
def test_fixtures_decide_what_runs(tree, arguments, expected):
    assert set(outcomes(tree, *arguments)) == expected


def test_a_ray_in_secret_fails_its_test(tree):
    raylet = tree / "no-raylet"
    shutil.copy("/bin/sleep", raylet)
    (tree / "test_tree.py").unlink()  # another name: a module that was imported once is not read again
    (tree / "test_secret.py").write_text(SECRET.format(raylet=raylet))
    expected = {"test_in_secret": "failed", "test_openly": "passed", "test_without": "passed"}
    assert outcomes(tree) == expected
