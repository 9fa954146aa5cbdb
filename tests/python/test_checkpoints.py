"""Checkpoint folders and configs against transformers and the safetensors package, both ways."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
import transformers_oracle as oracle
from parity_cases import CASES, reference_program, settings_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM


def run(*arguments) -> str:
    command = [str(a) for a in (reference_program(), *arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- files --------------------------------------------------------------------------------------

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]


def assorted() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t.{dtype}": (torch.randn(3, 5, generator=generator) * 3).to(dtype) for dtype in DTYPES
    }
    tensors["scalar"] = torch.tensor(2.5, dtype=torch.float64)
    tensors["nothing"] = torch.empty(0, 7)
    tensors["nan and inf"] = torch.tensor([float("nan"), float("inf"), -0.0])
    tensors['näme "quoted" \\ 字'] = torch.ones(1)
    return tensors


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_files_go_through_us_to_the_safetensors_package_and_back(tmp_path):
    tensors = assorted()
    metadata = {"format": "pt", "note": "näher \"so\""}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata=metadata)
    run("copy", tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors")
    back = load_file(tmp_path / "ours.safetensors")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape, name
        assert as_bytes(back[name]) == as_bytes(tensor), name
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == metadata


def test_files_without_tensors_or_metadata(tmp_path):
    save_file({}, tmp_path / "theirs.safetensors")
    run("copy", tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors")
    assert load_file(tmp_path / "ours.safetensors") == {}


# --- folders ------------------------------------------------------------------------------------

# The models of the parity test that differ in what a folder holds.
FOLDERS = [
    "llama_biases", "llama_tied", "llama_rope_llama3", "llama_rope_yarn_scales", "mistral",
    "qwen2_windows", "qwen3_windows", "mixtral", "qwen3_moe_dense_layers",
    "qwen3_moe_tied_biased_windowed", "deepseek_v3", "deepseek_v3_plain_queries",
    "deepseek_v3_biased_yarn",
]


def assert_same_model(folder, model) -> None:
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True
    )
    assert not any(report.values()), report
    state = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name].to(tensor.dtype), tensor), name
    tokens = torch.arange(40)[None] % model.config.vocab_size
    with torch.no_grad(), oracle.everything_fp64():
        # The same weights in the same model; and the config says the same.
        loaded.config._experts_implementation = "eager"
        oracle._refresh_rotary(loaded)
        oracle._refresh_rotary(model)
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
@pytest.mark.parametrize("case", FOLDERS)
def test_transformers_opens_what_we_save(case, shard_bytes, tmp_path):
    family, settings = settings_of(case)
    model = oracle.make_model(family, **settings)
    # Ours reads transformers' folder whole when it writes shards, and the other way round.
    theirs = "20KB" if shard_bytes == 1 << 30 else "1GB"
    model.save_pretrained(tmp_path / "theirs", max_shard_size=theirs)
    run("save", tmp_path / "theirs", tmp_path / "ours", "float64", shard_bytes)
    for folder, sharded in (("theirs", theirs == "20KB"), ("ours", theirs == "1GB")):
        index = tmp_path / folder / "model.safetensors.index.json"
        assert index.exists() == sharded, f"{folder}: the test would prove nothing"
    assert_same_model(tmp_path / "ours", model)


# --- configs ------------------------------------------------------------------------------------

# As many heads as the defaults of some families have key-value heads.
SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=3, num_attention_heads=32
)
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "deepseek_v3"]
# Not ours to keep: what transformers says of itself, and keys that change no training step.
IGNORED = {
    "_name_or_path", "architectures", "dtype", "transformers_version", "pretraining_tp",
    "max_window_layers",  # layer_types says it
    "decoder_sparse_step", "mlp_only_layers",  # compared as layers below
    "num_nextn_predict_layers",  # no part of the model, and not saved with it
}


def layers_with_experts(config: dict) -> list[int]:
    step = config.get("decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers") or []
    return [
        i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0
    ]


def assert_same_config(original: dict, ours: dict) -> None:
    for key, value in original.items():
        if key in IGNORED:
            continue
        if key == "head_dim" and value is None:
            value = original["hidden_size"] // original["num_attention_heads"]
        if key == "rope_parameters" and value["rope_type"] == "yarn":
            value = {"beta_fast": 32.0, "beta_slow": 1.0} | value  # its defaults, spelled out
        assert ours.get(key) == value, f"{key}: {ours.get(key)} for {value}"
    assert layers_with_experts(ours) == layers_with_experts(original)


def through_us(config: dict, folder) -> dict:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "ours").mkdir()
    (folder / "ours" / "config.json").write_text(run("config", folder / "config.json"))
    return AutoConfig.from_pretrained(folder / "ours").to_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_transformers(family, tmp_path):
    """A config that leaves out what may be left out, and one that spells everything out."""
    # Latent attention has a key for each head; transformers' default is of the whole model.
    sizes = SIZES | ({"num_attention_heads": 128} if family == "deepseek_v3" else {})
    full = AutoConfig.for_model(family, **sizes).to_dict()
    required = {
        "mixtral": ["num_local_experts", "num_experts_per_tok"],
        "qwen3_moe": ["num_local_experts", "num_experts_per_tok", "moe_intermediate_size"],
        "deepseek_v3": ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"],
    }
    sparse = {"model_type": family} | sizes | {k: full[k] for k in required.get(family, [])}
    # Ours carries no default for what no step depends on.
    for name, config in (("full", full), ("sparse", sparse)):
        ours = through_us(config, tmp_path / name)
        expected = dict(full)
        if name == "sparse":
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                expected.pop(key, None)
                ours.pop(key, None)
        assert_same_config(expected, ours)


@pytest.mark.parametrize("case", CASES)
def test_every_parity_case_keeps_its_config(case, tmp_path):
    family, settings = settings_of(case)
    full = AutoConfig.for_model(family, **settings).to_dict()
    assert_same_config(full, through_us(full, tmp_path / "full"))
