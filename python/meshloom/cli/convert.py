"""meshloom convert: checkpoints to folders that transformers opens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meshloom._errors import InvalidArgument


def register(app: typer.Typer) -> None:
    app.command()(convert)


def convert(
    checkpoint: Annotated[
        str, typer.Argument(help="A folder step-N, or a run folder: its newest checkpoint then.")
    ],
    folder: Annotated[str, typer.Argument(help="The Hugging Face folder to write.")],
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the weights: float32, bfloat16 or float64.")
    ] = "float32",
) -> None:
    """Write the model of a checkpoint as a folder that transformers opens.

    A checkpoint holds slices of named tensors, so it does not matter under
    which layout it was written, and training goes on from it under any other
    without conversion. One tensor is in memory at a time.

    [dim]Example[/dim]

      meshloom convert runs/a/checkpoints/step-00000120 out/ --dtype bfloat16
    """
    from meshloom import training

    source = newest(Path(checkpoint))
    training.export_checkpoint(str(source), folder, dtype)
    print(f"{source} is in {folder} as {dtype}")


def newest(path: Path) -> Path:
    """The checkpoint itself, or the newest of a run folder."""
    if (path / "manifest.json").is_file():
        return path
    steps = sorted((path / "checkpoints").glob("step-*"))
    if not steps:
        raise InvalidArgument(
            f"[cli.convert] {path} is no checkpoint (it has no manifest.json) and no run folder"
            " with one (it has no checkpoints/step-N)"
        )
    return steps[-1]
