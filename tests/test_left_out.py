"""Tests that need the folder of real data are left out with a line where it is absent, however many processes test."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
TESTS = """
import pytest

def test_alone():
    pass

@pytest.mark.shared
def test_marked():
    raise AssertionError

@pytest.mark.parametrize("n", [1, 2])
def test_fed(shared, n):
    raise AssertionError
"""


@pytest.fixture
def copied(tmp_path):
    """A repository with three tests that need the folder, which is not beside it, and one that does not."""
    folder = tmp_path / "project" / "tests"
    folder.mkdir(parents=True)
    shutil.copy(CONFTEST, folder)
    (folder / "test_some.py").write_text(TESTS)
    return folder


def run_tests(folder, *options, **environment):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "CI"} | environment,
        capture_output=True,
        text=True,
    )
    return run.returncode, run.stdout + run.stderr


@pytest.mark.parametrize("processes", [0, 2])
def test_a_line_counts_the_tests_and_names_the_folder(copied, processes):
    status, text = run_tests(copied, "-n", str(processes))
    assert status == 0, text
    (line,) = re.findall(r"^.*left out.*$", text, re.M)
    assert line.startswith("3 tests were left out")
    assert str(copied.parents[1] / "shared") in line


def test_no_line_where_the_folder_is_there(copied):
    (copied.parents[1] / "shared").mkdir()
    status, text = run_tests(copied, "-n", "0", "-k", "alone")
    assert status == 0, text
    assert "left out" not in text


def test_in_ci_it_is_an_error(copied):
    status, text = run_tests(copied, "-n", "0", CI="1")
    assert status != 0
    assert "CI must run the tests needing it" in text
