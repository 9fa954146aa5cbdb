"""Hugging Face transformers as an fp64 oracle.

Whatever the model's type, transformers takes norms, rotary tables and router probabilities in fp32,
so an fp64 model is only good to 1e-7. Here `torch.float32`, `torch.float` and `Tensor.float` stand
for their fp64 kin while a model runs, and the rotary frequencies are computed again under the same
rebinding.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


@contextlib.contextmanager
def everything_fp64():
    saved = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = saved


def make_model(model_type: str, seed: int = 0, **settings):
    """A small random model in fp64; norms and biases random too, so that their paths are seen."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **settings)
    config._attn_implementation = "sdpa"
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64)
            if "norm" in name:
                parameter.copy_(1.0 + 0.2 * noise)
            else:
                parameter.copy_(0.08 * noise)
    return model


def _refresh_rotary(model) -> None:
    for module in model.modules():
        if hasattr(module, "inv_freq") and hasattr(module, "rope_type"):
            compute = module.compute_default_rope_parameters
            if module.rope_type != "default":
                from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

                compute = ROPE_INIT_FUNCTIONS[module.rope_type]
            inverse, module.attention_scaling = compute(module.config)
            module.inv_freq = inverse
            module.original_inv_freq = inverse


def gradients(model, documents: list[dict], balance: float = 0.0, z_loss: float = 0.0):
    """Loss and gradients of one step: mean cross-entropy over the loss tokens of all documents.

    Documents run one at a time; the balance loss is transformers' own over all their tokens.
    Returns (loss, {parameter name in the saved checkpoint: gradient}).
    """
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    targets = 0
    router_logits = None
    tokens_of_step = sum(len(document["tokens"]) for document in documents)
    with everything_fp64():
        _refresh_rotary(model)
        for document in documents:
            tokens = torch.tensor(document["tokens"])[None]
            mask = document.get("loss_mask", [1] * len(document["tokens"]))
            extra = {"output_router_logits": True} if balance or z_loss else {}
            output = model(tokens, use_cache=False, **extra)
            labels = tokens[0, 1:].clone()
            labels[torch.tensor(mask[1:], dtype=torch.long) == 0] = -100
            targets += int((labels != -100).sum())
            if len(labels):
                total = total + torch.nn.functional.cross_entropy(
                    output.logits[0, :-1], labels, ignore_index=-100, reduction="sum"
                )
            if extra:
                layers = output.router_logits
                router_logits = (
                    layers
                    if router_logits is None
                    else tuple(torch.cat(pair) for pair in zip(router_logits, layers))
                )
        loss = total / targets
        if balance:
            import sys

            balancing = sys.modules[type(model).__module__].load_balancing_loss_func
            config = model.config
            loss = loss + balance * balancing(
                router_logits, config.num_local_experts, config.num_experts_per_tok
            )
        if z_loss:
            squares = sum((torch.logsumexp(layer, -1) ** 2).sum() for layer in router_logits)
            loss = loss + z_loss * squares / tokens_of_step
        loss.backward()
    return loss.item(), model


def checkpoint_gradients(model, folder: Path) -> dict[str, torch.Tensor]:
    """The gradients under the checkpoint's names: saved as if they were the weights."""
    from safetensors.torch import load_file

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def write_documents(path: Path, documents: list[dict]) -> None:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def random_documents(lengths, vocab_size: int, masked: bool = True, seed: int = 1) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for index, length in enumerate(lengths):
        tokens = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        document = {"tokens": tokens}
        if masked and index % 2:
            document["loss_mask"] = (torch.rand(length, generator=generator) < 0.7).int().tolist()
        documents.append(document)
    return documents
