"""Breaks jobs on purpose and checks that every survivor says so, in time and correctly.

    comm_deaths.py mpi MPIRUN PROGRAM     ranks under mpirun --enable-recovery
    comm_deaths.py torch                  ranks over Gloo, forked
"""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

RANKS = 4
VICTIM = RANKS - 2
LIMIT = 1.0
# A rank may notice late on a loaded machine, and others only after its limit.
PATIENCE = 15.0

# mode -> (what some rank must say, what every rank must say)
EXPECTED: dict[str, tuple[str, str]] = {
    "killed_in_collective": (rf"rank {VICTIM}\b|missing peers: [\d, ]*{VICTIM}", r"comm\.all_reduce"),
    "killed_in_exchange": (rf"rank {VICTIM}\b|missing peers: [\d, ]*{VICTIM}", r"comm\.send_receive"),
    "killed_in_split": (rf"rank {VICTIM}\b|missing peers: [\d, ]*{VICTIM}", r"comm\.(all_gather|all_reduce)"),
    "stopped": (rf"missing peers: [\d, ]*{VICTIM}", r"comm\.all_reduce"),
    "absent": (rf"missing peers: [\d, ]*{VICTIM}", r"comm\.all_reduce"),
    "shapes": (r"the ranks disagree about the call all_reduce", r"comm\.all_reduce"),
    "kinds": (r"the ranks disagree about the call|not finished within", r"comm\.(all_reduce|broadcast)"),
}
SURVIVES = ("absent", "shapes", "kinds")
# All of them run where MESHLOOM_FULL is set, as tests/run.sh --full does.
SAMPLE = {
    "mpi": ("killed_in_collective", "killed_in_exchange", "stopped", "shapes"),
    "torch": ("killed_in_exchange", "killed_in_split", "stopped", "kinds"),
}


def read(output: str) -> tuple[dict[int, str], dict[int, float], int | None]:
    """Errors and their times by rank, and the process id of the victim."""
    errors: dict[int, str] = {}
    seconds: dict[int, float] = {}
    victim = None
    for line in output.splitlines():
        if match := re.match(r"rank (\d+) after ([\d.]+) s: (.*)", line):
            errors[int(match[1])] = match[3]
            seconds[int(match[1])] = float(match[2])
        elif match := re.match(r"rank \d+ pid (\d+) (ends|stops|waits)", line):
            victim = int(match[1])
    return errors, seconds, victim


def problems(mode: str, output: str) -> list[str]:
    errors, seconds, victim = read(output)
    some, every = EXPECTED[mode]
    found = []
    survivors = [r for r in range(RANKS) if mode in SURVIVES or r != VICTIM]
    if victim is None and mode not in ("shapes", "kinds"):
        found.append("nobody broke the job")
    for rank in survivors:
        if rank not in errors:
            found.append(f"rank {rank} reported nothing")
        elif not re.search(every, errors[rank]):
            found.append(f"rank {rank} does not name the call ({every}): {errors[rank]}")
        elif f"rank {rank}/{RANKS}" not in errors[rank] and "rank" not in errors[rank]:
            found.append(f"rank {rank} does not say who it is: {errors[rank]}")
        elif rank != VICTIM and not re.search(r"in step [234] \w+ slot 1 unit 7 samples 4, 9", errors[rank]):
            found.append(f"rank {rank} does not say what it was doing: {errors[rank]}")
        if seconds.get(rank, 0.0) > PATIENCE:
            found.append(f"rank {rank} took {seconds[rank]} s")
    if not any(re.search(some, text) for text in errors.values()):
        found.append(f"nobody says {some}: {errors}")
    return found


def run_mpi(mode: str, mpirun: str, program: str) -> str:
    command = [
        mpirun, "--allow-run-as-root", "--oversubscribe", "--enable-recovery",
        "--mca", "mpi_yield_when_idle", "1", "-n", str(RANKS), program, mode, str(LIMIT),
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+") as log:
        job = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)

        def output() -> str:
            log.seek(0)
            return log.read()

        watch(mode, output, lambda: job.poll() is not None)
        try:
            job.wait(PATIENCE)  # with --enable-recovery it ends with 0 whatever its ranks did
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()
            raise SystemExit(f"{mode}: mpirun does not end\n{output()}") from None
        return output()


def watch(mode: str, output: Callable[[], str], ended: Callable[[], bool]) -> None:
    """Waits until all survivors have reported; a stopped process is then killed."""
    until = time.monotonic() + 2 * PATIENCE
    while time.monotonic() < until and not ended():
        errors, _, victim = read(output())
        if len(errors) >= RANKS - 1 and mode == "stopped" and victim is not None:
            os.kill(victim, signal.SIGKILL)
            return
        if len(errors) == RANKS:
            return
        time.sleep(0.05)


def run_torch_rank(mode: str, rank: int, folder: str) -> int:
    import comm_conformance_torch
    import torch.distributed as dist

    store = pathlib.Path(folder, "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    return comm_conformance_torch.run_death(dist.group.WORLD, mode, LIMIT)


def run_torch(mode: str) -> str:
    import comm_conformance_torch  # noqa: F401  before the fork: torch is loaded once

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder, "log")
        log.touch()
        children = {}
        for rank in range(RANKS):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
                    os.dup2(descriptor, 1)
                    os.dup2(descriptor, 2)
                    code = run_torch_rank(mode, rank, folder)
                finally:
                    os._exit(code)
            children[child] = rank

        def reap() -> bool:
            for child in list(children):
                if os.waitpid(child, os.WNOHANG)[0] != 0:
                    del children[child]
            return not children

        watch(mode, log.read_text, reap)
        until = time.monotonic() + PATIENCE
        while not reap() and time.monotonic() < until:
            time.sleep(0.05)
        late = sorted(children.values())
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if late:
            raise SystemExit(f"{mode}: ranks {late} do not end\n{log.read_text()}")
        return log.read_text()


def main() -> int:
    failed = 0
    backend, *arguments = sys.argv[1:]
    for mode in EXPECTED if os.environ.get("MESHLOOM_FULL") else SAMPLE[backend]:
        start = time.monotonic()
        output = run_mpi(mode, *arguments) if backend == "mpi" else run_torch(mode)
        found = problems(mode, output)
        print(f"{backend} {mode}: {'ok' if not found else 'FAILED'}, {time.monotonic() - start:.1f} s")
        if found:
            failed = 1
            print("\n".join([*found, output]))
    return failed


if __name__ == "__main__":
    sys.exit(main())
