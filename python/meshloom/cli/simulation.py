"""meshloom simulate: what a plan would take on a cluster that need not be there."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshloom.cli import common

if TYPE_CHECKING:
    from meshloom._plan import Simulation, StepPlan

SettingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change a key of the cluster file, e.g. between.bandwidth=5e10; again for another.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Planning")(simulate)


def simulate(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="A plan file.")],
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster", help="YAML description; 8 GPUs a node by default.", show_default=False
        ),
    ] = None,
    set_: SettingOption = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy", help="What if another planned; again for another.", show_default=False
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option("--layout", help="What if the mesh were this.", show_default=False),
    ] = None,
    capacity_tokens: Annotated[
        int | None,
        typer.Option(
            "--capacity-tokens", "--capacity", help="What if ranks held as many.", show_default=False
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers", help="What if activations of a model of so many layers could be offloaded.",
            show_default=False,
        ),
    ] = None,
    schedule: Annotated[
        str,
        typer.Option("--schedule", help="1f1b, interleaved_1f1b, zb_h1 or zb_v.", show_default=False),
    ] = "",
    timeline: Annotated[
        str | None,
        typer.Option(
            "--timeline", help="Write every rank's timeline as a Chrome trace.", show_default=False
        ),
    ] = None,
    json: common.JsonOption = False,
) -> None:
    """Run a plan's programs on a cost model: step time, bubbles, traffic, memory.

    With --strategy, --layout, --capacity or --layers the same samples are planned again, and both are
    shown. The cluster file describes nodes, links, compute rates and the model's bytes.

    [dim]Examples[/dim]

      meshloom simulate plan.json --cluster cluster.yaml

      meshloom simulate plan.json --strategy static --strategy naive_hdp

      meshloom simulate plan.json --layout hdp=16,pp=4 --schedule zb_h1 --set between.bandwidth=5e10
    """
    from meshloom import planning, simulation
    from meshloom._plan import Layout, MemoryModel, StepPlan

    given = StepPlan.load(plan)
    machines, workload = simulation.read_cluster(
        cluster, set_ or (), base=simulation.default_workload(given.cost)
    )
    plans = {"as given": given}
    changed = layout is not None or capacity_tokens is not None or layers is not None
    for name in strategy or ([given.strategy] if changed else []):
        problem = planning.problem_of(given)
        if layout is not None:
            problem.layout = Layout.parse(layout)
        if capacity_tokens is not None:
            problem.capacity_tokens = capacity_tokens
        if problem.ranks_per_node == 0:
            problem.ranks_per_node = max(1, machines.ranks_per_node // problem.layout.tp)
        if layers is not None:
            problem.memory = MemoryModel(
                layers=layers, transfer=simulation.host_transfer(machines, workload)
            )
        plans[f"{name}, changed" if changed else name] = planning.make_plan(
            problem, planning.find_strategy(name)
        )
    rows = []
    for name, one in plans.items():
        started = time.perf_counter()
        result = simulation.simulate(
            one, machines, workload=workload, schedule=schedule if one.layout.pp > 1 else "",
            spans=timeline is not None,
        )
        rows.append(_facts(name, one, result) | {"simulation_seconds": time.perf_counter() - started})
        if timeline is not None:
            _write_timeline(timeline, one, result)  # the last one's stays
    if json:
        common.print_json(rows)
    else:
        _print_rows(rows)
    if timeline is not None and not json:
        print(f"timeline written to {timeline}")


def _facts(name: str, plan: StepPlan, result: Simulation) -> dict[str, Any]:
    world = plan.layout.world_size
    return {
        "plan": name,
        "strategy": plan.strategy,
        "layout": str(plan.layout),
        "ranks": world,
        "step_time": result.step_time,
        "tokens_per_second": plan.total_tokens() / result.step_time if result.step_time else 0.0,
        "bubble": result.bubble,
        "exposed": sum(result.exposed) / (world * result.step_time) if result.step_time else 0.0,
        "peak_memory_bytes": max(result.peak_memory),
        "bytes_inside_nodes": result.bytes_inside,
        "bytes_between_nodes": result.bytes_between,
        "bytes_to_host": result.bytes_host,
    }


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for row in rows:
        table.add_column(row["plan"], justify="right")

    def line(title: str, text: Any) -> None:
        table.add_row(title, *(text(row) for row in rows))

    line("layout", lambda row: row["layout"])
    line("step time", lambda row: f"{row['step_time']:.4g} s")
    if len(rows) > 1:
        line("faster than as given", lambda row: f"{rows[0]['step_time'] / row['step_time']:.2f}x")
    line("tokens/s", lambda row: f"{row['tokens_per_second']:,.0f}")
    line("without computation", lambda row: f"{row['bubble']:.1%}")
    line("exposed communication", lambda row: f"{row['exposed']:.1%}")
    line("peak of saved activations", lambda row: common.short(row["peak_memory_bytes"]) + "B")
    line("sent inside nodes", lambda row: common.short(row["bytes_inside_nodes"]) + "B")
    line("sent between nodes", lambda row: common.short(row["bytes_between_nodes"]) + "B")
    line("moved to the host and back", lambda row: common.short(row["bytes_to_host"]) + "B")
    common.console().print(table)


def _write_timeline(path: str, plan: StepPlan, result: Simulation) -> None:
    """The trace-event format: a process a pipeline stage, a thread a rank."""
    import json

    slots = [slot.units for slot in plan.slots]
    events = []
    for span in result.spans:
        if span.end <= span.begin:
            continue
        name = span.op if span.slot < 0 else f"{span.op} {span.slot}"
        arguments: dict[str, Any] = {"compute": span.compute, "exposed": span.exposed}
        if span.unit >= 0:
            arguments["samples"] = slots[span.slot][span.unit].samples
        events.append(
            {
                "name": name,
                "cat": span.op,
                "ph": "X",
                "ts": span.begin * 1e6,
                "dur": (span.end - span.begin) * 1e6,
                "pid": plan.layout.coordinates(span.rank).pp,
                "tid": span.rank,
                "args": arguments,
            }
        )
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"traceEvents": events}, file)
