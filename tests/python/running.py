"""Running the command line and other programs against the build tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 180.0  # seconds; nothing here takes ten uncontended

MPIRUN = ["mpirun", "--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]

# A model that trains in milliseconds; odd sizes, so that nothing leans on round ones.
MODEL = {
    "model_type": "qwen3_moe",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "moe_intermediate_size": 12,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


def environment(build: Path, **variables: str) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(build / "python"),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
    } | variables


def run(
    build: Path, command: Sequence[object], *, good: bool = True, cwd: Path | None = None,
    limit: float = LIMIT, **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Runs a program; `good`: it must succeed, else it must fail."""
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment(build, **variables),
        capture_output=True, text=True, check=False, timeout=limit,
    )
    assert (result.returncode == 0) == good, (
        f"{command} ended with {result.returncode}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    )
    return result


def meshloom(
    build: Path, *arguments: object, good: bool = True, **settings: Any
) -> subprocess.CompletedProcess[str]:
    return run(build, [sys.executable, "-m", "meshloom", *arguments], good=good, **settings)


def write_config(path: Path, **changes: Any) -> Path:
    """A YAML config (JSON is YAML) of a tiny run on `<folder>/corpus.jsonl`."""
    config: dict[str, Any] = {
        "run": str(path.parent / "run"),
        "seed": 3,
        "steps": 4,
        "dtype": "float64",
        "global_batch_tokens": 200,
        "model": {"config": MODEL},
        "data": {
            "paths": [str(path.parent / "corpus.jsonl")],
            "vocab_size": 300,
            "max_document_tokens": 120,
        },
        "cost": {"quadratic": 1e-6, "linear": 1e-4, "fixed": 1e-3, "exchange": 0.0},
    }
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            config[key] = config[key] | value
        else:
            config[key] = value
    path.write_text(json.dumps(config, indent=1))
    return path


def write_corpus(path: Path, count: int = 60) -> Path:
    """Texts of 10 to 1,000 characters; enough for a tokenizer of 300 pieces."""
    words = "the mesh follows data long short sample rank plan ring token expert layer".split()
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            size = 2 + (index * index * 7) % 170
            text = " ".join(words[(index * 5 + 3 * j + j * j) % len(words)] for j in range(size))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def losses(run_folder: Path) -> list[float]:
    return [entry["loss"] for entry in metrics(run_folder)]
