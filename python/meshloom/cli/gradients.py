"""meshloom gradients: one step's loss and gradients under a layout, for anybody's reference."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshloom import launch
from meshloom._errors import DataError
from meshloom.cli import common

if TYPE_CHECKING:
    from meshloom._core import Communicator, Document, GradientsResult
    from meshloom._plan import Layout, StepPlan


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
        typer.Option(
            "--dump", help="Write loss and gradients to this safetensors file.", show_default=False
        ),
    ] = None,
    layout: common.LayoutOption = None,
    hdp: common.HdpOption = None,
    strategy: common.StrategyOption = "balanced",
    capacity_tokens: Annotated[
        int,
        typer.Option(
            "--capacity-tokens", "--capacity",
            help="Most tokens that a rank may hold of one unit; 0: an equal share of the step, more"
            " where the longest document needs it.",
        ),
    ] = 0,
    plan: Annotated[
        str | None,
        typer.Option("--plan", help="Run this plan file instead of a strategy's.", show_default=False),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float64, float32 or bfloat16.")] = "float64",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")] = "cpu",
    aux_loss: Annotated[
        bool,
        typer.Option("--aux-loss", help="Add the global balance loss with the config's coefficient."),
    ] = False,
    zero: Annotated[
        int, typer.Option("--zero", help="ZeRO: shard 1 optimizer state, 2 gradients, 3 parameters.")
    ] = 1,
    pipeline: Annotated[
        str,
        typer.Option(
            "--pipeline", help="Schedule of the pipeline: 1f1b, interleaved_1f1b, zb_h1, zb_v.",
            show_default=False,
        ),
    ] = "",
    recompute: Annotated[
        str, typer.Option("--recompute", help="What backward computes again: none, selective, full.")
    ] = "none",
    as_json: common.JsonOption = False,
) -> None:
    """Compute one step's loss and all gradients under a layout.

    The dump has exactly the tensor names and shapes of the model folder's own
    safetensors, and a scalar `loss`: the mean over all loss tokens of the
    step. Labels are the next token inside each document. Alone it runs its
    ranks as threads; under mpirun as processes.

    [dim]Examples[/dim]

      meshloom gradients --model Qwen3-0.6B --sequences docs.jsonl --hdp 4 --dump out.safetensors

      mpirun -n 4 meshloom gradients --model Qwen3-0.6B --sequences docs.jsonl --plan plan.json

      meshloom gradients --model Qwen3-0.6B --sequences docs.jsonl --layout tp=2,pp=2,hdp=2 --pipeline zb_h1
    """
    from meshloom import planning, training

    documents = read_documents(sequences)
    given = _given_plan(plan)
    if layout is None and hdp is None and given is not None:
        mesh: Layout = given.layout
    else:
        mesh = common.resolve_layout(layout, hdp)
    options = training.GradientsOptions(
        model=model, dtype=dtype, device=device, layout=mesh, strategy=strategy,
        capacity_tokens=capacity_tokens, plan=given, aux_loss=aux_loss,
        parallel=training.ParallelSection(zero=zero, pipeline=pipeline, recompute=recompute),
    )
    planner = [planning.instance(strategy)] if given is None else []

    def body(world: Communicator) -> None:
        result = training.gradients(options, documents, world, *planner)
        if world.rank == 0:
            _report(result, documents, dump, as_json)

    if launch.launcher() is not None:
        body(training.make_world())
    else:
        training.run_thread_ranks(mesh.world_size, body)


def read_documents(path: str) -> list[Document]:
    """Documents of a JSON-lines file of tokens. Raises DataError that names the line."""
    from meshloom import data

    source = data.jsonl(path)
    documents = [source[index] for index in range(len(source))]
    if not documents:
        raise DataError(f"[cli.gradients] {path} holds no documents, expected one a line")
    return documents


def _given_plan(path: str | None) -> StepPlan | None:
    if path is None:
        return None
    from meshloom._plan import StepPlan

    return StepPlan.load(path)


def _report(
    result: GradientsResult, documents: list[Document], dump: str | None, as_json: bool
) -> None:
    if dump is not None:
        result.save(dump)
    plan = result.plan
    summary: dict[str, Any] = {
        "loss": result.loss,
        "aux_loss": result.aux_loss,
        "documents": len(documents),
        "tokens": sum(len(document) for document in documents),
        "tensors": len(result.names),
        "layout": str(plan.layout),
        "slots": len(plan.slots),
        "units": sum(len(slot.units) for slot in plan.slots),
        "dump": dump,
    }
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    print(f"loss {result.loss:.12g} over {summary['documents']} documents, {summary['tokens']} tokens;"
          f" {summary['units']} units in {summary['slots']} slots, layout {summary['layout']}")
    if dump is not None:
        print(f"{summary['tensors']} gradients and the loss are in {dump}")
