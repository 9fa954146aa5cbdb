"""meshloom train: one rank of a run, or the launcher of its ranks."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshloom import launch
from meshloom.cli import common, progress

if TYPE_CHECKING:
    from meshloom._core import Communicator, StepMetrics, TrainConfig
    from meshloom._plan import StepPlan

# SIGTERM and SIGUSR1 are what schedulers send before they end a job; SIGINT is Ctrl-C.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_REPORT_SIGNAL = signal.SIGUSR2


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Training")(train)


def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="What to train, and how.")],
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks", "-n", show_default=False,
            help="Ranks to start on this host; default: what the config's layout needs, else 1.",
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend", show_default=False,
            help="How ranks talk: thread (inside one process), mpi, nccl, or torch under torchrun.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", show_default=False,
            help="Folder of text files, or a .jsonl file, instead of the config's; again for more.",
        ),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option("--run", help="Run folder instead of the config's.", show_default=False),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Steps instead of the config's.", show_default=False)
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy", show_default=False,
            help="Balance strategy instead of the config's; MODULE:CLASS for one of your own.",
        ),
    ] = None,
    layout: common.LayoutOption = None,
    hdp: common.HdpOption = None,
    capacity_tokens: Annotated[
        int | None,
        typer.Option(
            "--capacity-tokens", "--capacity", show_default=False,
            help="Most tokens that a rank may hold of one unit, instead of the config's.",
        ),
    ] = None,
) -> None:
    """Train the model that CONFIG.yaml describes.

    Alone it starts its ranks itself, under mpirun or, with --backend
    thread, as threads. Under mpirun, srun or torchrun it is one of the ranks.

    SIGTERM, SIGUSR1 and Ctrl-C end the run after the current step, with a
    checkpoint; the same command continues it. A second Ctrl-C ends it now.
    SIGUSR2 makes every rank write what it waits for to flight/ in the run
    folder, as a call that hangs does by itself.

    [dim]Examples[/dim]

      meshloom train examples/quickstart.yaml --ranks 4

      meshloom train config.yaml -n 2 --backend thread --data corpus/

      mpirun -n 4 meshloom train config.yaml

      torchrun --nproc-per-node 4 -m meshloom train config.yaml
    """
    if backend not in (None, "thread", "mpi", "nccl", "torch"):
        raise typer.BadParameter(f"--backend is {backend}, expected thread, mpi, nccl or torch")
    started_by = launch.launcher()
    if started_by is not None and ranks is not None:
        raise typer.BadParameter(
            f"--ranks is for a start without a launcher; this process was started by {started_by}"
        )
    if not os.path.isfile(config):
        raise FileNotFoundError(2, "there is no such config file", config)
    overrides = {
        "data": data, "run": run, "steps": steps, "strategy": strategy,
        "layout": common.resolve_layout(layout, hdp) if layout or hdp else None,
        "capacity_tokens": capacity_tokens,
    }
    if started_by is not None:
        _train_rank(config, overrides, backend)
        return
    count = ranks if ranks is not None else _ranks_of(config, overrides)
    if count < 1:
        raise typer.BadParameter(f"--ranks is {count}, expected at least 1")
    if backend == "thread" and count > 1:
        _train_on_threads(config, overrides, count)
    elif count == 1:
        _train_rank(config, overrides, backend)
    elif backend == "torch":
        raise typer.BadParameter(
            f"--backend torch takes its ranks from torchrun: torchrun --nproc-per-node {count} -m"
            f" meshloom train {config}"
        )
    else:
        arguments = ["train", config]
        for path in data or ():
            arguments += ["--data", path]
        named = (
            ("--run", run), ("--steps", steps), ("--backend", backend), ("--strategy", strategy),
            ("--layout", layout), ("--hdp", hdp), ("--capacity-tokens", capacity_tokens),
        )
        for name, value in named:
            arguments += [name, str(value)] if value is not None else []
        if code := launch.run_under_mpirun(count, arguments):
            raise typer.Exit(code)


def _ranks_of(path: str, overrides: Mapping[str, Any]) -> int:
    """Ranks that the layout asks for; 1 where it leaves that open."""
    layout = _load(path, overrides).layout
    return int(layout.world_size) if layout.hdp else 1


def _load(path: str, overrides: Mapping[str, Any]) -> TrainConfig:
    from meshloom import training

    config = training.TrainConfig.load(path)
    if overrides["data"]:
        config.data.paths = overrides["data"]
        config.data.weights = []
        config.data.extensions = []
    for name in ("run", "steps", "strategy", "layout", "capacity_tokens"):
        if overrides[name] is not None:
            setattr(config, name, overrides[name])
    return config


def _handle_signals() -> None:
    from meshloom import _runtime

    _runtime.core.stop_on_signals([int(number) for number in _STOP_SIGNALS])
    _runtime.core.report_on_signal(int(_REPORT_SIGNAL))


def _show_report(report: str, folder: str) -> None:
    """What a rank waits for, on stderr; its last calls are in the run folder."""
    lines = report.split("\nlast ", 1)[0].splitlines()
    print("\n".join(["note: " + lines[0], *("  " + line for line in lines[1:]), f"  more in {folder}/flight"]),
          file=sys.stderr, flush=True)


def _train_rank(path: str, overrides: Mapping[str, Any], backend: str | None) -> None:
    from meshloom import training

    config = _load(path, overrides)
    world = training.make_world(backend)
    _handle_signals()
    _train(config, world)


def _train_on_threads(path: str, overrides: Mapping[str, Any], count: int) -> None:
    from meshloom import training

    config = _load(path, overrides)
    _handle_signals()
    training.run_thread_ranks(count, lambda world: _train(config, world))


def _train(config: TrainConfig, world: Communicator) -> None:
    """One rank of the run; rank 0 shows it."""
    from meshloom import training

    first = world.rank == 0
    width = progress.terminal_width()
    if first:
        print(f"meshloom: {world.size} rank{'s' if world.size > 1 else ''} over {world.backend},"
              " reading data", flush=True)
    trainer = training.make_trainer(
        config, world, on_hang=lambda report: _show_report(report, config.run)
    )
    resolved = trainer.config
    line = progress.Progress(resolved.steps, width)
    if first:
        model = trainer.model_config
        print(
            f"{model.model_type}, {model.parameter_count / 1e6:.1f} M parameters; layout"
            f" {resolved.layout}, {resolved.global_batch_tokens:,} tokens a step, capacity"
            f" {resolved.capacity_tokens:,}, strategy {resolved.strategy}; run folder {resolved.run}",
            flush=True,
        )
        print(trainer.memory, flush=True)
        if trainer.resumed_from:
            print(f"continuing from {trainer.resumed_from} at step {trainer.next_step}", flush=True)
    told = 0
    history: list[StepMetrics] = []
    plans: deque[StepPlan] = deque(maxlen=progress.COMPARED_STEPS)
    for metrics in trainer:
        if not first:
            continue
        for notice in trainer.notices[told:]:
            line.say(f"note: {notice}")
        told = len(trainer.notices)
        history.append(metrics)
        plans.append(trainer.last_plan)
        line.update(metrics)
    if not first:
        return
    line.close()
    for notice in trainer.notices[told:]:
        print(f"note: {notice}", flush=True)
    if history:
        print(progress.closing_table(history, list(plans), width), flush=True)
    if trainer.finished:
        _keep_tokenizer(resolved)
        print(f"the trained model is in {resolved.run}/checkpoint", flush=True)
    else:
        print(f"stopped after step {trainer.next_step} of {resolved.steps} with a checkpoint; the same"
              " command continues", flush=True)


def _keep_tokenizer(config: TrainConfig) -> None:
    """Puts the tokenizer beside the trained weights."""
    folder = Path(config.run) / "checkpoint"
    own = sorted(Path(config.data.cache or Path(config.run) / "cache").glob("tokenizer-*.model"))
    if config.data.tokenizer:
        source = Path(config.data.tokenizer)
    elif config.model.path:
        named = (Path(config.model.path) / name for name in ("tokenizer.json", "tokenizer.model"))
        source = next((path for path in named if path.is_file()), folder)
    else:
        source = max(own, key=lambda path: path.stat().st_mtime, default=folder)
    if source.is_file():
        name = "tokenizer.json" if source.suffix == ".json" else "tokenizer.model"
        shutil.copyfile(source, folder / name)
