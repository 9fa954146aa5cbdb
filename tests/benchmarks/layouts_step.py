"""Two ranks of one thread each: Meshloom's layouts against torch's DDP, FSDP2, DTensor and
pipelining over Gloo.

Same model, documents, micro-batches and optimizer on both sides, steps in turns. torch's side is
the faster of eager and compiled layers.

    python tests/benchmarks/layouts_step.py --build build/cmake

needs torch, transformers, mpirun and a build tree with the target `step_benchmark`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import step_models
import torch_layouts
import train_step

DOCUMENTS, TOKENS = 8, 512
# Name, torch's mode, our layout, ZeRO, tokens of a rank's micro-batch.
CASES = {
    "data": ("ddp", "hdp=2", 1, DOCUMENTS // 2 * TOKENS),
    "zero3": ("fsdp2", "hdp=2", 3, DOCUMENTS // 2 * TOKENS),
    "tensor": ("tensor", "tp=2", 1, DOCUMENTS * TOKENS),
    "pipeline": ("pipeline", "pp=2", 1, DOCUMENTS // torch_layouts.MICRO_BATCHES * TOKENS),
}


def against_torch(name: str, model: Path, documents: Path, build: Path, pairs: int) -> dict:
    mode, layout, zero, capacity = CASES[name]
    program = build / "tests" / "benchmarks" / "step_benchmark"
    options = ["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
    ours_command = ["mpirun", "-n", "2", *options, program, model, documents, "1", layout,
                    str(zero), str(capacity)]

    def torch_command(compiled: bool) -> list[str | Path]:
        worker = Path(torch_layouts.__file__)
        return [sys.executable, worker, model, documents, mode, str(int(compiled))]

    seconds = {}
    for compiled in (False, True):
        try:
            with train_step.running(torch_command(compiled), 1) as side:
                side.step()
                side.step()
                seconds[compiled] = min(side.step()["seconds"] for _ in range(3))
                side.close()
        except (RuntimeError, BrokenPipeError) as error:
            if not compiled:
                raise
            print(f"{name}: compiled layers fail: {error}", file=sys.stderr)
    best = min(seconds, key=lambda compiled: seconds[compiled])
    with (
        train_step.running(ours_command, 1) as ours,
        train_step.running(torch_command(best), 1) as theirs,
    ):
        result = train_step.compare(ours, theirs, pairs, warm_up=2)
        ours.close()
        theirs.close()
    return result | {"torch": f"{mode}, {'compiled' if best else 'eager'}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=Path("build/cmake"))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    arguments = parser.parse_args()
    print("| layout | against | tokens/s | ratio of wall time, median (all) | losses |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        step_models.write_model("dense", folder / "dense")
        rng = random.Random(0)
        documents = folder / "equal.jsonl"
        documents.write_text("".join(
            json.dumps({"tokens": [rng.randrange(step_models.VOCABULARY) for _ in range(TOKENS)]})
            + "\n"
            for _ in range(DOCUMENTS)
        ))
        for case in arguments.cases:
            result = against_torch(case, folder / "dense", documents, arguments.build,
                                   arguments.pairs)
            ours, theirs = result["tokens_per_second"]
            ratios = " ".join(f"{x:.2f}" for x in sorted(result["ratios"]))
            losses = " ".join(f"{x:.5f}" for x in result["losses"])
            print(f"| {CASES[case][1]}, ZeRO-{CASES[case][2]} | {result['torch']} "
                  f"| {ours} / {theirs} | {result['ratio']:.2f} ({ratios}) | {losses} |",
                  flush=True)


if __name__ == "__main__":
    main()
