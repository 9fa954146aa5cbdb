"""Transformers models, unmodified, under plans: gradients are those of one process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import running
import torch
import transformers_oracle as oracle
from running import MPIRUN, run
from safetensors.torch import load_file

# fp64 sums in another order
TOLERANCE = 1e-9
VOCABULARY = 53
LENGTHS = [1, 3, 127, 31, 2, 53, 128, 17]

BASE = dict(
    vocab_size=VOCABULARY, hidden_size=24, intermediate_size=37, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, head_dim=10,
)
FAMILIES = {
    "llama": ("llama", {}),
    "windows": ("mistral", dict(sliding_window=23)),
    "moe": ("qwen3_moe", dict(moe_intermediate_size=11, num_experts=5, num_experts_per_tok=2)),
    # a family that Meshloom's own models do not have
    "olmo2": ("olmo2", {}),
}

PROGRAM = """
import json, sys, threading, torch
sys.path.insert(0, {tests!r})
import transformers_oracle as oracle
import meshloom as ml
from meshloom.integrations import transformers
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file

torch.set_num_threads(1)
transformers.register()
documents = [json.loads(line) for line in open({documents!r})]

loading = threading.Lock()  # transformers changes torch's default dtype while it loads

def rank(world):
    with loading:
        model = AutoModelForCausalLM.from_pretrained(
            {model!r}, attn_implementation="meshloom", experts_implementation="eager", dtype=torch.float64
        )
        oracle._refresh_rotary(model)
    world.barrier().wait()
    session = ml.PlanSession(world, capacity_tokens=-(-128 // world.size), strategy={strategy!r})
    loss = torch.zeros((), dtype=torch.float64)
    for unit in session.plan(documents):
        part = unit.weighted_loss(model(**unit.inputs).logits)
        part.backward()
        loss += part.detach()
    session.sync_gradients(model.parameters())
    world.all_reduce_(loss).wait()
    if world.rank == 0:
        names = {{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}
        save_file(names | {{"loss": loss}}, {out!r})

with oracle.everything_fp64():
    if {threads}:
        ml.run_thread_ranks({threads}, rank)
    else:
        rank(ml.make_world())
"""


def check(
    build: Path, tmp_path: Path, family: str, strategy: str, launch: list[object], threads: int,
    lengths: Sequence[int] = LENGTHS,
) -> None:
    model_type, settings = FAMILIES[family]
    settings = BASE | settings
    if model_type == "olmo2":
        settings.pop("head_dim")
    model = oracle.make_model(model_type, **settings)
    model.save_pretrained(tmp_path / "model")
    documents = oracle.random_documents(lengths, VOCABULARY)
    oracle.write_documents(tmp_path / "documents.jsonl", documents)
    loss, model = oracle.gradients(model, documents)
    out = tmp_path / "out.safetensors"
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(
        tests=str(Path(__file__).parent), documents=str(tmp_path / "documents.jsonl"),
        model=str(tmp_path / "model"), strategy=strategy, out=str(out), threads=threads,
    ))
    run(build, [*launch, sys.executable, script])
    mine = load_file(out)
    assert mine.pop("loss").item() == pytest.approx(loss, rel=TOLERANCE)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(mine) == set(expected)
    for name, gradient in expected.items():
        error = (mine[name] - gradient).abs().max().item()
        assert error <= TOLERANCE * gradient.abs().max().item(), f"{name}: {error}"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_one_process(build_dir: Path, tmp_path: Path, family: str) -> None:
    check(build_dir, tmp_path, family, "balanced", [], 3)


def test_shares_without_a_token(build_dir: Path, tmp_path: Path) -> None:
    """`static` cuts the unit of the two-token document over three ranks."""
    check(build_dir, tmp_path, "moe", "static", [], 3, [128, 2, 128])


def test_processes(build_dir: Path, tmp_path: Path) -> None:
    check(build_dir, tmp_path, "llama", "naive_hdp", [*MPIRUN, "-n", 2], 0)


def test_example(build_dir: Path, tmp_path: Path) -> None:
    model = oracle.make_model("llama", **BASE).float()
    model.save_pretrained(tmp_path / "model")
    oracle.write_documents(tmp_path / "d.jsonl", oracle.random_documents(LENGTHS, VOCABULARY))
    script = running.ROOT / "examples/02_transformers_model/train.py"
    losses = []
    for launch in ([], [*MPIRUN, "-n", 3]):
        result = run(build_dir, [*launch, sys.executable, script, tmp_path / "model", tmp_path / "d.jsonl"])
        losses.append([float(line.split()[-1]) for line in result.stdout.splitlines() if line.startswith("step")])
    assert len(losses[0]) == 5 and losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)  # fp32 sums in another order, five updates


def test_misuse_is_named(build_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "misuse.py"
    script.write_text("""
import torch, meshloom as ml
from meshloom.integrations import transformers
from transformers import AutoConfig, AutoModelForCausalLM
transformers.register()
config = AutoConfig.for_model("llama", vocab_size=20, hidden_size=16, intermediate_size=16,
                              num_hidden_layers=1, num_attention_heads=2)
config._attn_implementation = "meshloom"
model = AutoModelForCausalLM.from_config(config)
def expect(kind, words, body):
    try:
        body()
    except kind as error:
        assert words in str(error), error
    else:
        raise SystemExit("nothing was raised: " + words)
expect(ml.InvalidArgument, "unit.inputs", lambda: model(torch.tensor([[1, 2, 3]])))
world = ml.make_world()
session = ml.PlanSession(world, capacity_tokens=4)
expect(ml.InvalidArgument, "target", lambda: session.plan([[1], [2]]))
expect(ml.InvalidArgument, "5", lambda: list(session.plan([[1, 2, 3, 4, 5]])))
unit = next(session.plan([[1, 2, 3]]))
expect(ml.InvalidArgument, "expected [T, heads, head_dim] with T = 3",
       lambda: ml.attention(torch.zeros(2, 1, 4), torch.zeros(2, 1, 4), torch.zeros(2, 1, 4), unit=unit))
def other(world):
    expect(ml.PlanError, "ranks [1]",
           lambda: ml.PlanSession(world, capacity_tokens=9).plan([[1, 2, 3] + [4] * world.rank]))
ml.run_thread_ranks(2, other)
""")
    run(build_dir, [sys.executable, script])


