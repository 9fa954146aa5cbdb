"""Small models of every supported family and feature, and the program that runs ours."""

from __future__ import annotations

import os
from pathlib import Path

VOCABULARY = 67  # odd sizes throughout: nothing may lean on multiples of a vector

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
    # Of the wavelengths 6, 40, 250, ... the first is kept, the second blended, all others stretched.
    "original_max_position_embeddings": 100,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
MOE = dict(moe_intermediate_size=11, num_experts=5, num_experts_per_tok=2)

DEEPSEEK = dict(
    num_hidden_layers=3,
    first_k_dense_replace=1,
    moe_intermediate_size=11,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    q_lora_rank=10,
    kv_lora_rank=14,
    qk_nope_head_dim=7,
    qk_rope_head_dim=6,
    v_head_dim=9,
)

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
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "deepseek_v3_plain_queries": (
        "deepseek_v3",
        DEEPSEEK | dict(
            q_lora_rank=None, rope_interleave=False, n_shared_experts=2, norm_topk_prob=False,
        ),
    ),
    "deepseek_v3_biased_yarn": (
        "deepseek_v3",
        DEEPSEEK | dict(
            num_hidden_layers=2, first_k_dense_replace=0, attention_bias=True, n_group=1,
            num_experts_per_tok=5,
            topk_group=1, routed_scaling_factor=0.7, tie_word_embeddings=True,
            rope_parameters=YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 1.3},
        ),
    ),
}


def reference_program() -> Path:
    default = Path(__file__).parents[2] / "build" / "cmake"  # as in conftest.py
    build = Path(os.environ.get("MESHLOOM_BUILD_DIR", default))
    return build / "tests" / "unit" / "model" / "model_reference"


def settings_of(case: str) -> tuple[str, dict]:
    family, settings = CASES[case]
    settings = BASE | settings
    if family == "qwen2":
        del settings["head_dim"]  # transformers' Qwen2 knows none
    if family == "deepseek_v3":
        del settings["head_dim"], settings["num_key_value_heads"]  # a key for each head
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    return family, settings
