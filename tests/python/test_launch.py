"""Launchers are recognised by their variables; what ranks and mpirun say is shown once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import running
from running import run

PROGRAM = """
import sys
from meshloom import launch
errors = launch.ErrorFilter()
for line in sys.stdin.read().splitlines():
    for shown in errors.take(line):
        print(shown)
for shown in errors.rest():
    print(shown)
"""
DASHES = "-" * 74


def shown(build: Path, text: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=text, env=running.environment(build), text=True,
        capture_output=True, check=True,
    )
    return result.stdout.splitlines()


def test_an_error_of_many_ranks_is_shown_once(build_dir: Path) -> None:
    text = f"""a warning
error: rank 2: [train.open_data] no such folder
error: rank 0: [train.open_data] no such folder
{DASHES}
Primary job  terminated normally, but 1 process returned
error: rank 1: [train.open_data] no such folder
a non-zero exit code. Per user-direction, the job has been aborted.
{DASHES}
error: rank 1: something else
mpirun: Forwarding signal 10 to job
"""
    assert shown(build_dir, text) == [
        "a warning", "error: [train.open_data] no such folder", "error: something else",
    ]


def test_a_dead_rank_is_named(build_dir: Path) -> None:
    text = f"""{DASHES}
Primary job  terminated normally, but 1 process returned
a non-zero exit code. Per user-direction, the job has been aborted.
{DASHES}
{DASHES}
mpirun noticed that process rank 1 with PID 0 on node host exited on signal 9 (Killed).
{DASHES}
"""
    assert shown(build_dir, text) == [
        "error: mpirun noticed that process rank 1 with PID 0 on node host exited on signal 9 (Killed)."
    ]


def test_what_mpirun_alone_says_is_kept(build_dir: Path) -> None:
    text = f"{DASHES}\nThere are not enough slots available in the system\n{DASHES}\n{DASHES}\ncut off"
    assert shown(build_dir, text) == [
        "There are not enough slots available in the system", "cut off",
    ]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "None None"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, "mpi 3"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpi 1"),
        ({"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1"}, "torchrun 5"),
        ({"RANK": "5"}, "None None"),
    ],
)
def test_launchers(build_dir: Path, variables: dict[str, str], expected: str) -> None:
    program = "from meshloom import launch; print(launch.launcher(), launch.rank_of_launcher())"
    assert run(build_dir, [sys.executable, "-c", program], **variables).stdout.strip() == expected


def test_without_mpirun_the_error_says_what_to_do(build_dir: Path, tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.symlink_to(os.path.realpath(sys.executable))
    assert shutil.which("mpirun", path=str(tmp_path)) is None
    result = run(
        build_dir, [sys.executable, "-c",
                    "from meshloom import launch; launch.mpirun_command(2, ['x'])"],
        good=False, PATH=str(tmp_path),
    )
    assert "openmpi-bin" in result.stderr
