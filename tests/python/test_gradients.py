"""`meshloom gradients` under layouts, strategies, plans and launchers against transformers in fp64."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import running
import transformers_oracle as oracle
from running import MPIRUN, meshloom, run
from safetensors import safe_open
from safetensors.torch import load_file

# fp64 sums in another order; a wrong term is off by far more. Of each tensor's largest element.
TOLERANCE = 1e-9

VOCABULARY = 61
# one token, primes, shorter than the rank count, and one that fills four ranks of 32 tokens
LENGTHS = [1, 3, 127, 31, 2, 53, 128, 17]
CAPACITY = 32


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A model folder, its documents, and what transformers says."""
    folder = tmp_path_factory.mktemp("gradients")
    settings = dict(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=37,
        num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=10,
        moe_intermediate_size=11, num_experts=5, num_experts_per_tok=2, norm_topk_prob=True,
        router_aux_loss_coef=0.3,
    )
    model = oracle.make_model("qwen3_moe", **settings)
    model.save_pretrained(folder / "model")
    documents = oracle.random_documents(LENGTHS, VOCABULARY)
    oracle.write_documents(folder / "documents.jsonl", documents)
    loss, model = oracle.gradients(model, documents)
    plain = oracle.checkpoint_gradients(model, folder / "plain")
    balanced_loss, model = oracle.gradients(
        oracle.make_model("qwen3_moe", **settings), documents, balance=0.3
    )
    balanced = oracle.checkpoint_gradients(model, folder / "balanced")
    return {"folder": folder, "plain": (loss, plain), "balanced": (balanced_loss, balanced)}


def check(dump: Path, case: dict, which: str = "plain") -> None:
    mine = load_file(dump)
    loss, expected = case[which]
    assert mine.pop("loss").item() == pytest.approx(loss, rel=TOLERANCE)
    with safe_open(case["folder"] / "model/model.safetensors", "pt") as stored:
        assert set(mine) == set(stored.keys())
    for name, gradient in expected.items():
        error = (mine[name] - gradient).abs().max().item()
        assert mine[name].shape == gradient.shape, name
        assert error <= TOLERANCE * gradient.abs().max().item(), f"{name}: {error}"


def arguments(case: dict, dump: Path) -> list[object]:
    folder = case["folder"]
    return ["gradients", "--model", folder / "model", "--sequences", folder / "documents.jsonl",
            "--dtype", "float64", "--dump", dump]


@pytest.mark.parametrize("strategy", ["static", "naive_hdp", "balanced", "bytescale"])
def test_strategies_on_threads(build_dir: Path, case: dict, tmp_path: Path, strategy: str) -> None:
    dump = tmp_path / "out.safetensors"
    result = meshloom(build_dir, *arguments(case, dump), "--layout", "hdp=4", "--strategy", strategy,
                      "--capacity-tokens", CAPACITY)
    assert "loss" in result.stdout
    check(dump, case)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7, 8])
def test_rank_counts(build_dir: Path, case: dict, tmp_path: Path, ranks: int) -> None:
    dump = tmp_path / "out.safetensors"
    meshloom(build_dir, *arguments(case, dump), "--hdp", ranks, "--capacity", -(-128 // ranks))
    check(dump, case)


def test_processes_and_the_balance_loss(build_dir: Path, case: dict, tmp_path: Path) -> None:
    dump = tmp_path / "out.safetensors"
    result = run(build_dir, [*MPIRUN, "-n", 4, sys.executable, "-m", "meshloom",
                             *arguments(case, dump), "--hdp", 4, "--aux-loss", "--json"])
    assert json.loads(result.stdout)["layout"] == "hdp=4"
    check(dump, case, "balanced")


@pytest.mark.parametrize("exchange", ["ring", "all_gather", "ulysses", "ring_ulysses"])
def test_given_plan(build_dir: Path, case: dict, tmp_path: Path, exchange: str) -> None:
    """A plan written by `meshloom plan`, changed by hand: other ranks, order and exchange."""
    lengths = tmp_path / "lengths.jsonl"
    lengths.write_text((case["folder"] / "documents.jsonl").read_text())
    plan = tmp_path / "plan.json"
    meshloom(build_dir, "plan", "--lengths", lengths, "--hdp", 4, "--capacity", CAPACITY, "--out", plan)
    tree = json.loads(plan.read_text())
    tree["slots"].reverse()
    for slot in tree["slots"]:
        for unit in slot["units"]:
            unit["ranks"] = [3 - rank for rank in unit["ranks"]]
            if len(unit["ranks"]) > 1:
                unit["exchange"] = exchange
                if exchange == "ring_ulysses":
                    unit["ulysses_degree"] = next(u for u in (2, 3, 1) if len(unit["ranks"]) % u == 0)
    plan.write_text(json.dumps(tree))
    dump = tmp_path / "out.safetensors"
    meshloom(build_dir, *arguments(case, dump), "--plan", plan)
    check(dump, case)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("twice", ["sample"]),
        ("overlap", ["rank"]),
        ("capacity", ["capacity"]),
        ("denominator", ["sample 2", "127 of them targets", "126"]),
        ("other_documents", ["sample"]),
    ],
)
def test_tampered_plan_is_refused(
    build_dir: Path, case: dict, tmp_path: Path, change: str, words: list[str]
) -> None:
    plan = tmp_path / "plan.json"
    meshloom(build_dir, "plan", "--lengths", case["folder"] / "documents.jsonl", "--hdp", 4,
             "--capacity", CAPACITY, "--out", plan)
    tree = json.loads(plan.read_text())
    units = [unit for slot in tree["slots"] for unit in slot["units"]]
    if change == "twice":
        units[-1]["samples"].append(units[0]["samples"][0])
    elif change == "overlap":
        tree["slots"][0]["units"] = [unit | {"ranks": [0, 1, 2, 3]} for unit in units[:2]]
    elif change == "capacity":
        tree["capacity_tokens"] = 8
    elif change == "denominator":
        tree["samples"][2]["loss_tokens"] += 1
    else:
        tree["samples"][2]["tokens"] -= 1
        tree["samples"][2]["loss_tokens"] = 1
    plan.write_text(json.dumps(tree))
    dump = tmp_path / "out.safetensors"
    result = meshloom(build_dir, *arguments(case, dump), "--plan", plan, good=False)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert all(word in result.stderr for word in words), result.stderr
    assert not dump.exists()


def test_own_strategy(build_dir: Path, case: dict, tmp_path: Path) -> None:
    dump = tmp_path / "out.safetensors"
    name = f"{running.ROOT}/examples/extend_balance_strategy/longest_first.py:LongestFirst"
    meshloom(build_dir, *arguments(case, dump), "--hdp", 4, "--strategy", name, "--capacity", CAPACITY)
    check(dump, case)
