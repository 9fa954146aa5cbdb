"""Planning from Python: lengths in, plan out. Never imports torch."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import os
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import TypeAlias

from meshloom import _plan
from meshloom._errors import InvalidArgument, PlanError
from meshloom._plan import (
    BalanceStrategy,
    CostModel,
    Layout,
    MemoryModel,
    PlanProblem,
    SampleInfo,
    StepPlan,
    Violation,
    register_strategy,
    strategy_names,
    verify,
)

__all__ = ["check_file", "find_strategy", "make_plan", "plan", "problem_of", "register_strategy",
           "strategy_names", "verify"]

Strategy: TypeAlias = "str | BalanceStrategy"


def plan(
    lengths: Iterable[int | SampleInfo],
    *,
    capacity_tokens: int,
    hdp: int | None = None,
    layout: Layout | None = None,
    strategy: Strategy = "balanced",
    cost: CostModel | None = None,
    memory: MemoryModel | None = None,
    lockstep: str = "none",
    ranks_per_node: int = 0,
    exchanges: str = "",
    step: int = 0,
) -> StepPlan:
    """Decides which of the ranks work together on which samples, in which order.

    `lengths` are tokens of each sample (sample i gets id i and every token after its first is a
    target) or SampleInfo. `exchanges` are rules NAME[:DEGREES[:TOKENS]],... of how units share keys and
    values, e.g. "ring:2-4,ulysses"; units without a rule use ring. The plan is a pure function of the arguments, and it has been verified.
    Raises InvalidArgument for a malformed problem and PlanError if the strategy broke a contract.
    """
    if (hdp is None) == (layout is None):
        raise InvalidArgument("[plan] give either hdp or layout: one of them says how many ranks")
    problem = PlanProblem()
    problem.step = step
    problem.layout = layout if layout is not None else Layout(hdp=hdp or 0)
    problem.capacity_tokens = capacity_tokens
    problem.lockstep = lockstep
    problem.samples = [
        entry if isinstance(entry, SampleInfo) else SampleInfo(id=index, tokens=_length(index, entry))
        for index, entry in enumerate(lengths)
    ]
    problem.ranks_per_node = ranks_per_node
    problem.choose_exchanges(exchanges)
    if cost is not None:
        problem.cost = cost
    if memory is not None:
        problem.memory = memory
    return make_plan(problem, strategy)


def _length(index: int, entry: object) -> int:
    """A length as an int, of numpy and torch, too; a bool, a fraction or a text is none."""
    if not isinstance(entry, bool):
        try:
            return operator.index(entry)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise InvalidArgument(f"[plan] length {index} is {entry!r}, expected an integer or a SampleInfo")


def find_strategy(name: str) -> Strategy:
    """A registered name as it is; `module:Class` (or `file.py:Class`) as an instance of the class."""
    if ":" not in name:
        return name
    module_name, _, class_name = name.rpartition(":")
    try:
        strategy = getattr(_module(module_name), class_name)()
    except Exception as error:  # it runs a user's code
        raise InvalidArgument(f"[plan.strategy] {name!r} cannot be loaded: {error}") from error
    if not isinstance(strategy, BalanceStrategy):
        raise InvalidArgument(
            f"[plan.strategy] {name!r} is a {type(strategy).__name__}, expected a subclass of"
            " meshloom.BalanceStrategy"
        )
    return strategy


def _module(name: str) -> ModuleType:
    """A module by its name, from the current folder too, or a file by its path."""
    if not name.endswith(".py"):
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        return importlib.import_module(name)
    stem = os.path.basename(name)[:-3]
    spec = importlib.util.spec_from_file_location(f"meshloom_strategy_{stem}", name)
    if spec is None or spec.loader is None or not os.path.isfile(name):
        raise FileNotFoundError(2, "there is no such file", name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def instance(strategy: Strategy) -> BalanceStrategy:
    """The strategy itself: a registered name, `module:Class` and `file.py:Class` are made one."""
    found = find_strategy(strategy) if isinstance(strategy, str) else strategy
    return _plan.strategies.create(found) if isinstance(found, str) else found


def make_plan(problem: PlanProblem, strategy: Strategy = "balanced") -> StepPlan:
    """Validates the problem, runs the strategy, predicts and verifies."""
    return _plan.make_plan(problem, strategy)


def check_file(path: str) -> tuple[StepPlan, list[Violation]]:
    """A plan file and every contract it breaks: those of the plan, then those of the programs."""
    loaded = StepPlan.load(path)
    violations = _plan.check_plan(loaded)
    if not violations:
        violations = _plan.check_programs(loaded, _plan.compile(loaded))
    return loaded, violations


def problem_of(plan_of_step: StepPlan) -> PlanProblem:
    """The problem that a plan solves, to be solved again: change it, then `make_plan`."""
    problem = PlanProblem()
    problem.step = plan_of_step.step
    problem.layout = plan_of_step.layout
    problem.capacity_tokens = plan_of_step.capacity_tokens
    problem.lockstep = plan_of_step.lockstep
    problem.ranks_per_node = plan_of_step.ranks_per_node
    problem.cost = plan_of_step.cost
    problem.memory = plan_of_step.memory
    problem.samples = plan_of_step.samples
    return problem


def try_plan(problem: PlanProblem, strategy: Strategy) -> StepPlan | None:
    """make_plan; None where the strategy cannot serve the problem."""
    try:
        return make_plan(problem, strategy)
    except (InvalidArgument, PlanError):
        return None
