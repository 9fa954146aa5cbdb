"""Loss and every gradient against transformers in fp64, for every supported family."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers_oracle as oracle
from safetensors.torch import load_file

# Both sides sum in fp64 in different orders; a wrong term is off by far more.
TOLERANCE = 1e-9

VOCABULARY = 67  # odd sizes throughout: nothing may lean on multiples of a vector
LENGTHS = [1, 2, 13, 29, 47]

BASE = dict(
    vocab_size=VOCABULARY,
    hidden_size=24,
    intermediate_size=37,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
MOE = dict(moe_intermediate_size=11, num_experts=5, num_experts_per_tok=2)

CASES = {
    "llama": ("llama", {}),
    "llama_heads_of_their_own": ("llama", dict(num_key_value_heads=6)),
    "llama_biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama_tied": ("llama", dict(tie_word_embeddings=True)),
    "llama_rope_linear": (
        "llama",
        dict(rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}),
    ),
    "llama_rope_llama3": ("llama", dict(rope_parameters=LLAMA3_ROPE)),
    "llama_rope_yarn": ("llama", dict(rope_parameters=YARN_ROPE)),
    "llama_rope_yarn_scales": (
        "llama",
        dict(rope_parameters=YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}),
    ),
    "llama_rope_yarn_factor": ("llama", dict(rope_parameters=YARN_ROPE | {"attention_factor": 0.8})),
    "mistral": ("mistral", dict(sliding_window=7)),
    "mistral_whole": ("mistral", dict(sliding_window=None)),
    "qwen2": ("qwen2", {}),
    "qwen2_windows": (
        "qwen2",
        dict(
            num_hidden_layers=3, use_sliding_window=True, sliding_window=5, max_window_layers=1,
            tie_word_embeddings=True,
        ),
    ),
    "qwen3": ("qwen3", {}),
    "qwen3_windows": (
        "qwen3",
        dict(
            attention_bias=True, use_sliding_window=True, sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "mixtral": ("mixtral", dict(num_local_experts=5, num_experts_per_tok=2)),
    "mixtral_windows": (
        "mixtral",
        dict(num_local_experts=3, num_experts_per_tok=3, sliding_window=6),
    ),
    "qwen3_moe": ("qwen3_moe", MOE | dict(norm_topk_prob=True)),
    "qwen3_moe_raw_weights": ("qwen3_moe", MOE | dict(norm_topk_prob=False)),
    "qwen3_moe_top_one": ("qwen3_moe", MOE | dict(num_experts_per_tok=1, norm_topk_prob=True)),
    "qwen3_moe_dense_layers": (
        "qwen3_moe",
        MOE | dict(num_hidden_layers=4, mlp_only_layers=[0], decoder_sparse_step=2),
    ),
    "qwen3_moe_tied_biased_windowed": (
        "qwen3_moe",
        MOE | dict(
            attention_bias=True, tie_word_embeddings=True, use_sliding_window=True,
            sliding_window=5, rope_parameters=YARN_ROPE,
        ),
    ),
}
BALANCED = ["mixtral", "qwen3_moe", "qwen3_moe_dense_layers"]


def reference_program() -> Path:
    build = Path(os.environ["MESHLOOM_BUILD_DIR"])
    return build / "tests" / "unit" / "model" / "model_reference"


def settings_of(case: str) -> tuple[str, dict]:
    family, settings = CASES[case]
    settings = BASE | settings
    if family == "qwen2":
        del settings["head_dim"]  # transformers' Qwen2 knows none
    return family, settings


def ours(folder: Path, documents: list[dict], out: Path, **options) -> dict[str, torch.Tensor]:
    sequences = out.with_suffix(".jsonl")
    oracle.write_documents(sequences, documents)
    flags = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    command = [reference_program(), folder, sequences, out, *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return load_file(out)


def compare(model, loss: float, mine: dict[str, torch.Tensor], folder: Path) -> None:
    assert mine.pop("loss").item() == pytest.approx(loss, rel=TOLERANCE, abs=0)
    expected = oracle.checkpoint_gradients(model, folder)
    assert set(mine) == set(expected)
    for name, gradient in expected.items():
        assert mine[name].shape == gradient.shape, name
        scale = gradient.abs().max().item()
        assert scale > 0 or name.endswith("k_proj.bias"), f"{name}: the oracle's gradient is zero"
        error = (mine[name] - gradient).abs().max().item()
        assert error <= TOLERANCE * max(scale, 1e-3), f"{name}: {error / max(scale, 1e-300)}"


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_transformers(case, tmp_path):
    family, settings = settings_of(case)
    model = oracle.make_model(family, **settings)
    model.save_pretrained(tmp_path / "model")
    documents = oracle.random_documents(LENGTHS, VOCABULARY)
    loss, model = oracle.gradients(model, documents)
    mine = ours(tmp_path / "model", documents, tmp_path / "ours.safetensors")
    compare(model, loss, mine, tmp_path / "gradients")


@pytest.mark.parametrize("case", BALANCED)
def test_balance_and_z_loss_are_transformers(case, tmp_path):
    family, settings = settings_of(case)
    model = oracle.make_model(family, **settings)
    model.save_pretrained(tmp_path / "model")
    documents = oracle.random_documents(LENGTHS, VOCABULARY)
    weights = {"balance": 0.3, "z_loss": 0.02}  # large enough that a slip shows
    loss, model = oracle.gradients(model, documents, **weights)
    mine = ours(
        tmp_path / "model", documents, tmp_path / "ours.safetensors",
        balance=weights["balance"], **{"z-loss": weights["z_loss"]},
    )
    compare(model, loss, mine, tmp_path / "gradients")


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_fused_checkpoints_are_read_and_answered_in_kind(case, tmp_path):
    family, settings = settings_of(case)
    model = oracle.make_model(family, **settings)
    model.save_pretrained(tmp_path / "hub")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    documents = oracle.random_documents([9, 17], VOCABULARY)
    hub = ours(tmp_path / "hub", documents, tmp_path / "hub.safetensors")
    fused = ours(tmp_path / "fused", documents, tmp_path / "fused.safetensors")
    stored = load_file(tmp_path / "fused" / "model.safetensors")
    assert {name: t.shape for name, t in stored.items()} == {
        name: t.shape for name, t in fused.items() if name != "loss"
    }
    assert fused["loss"] == hub["loss"]
    inner = fused["model.layers.1.mlp.experts.gate_up_proj"].shape[1] // 2
    up = "block_sparse_moe.experts.3.w3" if case == "mixtral" else "mlp.experts.3.up_proj"
    hub_up = "model.layers.1." + up.replace(".3.", ".2.") + ".weight"
    assert torch.equal(
        fused["model.layers.1.mlp.experts.gate_up_proj"][2, inner:], hub[hub_up]
    )
