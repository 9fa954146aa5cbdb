"""Tokens per second of a whole optimizer step: Meshloom's trainer against transformers.

Both sides run as processes of their own on the same weights and the same documents, in fp32 with
fused AdamW and two threads; steps alternate, so that a busy machine slows both. transformers runs
at its best: the fastest of one document at a time and length buckets, each eager and compiled
layer by layer. Then two ranks of Meshloom with one thread each run against one with two.

    python tests/benchmarks/train_step.py --build build/cmake

needs torch, transformers and a build tree with the target `step_benchmark`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import step_models

THREADS = 2
VARIANTS = [(mode, compiled) for mode in ("documents", "buckets") for compiled in (False, True)]


class Side:
    """A process that makes one step for every line it gets."""

    def __init__(self, command: list[str | Path], threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")

    def step(self) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> int:
        """Peak resident bytes."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        peak = self._answer()["peak_bytes"]
        self.process.wait()
        return peak


@contextmanager
def running(command: list[str | Path], threads: int) -> Iterator[Side]:
    side = Side(command, threads)
    try:
        yield side
    finally:
        if side.process.poll() is None:
            side.process.kill()
        side.process.wait()


class Case:
    """A model and a set of documents on disk, and the commands of its sides."""

    def __init__(self, kind: str, mix: str, folder: Path, build: Path) -> None:
        self.model = folder / kind
        self.documents = folder / f"{mix}.jsonl"
        self.program = build / "tests" / "benchmarks" / "step_benchmark"
        self.lengths = step_models.LENGTHS[mix]
        if not self.model.exists():
            step_models.write_model(kind, self.model)
        lines = (json.dumps({"tokens": tokens}) for tokens in step_models.documents(mix))
        self.documents.write_text("\n".join(lines) + "\n")

    def meshloom(self, ranks: int = 1) -> list[str | Path]:
        command = [self.program, self.model, self.documents, str(THREADS // ranks)]
        if ranks == 1:
            return command
        options = ["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
        return ["mpirun", "-n", str(ranks), *options, *command]

    def transformers(self, mode: str, compiled: bool) -> list[str | Path]:
        worker = Path(step_models.__file__)
        return [sys.executable, worker, self.model, self.documents, mode, str(int(compiled))]

    def variants(self) -> list[tuple[str, bool]]:
        if len(self.lengths) > 1:
            return VARIANTS
        return [(mode, compiled) for mode, compiled in VARIANTS if mode == "documents"]


def compare(first: Side, second: Side, pairs: int, warm_up: int) -> dict:
    """Alternating steps; ratios are second / first: how much faster the first is."""
    for _ in range(warm_up):
        first.step()
        second.step()
    wall, cpu, rates = [], [], []
    a: dict = {}
    b: dict = {}
    for _ in range(pairs):
        a, b = first.step(), second.step()
        wall.append(b["seconds"] / a["seconds"])
        cpu.append(b["cpu_seconds"] / a["cpu_seconds"])
        rates.append((a["tokens"] / a["seconds"], a["tokens"] / b["seconds"]))
    return {
        "ratio": statistics.median(wall),
        "cpu_ratio": statistics.median(cpu),
        "ratios": [round(x, 3) for x in wall],
        "tokens_per_second": [round(statistics.median(side)) for side in zip(*rates)],
        "losses": [a["loss"], b["loss"]],
    }


def fastest_variant(case: Case, steps: int) -> tuple[tuple[str, bool], dict[str, float]]:
    seconds = {}
    for mode, compiled in case.variants():
        with running(case.transformers(mode, compiled), THREADS) as side:
            side.step()
            side.step()
            seconds[mode, compiled] = min(side.step()["cpu_seconds"] for _ in range(steps))
            side.close()
    best = min(seconds, key=lambda variant: seconds[variant])
    return best, {variant_name(*variant): seconds[variant] for variant in seconds}


def variant_name(mode: str, compiled: bool) -> str:
    return f"{mode}, {'compiled' if compiled else 'eager'}"


def against_transformers(case: Case, pairs: int, search: int) -> dict:
    best, seconds = fastest_variant(case, search)
    with (
        running(case.meshloom(), THREADS) as ours,
        running(case.transformers(*best), THREADS) as theirs,
    ):
        result = compare(ours, theirs, pairs, warm_up=2)
        peaks = ours.close(), theirs.close()
    return result | {
        "transformers": variant_name(*best),
        "variants_cpu_seconds": seconds,
        "peak_bytes": peaks,
        "memory_ratio": peaks[0] / peaks[1],
    }


def two_ranks(case: Case, pairs: int) -> dict:
    with running(case.meshloom(2), 1) as ranks, running(case.meshloom(), THREADS) as one:
        return compare(ranks, one, pairs, warm_up=2)


def table(results: dict[str, dict]) -> str:
    lines = [
        "| case | against | tokens/s | ratio (median) | of CPU time | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        ours, theirs = result["tokens_per_second"]
        memory = cpu = ""  # the CPU time of two ranks is rank 0's alone
        if "peak_bytes" in result:
            a, b = (peak / 2**20 for peak in result["peak_bytes"])
            cpu = f"{result['cpu_ratio']:.2f}"
            memory = f"{a:.0f} / {b:.0f} MiB = {result['memory_ratio']:.2f}"
        against = result.get("transformers", "one process, two threads")
        lines.append(
            f"| {name} | {against} | {ours} / {theirs} | {result['ratio']:.2f} "
            f"| {cpu} | {memory} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=Path("build/cmake"))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--search", type=int, default=2, help="steps to pick a variant by")
    parser.add_argument("--cases", nargs="*", default=["moe-mixed", "dense-mixed", "moe-long",
                                                       "dense-long", "ranks"])
    parser.add_argument("--json", type=Path, help="where to write all figures")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in arguments.cases:
            if case == "ranks":
                if shutil.which("mpirun") is None:
                    raise SystemExit("the case `ranks` needs mpirun")
                moe = Case("moe", "mixed", folder, arguments.build)
                results["moe-mixed, two ranks"] = two_ranks(moe, arguments.pairs)
            else:
                kind, mix = case.split("-")
                built = Case(kind, mix, folder, arguments.build)
                results[case] = against_transformers(built, arguments.pairs, arguments.search)
            print(f"{case} done", file=sys.stderr, flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
