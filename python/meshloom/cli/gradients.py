"""meshloom gradients: one step's loss and gradients under a layout, for anybody's reference."""

from __future__ import annotations

from typing import Annotated

import typer

from meshloom.cli import common


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Training")(gradients)


def gradients(
    model: Annotated[str, typer.Option("--model", help="Hugging Face model folder.")],
    sequences: Annotated[
        str,
        typer.Option("--sequences", help='JSON lines: {"tokens": [...], "loss_mask": [...]?}'),
    ],
    dump: Annotated[
        str | None,
        typer.Option("--dump", help="Write loss and gradients to this safetensors file.", show_default=False),
    ] = None,
    layout: common.LayoutOption = None,
    hdp: common.HdpOption = None,
    strategy: common.StrategyOption = "balanced",
    capacity_tokens: Annotated[
        int,
        typer.Option(
            "--capacity-tokens", "--capacity",
            help="Most tokens that a rank may hold of one unit; 0: what the longest document needs.",
        ),
    ] = 0,
    plan: Annotated[
        str | None,
        typer.Option("--plan", help="Run this plan file instead of a strategy's.", show_default=False),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float64, float32 or bfloat16.")] = "float64",
    aux_loss: Annotated[
        bool, typer.Option("--aux-loss", help="Add the global balance loss with the config's coefficient.")
    ] = False,
    json: common.JsonOption = False,
) -> None:
    """Compute one step's loss and all gradients under a layout.

    The dump has exactly the tensor names and shapes of the model folder's own safetensors, and a
    scalar `loss`: the mean over all loss tokens of the step. Labels are the next token inside each
    document. Alone it runs its ranks as threads; under mpirun as processes.

    [dim]Examples[/dim]

      meshloom gradients --model Qwen3-0.6B --sequences docs.jsonl --layout hdp=4 --capacity 4096 --dump out.safetensors

      mpirun -n 4 meshloom gradients --model Qwen3-0.6B --sequences docs.jsonl --hdp 4 --plan plan.json --dump out.safetensors
    """
    from meshloom import session

    session.gradients(
        model=model, sequences=sequences, dump=dump,
        layout=None if layout is None and hdp is None else common.resolve_layout(layout, hdp),
        strategy=strategy, capacity_tokens=capacity_tokens, plan_file=plan, dtype=dtype,
        aux_loss=aux_loss, as_json=json,
    )
