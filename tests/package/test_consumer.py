"""Projects that use Meshloom: from an install, from parts of it, from the build tree, as sources."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

CONSUMER = pathlib.Path(__file__).with_name("consumer")
ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*command: object, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False,
        env=os.environ | environment,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def build_and_run(folder: pathlib.Path, which: str, *arguments: str) -> None:
    """Configures, builds and runs the consumer project."""
    run(
        "cmake", "-S", CONSUMER, "-B", folder, "-G", "Ninja", f"-DWHICH={which}",
        "-DCMAKE_BUILD_TYPE=Debug", f"-DPython_EXECUTABLE={sys.executable}", *arguments,
    )
    targets = ["consumer_plan"] + (["consumer_full"] if which == "full" else [])
    run("cmake", "--build", folder, "--parallel", os.environ.get("MESHLOOM_JOBS", "1"), "--target", *targets)
    assert "slots" in run(folder / "consumer_plan", LD_LIBRARY_PATH="")
    if which == "full":
        assert "parameters" in run(folder / "consumer_full", LD_LIBRARY_PATH="")


@pytest.fixture(scope="session")
def installed(build_dir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An install tree that has been moved: nothing in it may remember where it was put first."""
    first = tmp_path_factory.mktemp("install") / "first"
    run("cmake", "--install", build_dir, "--prefix", first)
    moved = first.parent / "moved"
    shutil.move(first, moved)
    return moved


def test_moved_install_serves_the_full_library(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    build_and_run(tmp_path, "full", f"-DCMAKE_PREFIX_PATH={installed}")


def test_plan_component_needs_no_libtorch(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    build_and_run(
        tmp_path, "plan", f"-DCMAKE_PREFIX_PATH={installed}", "-DCMAKE_DISABLE_FIND_PACKAGE_LibTorch=ON"
    )


def test_full_component_without_libtorch_says_so(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    result = subprocess.run(
        ["cmake", "-S", CONSUMER, "-B", tmp_path, "-G", "Ninja", "-DWHICH=full",
         f"-DCMAKE_PREFIX_PATH={installed}", "-DCMAKE_DISABLE_FIND_PACKAGE_LibTorch=ON"],
        capture_output=True, text=True, check=False,
    )
    assert result.returncode != 0
    assert "LibTorch" in result.stderr


def test_build_tree_is_a_package(build_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    build_and_run(tmp_path, "full", f"-Dmeshloom_DIR={build_dir}")


def test_sources_as_subdirectory(tmp_path: pathlib.Path) -> None:
    """Configures whole, builds the planning half: the rest is compiled often enough elsewhere."""
    build_and_run(
        tmp_path, "plan", f"-DSUBDIRECTORY={ROOT}", "-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=64"
    )


def test_install_tree_names_no_build_folder(installed: pathlib.Path, build_dir: pathlib.Path) -> None:
    found = [
        file.name
        for file in installed.rglob("*")
        if file.suffix in {".cmake", ".h"} and str(build_dir) in file.read_text()
    ]
    assert not found, found
    for library in installed.rglob("lib*.so*"):
        if not library.is_symlink():
            paths = [l for l in run("readelf", "-d", library).splitlines() if "PATH" in l]
            assert paths and all("[$ORIGIN]" in line for line in paths), (library, paths)


def test_wheel_serves_c_plus_plus_too(tmp_path: pathlib.Path) -> None:
    """The installed Python package tells CMake where its C++ half is."""
    prefix = run(sys.executable, "-c", "import meshloom; print(meshloom.get_cmake_prefix_path())").strip()
    if pathlib.Path(prefix, "lib/cmake/meshloom").exists():
        build_and_run(tmp_path, "plan", f"-DCMAKE_PREFIX_PATH={prefix}")
    else:  # the package of a build tree: its CMake package is the build tree's
        assert pathlib.Path(prefix, "meshloom-config.cmake").exists()
