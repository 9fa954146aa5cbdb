"""Hugging Face transformers models under an HDP plan, unmodified.

    meshloom.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="meshloom")
    for unit in session.plan(documents):
        unit.weighted_loss(model(**unit.inputs).logits).backward()
"""

from __future__ import annotations

from typing import Any

import torch

from meshloom import session
from meshloom._errors import InvalidArgument, NotSupported

NAME = "meshloom"


def register() -> None:
    """Makes `attn_implementation="meshloom"` known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """The unit says which tokens see which."""


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    meshloom_unit: session.PlannedUnit | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]."""
    if meshloom_unit is None:
        raise InvalidArgument(
            "[integrations.transformers] attention was called without a unit: call the model with"
            " **unit.inputs, and use a model that hands its keywords on to attention"
        )
    if query.shape[0] != 1:
        raise InvalidArgument(
            f"[integrations.transformers] the batch has {query.shape[0]} rows, expected 1: a unit is one"
            " row without padding"
        )
    for name, value_of in (("dropout", dropout), ("softcap", others.get("softcap")), ("s_aux", others.get("s_aux"))):
        if value_of is not None and not (isinstance(value_of, float) and value_of == 0.0):
            raise NotSupported(f"[integrations.transformers] attention with {name} is not built")
    if not getattr(module, "is_causal", True):
        raise NotSupported("[integrations.transformers] attention that is not causal is not built")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = session.attention(
        q, k, v, unit=meshloom_unit, scale=scaling, window=sliding_window or 0
    )
    return out[None], None
