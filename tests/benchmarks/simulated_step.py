"""Simulated against measured step times of real runs: two ranks with one thread each, under MPI.

For every case (a layout of two ranks and a model) one mix of lengths is the profile. While it
trains, the backend's links are measured, and whether transfers hide behind computation here; the
timeline of its steps gives the cost of units, what each pipeline stage has of it, and what a step
takes beside its units. With these figures, frozen, three other mixes are trained, and every step's
plan file is simulated on a description of this machine. Nothing is fitted to what is compared.

    python tests/benchmarks/simulated_step.py --python build/cmake/python [--cases hdp tp pp ep]

needs torch, mpirun and a built package. The machine has to be otherwise idle.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 2048
STEP_TOKENS = 4096
WARM_UP = 2
MIXES = ("short", "mixed", "long")
LINK_BYTES = 1 << 20  # about what rows of a micro-batch are
WAITS = ("wait", "tensor", "dispatch", "pipeline")  # spans inside forward and backward

DENSE: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY,
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "hidden_act": "silu",
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}
MIXTURE: dict[str, Any] = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 768,
    "moe_intermediate_size": 384, "num_experts": 8, "num_experts_per_tok": 2,
    "norm_topk_prob": True, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "hidden_act": "silu",
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "attention_bias": False,
}


@dataclasses.dataclass(frozen=True)
class Case:
    layout: dict[str, int]
    model: dict[str, Any]
    capacity: int
    longest: int  # document, in tokens


CASES = {
    "hdp": Case({"hdp": 2}, DENSE, 2560, STEP_TOKENS),
    "tp": Case({"tp": 2}, DENSE, 2048, 2048),
    "pp": Case({"pp": 2}, DENSE, 1024, 1024),
    "ep": Case({"hdp": 2, "ep": 2}, MIXTURE, 2560, STEP_TOKENS),
    "hdp-moe": Case({"hdp": 2}, MIXTURE, 2560, STEP_TOKENS),
    "tp-moe": Case({"tp": 2}, MIXTURE, 2048, 2048),
    "pp-moe": Case({"pp": 2}, MIXTURE, 1024, 1024),
}


def lengths_of(mix: str, longest: int, rng: random.Random) -> int:
    """One length of a mix: log-normal bodies with and without a tail, or long documents alone."""
    if mix == "short":
        length = 160 * math.exp(rng.gauss(0.0, 0.8))
    elif mix == "long":
        length = rng.uniform(longest / 4, longest)
    else:  # mixed, and the profile's
        tail = rng.random() < 0.12
        length = longest / 4 / (1 - rng.random()) if tail else 250 * math.exp(rng.gauss(0.0, 1.0))
    return max(16, min(longest, round(length)))


def documents(mix: str, longest: int, steps: int) -> list[dict[str, list[int]]]:
    rng = random.Random(mix)
    result = []
    left = steps * STEP_TOKENS
    while left > 0:
        length = lengths_of(mix, longest, rng)
        left -= length
        result.append({"tokens": [rng.randrange(VOCABULARY) for _ in range(length)]})
    return result


def median_seconds(body: Callable[[], None], rounds: int = 9) -> float:
    body()
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        body()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def measure_links(world: Any) -> dict[str, float]:
    """Latency and bandwidth of collectives, and how much of them computation hides. Collective."""
    import torch

    size = world.size
    rows = [1] * size
    small = torch.ones(1, 16)
    large = torch.ones(1, LINK_BYTES // 4)
    wide = torch.ones(size, LINK_BYTES // 4)
    tiny = torch.ones(size, 16)

    def both(gathered: Any, scattered: Any) -> None:
        world.all_gather(gathered, rows).result()
        world.reduce_scatter(scattered, rows).result()

    latency = median_seconds(lambda: both(small, tiny)) / 2
    transfer = median_seconds(lambda: both(large, wide)) / 2
    bandwidth = LINK_BYTES * (size - 1) / max(transfer - latency, 0.01 * transfer)

    matrix = torch.ones(384, 384)

    def compute() -> None:
        for _ in range(24):
            torch.mm(matrix, matrix)

    def together(beside: Callable[[], None]) -> None:
        works = [world.all_gather(large, rows) for _ in range(8)]
        beside()
        for work in works:
            work.result()

    computing = median_seconds(compute)
    moving = median_seconds(lambda: together(lambda: None))
    hidden = computing + moving - median_seconds(lambda: together(compute))
    overlap = min(1.0, max(0.0, hidden / min(computing, moving)))
    return {"latency": latency, "bandwidth": bandwidth, "overlap": overlap}


def train(folder: Path, case: Case, mix: str, steps: int, cost: dict[str, float] | None) -> None:
    """One rank of one run; the run folder keeps plans, metrics and the timeline."""
    import torch

    import meshloom as ml

    torch.set_num_threads(1)
    config = ml.TrainConfig(
        run=str(folder / mix), steps=steps, global_batch_tokens=STEP_TOKENS,
        capacity_tokens=case.capacity, threads=1, timeline_steps=steps,
        layout=ml.Layout(**case.layout),
    )
    config.data = ml.DataSection(max_document_tokens=case.longest)
    if cost is not None:
        config.cost = ml.CostModel(**cost)
    loader = ml.data.Loader(
        [(ml.data.documents(documents(mix, case.longest, 2 * steps)), 1.0)],
        global_batch_tokens=STEP_TOKENS, max_document_tokens=case.longest,
    )
    model = ml.ModelConfig.from_json(json.dumps(case.model))
    world = ml.make_world()
    links = measure_links(world) if cost is None else {}
    ml.make_trainer(config, world, model=model, loader=loader).run()
    if links and world.rank == 0:
        (folder / "links.json").write_text(json.dumps(links))


def under_mpi(
    arguments: argparse.Namespace, folder: Path, name: str, mix: str, cost: dict[str, float] | None
) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(arguments.python.resolve()),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
    }
    command = ["mpirun", "-n", "2", "--oversubscribe", "--bind-to", "none",
               "--mca", "mpi_yield_when_idle", "1", sys.executable, __file__,
               "--worker", str(folder), name, mix, str(arguments.steps), json.dumps(cost)]
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)


class Run:
    """What a run folder says of its steps after the first ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        self.seconds: dict[int, float] = {
            line["step"]: line["seconds"]
            for line in lines if "seconds" in line and line["step"] >= WARM_UP
        }
        events = json.loads((folder / "timeline.json").read_text())
        #: By step and rank.
        self.spans: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        for event in events:
            if event.get("ph") == "X" and event["args"]["step"] in self.seconds:
                self.spans[event["args"]["step"], event["pid"]].append(event)
        self.ranks = 1 + max(rank for _, rank in self.spans)

    def plan(self, step: int) -> Any:
        import meshloom as ml

        return ml.StepPlan.load(str(self.folder / "plans" / f"step-{step:08d}.json"))

    def total(self, step: int, rank: int, kind: str) -> float:
        spans = self.spans[step, rank]
        return sum(span["dur"] for span in spans if span["name"] == kind) * 1e-6

    def busy(self, step: int, rank: int) -> dict[tuple[int, int], float]:
        """Seconds that a rank computed, by slot and unit."""
        result: dict[tuple[int, int], float] = defaultdict(float)
        for span in self.spans[step, rank]:
            kind = span["name"]
            sign = 1 if kind in ("forward", "backward") else -1 if kind in WAITS else 0
            result[span["args"]["slot"], span["args"]["unit"]] += sign * span["dur"] * 1e-6
        return result


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Parameters of the whole model."""

    dense: int
    experts: int
    expert_share: float
    """Of what a token is multiplied with."""

    @classmethod
    def of(cls, model: dict[str, Any]) -> Sizes:
        hidden, layers = model["hidden_size"], model["num_hidden_layers"]
        heads = 2 * model["num_attention_heads"] + 2 * model["num_key_value_heads"]
        attention = hidden * heads * model["head_dim"]
        count = model.get("num_experts", 0)
        expert = 3 * hidden * model.get("moe_intermediate_size", 0)
        other = hidden * count if count else 3 * hidden * model["intermediate_size"]
        head = VOCABULARY * hidden
        dense = layers * (attention + other + 2 * hidden) + 2 * head + hidden
        active = layers * model.get("num_experts_per_tok", 0) * expert
        return cls(dense, layers * count * expert, active / (active + dense - head))


def profile(case: Case, run: Run, links: dict[str, float]) -> dict[str, Any]:
    """What the simulator is told: costs of units, stages, links, and what a step takes beside."""
    import meshloom as ml

    layout = ml.Layout(**case.layout)
    share = Sizes.of(case.model).expert_share if layout.ep > 1 else 0.0
    timings = []
    stages = [0.0] * layout.pp
    for step in run.seconds:
        plan = run.plan(step)
        tokens = {sample.id: sample.tokens for sample in plan.samples}
        of_rank: dict[tuple[int, int, int], float] = defaultdict(float)  # hdp, slot, unit
        for rank in range(run.ranks):
            at = layout.coordinates(rank)
            for (slot, unit), seconds in run.busy(step, rank).items():
                of_rank[at.hdp, slot, unit] += seconds
                stages[at.pp] += seconds if slot >= 0 else 0.0
        for s, slot in enumerate(plan.slots):
            own = defaultdict(float)
            for unit in slot.units:
                for member in unit.ranks:
                    own[member] = sum(tokens[i] for i in unit.samples) / len(unit.ranks)
            for u, unit in enumerate(slot.units):
                for member in unit.ranks:
                    group = member // layout.ep * layout.ep
                    mean = sum(own[group + i] for i in range(layout.ep)) / layout.ep
                    timing = ml.UnitTiming(
                        [tokens[i] for i in unit.samples], of_rank[member, s, u], len(unit.ranks)
                    )
                    # Experts work for the tokens of all members.
                    timing.token_sum = len(unit.ranks) * (own[member] * (1 - share) + mean * share)
                    timings.append(timing)
    fit = ml.fit_cost(timings)
    forward = sum(run.total(s, r, "forward") for s in run.seconds for r in range(run.ranks))
    backward = sum(run.total(s, r, "backward") for s in run.seconds for r in range(run.ranks))
    return {
        "cost": {n: getattr(fit.model, n) for n in ("quadratic", "linear", "fixed")},
        "fit_error": fit.median_error,
        "forward_share": forward / (forward + backward),
        "stage_shares": [seconds / sum(stages) for seconds in stages],
        "loader_seconds": statistics.median(
            span["dur"] * 1e-6 for spans in run.spans.values() for span in spans if span["name"] == "load"
        ),
        "step_seconds": statistics.median(beside_units(run, step) for step in run.seconds),
    } | links


def beside_units(run: Run, step: int) -> float:
    """Seconds of a step's reduction, update, and of all that has no span.

    Ranks come to the reduction at different times, and wait there: the shorter of the two slices of
    a step is the reduction itself.
    """
    ranks = range(run.ranks)
    covered = max(
        max(span["ts"] + span["dur"] for span in run.spans[step, rank])
        - min(span["ts"] for span in run.spans[step, rank]) for rank in ranks
    )
    return (
        min(run.total(step, rank, "reduce") for rank in ranks)
        + min(run.total(step, rank, "step") for rank in ranks)
        + run.seconds[step] - covered * 1e-6
    )


def simulated(
    case: Case, run: Run, step: int, facts: dict[str, Any], step_seconds: float, states: bool = True
) -> float:
    import meshloom as ml

    model, sizes = case.model, Sizes.of(case.model)
    plan = run.plan(step)
    plan.cost = ml.CostModel(**facts["cost"], exchange=0.0)
    cluster = ml.Cluster()
    cluster.ranks_per_node = 2
    cluster.inside.bandwidth, cluster.inside.latency = facts["bandwidth"], facts["latency"]
    cluster.overlap = facts["overlap"]
    cluster.loader_seconds = facts["loader_seconds"]
    workload = ml.Workload()
    workload.layers = model["num_hidden_layers"]
    workload.seconds_per_work = 1.0
    workload.forward_share = facts["forward_share"]
    workload.stage_shares = facts["stage_shares"]
    tp = case.layout.get("tp", 1)
    workload.heads = model["num_attention_heads"] // tp
    workload.key_value_heads = model["num_key_value_heads"] // tp
    workload.head_dim = model["head_dim"]
    workload.element_bytes = workload.wire_bytes = 4
    workload.hidden_bytes = 4.0 * model["hidden_size"]
    workload.mixture_share = 1.0 if "num_experts" in model else 0.0
    workload.dispatch_bytes = 4.0 * model["hidden_size"] * model.get("num_experts_per_tok", 0)
    workload.expert_share = sizes.expert_share
    dense, experts = (4.0 * sizes.dense, 4.0 * sizes.experts) if states else (0.0, 0.0)
    workload.parameter_bytes = workload.gradient_bytes = dense
    workload.expert_parameter_bytes = workload.expert_gradient_bytes = experts
    workload.step_seconds = step_seconds
    return float(ml.simulate(plan, cluster, workload=workload).step_time)


def priced_states(case: Case, run: Run, facts: dict[str, Any]) -> float:
    """Seconds that the simulator counts for sums of gradients and gathers of parameters: the
    profile's figures beside units hold them, too."""
    step = min(run.seconds)
    bare = {**facts, "cost": {"quadratic": 0.0, "linear": 1e-30, "fixed": 0.0}}
    both = simulated(case, run, step, bare, 0.0)
    return both - simulated(case, run, step, bare, 0.0, states=False)


def compare(arguments: argparse.Namespace, root: Path, name: str) -> float:
    """One case: profile, then the mixes. @returns the worst ratio's distance from one."""
    case = CASES[name]
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    under_mpi(arguments, folder, name, "profile", None)
    run = Run(folder / "profile")
    facts = profile(case, run, json.loads((folder / "links.json").read_text()))
    step_seconds = max(0.0, facts["step_seconds"] - priced_states(case, run, facts))
    print(f"{name}: {json.dumps(facts | {'step_seconds': step_seconds})}", file=sys.stderr)
    last = run.plan(max(run.seconds)).cost
    planned = {n: getattr(last, n) for n in ("quadratic", "linear", "fixed", "exchange")}
    worst = 0.0
    for mix in ("profile", *MIXES):
        if mix != "profile":
            under_mpi(arguments, folder, name, mix, planned)
            run = Run(folder / mix)
        model = {step: simulated(case, run, step, facts, step_seconds) for step in run.seconds}
        ratio = sum(model.values()) / sum(run.seconds.values())
        single = sorted(model[step] / run.seconds[step] for step in run.seconds)
        if mix != "profile":
            worst = max(worst, abs(ratio - 1.0))
        print(f"| {name} | {mix} | {sum(run.seconds.values()):.2f} s | {sum(model.values()):.2f} s "
              f"| {ratio:.3f} | {statistics.median(single):.3f} | {single[0]:.3f} to {single[-1]:.3f} |",
              flush=True)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, default=Path("build/cmake/python"))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["hdp", "tp", "pp", "ep"])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--check", action="store_true", help="exit code 1 beyond 15 %%")
    parser.add_argument("--keep", type=Path, help="folder for the runs, which is not deleted")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        folder, name, mix, steps, cost = arguments.worker
        return train(Path(folder), CASES[name], mix, int(steps), json.loads(cost))
    sys.path.insert(0, str(arguments.python.resolve()))
    worst = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.keep or Path(temporary)
        print("| case | mix | measured | simulated | ratio | median step | of single steps |")
        print("|---|---|---|---|---|---|---|")
        for name in arguments.cases:
            worst = max(worst, compare(arguments, root, name))
    if arguments.check and worst > 0.15:
        raise SystemExit(f"simulated step times are {worst:.1%} off")


if __name__ == "__main__":
    main()
