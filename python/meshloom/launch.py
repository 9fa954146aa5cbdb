"""Starting ranks: which launcher started this process, and starting them under mpirun."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO

from meshloom._errors import InvalidArgument, NotSupported
from meshloom._world import find_place

# mpirun's stderr stays open while a rank that outlives it holds it.
_DRAIN_SECONDS = 5.0

WIDTH_VARIABLE = "MESHLOOM_TERMINAL_WIDTH"
"""Columns of the terminal behind the pipe that a launcher hands its ranks as stdout."""


def launcher(environment: Mapping[str, str] | None = None) -> str | None:
    """`mpi`, `torchrun`, `slurm`, or None for a process that was started alone."""
    place = find_place(os.environ if environment is None else environment)
    return None if place.launcher == "single" else place.launcher


def rank_of_launcher(environment: Mapping[str, str] | None = None) -> str | None:
    """This process's rank as its launcher's variables say, None without a launcher."""
    variables = os.environ if environment is None else environment
    names = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID", "RANK")
    if launcher(variables) is None:
        return None
    return next((variables[name] for name in names if name in variables), None)


def mpirun_command(ranks: int, command: Sequence[str]) -> list[str]:
    """The command that starts `ranks` processes of `command` on this host.

    When a rank dies, Open MPI names it and ends the others. More ranks than cores must work, so
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
        options = ["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
        if os.geteuid() == 0:
            options.append("--allow-run-as-root")
    return [mpirun, *options, "-n", str(ranks), *command]


def _end_with_parent() -> None:
    """Linux: this process gets SIGTERM when its parent dies, however it dies."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class ErrorFilter:
    """What ranks and mpirun write to stderr, each error once.

    Ranks agree on errors, so one line arrives from each; after it, mpirun's remark that a process
    returned a non-zero exit code says nothing new. What mpirun says of a rank that a signal ended is
    kept.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._block: list[str] | None = None  # of mpirun, between two lines of dashes

    def take(self, line: str) -> list[str]:
        """Lines to show now that `line` (without its end) has come."""
        if re.fullmatch(r"-{40,}", line):
            block, self._block = self._block, [] if self._block is None else None
            return [] if block is None else self._close(block)
        if line.startswith("error: "):  # a rank's, inside a block of mpirun's too
            text = re.sub(r"^error: (rank \d+: )?", "", line)
            if text in self._seen:
                return []
            self._seen.add(text)
            return [f"error: {text}"]
        if self._block is not None:
            self._block.append(line)
            return []
        return [] if line.startswith("mpirun: Forwarding signal") else [line]

    def rest(self) -> list[str]:
        """Lines of a block that never ended."""
        block, self._block = self._block, None
        return self._close(block) if block else []

    def _close(self, block: list[str]) -> list[str]:
        text = " ".join(" ".join(block).split())
        if text.startswith("Primary job terminated normally"):
            return []  # the block after it says which rank, and how it ended
        if "exited on signal" not in text:
            return [] if self._seen or not text else block
        return [f"error: {text}"]


def _copy_lines(stream: IO[str], errors: ErrorFilter) -> None:
    for line in stream:
        for shown in errors.take(line.rstrip("\r\n")):
            print(shown, file=sys.stderr, flush=True)


def run_under_mpirun(ranks: int, arguments: Sequence[str]) -> int:
    """Runs `meshloom ARGUMENTS` on `ranks` processes and returns the exit code.

    SIGINT and SIGTERM ask the ranks to finish their step and save (mpirun itself would kill them
    after a second); a second SIGINT or SIGTERM ends them. SIGUSR1 and SIGUSR2 are passed on.
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
        command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        errors="replace", start_new_session=True, preexec_fn=_end_with_parent,
    )
    errors = ErrorFilter()
    assert process.stderr is not None
    reader = threading.Thread(target=_copy_lines, args=(process.stderr, errors), daemon=True)
    reader.start()
    asked = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if number == signal.SIGUSR2:
            process.send_signal(number)
        elif number == signal.SIGUSR1 or not asked:
            if number != signal.SIGUSR1:
                asked = True
                os.write(2, b"\nstopping after this step, with a checkpoint; once more ends the ranks now\n")
            process.send_signal(signal.SIGUSR1)
        else:
            process.send_signal(signal.SIGTERM)

    previous = {
        number: signal.signal(number, forward)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    }
    try:
        code = process.wait()
        reader.join(timeout=_DRAIN_SECONDS)
        for line in errors.rest():
            print(line, file=sys.stderr, flush=True)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if process.poll() is None:
            process.kill()
    return 128 - code if code < 0 else code
