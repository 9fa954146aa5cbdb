"""meshloom train: one rank of a run, or its launcher."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from meshloom.cli import common

if TYPE_CHECKING:
    from meshloom._core import Communicator


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
        typer.Option("--backend", help="How ranks talk: thread, mpi or nccl.", show_default=False),
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
) -> None:
    """Train the model that CONFIG.yaml describes.

    Alone it starts its ranks itself, under mpirun (or as threads with --backend thread). Under
    mpirun, torchrun or srun it is one of the ranks. SIGTERM, SIGINT and SIGUSR1 end the run after
    the current step with a checkpoint; the same command continues it.

    [dim]Examples[/dim]

      meshloom train examples/quickstart.yaml --ranks 4

      meshloom train config.yaml --ranks 2 --backend thread --data corpus/ --data more.jsonl

      mpirun -n 4 meshloom train config.yaml

      torchrun --nproc-per-node 4 -m meshloom train config.yaml
    """
    from meshloom import launch

    if backend not in (None, "thread", "mpi", "nccl"):
        raise typer.BadParameter(f"--backend is {backend}, expected thread, mpi or nccl")
    started_by = launch.launcher()
    if started_by is not None and ranks is not None:
        raise typer.BadParameter("--ranks is for a start without a launcher; this one runs under " + started_by)
    if not os.path.isfile(config):
        raise FileNotFoundError(f"{config}: there is no such config file")

    from meshloom import session

    overrides = session.Overrides(data=tuple(data or ()), run=run, steps=steps)
    if started_by is not None:
        communicator = session.world(backend)
        session.train(config, overrides, communicator)
        return
    count = ranks if ranks is not None else session.ranks_of(config)
    if backend == "thread":
        session.train_on_threads(config, overrides, count)
    elif count == 1:
        session.train(config, overrides, session.world(backend))
    else:
        arguments = ["train", config]
        for path in data or ():
            arguments += ["--data", path]
        for name, value in (("--run", run), ("--steps", steps), ("--backend", backend)):
            arguments += [name, str(value)] if value is not None else []
        code = launch.run_under_mpirun(count, arguments)
        if code:
            raise typer.Exit(code)
