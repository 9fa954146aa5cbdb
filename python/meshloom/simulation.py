"""Simulated steps: a plan's programs on a cluster description. Never imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from meshloom import _plan
from meshloom._errors import DataError, InvalidArgument
from meshloom._plan import Cluster, Simulation, StepPlan, Workload

if TYPE_CHECKING:
    from meshloom._plan import CostModel, Schedule

__all__ = ["default_workload", "device_memory_gib", "host_transfer", "read_cluster", "simulate"]

_MEMORY_KEY = "device_memory_gib"  # of a rank; says nothing to the simulator


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


def _without_memory(text: str, name: str) -> tuple[str, float | None]:
    """A cluster file's text without the memory of a rank, and that."""
    import json

    import yaml

    if _MEMORY_KEY not in text:
        return text, None
    try:
        root = yaml.safe_load(text)
    except yaml.YAMLError:
        return text, None  # the reader of all other keys says what is wrong
    if not isinstance(root, dict) or _MEMORY_KEY not in root:
        return text, None
    value = root.pop(_MEMORY_KEY)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise DataError(
            f"[sim.cluster] {name}: {_MEMORY_KEY} is {value!r}, expected a number above 0"
        )
    return json.dumps(root), float(value)


def device_memory_gib(path: str | os.PathLike[str]) -> float | None:
    """Memory of a rank in GiB, as a cluster file says it; None where it does not."""
    return _without_memory(Path(path).read_text(encoding="utf-8"), str(path))[1]


def read_cluster(
    path: str | os.PathLike[str] | None, settings: Iterable[str] = (), *, base: Workload | None = None
) -> tuple[Cluster, Workload]:
    """Cluster and workload of a file, then of `settings` like `between.bandwidth=5e10`."""
    cluster, workload = Cluster(), base or Workload.llama_7b()
    texts = [] if path is None else [(Path(path).read_text(encoding="utf-8"), str(path))]
    texts += [(_as_yaml(setting), setting) for setting in settings]
    for text, name in texts:
        text, _ = _without_memory(text, name)
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
