from __future__ import annotations

import os
import pathlib

import pytest


@pytest.fixture(scope="session")
def build_dir() -> pathlib.Path:
    """The build tree under test; tests/run.sh names it."""
    folder = pathlib.Path(
        os.environ.get("MESHLOOM_BUILD_DIR", pathlib.Path(__file__).parents[1] / "build/cmake")
    )
    assert (folder / "CMakeCache.txt").exists(), f"{folder} is no build tree: run tests/run.sh"
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long sweeps run in the full test run only."""
    if os.environ.get("MESHLOOM_FULL"):
        return
    long = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if not item.get_closest_marker("full")]
