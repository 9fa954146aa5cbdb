"""Communicators in Python: what the launchers' variables mean, and worlds that they start."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest
from meshloom._errors import InvalidArgument
from meshloom._world import find_place, first_host

PROGRAM = str(pathlib.Path(__file__).with_name("world_program.py"))
# Only a hang reaches it.
PATIENCE = 120
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_ID": "70011",
}


def test_no_launcher_is_a_world_of_one() -> None:
    place = find_place({})
    assert (place.launcher, place.rank, place.size) == ("single", 0, 1)
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}).launcher == "single"  # sbatch's shell


def test_torchrun_is_found() -> None:
    place = find_place(TORCHRUN)
    assert (place.launcher, place.rank, place.size, place.local_rank) == ("torchrun", 3, 8, 1)


def test_mpirun_wins_over_stray_variables_and_torchrun_over_srun() -> None:
    mpirun = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}
    assert find_place(mpirun).local_rank == 2
    assert find_place({**TORCHRUN, **mpirun}).launcher == "mpi"
    assert find_place({**TORCHRUN, **SLURM, "PMIX_RANK": "0"}).launcher == "torchrun"
    assert find_place({**TORCHRUN, **mpirun, "TORCHELASTIC_RUN_ID": "x"}).launcher == "torchrun"


def test_slurm_steps_meet_at_the_first_host() -> None:
    place = find_place(SLURM)
    assert (place.launcher, place.rank, place.size, place.local_rank) == ("slurm", 5, 8, 1)
    assert place.init_method == "tcp://gpu003:30011"
    assert find_place({**SLURM, "MASTER_ADDR": "h", "MASTER_PORT": "9"}).init_method == "tcp://h:9"
    assert find_place({**SLURM, "PMIX_RANK": "5"}, has_mpi=True).launcher == "mpi"
    assert find_place({**SLURM, "PMIX_RANK": "5"}, has_mpi=False).launcher == "slurm"


def test_a_file_is_where_it_says_whoever_started_the_ranks() -> None:
    place = find_place({"MESHLOOM_STORE": "/shared/a b", **TORCHRUN, "OMPI_COMM_WORLD_SIZE": "4"})
    assert (place.launcher, place.rank, place.size, place.local_rank) == ("file", 3, 8, 1)
    assert place.init_method == "file:///shared/a b"
    with pytest.raises(InvalidArgument, match="RANK is None, expected a number"):
        find_place({"MESHLOOM_STORE": "/shared/x", "WORLD_SIZE": "8"})


def test_first_hosts_of_node_lists() -> None:
    assert first_host("gpu[003-006,009],login") == "gpu003"
    assert first_host("a1,a2") == "a1"
    assert first_host("rack[1,3]-node") == "rack1-node"
    assert first_host("solo") == "solo"


def test_malformed_variables_are_named() -> None:
    with pytest.raises(InvalidArgument, match="RANK is 'x', expected a number"):
        find_place({**TORCHRUN, "RANK": "x"})


def environment(build_dir: pathlib.Path, **extra: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_COMM", "PMI"))}
    return clean | {
        "PYTHONPATH": str(build_dir / "python"),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        **extra,
    }


def reports(output: str) -> list[dict]:
    """The JSON objects in what ranks printed; unbuffered ranks may share a line."""
    found, at = [], output.find("{")
    while at >= 0:
        report, at = json.JSONDecoder().raw_decode(output, at)
        found.append(report)
        at = output.find("{", at)
    return found


def check(outputs: list[str], size: int, backend: str) -> None:
    ranks = sorted(
        (report for output in outputs for report in reports(output)), key=lambda seen: seen["rank"]
    )
    assert [seen["rank"] for seen in ranks] == list(range(size))
    for seen in ranks:
        assert seen["backend"] == backend
        assert seen["sum"] == size * (size + 1) / 2
        assert seen["gathered"] == [r for r in range(size) for _ in range(r + 1)]
        assert seen["sent"] == 2 * 4_000 * (size - 1) // size
        if backend == "torch":
            assert seen["again"] == size * size


def run(command: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_world_of_one(build_dir: pathlib.Path) -> None:
    check([run([sys.executable, PROGRAM], environment(build_dir))], 1, "thread")


def test_torchrun_world(build_dir: pathlib.Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    check([run([*command, PROGRAM], environment(build_dir))], 2, "torch")


def test_mpirun_world(build_dir: pathlib.Path) -> None:
    features = run(
        [sys.executable, "-c", "from meshloom import _build_info as b; print(b.FEATURES['mpi'])"],
        environment(build_dir),
    )
    if features.strip() == "False":  # configured without MPI: the twin says so
        with pytest.raises(AssertionError, match="this build has no MPI"):
            run([sys.executable, PROGRAM], environment(build_dir, OMPI_COMM_WORLD_SIZE="2"))
        return
    command = [shutil.which("mpirun") or "mpirun", "--oversubscribe", "-n", "2", sys.executable]
    check([run([*command, PROGRAM], environment(build_dir))], 2, "mpi")


def test_ranks_meet_by_a_file(build_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, PROGRAM], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment(
                build_dir, MESHLOOM_STORE=str(tmp_path / "meet"), RANK=str(rank), WORLD_SIZE="2"
            ),
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=PATIENCE)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    check(outputs, 2, "torch")


def test_slurm_world(build_dir: pathlib.Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(2):
        env = environment(
            build_dir,
            SLURM_PROCID=str(rank),
            SLURM_LOCALID=str(rank),
            SLURM_STEP_NUM_TASKS="2",
            SLURM_STEP_NODELIST="localhost",
            MASTER_PORT=port,
        )
        ranks.append(
            subprocess.Popen(
                [sys.executable, PROGRAM], env=env, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True,
            )
        )
    outputs = [rank.communicate(timeout=PATIENCE)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    check(outputs, 2, "torch")
