"""Simulated steps: a plan's programs on a cluster description. Never imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from meshloom import _plan
from meshloom._errors import InvalidArgument
from meshloom._plan import Cluster, Simulation, StepPlan, Workload

if TYPE_CHECKING:
    from meshloom._plan import CostModel, Schedule

__all__ = ["default_workload", "host_transfer", "read_cluster", "simulate"]


def default_workload(cost: CostModel) -> Workload:
    """ByteScale's 7B model, with seconds for the plan's units of work.

    A plan counts work in units of its own; here the work that grows with the square of a length
    takes what attention takes in figure 6 of ByteScale (or, with none, the linear work what all
    else takes).
    """
    workload = Workload.llama_7b()
    seconds = Workload.llama_7b_cost()
    if cost.quadratic > 0:
        workload.seconds_per_work = seconds.quadratic / cost.quadratic
    else:
        workload.seconds_per_work = seconds.linear / cost.linear
    return workload


def host_transfer(cluster: Cluster, workload: Workload) -> float:
    """`MemoryModel.transfer` of a workload on a cluster, in the plan's units of work."""
    seconds = workload.saved_bytes * workload.layers / cluster.host.bandwidth
    return seconds / workload.seconds_per_work


def _as_yaml(setting: str) -> str:
    """`between.latency=1e-5` -> `between: {latency: 1e-5}`."""
    path, separator, value = setting.partition("=")
    if not separator or not all(path.split(".")):
        raise InvalidArgument(f"[sim.cluster] {setting!r} is no setting, expected KEY.KEY=VALUE")
    text = value
    for key in reversed(path.split(".")[1:]):
        text = f"{{{key}: {text}}}"
    return f"{path.split('.')[0]}: {text}"


def read_cluster(
    path: str | os.PathLike[str] | None, settings: Iterable[str] = (), *, base: Workload | None = None
) -> tuple[Cluster, Workload]:
    """Cluster and workload of a file, then of `settings` like `between.bandwidth=5e10`."""
    cluster, workload = Cluster(), base or Workload.llama_7b()
    texts = [] if path is None else [(Path(path).read_text(encoding="utf-8"), str(path))]
    texts += [(_as_yaml(setting), setting) for setting in settings]
    for text, name in texts:
        cluster = Cluster.from_yaml(text, name, cluster)
        workload = Workload.from_yaml(text, name, workload)
    return cluster, workload


def simulate(
    plan: StepPlan,
    cluster: Cluster | str | os.PathLike[str] | None = None,
    *,
    workload: Workload | None = None,
    schedule: str = "",
    table: Schedule | None = None,
    spans: bool = False,
) -> Simulation:
    """Runs the plan's programs on a cost model: step time, bubbles, exposed communication, memory.

    `cluster` is a Cluster or a YAML file that describes one (and may describe the workload);
    `schedule` names a pipeline schedule, `table` is one of your own; `spans` keeps every
    instruction of every rank.
    """
    if isinstance(cluster, Cluster):
        described = default_workload(plan.cost)
    else:
        cluster, described = read_cluster(cluster, base=default_workload(plan.cost))
    workload = workload or described
    if table is not None:
        return _plan.simulate(plan, cluster, workload, table=table, spans=spans)
    return _plan.simulate(plan, cluster, workload, schedule=schedule, spans=spans)
