"""meshloom autotune: the fastest layouts of a model on a cluster that fit, by the simulator."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshloom.cli import common

if TYPE_CHECKING:
    from meshloom.tuning import TunedLayout, Tuning


_LEAST_WIDTH = 110  # of the table: figures are cut off below, also where stdout is no terminal


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Planning")(autotune)


def autotune(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Hugging Face config.json, or its folder.")
    ],
    lengths: Annotated[
        str,
        typer.Option(
            "--lengths",
            help="The mix, a sample a line: `tokens`, `tokens loss_tokens` or JSON; - is stdin.",
        ),
    ],
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster", help="YAML description; 8 GPUs a node by default.", show_default=False
        ),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks", help="Of the world; by default all of the cluster's.", show_default=False
        ),
    ] = None,
    device_memory_gib: Annotated[
        float | None,
        typer.Option(
            "--device-memory-gib",
            help="Of a rank; else the cluster file's device_memory_gib.",
            show_default=False,
        ),
    ] = None,
    global_batch_tokens: Annotated[
        int | None,
        typer.Option(
            "--global-batch-tokens",
            help="Of a step, drawn from the mix; by default a step is the whole mix.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Drawn steps to plan for.")] = 4,
    top: Annotated[int, typer.Option("--top", help="Most layouts to show.")] = 10,
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout",
            help="What is given, e.g. tp=2,zero=1: of tp, pp, hdp, ep, chunks, zero, pipeline,"
            " recompute.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16 or float32.")] = "bfloat16",
    tflops: Annotated[
        float | None,
        typer.Option(
            "--tflops",
            help="What a rank of compute rate 1 achieves, in 1e12 operations a second.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the drawn steps.")] = 0,
    simulations: Annotated[
        int, typer.Option("--simulations", help="Most layouts to simulate, the likeliest first.")
    ] = 1000,
    json: common.JsonOption = False,
) -> None:
    """Find the fastest layouts that fit: sizes of all axes, schedule, ZeRO level, recomputation.

    Layouts that divide the model and the ranks are kept where states and the longest sample fit a
    rank's memory. A bound on their step time sorts them; steps drawn from the mix are planned and
    simulated for the likeliest. The last line goes into config.yaml.

    [dim]Examples[/dim]

      meshloom autotune models/llama --lengths lengths.txt --ranks 64 --device-memory-gib 80

      meshloom autotune config.json --lengths lengths.txt --cluster cluster.yaml --layout tp=2
    """
    from meshloom import tuning

    terminal = sys.stderr.isatty()

    def show(done: int, most: int) -> None:
        print(f"\rsimulated {done} of at most {most}", end="", file=sys.stderr, flush=True)

    started = time.perf_counter()
    result = tuning.autotune(
        model, common.read_samples(lengths), ranks=ranks, cluster=cluster,
        device_memory_gib=device_memory_gib, global_batch_tokens=global_batch_tokens, steps=steps,
        top=top, fixed=parse_fixed(layout), dtype=dtype, tflops=tflops, seed=seed,
        simulations=simulations, progress=show if terminal else None,
    )
    if terminal:
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr, flush=True)
    if json:
        common.print_json(_as_json(result))
    else:
        _print(result, time.perf_counter() - started)


def parse_fixed(text: str | None) -> dict[str, int | str]:
    """`tp=2,recompute=full` as a mapping; what is no number stays text."""
    fixed: dict[str, int | str] = {}
    for part in text.split(",") if text else ():
        key, separator, value = (piece.strip() for piece in part.partition("="))
        if not separator or not key or not value or key in fixed:
            raise typer.BadParameter(f"--layout {text!r}: {part!r} is not one KEY=VALUE")
        fixed[key] = int(value) if value.isdecimal() else value
    return fixed


def _as_json(result: Tuning) -> dict[str, Any]:
    return {
        "layouts": [one.to_dict() for one in result.layouts],
        "candidates": result.candidates,
        "simulated": result.simulated,
        "slower": result.slower,
        "left_out": result.left_out,
        "dropped": result.dropped,
        "tflops": result.tflops,
    }


def _print(result: Tuning, seconds: float) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("tp", "pp", "hdp", "ep"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("schedule", no_wrap=True)
    table.add_column("zero", justify="right")
    table.add_column("recompute")
    for title in ("capacity", "step", "tokens/s", "idle", "exposed", "GiB a rank"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in result.layouts:
        table.add_row(*_row(one))
    console = common.console()
    console.width = max(console.width, _LEAST_WIDTH)
    console.print(table)
    left_out = f", {result.left_out} left out as likely slower" if result.left_out else ""
    console.print(
        f"{result.candidates} layouts: {result.simulated} simulated in {seconds:.1f} s,"
        f" {result.slower} slower by a bound{left_out}"
    )
    console.print(
        f"a rank is taken to achieve {result.tflops:.4g} TFLOP/s: --tflops, or"
        " workload.seconds_per_work in the cluster file"
    )
    for why, count in result.dropped.items():
        console.print(f"{count} dropped: {why}", markup=False)
    if result.layouts:
        print(f"config.yaml: {result.layouts[0].config()}")


def _row(one: TunedLayout) -> list[str]:
    layout = one.layout
    schedule = one.pipeline or "-"
    if layout.chunks > 1:
        schedule += f" x{layout.chunks}"
    return [
        str(layout.tp), str(layout.pp), str(layout.hdp), str(layout.ep), schedule, str(one.zero),
        one.recompute, f"{one.capacity_tokens:,}", f"{one.step_seconds:.4g} s",
        common.short(one.tokens_per_second), f"{one.bubble:.1%}", f"{one.exposed:.1%}",
        f"{one.memory_bytes / (1 << 30):.1f}",
    ]
