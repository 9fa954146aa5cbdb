"""Training from Python: the same objects as in C++, and the few lines that join them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from meshloom import _runtime, planning
from meshloom._world import world_from_env

if TYPE_CHECKING:
    from meshloom import _core
else:
    _core = _runtime.core

AdamWOptions = _core.AdamWOptions
CheckpointSection = _core.CheckpointSection
ParallelSection = _core.ParallelSection
export_checkpoint = _core.export_checkpoint
Communicator = _core.Communicator
DataSection = _core.DataSection
ExpertsSection = _core.ExpertsSection
GradientsOptions = _core.GradientsOptions
GradientsResult = _core.GradientsResult
GroupOptions = _core.GroupOptions
ModelConfig = _core.ModelConfig
ModelSection = _core.ModelSection
OffloadSection = _core.OffloadSection
ParameterRule = _core.ParameterRule
ReduceOp = _core.ReduceOp
ScheduleOptions = _core.ScheduleOptions
StepMetrics = _core.StepMetrics
TrainConfig = _core.TrainConfig
Trainer = _core.Trainer
Watchdog = _core.Watchdog
Work = _core.Work
gradients = _core.gradients
run_thread_ranks = _core.run_thread_ranks


def make_world(
    backend: str | None = None, options: GroupOptions | None = None
) -> Communicator:
    """This process's place among the ranks that its launcher started.

    `backend` None: mpi under mpirun, torch (Gloo) under torchrun, either in a Slurm step, else a
    world of one.
    """
    return world_from_env(options, backend=backend)


def make_trainer(
    config: TrainConfig,
    world: Communicator,
    *,
    model: ModelConfig | None = None,
    loader: _core.Loader | None = None,
    strategy: planning.Strategy | None = None,
    on_hang: Callable[[str], None] | None = None,
) -> Trainer:
    """A Trainer for everything that `config` names. Collective.

    `model`, `loader` and `strategy` replace what the config says; a strategy is an instance, a
    registered name, `module:Class` or `file.py:Class`. A `tokenizer.json` needs the package
    `tokenizers`. `on_hang` gets the report of a call that hangs (`watchdog_seconds`), on another
    thread.
    """
    model = _core.load_model_config(config) if model is None else model
    chosen = planning.instance(strategy or config.strategy)
    if loader is None:
        tokenizers = []
        beside_weights = os.path.join(config.model.path, "tokenizer.json") if config.model.path else ""
        file = config.data.tokenizer or (beside_weights if os.path.isfile(beside_weights) else "")
        if file and _needs_python(file):
            from meshloom import data

            tokenizers.append(data.load_tokenizer(file))
        loader = _core.open_data(config, model.vocab_size, world, *tokenizers)
    if on_hang is None:
        return Trainer(config, model, loader, world, chosen)
    return Trainer(config, model, loader, world, chosen, on_hang)


def _needs_python(path: str) -> bool:
    return path.endswith(".json") or os.path.isdir(path)
