"""Training from Python: the same objects as in C++, and the few lines that join them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from meshloom import _runtime, launch, planning
from meshloom._errors import InvalidArgument, NotSupported

if TYPE_CHECKING:
    from meshloom import _core
else:
    _core = _runtime.core

AdamWOptions = _core.AdamWOptions
CheckpointSection = _core.CheckpointSection
Communicator = _core.Communicator
DataSection = _core.DataSection
GradientsOptions = _core.GradientsOptions
GradientsResult = _core.GradientsResult
GroupOptions = _core.GroupOptions
ModelConfig = _core.ModelConfig
ModelSection = _core.ModelSection
ParameterRule = _core.ParameterRule
ScheduleOptions = _core.ScheduleOptions
StepMetrics = _core.StepMetrics
TrainConfig = _core.TrainConfig
Trainer = _core.Trainer
gradients = _core.gradients
run_thread_ranks = _core.run_thread_ranks


def make_world(
    backend: str | None = None, options: GroupOptions | None = None
) -> Communicator:
    """This process's place among the ranks that its launcher started.

    `backend` None: mpi under mpirun or srun, torch (Gloo) under torchrun, else a world of one.
    """
    options = GroupOptions() if options is None else options
    started_by = launch.launcher()
    if backend is None:
        backend = {"mpi": "mpi", "torchrun": "torch", None: "thread"}[started_by]
    if backend == "thread":
        return _core.make_thread_world(1, options)[0]
    if backend == "mpi":
        return _core.make_mpi_world(options)
    if backend in ("torch", "nccl"):
        raise NotSupported(f"[make_world] backend {backend} is not built")
    raise InvalidArgument(f"[make_world] backend is {backend!r}, expected thread, mpi, torch or nccl")


def make_trainer(
    config: TrainConfig,
    world: Communicator,
    *,
    model: ModelConfig | None = None,
    loader: _core.Loader | None = None,
    strategy: planning.Strategy | None = None,
) -> Trainer:
    """A Trainer for everything that `config` names. Collective.

    `model`, `loader` and `strategy` replace what the config says; a strategy is an instance, a
    registered name, `module:Class` or `file.py:Class`. A `tokenizer.json` needs the package
    `tokenizers`.
    """
    model = _core.load_model_config(config) if model is None else model
    chosen = planning.instance(strategy or config.strategy)
    if loader is None:
        tokenizers = []
        if config.data.tokenizer and _needs_python(config.data.tokenizer):
            from meshloom import data

            tokenizers.append(data.load_tokenizer(config.data.tokenizer))
        loader = _core.open_data(config, model.vocab_size, world, *tokenizers)
    return Trainer(config, model, loader, world, chosen)


def _needs_python(path: str) -> bool:
    return path.endswith(".json") or os.path.isdir(path)
