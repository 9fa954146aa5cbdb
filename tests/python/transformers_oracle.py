"""Hugging Face transformers as an fp64 oracle.

Whatever the model's type, transformers takes norms, rotary tables and router probabilities in fp32,
so an fp64 model is only good to 1e-7. Here `torch.float32`, `torch.float` and `Tensor.float` stand
for their fp64 kin while a model runs, and the rotary frequencies are computed again under the same
rebinding.
"""

from __future__ import annotations

import contextlib
import json
import sys
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
        for router in biased_routers(model):
            # As far apart as the scores are, so that it decides some choices and not all.
            bias = router.e_score_correction_bias
            bias.copy_(0.03 * torch.randn(bias.shape))  # fp32, in which transformers loads it
    return model


def biased_routers(model) -> list:
    return [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]


@contextlib.contextmanager
def recorded_routing(model):
    """Yields the list to which every biased router adds (logits, chosen experts) as it runs."""
    record = []
    hooks = [
        router.register_forward_hook(lambda _, __, out: record.append((out[0], out[2])))
        for router in biased_routers(model)
    ]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


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


def global_balance(model, router_logits: list[tuple]) -> torch.Tensor:
    """transformers' own balance loss over all tokens of the step."""
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    pooled = tuple(torch.cat(layer) for layer in zip(*router_logits))
    config = model.config
    return function(pooled, config.num_local_experts, config.num_experts_per_tok)


def _choices_and_probabilities(model, logits: torch.Tensor):
    """How often each expert is chosen, and the sum of its probabilities, over the rows."""
    probabilities = torch.softmax(logits, -1)
    chosen = probabilities.topk(model.config.num_experts_per_tok, -1).indices
    counts = torch.bincount(chosen.flatten(), minlength=logits.shape[-1]).to(logits.dtype)
    return counts, probabilities.sum(0)


def sequence_balance(model, router_logits: list[tuple]) -> torch.Tensor:
    """Mean over layers, documents weighted by their tokens, of E * sum_e f_e P_e in a document."""
    total = 0.0
    tokens = 0
    for layers in router_logits:  # of one document
        length = len(layers[0])
        tokens += length
        for logits in layers:
            counts, sums = _choices_and_probabilities(model, logits)
            experts = logits.shape[-1]
            total = total + length * experts * (counts / length * sums / length).sum() / len(layers)
    return total / tokens


def lagged_balance(model, router_logits: list[tuple]) -> torch.Tensor:
    """Mean over layers of E * sum_e f_e P_e over the step, f_e being constants.

    They belong to the step before; a test that runs one step twice has the same there.
    """
    layers = [torch.cat(layer) for layer in zip(*router_logits)]
    total = 0.0
    for logits in layers:
        counts, sums = _choices_and_probabilities(model, logits)
        total = total + logits.shape[-1] * (counts * sums).sum() / len(logits) ** 2
    return total / len(layers)


def deepseek_sequence_balance(model, routing: list[list[tuple]]) -> torch.Tensor:
    """DeepSeek-V3's sequence-wise loss (arXiv 2412.19437, eq. 17 to 20), as the mean over layers and
    over documents weighted by their tokens. Choices are those of the biased router."""
    total = 0.0
    tokens = 0
    for layers in routing:  # of one document
        length = len(layers[0][0])
        tokens += length
        for logits, chosen in layers:
            scores = logits.sigmoid()
            experts, k = logits.shape[-1], chosen.shape[-1]
            counts = torch.bincount(chosen.flatten(), minlength=experts).to(logits.dtype)
            frequency = counts * experts / (k * length)
            mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
            total = total + length * (frequency * mean).sum() / len(layers)
    return total / tokens


def gradients(
    model,
    documents: list[dict],
    balance: float = 0.0,
    z_loss: float = 0.0,
    balance_loss=global_balance,
    fp64: bool = True,
):
    """Loss and gradients of one step: mean cross-entropy over the loss tokens of all documents.

    Documents run one at a time. Returns (loss, the model, whose parameters hold the gradients).
    With `fp64` false, transformers computes as it always does, in the model's own type.
    """
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64 if fp64 else torch.float32)
    targets = 0
    router_logits = []
    tokens_of_step = sum(len(document["tokens"]) for document in documents)
    routers = biased_routers(model)
    for router in routers:
        router.choices = torch.zeros_like(router.e_score_correction_bias)
    precision = everything_fp64() if fp64 else contextlib.nullcontext()
    with precision, recorded_routing(model) as record:
        if fp64:
            _refresh_rotary(model)
        for document in documents:
            tokens = torch.tensor(document["tokens"])[None]
            mask = document.get("loss_mask", [1] * len(document["tokens"]))
            extra = {"output_router_logits": True} if (balance or z_loss) and not routers else {}
            record.clear()
            output = model(tokens, use_cache=False, **extra)
            labels = tokens[0, 1:].clone()
            labels[torch.tensor(mask[1:], dtype=torch.long) == 0] = -100
            targets += int((labels != -100).sum())
            if len(labels):
                total = total + torch.nn.functional.cross_entropy(
                    output.logits[0, :-1].to(total.dtype), labels, ignore_index=-100, reduction="sum"
                )
            if extra:
                router_logits.append(output.router_logits)
            for router, (_, chosen) in zip(routers, record, strict=True):
                router.choices += torch.bincount(chosen.flatten(), minlength=len(router.choices))
            if routers:
                router_logits.append(list(record))
        loss = total / targets
        if balance:
            loss = loss + balance * balance_loss(model, router_logits)
        if z_loss:
            squares = sum(
                (torch.logsumexp(layer, -1) ** 2).sum() for layers in router_logits for layer in layers
            )
            loss = loss + z_loss * squares / tokens_of_step
        loss.backward()
    return loss.item(), model


def load_model(folder: Path, dtype: torch.dtype):
    """A saved model as transformers trains it in this type."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", experts_implementation="eager"
    )


def checkpoint_gradients(model, folder: Path) -> dict[str, torch.Tensor]:
    """The gradients under the checkpoint's names: saved as if they were the weights.

    A correction bias has none; under its name stands how often each expert was chosen.
    """
    from safetensors.torch import load_file

    with torch.no_grad():
        for router in biased_routers(model):
            router.e_score_correction_bias.copy_(router.choices)
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
