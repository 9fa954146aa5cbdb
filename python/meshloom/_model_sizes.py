"""Sizes of a model, from its `config.json`: what time, traffic and memory depend on."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

from meshloom import _plan
from meshloom._errors import DataError, NotSupported

# model_type -> (K/V heads, size of a head) where the file does not say; 0: what other sizes imply.
_FAMILIES = {
    "llama": (0, 0),
    "mistral": (8, 0),
    "qwen2": (32, 0),
    "qwen3": (32, 128),
    "mixtral": (8, 0),
    "qwen3_moe": (4, 0),
    "deepseek_v3": (0, 0),
}
_MOE_FAMILIES = ("mixtral", "qwen3_moe")
_WHERE = "[autotune.model]"
_ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Sizes of a decoder model, as far as time and memory depend on them."""

    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate: int
    """Of a dense feed-forward layer."""
    vocabulary: int
    moe_layers: tuple[bool, ...]
    """Of every layer: whether it is a mixture of experts."""
    expert_intermediate: int = 0
    experts: int = 0
    experts_per_token: int = 0
    shared_intermediate: int = 0
    """Of the experts of a mixture that every token meets, together."""
    correction_bias: bool = False
    """Of routers, a number an expert."""
    kv_lora_rank: int = 0
    """Of latent attention; 0: keys and values are projected."""
    q_lora_rank: int = 0
    rope_dim: int = 0
    """Of head_dim, with latent attention: the part of keys that all heads share."""
    value_dim: int = 0
    """Size of a head's values with latent attention; otherwise head_dim."""
    tied_embeddings: bool = False
    dtype: str = "bfloat16"

    @property
    def layers(self) -> int:
        return len(self.moe_layers)

    @property
    def element_bytes(self) -> int:
        """Of a parameter or an activation."""
        return _ELEMENT_BYTES[self.dtype]

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and as many of a head of its own."""
        return self.vocabulary * self.hidden

    def attention(self, tp: int = 1) -> int:
        """Parameters of one layer's attention on one of `tp` tensor ranks."""
        if self.kv_lora_rank:
            heads, queries = self.heads // tp, self.q_lora_rank or self.hidden
            down = self.hidden * (self.q_lora_rank + self.kv_lora_rank + self.rope_dim)
            up = self.head_dim * queries + (self.head_dim - self.rope_dim + self.value_dim) * self.kv_lora_rank
            norms = self.q_lora_rank + self.kv_lora_rank
            return down + norms + heads * (up + self.value_dim * self.hidden)
        heads = self.heads // tp + max(self.key_value_heads // tp, 1)
        return 2 * self.hidden * heads * self.head_dim

    def feed_forward(self, layer: int, tp: int = 1) -> int:
        """Parameters of a layer's dense feed-forward, or of its router and shared experts, on one
        tensor rank."""
        if self.moe_layers[layer]:
            bias = self.experts if self.correction_bias else 0
            return self.experts * self.hidden + bias + 3 * self.hidden * self.shared_intermediate // tp
        return 3 * self.hidden * self.intermediate // tp

    def layer_experts(self, layer: int) -> int:
        """Parameters of all experts of a layer."""
        one = 3 * self.hidden * self.expert_intermediate
        return self.experts * one if self.moe_layers[layer] else 0

    @functools.cached_property
    def parameters(self) -> int:
        """Of the whole model."""
        result = self.embedding * (1 if self.tied_embeddings else 2) + self.hidden
        for layer in range(self.layers):
            result += self.attention() + self.feed_forward(layer) + self.layer_experts(layer)
        return result + 2 * self.hidden * self.layers

    @functools.cached_property
    def active_parameters(self) -> int:
        """Parameters that a token is multiplied with: without other experts and the look-up."""
        unused = self.experts - self.experts_per_token
        inactive = sum(self.moe_layers) * unused * 3 * self.hidden * self.expert_intermediate
        return self.parameters - inactive - (0 if self.tied_embeddings else self.embedding)

    @property
    def pair_work(self) -> int:
        """Multiplications of one causal token pair in forward, halved as the causal mask does."""
        return self.layers * self.heads * (self.head_dim + (self.value_dim or self.head_dim)) // 2

    def chosen_intermediate(self, layer: int) -> int:
        """Width of what a token meets in a layer's feed-forward."""
        if self.moe_layers[layer]:
            return self.experts_per_token * self.expert_intermediate + self.shared_intermediate
        return self.intermediate

    def gate_and_up(self) -> int:
        """Parameters that selective recomputation multiplies a token with once more."""
        return sum(2 * self.hidden * self.chosen_intermediate(i) for i in range(self.layers))

    @functools.cached_property
    def forecast_sizes(self) -> _plan.ModelSizes:
        """The same for memory forecasts."""
        result = _plan.ModelSizes()
        result.hidden, result.vocabulary = self.hidden, self.vocabulary
        result.heads, result.key_value_heads = self.heads, self.key_value_heads
        result.head_dim, result.intermediate = self.head_dim, self.intermediate
        result.moe_layers = list(self.moe_layers)
        result.experts, result.experts_per_token = self.experts, self.experts_per_token
        result.expert_intermediate = self.expert_intermediate
        result.shared_intermediate, result.correction_bias = self.shared_intermediate, self.correction_bias
        result.kv_lora_rank, result.q_lora_rank = self.kv_lora_rank, self.q_lora_rank
        result.rope_dim, result.value_dim = self.rope_dim, self.value_dim
        result.tied_embeddings = self.tied_embeddings
        return result


class _Fields:
    def __init__(self, root: dict[str, Any], name: str) -> None:
        self._root = root
        self._name = name

    def is_null(self, key: str) -> bool:
        return key in self._root and self._root[key] is None

    def size(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self._root.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            shown = "missing" if value is None else json.dumps(value)
            expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise DataError(f"{_WHERE} {self._name}: {key} is {shown}, expected {expected}")
        return value


def _latent_sizes(fields: _Fields, expert_intermediate: int) -> dict[str, Any]:
    """Of latent attention and what comes with it, with DeepSeek-V3's defaults."""
    return {
        "kv_lora_rank": fields.size("kv_lora_rank", 512),
        "q_lora_rank": 0 if fields.is_null("q_lora_rank") else fields.size("q_lora_rank", 1536),
        "rope_dim": fields.size("qk_rope_head_dim", 64),
        "value_dim": fields.size("v_head_dim", 128),
        "shared_intermediate": fields.size("n_shared_experts", 1) * expert_intermediate,
        "correction_bias": True,
    }


def read_model(
    model: str | os.PathLike[str] | dict[str, Any], dtype: str = "bfloat16"
) -> ModelSizes:
    """Sizes from a Hugging Face `config.json`: its path, its folder or its contents.

    Raises DataError for a file that is none, and NotSupported for a model type that is not built.
    """
    if isinstance(model, dict):
        root, name = model, "config"
    else:
        path = Path(model)
        path = path / "config.json" if path.is_dir() else path
        name = str(path)
        try:
            root = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{_WHERE} {name} is not JSON: {error}") from None
        if not isinstance(root, dict):
            raise DataError(f"{_WHERE} {name} is not a JSON object")
    kind = root.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise NotSupported(
            f"{_WHERE} {name}: model_type is {json.dumps(kind)}; known: {', '.join(_FAMILIES)}"
        )
    if dtype not in _ELEMENT_BYTES:
        known = ", ".join(_ELEMENT_BYTES)
        raise DataError(f"{_WHERE} dtype is {dtype!r}, expected one of: {known}")
    fields = _Fields(root, name)
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    key_value_heads, head_dim = _FAMILIES[kind]
    # Absent takes the family's default, null one per head, as transformers does.
    if "num_key_value_heads" in root:
        key_value_heads = 0
    if "head_dim" in root:
        head_dim = 0
    layers = fields.size("num_hidden_layers")
    moe_layers = [False] * layers
    experts = expert_intermediate = experts_per_token = 0
    latent: dict[str, Any] = {}
    if kind == "deepseek_v3":
        experts = fields.size("n_routed_experts", 256)
        experts_per_token = fields.size("num_experts_per_tok", 8)
        expert_intermediate = fields.size("moe_intermediate_size", 2048)
        latent = _latent_sizes(fields, expert_intermediate)
        key_value_heads = heads
        head_dim = fields.size("qk_nope_head_dim", 128) + latent["rope_dim"]
        leading = fields.size("first_k_dense_replace", 3, least=0)
        moe_layers = [i >= leading for i in range(layers)]
    elif kind in _MOE_FAMILIES:
        mixtral = kind == "mixtral"
        named = "num_local_experts" if mixtral or "num_local_experts" in root else "num_experts"
        experts = fields.size(named)
        experts_per_token = fields.size("num_experts_per_tok")
        width = "intermediate_size" if mixtral else "moe_intermediate_size"
        expert_intermediate = fields.size(width)
        step = 1 if mixtral else fields.size("decoder_sparse_step", 1)
        dense = [] if mixtral else root.get("mlp_only_layers") or []
        moe_layers = [(i + 1) % step == 0 and i not in dense for i in range(layers)]
    if experts_per_token > experts:
        raise DataError(
            f"{_WHERE} {name}: num_experts_per_tok is {experts_per_token}, but there are"
            f" {experts} experts"
        )
    return ModelSizes(
        hidden=hidden,
        heads=heads,
        key_value_heads=key_value_heads if latent else fields.size("num_key_value_heads", key_value_heads or heads),
        head_dim=head_dim if latent else fields.size("head_dim", head_dim or max(1, hidden // heads)),
        intermediate=fields.size("intermediate_size"),
        vocabulary=fields.size("vocab_size"),
        moe_layers=tuple(moe_layers),
        expert_intermediate=expert_intermediate,
        experts=experts,
        experts_per_token=experts_per_token,
        tied_embeddings=bool(root.get("tie_word_embeddings", False)),
        dtype=dtype,
        **latent,
    )
