from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
CXX_FOLDERS = ("include", "src", "python", "tests", "examples")
CXX_SUFFIXES = {".h", ".cc", ".cu"}


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    return ROOT


@pytest.fixture(scope="session")
def sources() -> list[pathlib.Path]:
    """Every C++ and CUDA file of the project."""
    found = [
        file
        for folder in CXX_FOLDERS
        for file in sorted((ROOT / folder).rglob("*"))
        if file.suffix in CXX_SUFFIXES
    ]
    assert len(found) > 50, f"only {len(found)} files under {ROOT}: the check looks in a wrong place"
    return found


@pytest.fixture(scope="session")
def clang_format() -> str:
    found = shutil.which("clang-format-14")
    assert found, "clang-format-14 is missing; apt-get install clang-format-14"
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    assert "version 14." in version, version
    return found
