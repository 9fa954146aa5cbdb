"""Which launcher started this process, and the world that its ranks make up. Needs no torch until
a world is made."""

from __future__ import annotations

import atexit
import dataclasses
import datetime
import os
import pathlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from meshloom._build_info import FEATURES
from meshloom._errors import InvalidArgument, NotSupported

if TYPE_CHECKING:
    from meshloom._core import Communicator, GroupOptions

_BACKENDS = ("thread", "mpi", "nccl", "torch")
_SLURM_PORTS = range(20_000, 40_000)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a launcher has put this process."""

    launcher: str
    """mpi, torchrun, slurm, file or single."""
    local_rank: int = 0
    """Rank on this machine: which device is ours."""
    rank: int = 0
    size: int = 1
    init_method: str = ""
    """Where torch.distributed meets (torchrun, slurm, file)."""


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise InvalidArgument(
            f"[comm.from_env] {name} is {text!r}, expected a number"
        ) from None


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: `gpu[003-006,009],login` is `gpu003`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise InvalidArgument(f"[comm.from_env] SLURM_STEP_NODELIST is {nodes!r}, expected hosts")
    return match[1] + (match[2] or "") + (match[3] or "")


def find_place(environ: Mapping[str, str], *, has_mpi: bool = FEATURES["mpi"]) -> Place:
    """Reads a launcher's variables. torchrun's win under srun, mpirun's win over variables that
    merely look like torchrun's; MESHLOOM_STORE, which nobody sets by accident, over all."""
    torchrun = all(name in environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    mpirun = "OMPI_COMM_WORLD_SIZE" in environ
    if path := environ.get("MESHLOOM_STORE"):
        return Place(
            "file",
            local_rank=_number(environ, "LOCAL_RANK", 0),
            rank=_number(environ, "RANK"),
            size=_number(environ, "WORLD_SIZE"),
            init_method=f"file://{pathlib.Path(path).absolute()}",
        )
    step = "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ
    if torchrun and ("TORCHELASTIC_RUN_ID" in environ or not mpirun):
        return Place(
            "torchrun",
            local_rank=_number(environ, "LOCAL_RANK", 0),
            rank=_number(environ, "RANK"),
            size=_number(environ, "WORLD_SIZE"),
            init_method="env://",
        )
    pmi = any(name in environ for name in ("PMI_SIZE", "PMI_RANK", "PMIX_RANK"))
    if mpirun or (pmi and (has_mpi or not step)):
        local = "OMPI_COMM_WORLD_LOCAL_RANK" if mpirun else "SLURM_LOCALID"
        return Place("mpi", local_rank=_number(environ, local, 0))
    if step and _number(environ, "SLURM_STEP_NUM_TASKS") > 1:
        address = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", ""))
        job = _number(environ, "SLURM_JOB_ID", 0) + 7 * _number(environ, "SLURM_STEP_ID", 0)
        port = _number(environ, "MASTER_PORT", _SLURM_PORTS[job % len(_SLURM_PORTS)])
        return Place(
            "slurm",
            local_rank=_number(environ, "SLURM_LOCALID", 0),
            rank=_number(environ, "SLURM_PROCID"),
            size=_number(environ, "SLURM_STEP_NUM_TASKS"),
            init_method=f"tcp://{address}:{port}",
        )
    return Place("single", local_rank=_number(environ, "LOCAL_RANK", 0))


def _process_group(place: Place, timeout: datetime.timedelta | None) -> Any:
    """A torch.distributed group that carries CPU tensors: the program's own where it has one."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        raise NotSupported("[comm.from_env] this torch has no torch.distributed, expected gloo")
    limit = {} if timeout is None else {"timeout": timeout}
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo", init_method=place.init_method, rank=place.rank, world_size=place.size, **limit
        )
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    group = dist.group.WORLD
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError:  # the program's group is for devices alone
        group = dist.new_group(backend="gloo", **limit)
    return group


def world_from_env(
    options: GroupOptions | None = None, device: str = "cpu", backend: str | None = None
) -> Communicator:
    """What `Communicator.from_env` returns; a `backend` wins over MESHLOOM_BACKEND."""
    from meshloom._runtime import core

    options = core.GroupOptions() if options is None else options
    if device not in ("cpu", "cuda"):
        raise InvalidArgument(f"[comm.from_env] device is {device!r}, expected cpu or cuda")
    backend = backend or os.environ.get("MESHLOOM_BACKEND", "")
    if backend and backend not in _BACKENDS:
        raise InvalidArgument(
            f"[comm.from_env] the backend is {backend!r}, expected one of " + ", ".join(_BACKENDS)
        )
    place = find_place(os.environ)
    if backend == "torch" and place.launcher not in ("torchrun", "slurm", "file"):
        raise InvalidArgument(
            "[comm.from_env] the backend is 'torch', expected torchrun's variables (RANK, "
            "WORLD_SIZE, MASTER_ADDR, MASTER_PORT), MESHLOOM_STORE or a Slurm step; there are none"
        )
    if backend == "mpi" or (backend in ("", "nccl") and place.launcher == "mpi"):
        host: Communicator = core.make_mpi_world(options)
    elif backend == "thread" or place.launcher in ("single", "mpi"):
        host = core.make_thread_world(1, options)[0]
    else:
        group = _process_group(place, options.timeout)
        host = core.Communicator.from_process_group(group, options)
    if backend != "nccl" and (device == "cpu" or backend):
        return host
    import torch

    if not torch.cuda.is_available():
        raise NotSupported("[comm.from_env] device is 'cuda', but torch sees no CUDA device")
    world: Communicator = core.make_nccl_world(
        host, place.local_rank % torch.cuda.device_count(), options
    )
    return world
