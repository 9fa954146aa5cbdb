"""meshloom plan, verify, compare: on metadata alone, in milliseconds, without torch."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshloom._errors import Error
from meshloom.cli import common
from meshloom.cli.options import takes

if TYPE_CHECKING:
    from meshloom._plan import Layout, PlanProblem, StepPlan

LengthsOption = Annotated[
    str,
    typer.Option(
        "--lengths",
        help="A sample a line: `tokens`, `tokens loss_tokens` or JSON with `tokens`; - is stdin.",
    ),
]
StepOption = Annotated[int, typer.Option("--step", help="Step number written into the plan.")]
LockstepOption = Annotated[
    str, typer.Option("--lockstep", help="Whose members run slots together: none, ep, hdp.")
]
QuadraticOption = Annotated[float, typer.Option("--quadratic", help="Cost of s*s of a sample.")]
LinearOption = Annotated[float, typer.Option("--linear", help="Cost of s of a sample.")]
FixedOption = Annotated[float, typer.Option("--fixed", help="Cost of a unit, whatever it holds.")]
ExchangeOption = Annotated[
    float, typer.Option("--exchange-cost", help="Cost of an exchanged token that is not hidden.")
]
LayersOption = Annotated[
    int, typer.Option("--layers", help="Layers of the model, for offload; 0: no offload.")
]
TransferOption = Annotated[
    float,
    typer.Option(
        "--transfer", help="Cost of moving one token's activations to the host; 0: always hidden."
    ),
]
PipelineOption = Annotated[
    int | None, typer.Option("--pp", help="Pipeline stages, beside --hdp.", show_default=False)
]
ChunksOption = Annotated[
    int | None,
    typer.Option("--chunks", help="Model chunks of a stage, beside --hdp.", show_default=False),
]
ExpertOption = Annotated[
    int | None,
    typer.Option("--ep", help="Ranks of an expert-parallel group, beside --hdp.", show_default=False),
]
NodeOption = Annotated[
    int, typer.Option("--ranks-per-node", help="HDP ranks of a node; 0: all in one node.")
]
ExchangesOption = Annotated[
    str,
    typer.Option(
        "--exchange",
        help="How units share keys and values: NAME[:DEGREES[:TOKENS]],..., e.g. ring:2-4,ulysses.",
    ),
]


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Planning")(plan)
    app.command(rich_help_panel="Planning")(verify)
    app.command(rich_help_panel="Planning")(compare)


@dataclasses.dataclass(kw_only=True)
class ProblemOptions:
    """What a plan is a function of."""

    lengths: LengthsOption
    capacity_tokens: common.CapacityOption
    hdp: common.HdpOption = None
    layout: common.LayoutOption = None
    pp: PipelineOption = None
    chunks: ChunksOption = None
    ep: ExpertOption = None
    lockstep: LockstepOption = "none"
    quadratic: QuadraticOption = 1.0
    linear: LinearOption = 24576.0
    fixed: FixedOption = 0.0
    exchange_cost: ExchangeOption = 0.0
    layers: LayersOption = 0
    transfer: TransferOption = 0.0
    ranks_per_node: NodeOption = 0
    exchange: ExchangesOption = ""
    step: StepOption = 0

    def problem(self) -> PlanProblem:
        from meshloom import _plan

        problem = _plan.PlanProblem()
        problem.step = self.step
        problem.layout = self._layout()
        problem.capacity_tokens = self.capacity_tokens
        problem.lockstep = _plan.parse_lockstep(self.lockstep)
        problem.cost = _plan.CostModel(
            quadratic=self.quadratic, linear=self.linear, fixed=self.fixed,
            exchange=self.exchange_cost,
        )
        problem.memory = _plan.MemoryModel(layers=self.layers, transfer=self.transfer)
        problem.samples = common.read_samples(self.lengths)
        problem.ranks_per_node = self.ranks_per_node
        problem.choose_exchanges(self.exchange)
        return problem

    def _layout(self) -> Layout:
        layout = common.resolve_layout(self.layout, self.hdp)
        sizes = {"pp": self.pp, "chunks": self.chunks, "ep": self.ep}
        if self.layout is not None and any(size is not None for size in sizes.values()):
            raise typer.BadParameter("--pp, --chunks and --ep go with --hdp; --layout holds all sizes")
        for name, size in sizes.items():
            if size is not None:
                setattr(layout, name, size)
        layout.validate()
        return layout


def summary(plan: StepPlan) -> dict[str, Any]:
    units = [unit for slot in plan.slots for unit in slot.units]
    degrees: dict[int, int] = {}
    for unit in units:
        degrees[len(unit.ranks)] = degrees.get(len(unit.ranks), 0) + 1
    facts = {
        "strategy": plan.strategy,
        "samples": len(plan.samples),
        "tokens": plan.total_tokens(),
        "slots": len(plan.slots),
        "units": len(units),
        "units_by_ranks": {str(d): degrees[d] for d in sorted(degrees)},
        "makespan": plan.predicted.makespan,
        "lower_bound": plan.predicted.lower_bound,
        "efficiency": plan.predicted.efficiency,
        "exchange_tokens": plan.predicted.exchange_tokens,
    }
    if plan.predicted.step_time is not None:
        facts["step_time"] = plan.predicted.step_time
    return facts


@takes(ProblemOptions)
def plan(
    options: ProblemOptions,
    strategy: common.StrategyOption = "balanced",
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Write the plan file here.", show_default=False)
    ] = None,
    json: common.JsonOption = False,
) -> None:
    """Plan one step: which ranks work together on which samples.

    [dim]Examples[/dim]

      meshloom plan --lengths lengths.txt --hdp 64 --capacity 8192 --out plan.json

      printf '96000\\n812\\n3771\\n40\\n' | meshloom plan --lengths - --hdp 8 --capacity 16384 --json
    """
    from meshloom.planning import find_strategy, make_plan

    problem = options.problem()
    started = time.perf_counter()
    result = make_plan(problem, find_strategy(strategy))
    elapsed = time.perf_counter() - started
    if out is not None:
        result.save(out)
    if json:
        print(result.to_json())
        return
    facts = summary(result)
    degrees = ", ".join(f"{count} of {d}" for d, count in facts["units_by_ranks"].items())
    console = common.console()
    console.print(
        f"{facts['samples']:,} samples, {facts['tokens']:,} tokens -> {facts['slots']} slots, "
        f"{facts['units']} units (by ranks: {degrees})"
    )
    console.print(
        f"{result.strategy}: efficiency {facts['efficiency']:.1%}, makespan "
        f"{common.short(facts['makespan'])} (at least {common.short(facts['lower_bound'])}), "
        f"{facts['exchange_tokens']:,} tokens exchanged; verified; {elapsed * 1e3:.1f} ms"
    )
    if "step_time" in facts:
        console.print(f"step time of the programs, waiting included: {common.short(facts['step_time'])}")
    if out is not None:
        console.print(f"written to {out}")


def verify(
    plans: Annotated[list[str], typer.Argument(metavar="PLAN...", help="Plan files.")],
    json: common.JsonOption = False,
) -> None:
    """Check plan files against every contract; exit code 1 if one is broken.

    Conservation of samples, capacity, disjoint ranks, exchanges, order, and that the programs of all
    ranks meet (no deadlock). Violations name slot, unit, rank and sample.

    [dim]Examples[/dim]

      meshloom verify plan.json

      meshloom verify runs/quickstart/plans/*.json --json
    """
    from meshloom.planning import check_file

    reports = []
    for path in plans:
        try:
            result, violations = check_file(path)
            found = [{"contract": v.contract, "message": v.message} for v in violations]
            facts = summary(result) | {"step": result.step}
        except (Error, OSError) as error:  # the next file still gets its turn
            found, facts = [{"contract": "file", "message": str(error)}], {}
        reports.append({"file": path, "valid": not found, "violations": found} | facts)
    if json:
        common.print_json(reports)
    else:
        for report in reports:
            if report["valid"]:
                print(
                    f"{report['file']}: valid; step {report['step']}, {report['strategy']}, "
                    f"{report['samples']} samples in {report['units']} units, {report['slots']} slots"
                )
            else:
                broken_contracts: Any = report["violations"]
                for violation in broken_contracts:
                    print(f"{report['file']}: {violation['message']}")
    broken = sum(not report["valid"] for report in reports)
    if broken:
        raise Error(f"{broken} of {len(reports)} plan files broke a contract")


@takes(ProblemOptions)
def compare(
    options: ProblemOptions,
    strategy: Annotated[
        list[str] | None,
        typer.Option("--strategy", help="Only these; again for another.", show_default=False),
    ] = None,
    json: common.JsonOption = False,
) -> None:
    """Plan the same samples with every strategy and show them side by side.

    [dim]Examples[/dim]

      meshloom compare --lengths lengths.txt --hdp 64 --capacity 8192

      meshloom compare --lengths l.txt --hdp 8 --capacity 8192 --strategy balanced --strategy my.module:Mine
    """
    from meshloom.planning import find_strategy, make_plan, strategy_names

    problem = options.problem()
    rows: list[dict[str, Any]] = []
    for name in strategy or strategy_names():
        started = time.perf_counter()
        try:
            facts = summary(make_plan(problem, find_strategy(name)))
        except Error as error:
            if strategy:
                raise
            rows.append({"strategy": name, "error": " ".join(str(error).split())})
            continue
        facts["planning_seconds"] = time.perf_counter() - started
        rows.append(facts)
    if json:
        common.print_json(rows)
        return
    _print_comparison(rows)


def _print_comparison(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    planned = [row for row in rows if "error" not in row]
    # With a pipeline or in lockstep a plan is as good as the step time of its programs.
    measure = "step_time" if planned and "step_time" in planned[0] else "makespan"
    best = min((row[measure] for row in planned), default=0.0)
    titles = ["makespan", "x best", "x bound", "efficiency", "exchanged tokens", "slots", "units", "ms"]
    if measure == "step_time":
        titles = ["step time", "x best", *titles[3:]]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("strategy")
    for title in titles:
        table.add_column(title, justify="right")
    for row in sorted(planned, key=lambda row: row[measure]):
        bound = row["lower_bound"]
        cells = [row["strategy"], common.short(row[measure]), f"{row[measure] / best:.3f}"]
        if measure == "makespan":
            cells.append(f"{row['makespan'] / bound:.3f}" if bound else "-")
        table.add_row(
            *cells, f"{row['efficiency']:.1%}", f"{row['exchange_tokens']:,}", str(row["slots"]),
            str(row["units"]), f"{row['planning_seconds'] * 1e3:.1f}",
        )
    console = common.console()
    if planned:
        console.print(f"{planned[0]['samples']:,} samples, {planned[0]['tokens']:,} tokens")
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"{row['strategy']}: not applicable: {row['error']}", markup=False)
