"""Simulated against measured step times of a real run: two ranks with one thread each, under MPI.

A small model trains on one mix of lengths; the trainer fits the cost model to its units, and the
timeline of those steps gives what a step costs beside them. With this calibration, frozen, three
other mixes are trained, and every step's plan file is simulated on a description of this machine.
Beside that, every second step is simulated with costs fitted to the steps between: what a machine
does that is busy with something else meets both alike.

    python tests/benchmarks/simulated_step.py --python build/cmake/python

needs torch, mpirun and a built package. The machine has to be otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VOCABULARY = 2048
STEP_TOKENS = 4096
CAPACITY = 2560
WARM_UP = 2

MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
PARAMETER_BYTES = 4 * (
    2 * VOCABULARY * 256 + 256 + 4 * (2 * 256 + 256 * 256 * 2 + 2 * 256 * 128 + 3 * 256 * 768)
)


def lengths_of(mix: str, rng: random.Random) -> int:
    """One length of a mix: log-normal bodies with and without a tail, or long documents alone."""
    if mix == "short":
        length = 160 * math.exp(rng.gauss(0.0, 0.8))
    elif mix == "long":
        length = rng.uniform(1024, STEP_TOKENS)
    else:  # mixed, and the calibration's
        tail = rng.random() < 0.12
        length = 1024 / (1 - rng.random()) if tail else 250 * math.exp(rng.gauss(0.0, 1.0))
    return max(16, min(STEP_TOKENS, round(length)))


def documents(mix: str, steps: int) -> list[dict[str, list[int]]]:
    rng = random.Random(mix)
    result = []
    left = steps * STEP_TOKENS
    while left > 0:
        length = lengths_of(mix, rng)
        left -= length
        result.append({"tokens": [rng.randrange(VOCABULARY) for _ in range(length)]})
    return result


def train(folder: Path, mix: str, steps: int, cost: dict[str, float] | None) -> None:
    """One rank of one run; the run folder keeps plans, metrics and the timeline."""
    import torch

    import meshloom as ml

    torch.set_num_threads(1)
    config = ml.TrainConfig(
        run=str(folder / mix), steps=steps, global_batch_tokens=STEP_TOKENS, capacity_tokens=CAPACITY,
        threads=1, timeline_steps=steps,
    )
    if cost is not None:
        config.cost = ml.CostModel(**cost)
    loader = ml.data.Loader(
        [(ml.data.documents(documents(mix, 2 * steps)), 1.0)], global_batch_tokens=STEP_TOKENS
    )
    model = ml.ModelConfig.from_json(json.dumps(MODEL))
    ml.make_trainer(config, ml.make_world(), model=model, loader=loader).run()


def under_mpi(arguments: argparse.Namespace, folder: Path, mix: str, cost: dict[str, float] | None) -> None:
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
               "--worker", str(folder), mix, str(arguments.steps), json.dumps(cost)]
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)


def measured(run: Path) -> dict[int, float]:
    """Seconds of each step after the first ones."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["seconds"] for line in lines if "seconds" in line and line["step"] >= WARM_UP}


def plan_of(run: Path, step: int) -> Path:
    return run / "plans" / f"step-{step:08d}.json"


def spans_of(run: Path) -> list[dict[str, Any]]:
    events = json.loads((run / "timeline.json").read_text())
    return [event for event in events if event.get("ph") == "X"]


def beside_units(run: Path) -> dict[str, float]:
    """Seconds of a step's reduction and update.

    Ranks come to the reduction at different times, and wait there: the shorter of the two slices of
    a step is the reduction itself.
    """
    by_step: dict[str, dict[int, list[float]]] = {"reduce": {}, "step": {}}
    for span in spans_of(run):
        name = span["name"].split()[0]
        if name in by_step and span["args"]["step"] >= WARM_UP:
            by_step[name].setdefault(span["args"]["step"], []).append(span["dur"] * 1e-6)
    return {
        f"{name}_seconds": statistics.median(min(values) for values in steps.values())
        for name, steps in by_step.items()
    }


def calibration(run: Path) -> dict[str, Any]:
    """Cost coefficients as the trainer last had them, and what a step costs beside its units."""
    import meshloom as ml

    cost = ml.StepPlan.load(str(plan_of(run, max(measured(run))))).cost
    if cost.linear + cost.quadratic > 1e-2:
        raise SystemExit("the calibration run was too short to fit costs: give it more --steps")
    names = ("quadratic", "linear", "fixed", "exchange")
    return {"cost": {name: getattr(cost, name) for name in names}} | beside_units(run)


def fitted(run: Path, steps: list[int]) -> dict[str, Any] | None:
    """The same from some steps' units alone; None where they are too alike."""
    import meshloom as ml

    busy: dict[tuple[int, int, int], list[float]] = {}
    for span in spans_of(run):
        at = span["args"]
        if span["name"].split()[0] in ("forward", "backward"):
            busy.setdefault((at["step"], at["slot"], at["unit"]), []).append(span["dur"] * 1e-6)
    timings = []
    for step in steps:
        plan = ml.StepPlan.load(str(plan_of(run, step)))
        tokens = {sample.id: sample.tokens for sample in plan.samples}
        for s, slot in enumerate(plan.slots):
            for u, unit in enumerate(slot.units):
                seconds = sum(busy[step, s, u]) / len(unit.ranks)
                lengths = [tokens[sample] for sample in unit.samples]
                timings.append(ml.UnitTiming(lengths, seconds, len(unit.ranks)))
    try:
        cost = ml.fit_cost(timings).model
    except ml.InvalidArgument:
        return None
    return {"cost": {name: getattr(cost, name) for name in ("quadratic", "linear", "fixed")}} | beside_units(run)


def alternating(run: Path) -> float | None:
    """Simulated over measured time of steps, each with costs fitted to the steps of other parity."""
    real = measured(run)
    sums = [0.0, 0.0]
    for parity in (0, 1):
        facts = fitted(run, [step for step in real if step % 2 == parity])
        if facts is None:
            continue
        for step in real:
            if step % 2 != parity:
                sums[0] += simulated(run, step, facts)
                sums[1] += real[step]
    return sums[0] / sums[1] if sums[1] else None


def simulated(run: Path, step: int, facts: dict[str, Any]) -> float:
    import meshloom as ml

    plan = ml.StepPlan.load(str(plan_of(run, step)))
    plan.cost = ml.CostModel(**facts["cost"])
    # Two ranks send half of the gradients each; the gather of parameters is inside `step_seconds`.
    bandwidth = PARAMETER_BYTES / 2 / facts["reduce_seconds"]
    cluster = ml.Cluster.from_yaml(
        f"{{ranks_per_node: 2, inside: {{bandwidth: {bandwidth}, latency: 0}}}}", "this machine"
    )
    workload = ml.Workload()
    workload.layers = MODEL["num_hidden_layers"]
    workload.seconds_per_work = 1.0
    workload.heads = MODEL["num_attention_heads"]
    workload.key_value_heads = MODEL["num_key_value_heads"]
    workload.head_dim = MODEL["head_dim"]
    workload.element_bytes = workload.wire_bytes = 4
    workload.gradient_bytes = float(PARAMETER_BYTES)
    workload.parameter_bytes = 0.0
    workload.step_seconds = facts["step_seconds"]
    return ml.simulate(plan, cluster, workload=workload).step_time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, default=Path("build/cmake/python"))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--check", action="store_true", help="exit code 1 beyond 10 %%")
    parser.add_argument("--keep", type=Path, help="folder for the runs, which is not deleted")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        folder, mix, steps, cost = arguments.worker
        return train(Path(folder), mix, int(steps), json.loads(cost))
    sys.path.insert(0, str(arguments.python.resolve()))
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.keep or Path(name)
        under_mpi(arguments, folder, "calibration", None)
        facts = calibration(folder / "calibration")
        print(json.dumps(facts))
        print("| mix | steps | measured | simulated | ratio | of single steps | calibrated in turns |")
        print("|---|---|---|---|---|---|---|")
        for mix in ("short", "mixed", "long"):
            under_mpi(arguments, folder, mix, facts["cost"])
            real = measured(folder / mix)
            model = {step: simulated(folder / mix, step, facts) for step in real}
            ratio = sum(model.values()) / sum(real.values())
            single = sorted(model[step] / real[step] for step in real)
            worst = max(worst, abs(ratio - 1.0))
            turns = alternating(folder / mix)
            print(f"| {mix} | {len(real)} | {sum(real.values()):.2f} s | {sum(model.values()):.2f} s "
                  f"| {ratio:.3f} | {single[0]:.3f} to {single[-1]:.3f} "
                  f"| {'-' if turns is None else f'{turns:.3f}'} |", flush=True)
    if arguments.check and worst > 0.1:
        raise SystemExit(f"simulated step times are {worst:.1%} off")


if __name__ == "__main__":
    main()
