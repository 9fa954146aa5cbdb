"""Starting ranks: which launcher started this process, and starting them under mpirun."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

from meshloom._errors import InvalidArgument, NotSupported

# Variables by which a started process knows its place; any one suffices.
_MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK", "PMIX_RANK")
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR")

WIDTH_VARIABLE = "MESHLOOM_TERMINAL_WIDTH"
"""Columns of the terminal behind the pipe that a launcher hands its ranks as stdout."""


def launcher(environment: Mapping[str, str] | None = None) -> str | None:
    """`mpi`, `torchrun`, or None for a process that was started alone."""
    variables = os.environ if environment is None else environment
    if any(name in variables for name in _MPI_VARIABLES):
        return "mpi"
    if all(name in variables for name in _TORCHRUN_VARIABLES):
        return "torchrun"
    return None


def mpirun_command(ranks: int, command: Sequence[str]) -> list[str]:
    """The command that starts `ranks` processes of `command` on this host.

    Open MPI ends the surviving ranks a second after one dies unless --enable-recovery is given:
    then they can report who died and write what they know. More ranks than cores must work, so
    ranks are not bound to cores and yield while they wait.
    """
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        raise NotSupported(
            "[launch] there is no mpirun on PATH, expected Open MPI or MPICH; apt-get install"
            " openmpi-bin, or use --backend thread"
        )
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False)
    options = []
    if "Open MPI" in version.stdout or "OpenRTE" in version.stdout:
        options = ["--enable-recovery", "--oversubscribe", "--bind-to", "none",
                   "--mca", "mpi_yield_when_idle", "1"]
        if os.geteuid() == 0:
            options.append("--allow-run-as-root")
    return [mpirun, *options, "-n", str(ranks), *command]


def _end_with_parent() -> None:
    """Linux: this process gets SIGTERM when its parent dies, however it dies."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def run_under_mpirun(ranks: int, arguments: Sequence[str]) -> int:
    """Runs `meshloom ARGUMENTS` on `ranks` processes and returns the exit code.

    SIGINT and SIGTERM ask the ranks to finish their step and save (mpirun itself would kill them
    after a second); a second SIGINT or SIGTERM ends them.
    """
    if ranks < 1:
        raise InvalidArgument(f"[launch] ranks is {ranks}, expected at least 1")
    command = mpirun_command(ranks, [sys.executable, "-m", "meshloom", *arguments])
    environment = dict(os.environ)
    # Shared memory between ranks by process_vm_readv is forbidden in many containers.
    environment.setdefault("OMPI_MCA_btl_vader_single_copy_mechanism", "none")
    if sys.stdout.isatty():  # mpirun hands the ranks a pipe: tell them what is behind it
        environment[WIDTH_VARIABLE] = str(shutil.get_terminal_size().columns)
    # Waiting threads of one rank must not spin on the core that another rank computes on.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    asked = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if number == signal.SIGUSR1 or not asked:
            asked = asked or number != signal.SIGUSR1
            process.send_signal(signal.SIGUSR1)
        else:
            process.send_signal(signal.SIGTERM)

    previous = {
        number: signal.signal(number, forward)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if process.poll() is None:
            process.kill()
    return 128 - code if code < 0 else code
