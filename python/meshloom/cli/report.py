"""meshloom report: one self-contained page about a run, or about a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshloom.cli import common, planning, run_report

if TYPE_CHECKING:
    from meshloom._plan import Simulation, StepPlan

_DIGITS = 6


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Planning")(report)


def report(
    subject: Annotated[
        str, typer.Argument(metavar="RUN_DIR|PLAN", help="A run folder, or a plan file.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Write the page here.")] = "report.html",
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster", help="Of a plan: YAML description for the timeline; 8 GPUs a node by default.",
            show_default=False,
        ),
    ] = None,
    schedule: Annotated[
        str, typer.Option("--schedule", help="Of a plan: pipeline schedule.", show_default=False)
    ] = "",
) -> None:
    """Write a page that shows a run, or a plan: one file without any link to the network.

    Of a run: loss and speed, where the time of a step went, planned against
    measured, the timeline of its newest steps, traffic, stragglers, notices.
    Also while the run goes on.

    Of a plan: ranks over time as the simulator has its programs, balance,
    lengths.

    Point at anything for figures; zoom timelines with the wheel.

    [dim]Examples[/dim]

      meshloom report runs/run -o run.html

      meshloom report plan.json -o plan.html
    """
    if Path(subject).is_dir():
        if cluster is not None or schedule:
            raise typer.BadParameter("--cluster and --schedule are for plans; a run was measured")
        shown = run_report.data(Path(subject))
        Path(out).write_text(_filled("run_report.html", shown), encoding="utf-8")
        print(f"{subject}: written to {out}")
        return
    from meshloom import simulation
    from meshloom._plan import StepPlan

    given = StepPlan.load(subject)
    result = simulation.simulate(given, cluster, schedule=schedule, spans=True)
    Path(out).write_text(page(given, result), encoding="utf-8")
    print(f"{len(given.samples):,} samples on {given.layout.world_size} ranks: written to {out}")


def page(plan: StepPlan, result: Simulation) -> str:
    return _filled("report.html", _data(plan, result))


def _filled(template: str, data: dict[str, Any]) -> str:
    """A template of this folder with the common part and the data in it."""
    folder = Path(__file__).parent
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    common_part = (folder / "report_common.html").read_text(encoding="utf-8")
    whole = (folder / template).read_text(encoding="utf-8").replace("<!--COMMON-->", common_part)
    return whole.replace("/*DATA*/null", text)


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
