"""meshloom check-strategy: the contracts that every balance strategy has to keep."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Annotated

import typer

from meshloom._errors import Error, PlanError
from meshloom.cli import common

if TYPE_CHECKING:
    from meshloom._plan import PlanProblem


def register(app: typer.Typer) -> None:
    app.command("check-strategy", rich_help_panel="Planning")(check_strategy)


def check_strategy(
    name: Annotated[
        str, typer.Argument(metavar="STRATEGY", help="A registered name, MODULE:CLASS or FILE.py:CLASS.")
    ],
    problems: Annotated[int, typer.Option("--problems", help="Random problems to plan.", min=1)] = 200,
    seed: Annotated[int, typer.Option("--seed", help="Of the random problems.")] = 0,
    as_json: common.JsonOption = False,
) -> None:
    """Plan many random problems by a strategy and verify every plan.

    Checked: no sample is lost, repeated or cut, ranks of a slot's units are
    disjoint, nothing is over capacity, programs cannot deadlock, and the same
    problem gives the same plan again.

    [dim]Example[/dim]

      meshloom check-strategy my_module:LongestFirst
    """
    from meshloom import _plan, planning

    strategy = planning.find_strategy(name)
    efficiency = []
    for number, problem in enumerate(_problems(problems, seed)):
        where = (
            f"problem {number} (hdp {problem.layout.hdp}, capacity {problem.capacity_tokens},"
            f" {len(problem.samples)} samples, --seed {seed})"
        )
        try:
            plan = planning.make_plan(problem, strategy)
            _plan.verify(plan, _plan.compile(plan))
            again = planning.make_plan(problem, strategy)
        except Error as error:
            raise PlanError(f"[cli.check_strategy] {where}: {error}") from error
        if plan.hash() != again.hash():
            raise PlanError(f"[cli.check_strategy] {where}: two calls gave two plans, expected one")
        efficiency.append(plan.predicted.efficiency)
    mean, worst = sum(efficiency) / len(efficiency), min(efficiency)
    if as_json:
        common.print_json({"strategy": name, "problems": problems, "seed": seed,
                           "efficiency_mean": mean, "efficiency_worst": worst})
    else:
        print(f"{name}: {problems} plans verified; balance efficiency {mean:.3f} on average,"
              f" {worst:.3f} at worst")


def _problems(count: int, seed: int) -> list[PlanProblem]:
    """Few to many samples, equal to wildly different, on 1 to 16 ranks; edges first."""
    from meshloom._plan import Layout, PlanProblem

    source = random.Random(seed)
    result = []
    for number in range(count):
        hdp = 1 + number % 16 if number < 32 else source.choice((1, 2, 3, 4, 5, 7, 8, 16))
        capacity = source.choice((1, 64, 1000, 8192))
        size = source.choice((1, 2, 3, hdp, 40, 200))
        spread = source.choice((0.0, 1.0, 3.0))
        lengths = [
            max(1, min(int(source.lognormvariate(0, spread) * capacity / 4), capacity * hdp))
            for _ in range(size)
        ]
        if number % 5 == 0:
            lengths[0] = capacity * hdp
        result.append(PlanProblem.from_lengths(lengths, Layout(hdp=hdp), capacity))
    return result
