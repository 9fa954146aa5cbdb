"""meshloom report: one self-contained page about a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshloom.cli import common, planning

if TYPE_CHECKING:
    from meshloom._plan import Simulation, StepPlan

_DIGITS = 6


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Planning")(report)


def report(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="A plan file.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Write the page here.")] = "report.html",
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster", help="YAML description for the timeline; 8 GPUs a node by default.",
            show_default=False,
        ),
    ] = None,
    schedule: Annotated[
        str, typer.Option("--schedule", help="Pipeline schedule.", show_default=False)
    ] = "",
) -> None:
    """Write a page that shows a plan: ranks over time, balance, traffic, lengths.

    One file without any link to the network. The timeline is a simulation of the plan's programs;
    point at a unit to see its ranks and samples, zoom with the wheel (ranks: with shift).

    [dim]Example[/dim]

      meshloom report plan.json -o report.html
    """
    from meshloom import simulation
    from meshloom._plan import StepPlan

    given = StepPlan.load(plan)
    result = simulation.simulate(given, cluster, schedule=schedule, spans=True)
    Path(out).write_text(page(given, result), encoding="utf-8")
    print(f"{len(given.samples):,} samples on {given.layout.world_size} ranks: written to {out}")


def page(plan: StepPlan, result: Simulation) -> str:
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    data = json.dumps(_data(plan, result), separators=(",", ":")).replace("</", "<\\/")
    return template.replace("/*DATA*/null", data)


def _rounded(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")


def _data(plan: StepPlan, result: Simulation) -> dict[str, Any]:
    layout = plan.layout
    # Tensor ranks do the same at the same time: one row for all.
    spans = [
        [span.rank // layout.tp, span.op, span.slot, span.unit, _rounded(span.begin),
         _rounded(span.compute), _rounded(span.exposed), _rounded(span.end)]
        for span in result.spans
        if span.rank % layout.tp == 0 and span.end > span.begin
    ]
    facts = planning.summary(plan)
    figures: list[tuple[str, str]] = [
        ("step", str(plan.step)),
        ("strategy", plan.strategy),
        ("layout", str(layout)),
        ("capacity", f"{plan.capacity_tokens:,} tokens a rank and unit"),
        ("samples", f"{facts['samples']:,}"),
        ("tokens", f"{facts['tokens']:,}"),
        ("units", f"{facts['units']:,} in {facts['slots']:,} slots"),
        ("efficiency", f"{facts['efficiency']:.2%}"),
        ("makespan above the proven bound", _above(facts)),
        ("exchange tokens", f"{facts['exchange_tokens']:,}"),
        ("simulated step", f"{result.step_time:.4g} s"),
        ("tokens a second", f"{facts['tokens'] / result.step_time:,.0f}" if result.step_time else "-"),
        ("ranks without computation", f"{result.bubble:.1%}"),
        ("sent inside nodes", common.short(result.bytes_inside) + "B"),
        ("sent between nodes", common.short(result.bytes_between) + "B"),
        ("moved to the host and back", common.short(result.bytes_host) + "B"),
        ("peak of saved activations", common.short(max(result.peak_memory)) + "B"),
    ]
    return {
        "figures": figures,
        "degrees": facts["units_by_ranks"],
        "rows": layout.pp * layout.hdp,
        "hdp": layout.hdp,
        "time": _rounded(result.step_time),
        "busy": [_rounded(value) for value in result.busy[:: layout.tp]],
        "slots": [[[unit.ranks, unit.samples] for unit in slot.units] for slot in plan.slots],
        "tokens": {sample.id: sample.tokens for sample in plan.samples},
        "spans": spans,
    }


def _above(facts: dict[str, Any]) -> str:
    bound = facts["lower_bound"]
    return f"{facts['makespan'] / bound - 1:.2%}" if bound else "-"
