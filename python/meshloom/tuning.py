"""The fastest layouts that fit, by the simulator. Never imports torch."""

from __future__ import annotations

import dataclasses
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from meshloom import _layout_costs, _layout_memory, _plan, planning, simulation
from meshloom._errors import InvalidArgument, PlanError
from meshloom._candidates import RECOMPUTE, Candidate, candidates, check_fixed, nothing_divides
from meshloom._model_sizes import ModelSizes, read_model
from meshloom._plan import Cluster, CostModel, Layout, PlanProblem, SampleInfo, Workload

__all__ = ["Tuning", "TunedLayout", "autotune"]

GIB = float(1 << 30)
RESERVED = 0.08  # of a device: workspaces, communication buffers, fragmentation
MOST_RANKS_SOUGHT = 1 << 14  # how far a refusal looks for a number of ranks that would do

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedLayout:
    """A layout that fits, with what the simulator says of it. Seconds and bytes."""

    layout: Layout
    pipeline: str
    """Schedule; empty without a pipeline."""
    zero: int
    recompute: str
    capacity_tokens: int
    step_seconds: float
    """Mean over the drawn steps."""
    tokens_per_second: float
    bubble: float
    """Mean time of a rank without computation, as a part of the step."""
    exposed: float
    """Mean communication of a rank that is not hidden, as a part of the step."""
    state_bytes: float
    """Of the fullest rank: parameters, gradients, optimizer state, and what else does not grow with
    tokens."""
    activation_bytes: float
    """The most that a rank keeps for backward in any of the drawn steps."""

    @property
    def memory_bytes(self) -> float:
        """States and activations of the fullest rank, without what is reserved."""
        return self.state_bytes + self.activation_bytes

    def config(self) -> str:
        """What goes into config.yaml, in one line."""
        sizes = ["tp", "hdp", "pp", "ep", "chunks"]
        layout = ", ".join(f"{n}: {getattr(self.layout, n)}" for n in sizes)
        schedule = f", pipeline: {self.pipeline}" if self.pipeline else ""
        return (
            f"layout: {{{layout}}}; parallel: {{zero: {self.zero}{schedule}, recompute:"
            f" {self.recompute}}}; capacity_tokens: {self.capacity_tokens}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        sizes = {n: getattr(self.layout, n) for n in ("tp", "hdp", "pp", "ep", "chunks")}
        return facts | {"layout": sizes, "memory_bytes": self.memory_bytes}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Result of `autotune`."""

    layouts: list[TunedLayout]
    """The fastest first."""
    candidates: int
    """Layouts that divide heads, layers, experts and ranks."""
    simulated: int
    slower: int
    """Not simulated: a bound on their step time is above the last layout's of the result."""
    left_out: int
    """Not simulated: `simulations` were used up before their turn; by a guess they are slower."""
    dropped: dict[str, int]
    """Why candidates do not fit, and how many."""
    tflops: float
    """What a rank is taken to achieve, in 1e12 operations a second."""


@dataclasses.dataclass(frozen=True)
class _Fitting:
    candidate: Candidate
    capacity_tokens: int
    stages: Sequence[_layout_memory.StageMemory]
    cost: CostModel
    workload: Workload
    bound: float
    guess: float


@dataclasses.dataclass(frozen=True)
class _Setting:
    model: ModelSizes
    cluster: Cluster
    workload: Workload
    device_bytes: float
    batches: list[list[SampleInfo]]
    longest: int

    @property
    def usable_bytes(self) -> float:
        return self.device_bytes * (1.0 - RESERVED)

    @property
    def most_useful_capacity(self) -> int:
        """Tokens that no unit exceeds."""
        steps = (sum(sample.tokens for sample in batch) for batch in self.batches)
        return max(self.longest, *steps)


def autotune(
    model: str | os.PathLike[str] | dict[str, Any],
    lengths: Iterable[int | SampleInfo],
    *,
    ranks: int | None = None,
    cluster: Cluster | str | os.PathLike[str] | None = None,
    device_memory_gib: float | None = None,
    global_batch_tokens: int | None = None,
    steps: int = 4,
    top: int = 10,
    fixed: Mapping[str, int | str] | None = None,
    dtype: str = "bfloat16",
    tflops: float | None = None,
    seed: int = 0,
    simulations: int = 1000,
    progress: Progress | None = None,
) -> Tuning:
    """The fastest layouts of a model on a cluster that fit its memory, by the simulator.

    Args:
        model: a Hugging Face `config.json`, its folder, or its contents.
        lengths: the mix; tokens of each sample, or SampleInfo.
        ranks: of the world; by default all of a cluster that says how many nodes it has.
        cluster: a Cluster, or a file as `simulate` takes it, which may hold `device_memory_gib`.
        device_memory_gib: of a rank, in GiB; has precedence over the file's.
        global_batch_tokens: of a drawn step; by default a step is the whole mix.
        steps: drawn steps that every simulated layout is planned for.
        top: most layouts in the result.
        fixed: parts that are given: tp, pp, hdp, ep, chunks, zero, pipeline, recompute.
        dtype: of parameters and compute, bfloat16 or float32.
        tflops: what a rank of compute rate 1 achieves, in 1e12 operations a second; by default
            what ByteScale's measurements say of theirs, or the file's `seconds_per_work`.
        seed: of the draw; the result is a pure function of the arguments.
        simulations: most layouts that are simulated, in the order of a guess.
        progress: called with the number of simulated layouts and the most that there may be.

    Raises InvalidArgument for arguments out of range and where no layout fits: what is missing on
    the one that needs least, and what would help. DataError and NotSupported for a model file.
    """
    sizes = read_model(model, dtype)
    fixed = check_fixed(fixed or {})
    for name, value in (("steps", steps), ("top", top), ("simulations", simulations)):
        if value < 1:
            raise InvalidArgument(f"[autotune] {name} is {value}, expected at least 1")
    machines, base, file_gib = _read_cluster(cluster, sizes, tflops)
    ranks = _resolve_ranks(ranks, machines)
    gib = device_memory_gib if device_memory_gib is not None else file_gib
    if gib is None:
        raise InvalidArgument(
            "[autotune] how much memory has a rank? give device_memory_gib, here or in the cluster"
            " file"
        )
    if not gib > 0:
        raise InvalidArgument(f"[autotune] device_memory_gib is {gib}, expected above 0")
    pool = _pool(lengths)
    longest = max(sample.tokens for sample in pool)
    batches = draw(pool, global_batch_tokens, steps, seed)
    setting = _Setting(sizes, machines, base, gib * GIB, batches, longest)
    fitting, dropped = _fit(setting, ranks, fixed)
    total = len(fitting) + sum(dropped.values())
    if not total:
        raise InvalidArgument(nothing_divides(sizes, ranks, fixed))
    if not fitting:
        raise InvalidArgument(_nothing_fits(setting, ranks, fixed, dropped))
    fitting.sort(key=lambda one: one.guess)  # stable: equal ones stay in order
    found: list[tuple[float, int, TunedLayout]] = []
    simulated = slower = left_out = 0
    refusal: Exception | None = None
    for index, one in enumerate(fitting):
        if len(found) >= top and one.bound >= found[top - 1][0]:
            slower += 1
            continue
        if simulated >= simulations:
            left_out += 1
            continue
        if progress is not None:
            progress(simulated, min(simulations, len(fitting)))
        simulated += 1
        try:
            result = _simulate(setting, one)
        except (InvalidArgument, PlanError) as error:
            dropped["the planner refuses a step"] += 1
            refusal = refusal or error
            continue
        found.append((result.step_seconds, index, result))
        found.sort(key=lambda entry: entry[:2])
    if not found and refusal is not None:
        raise PlanError(f"[autotune] no layout that fits can be planned; the first: {refusal}")
    operations = _layout_costs.operations(sizes)
    return Tuning(
        layouts=[result for _, _, result in found[:top]], candidates=total, simulated=simulated,
        slower=slower, left_out=left_out, dropped=dict(sorted(dropped.items())),
        tflops=1e-12 * machines.compute_rate * operations / base.seconds_per_work,
    )


def _read_cluster(
    cluster: Cluster | str | os.PathLike[str] | None, model: ModelSizes, tflops: float | None
) -> tuple[Cluster, Workload, float | None]:
    """Machines, a workload with the seconds of a unit of work, and the file's device memory."""
    if tflops is not None and not tflops > 0:
        raise InvalidArgument(f"[autotune] tflops is {tflops}, expected above 0")
    rate = tflops * 1e12 if tflops is not None else _layout_costs.reference_rate()
    base = Workload.llama_7b()
    base.seconds_per_work = seconds = _layout_costs.operations(model) / rate
    if isinstance(cluster, Cluster):
        return cluster, base, None
    machines, workload = simulation.read_cluster(cluster, base=base)
    if tflops is not None:
        workload.seconds_per_work = seconds
    gib = None if cluster is None else simulation.device_memory_gib(cluster)
    return machines, workload, gib


def _resolve_ranks(ranks: int | None, cluster: Cluster) -> int:
    room = cluster.nodes * cluster.ranks_per_node
    if ranks is None:
        ranks = room
        if not room:
            raise InvalidArgument(
                "[autotune] how many ranks? give ranks, or nodes in the cluster description"
            )
    if ranks < 1:
        raise InvalidArgument(f"[autotune] ranks is {ranks}, expected at least 1")
    if room and ranks > room:
        raise InvalidArgument(
            f"[autotune] ranks is {ranks}, but the cluster has {cluster.nodes} nodes of"
            f" {cluster.ranks_per_node}"
        )
    return ranks


def _pool(lengths: Iterable[int | SampleInfo]) -> list[SampleInfo]:
    pool = [
        entry if isinstance(entry, SampleInfo) else SampleInfo(id=index, tokens=int(entry))
        for index, entry in enumerate(lengths)
    ]
    if not pool:
        raise InvalidArgument("[autotune] lengths holds no samples")
    for sample in pool:
        if sample.tokens < 1:
            raise InvalidArgument(f"[autotune] sample {sample.id} has {sample.tokens} tokens")
    return pool


def draw(
    pool: Sequence[SampleInfo], global_batch_tokens: int | None, steps: int, seed: int
) -> list[list[SampleInfo]]:
    """Steps of at most so many tokens, through the mix in shuffled order again and again.

    Without `global_batch_tokens` there is one step: the whole mix.
    Raises InvalidArgument where a sample has more tokens than a step.
    """
    if global_batch_tokens is None:
        return [list(pool)]
    longest = max(pool, key=lambda sample: sample.tokens)
    if longest.tokens > global_batch_tokens:
        raise InvalidArgument(
            f"[autotune] global_batch_tokens is {global_batch_tokens}, but sample {longest.id} has"
            f" {longest.tokens} tokens"
        )
    generator = random.Random(seed)
    order: list[SampleInfo] = []
    batches: list[list[SampleInfo]] = []
    batch: list[SampleInfo] = []
    tokens = 0
    while len(batches) < steps:
        if not order:
            order = generator.sample(list(pool), len(pool))
        sample = order[-1]
        if tokens + sample.tokens > global_batch_tokens:
            batches.append(batch)
            batch, tokens = [], 0
            continue
        order.pop()
        tokens += sample.tokens
        batch.append(
            SampleInfo(id=len(batch), tokens=sample.tokens, loss_tokens=sample.loss_tokens)
        )
    return batches


def _capacity(setting: _Setting, stages: Sequence[_layout_memory.StageMemory]) -> float:
    """Tokens of a unit that the fullest rank holds beside its states; below 1: none."""
    return min((setting.usable_bytes - stage.states) / stage.token for stage in stages)


def _fit(
    setting: _Setting, ranks: int, fixed: Mapping[str, int | str]
) -> tuple[list[_Fitting], Counter[str]]:
    """Candidates that hold their states and the longest sample, and why others do not."""
    dropped: Counter[str] = Counter()
    fitting = []
    batches = [[sample.tokens for sample in batch] for batch in setting.batches]
    everything = [tokens for batch in batches for tokens in batch]
    costs = {name: _layout_costs.cost_model(setting.model, name) for name in RECOMPUTE}
    scales = {
        name: _layout_costs.recompute_scale(setting.model, name, everything) for name in RECOMPUTE
    }
    for one in candidates(setting.model, ranks, fixed):
        stages = _layout_memory.stage_memory(
            setting.model, one.layout, one.pipeline, one.zero, one.recompute
        )
        room = _capacity(setting, stages)
        if room < 1:
            dropped["states leave no room for a token"] += 1
            continue
        capacity = min(int(room), setting.most_useful_capacity)
        if capacity * one.hdp < setting.longest:
            dropped["the longest sample does not fit the axis"] += 1
            continue
        load = _layout_costs.workload(
            setting.model, one, setting.workload, scales[one.recompute]
        )
        times = [
            _layout_costs.least_seconds(
                one, costs[one.recompute], load, setting.cluster, lengths, capacity
            )
            for lengths in batches
        ]
        fitting.append(
            _Fitting(
                candidate=one,
                capacity_tokens=capacity,
                stages=stages,
                cost=costs[one.recompute],
                workload=load,
                bound=sum(bound for bound, _ in times) / len(times),
                guess=sum(guess for _, guess in times) / len(times),
            )
        )
    return fitting, dropped


def _simulate(setting: _Setting, one: _Fitting) -> TunedLayout:
    """Plans the drawn steps and runs their programs on the cost model."""
    candidate = one.candidate
    seconds = bubble = exposed = tokens_held = 0.0
    for step, batch in enumerate(setting.batches):
        problem = PlanProblem()
        problem.step = step
        problem.layout = candidate.layout
        problem.capacity_tokens = one.capacity_tokens
        problem.lockstep = candidate.lockstep
        problem.cost = one.cost
        problem.samples = batch
        problem.ranks_per_node = max(1, setting.cluster.ranks_per_node // candidate.tp)
        plan = planning.make_plan(problem)
        result = _plan.simulate(plan, setting.cluster, one.workload, schedule=candidate.pipeline)
        seconds += result.step_time
        bubble += result.bubble * result.step_time
        exposed += sum(result.exposed) / len(result.exposed)
        tokens_held = max(tokens_held, _most_tokens(plan))
    fullest = max(one.stages, key=lambda stage: stage.states + tokens_held * stage.token)
    steps = len(setting.batches)
    tokens = sum(sample.tokens for batch in setting.batches for sample in batch)
    return TunedLayout(
        layout=candidate.layout, pipeline=candidate.pipeline, zero=candidate.zero,
        recompute=candidate.recompute, capacity_tokens=one.capacity_tokens,
        step_seconds=seconds / steps, tokens_per_second=tokens / seconds if seconds else 0.0,
        bubble=bubble / seconds if seconds else 0.0, exposed=exposed / seconds if seconds else 0.0,
        state_bytes=fullest.states, activation_bytes=tokens_held * fullest.token,
    )


def _most_tokens(plan: _plan.StepPlan) -> float:
    tokens = {sample.id: sample.tokens for sample in plan.samples}
    return max(
        sum(tokens[i] for i in unit.samples) / len(unit.ranks)
        for slot in plan.slots for unit in slot.units
    )


def _least_needed(
    setting: _Setting, ranks: int, fixed: Mapping[str, int | str]
) -> tuple[float, Candidate, float] | None:
    """Bytes of a device, the candidate that needs the fewest, and its states."""
    best: tuple[float, Candidate, float] | None = None
    for one in candidates(setting.model, ranks, fixed):
        stages = _layout_memory.stage_memory(
            setting.model, one.layout, one.pipeline, one.zero, one.recompute
        )
        tokens = -(-setting.longest // one.hdp)
        worst = max(stages, key=lambda stage: stage.states + tokens * stage.token)
        needed = (worst.states + tokens * worst.token) / (1.0 - RESERVED)
        if best is None or needed < best[0]:
            best = needed, one, worst.states
    return best


def _nothing_fits(
    setting: _Setting, ranks: int, fixed: Mapping[str, int | str], dropped: Counter[str]
) -> str:
    least = _least_needed(setting, ranks, fixed)
    assert least is not None  # there are candidates
    needed, one, states = least
    extras = f"zero={one.zero}, recompute={one.recompute}"
    if one.pipeline:
        extras += f", pipeline={one.pipeline}"
    share = -(-setting.longest // one.hdp)
    reasons = ", ".join(f"{count} because {why}" for why, count in sorted(dropped.items()))
    text = (
        f"[autotune] none of {sum(dropped.values())} layouts of {ranks} ranks fits"
        f" {setting.device_bytes / GIB:.4g} GiB a rank ({reasons}). The one that needs least is"
        f" {one.layout} ({extras}): {states / GIB:.3g} GiB of states and"
        f" {(needed * (1 - RESERVED) - states) / GIB:.3g} GiB for {share} tokens of the longest"
        f" sample ({setting.longest}), {needed / GIB:.4g} GiB with {RESERVED:.0%} kept back;"
        f" {(needed - setting.device_bytes) / GIB:.3g} GiB are missing. What would help: device"
        f" memory of {needed / GIB:.4g} GiB"
    )
    more = 2 * ranks
    while not {"tp", "pp", "hdp"} <= fixed.keys() and more <= MOST_RANKS_SOUGHT:
        enough = _least_needed(setting, more, fixed)
        if enough is not None and enough[0] <= setting.device_bytes:
            text += f", or {more} ranks ({enough[1].layout})"
            break
        more *= 2
    if held := _longest_held(setting, ranks, fixed):
        text += f", or samples of at most {held} tokens"
    if fixed:
        text += ", or less of " + ", ".join(f"{k}={v}" for k, v in fixed.items()) + " fixed"
    return text


def _longest_held(setting: _Setting, ranks: int, fixed: Mapping[str, int | str]) -> int:
    """Tokens of the longest sample that some layout holds; 0 where states alone are too much."""
    held = 0
    for one in candidates(setting.model, ranks, fixed):
        stages = _layout_memory.stage_memory(
            setting.model, one.layout, one.pipeline, one.zero, one.recompute
        )
        held = max(held, int(_capacity(setting, stages)) * one.hdp)
    return held
