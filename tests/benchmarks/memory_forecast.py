"""Predicted against measured memory of real runs: two ranks with one thread each, under MPI.

Every case trains some steps of documents that fill each rank's capacity. Of each rank, in MiB: what
`meshloom train` prints before the first step for the fullest step that the config allows; the
forecast of the steps that were planned; and the peak of its process beyond what it held before the
run (memory.json of the run folder). Ratios are of the last two.

With --pages the C library gives every tensor pages of its own and takes them back with it, so that
what is measured is tensors; without, it is its heap, too, as a run has it.

    python tests/benchmarks/memory_forecast.py --python build/cmake/python [--cases quickstart ...]

needs torch, mpirun and a built package.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VOCABULARY = 8192
STEPS = 3

QUICKSTART: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": VOCABULARY, "hidden_size": 256,
    "intermediate_size": 512, "moe_intermediate_size": 256, "num_experts": 8,
    "num_experts_per_tok": 2, "norm_topk_prob": True, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    "max_position_embeddings": 16384, "tie_word_embeddings": False,
}
DENSE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 512,
    "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
}
MODELS = {"quickstart": QUICKSTART, "dense": DENSE}


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    layout: dict[str, int]
    zero: int = 1
    recompute: str = "none"
    capacity: int = 4096

    @property
    def name(self) -> str:
        sizes = ",".join(f"{key}={value}" for key, value in self.layout.items())
        return f"{self.model} {sizes} zero {self.zero} {self.recompute} {self.capacity}"


def cases() -> list[Case]:
    """Every layout, then one thing after another changed."""
    result = []
    for model in MODELS:
        result += [Case(model, {axis: 2}) for axis in ("hdp", "tp", "pp")]
        result += [Case(model, {"hdp": 2}, zero=zero) for zero in (2, 3)]
        result += [
            Case(model, {axis: 2}, recompute=recompute)
            for axis in ("hdp", "tp", "pp") for recompute in ("selective", "full")
        ]
        result += [Case(model, {"hdp": 2}, capacity=capacity) for capacity in (2048, 8192)]
        result.append(Case(model, {"hdp": 2}, zero=3, recompute="full", capacity=8192))
    expert = {"hdp": 2, "ep": 2}
    result += [Case("quickstart", expert, zero=zero) for zero in (1, 2, 3)]
    result += [Case("quickstart", expert, recompute=recompute) for recompute in ("selective", "full")]
    return result


def documents(case: Case) -> list[dict[str, list[int]]]:
    """Documents of which four fill a rank."""
    rng = random.Random(case.name)
    count = STEPS * 2 * 4 * 2
    return [
        {"tokens": [rng.randrange(VOCABULARY) for _ in range(case.capacity // 4)]}
        for _ in range(count)
    ]


def train(folder: Path, case: Case) -> None:
    import torch

    import meshloom as ml

    torch.set_num_threads(1)
    # As many micro-batches as both stages of a pipeline hold.
    hdp = case.layout.get("hdp", 1)
    batch = case.capacity * hdp * case.layout.get("pp", 1)
    config = ml.TrainConfig(
        run=str(folder), steps=STEPS, global_batch_tokens=batch, capacity_tokens=case.capacity,
        threads=1, layout=ml.Layout(**case.layout), memory_check="warn",
    )
    config.parallel = ml.ParallelSection(zero=case.zero, recompute=case.recompute)
    config.data = ml.DataSection(max_document_tokens=case.capacity // 4)
    loader = ml.data.Loader(
        [(ml.data.documents(documents(case)), 1.0)],
        global_batch_tokens=batch, max_document_tokens=case.capacity // 4,
    )
    model = ml.ModelConfig.from_json(json.dumps(MODELS[case.model]))
    world = ml.make_world()
    trainer = ml.make_trainer(config, world, model=model, loader=loader)
    trainer.run()
    if world.rank == 0:
        (folder / "of_plans.json").write_text(json.dumps(of_plans(folder, trainer.memory.setting)))


def of_plans(folder: Path, setting: Any) -> list[int]:
    """The most that the plans of a run let every rank hold, in bytes."""
    import meshloom as ml

    most: list[int] = []
    for path in sorted((folder / "plans").iterdir()):
        plan = ml.StepPlan.load(str(path))
        programs = ml.compile(plan, layers=len(setting.model.moe_layers))
        totals = [ml.forecast_memory(setting, plan, program).total for program in programs]
        most = [max(pair) for pair in zip(most or totals, totals, strict=True)]
    return most


def under_mpi(python: Path, folder: Path, case: Case, pages: bool) -> list[dict[str, Any]]:
    environment = os.environ | {
        "PYTHONPATH": str(python.resolve()),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
    }
    if pages:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 18)
    command = ["mpirun", "-n", "2", "--oversubscribe", "--bind-to", "none",
               "--mca", "mpi_yield_when_idle", "1", sys.executable, __file__,
               "--worker", str(folder), json.dumps(dataclasses.asdict(case))]
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    ranks = json.loads((folder / "memory.json").read_text())["ranks"]
    for rank, total in zip(ranks, json.loads((folder / "of_plans.json").read_text()), strict=True):
        rank["of_plans"] = total
    return list(ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, default=Path("build/cmake/python"))
    parser.add_argument("--cases", nargs="+", help="only those whose name holds one of these")
    parser.add_argument("--pages", action="store_true", help="of its own for every tensor")
    parser.add_argument("--check", action="store_true", help="exit code 1 beyond 10 %%")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        folder, text = arguments.worker
        return train(Path(folder), Case(**json.loads(text)))
    worst = 0.0
    print("| case | at most | of its plans | measured | ratio by rank |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for index, case in enumerate(cases()):
            if arguments.cases and not any(part in case.name for part in arguments.cases):
                continue
            folder = Path(temporary) / str(index)
            ranks = under_mpi(arguments.python, folder, case, arguments.pages)
            ratios = [rank["of_plans"] / rank["measured"] for rank in ranks]
            worst = max(worst, *(abs(ratio - 1.0) for ratio in ratios))

            def shown(key: str, ranks: list[dict[str, Any]] = ranks) -> str:
                return " ".join(f"{rank[key] / (1 << 20):.0f}" for rank in ranks)

            print(f"| {case.name} | {shown('predicted')} | {shown('of_plans')} | {shown('measured')} | "
                  + " ".join(f"{ratio:.3f}" for ratio in ratios) + " |", flush=True)
    print(f"worst: {worst:.1%}")
    if arguments.check and worst > 0.1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
