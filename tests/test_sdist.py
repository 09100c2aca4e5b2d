"""The source distribution holds the product and all that its own tests need."""

import os
import subprocess
import sys
import tarfile

import pytest

from tests.factories import ROOT

FILES = ["Makefile", "constraints.txt", "alembic.ini", "worker.py", "CHANGELOG.md", "SECURITY.md"]
FOLDERS = ["src", "migrations", "tests", "benchmarks", "docs"]
QUICK_TESTS = ["tests/test_docs.py", "tests/test_imports.py", "tests/test_validation.py"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The folder that unpacking the built sdist makes."""
    folder = tmp_path_factory.mktemp("sdist")
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation"]
    subprocess.run([*build, "--outdir", str(folder), str(ROOT)], check=True, capture_output=True)
    (path,) = folder.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    return folder / path.name.removesuffix(".tar.gz")


def files_of(folder):
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(name) for name in names if "__pycache__" not in name.parts}


def test_the_sdist_has_the_files_at_the_root(unpacked):
    assert [name for name in FILES if not (unpacked / name).exists()] == []


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_the_sdist_has_the_files_of_the_repository(unpacked, name):
    assert files_of(unpacked / name) == files_of(ROOT / name)


def test_tests_of_the_unpacked_sdist_pass_there(unpacked):
    pytest_there = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "PYTHONPATH": str(unpacked / "src")}

    done = subprocess.run(
        [*pytest_there, *QUICK_TESTS],
        cwd=unpacked,
        env=environment,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr
