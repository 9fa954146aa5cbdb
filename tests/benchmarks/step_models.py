"""Models, documents and the transformers side of `train_step.py`."""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from pathlib import Path

VOCABULARY = 8192

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_cache": False,
}

CONFIGS = {
    "moe": COMMON
    | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "intermediate_size": 768,
        "moe_intermediate_size": 256,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
    },
    "dense": COMMON
    | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": 768,
        "mlp_bias": False,
    },
}

# 14 documents of 15 to 4,096 tokens, 8,192 in all; and one long one.
LENGTHS = {
    "mixed": [15, 31, 47, 64, 90, 121, 158, 206, 275, 352, 489, 778, 1470, 4096],
    "long": [4096],
}


def documents(mix: str, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in LENGTHS[mix]]


def write_model(kind: str, folder: Path) -> None:
    """A folder with random weights, written by transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def buckets(lengths: list[int], waste: float = 0.25) -> list[list[int]]:
    """Documents grouped by length so that padding adds at most `waste` to each group."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups:
            group = groups[-1]
            longest = lengths[group[0]]
            real = sum(lengths[j] for j in group) + lengths[i]
            if longest * (len(group) + 1) <= (1 + waste) * real:
                group.append(i)
                continue
        groups.append([i])
    return groups


class TransformersStep:
    """A whole optimizer step of transformers: sdpa, grouped experts, fused AdamW."""

    def __init__(self, folder: Path, docs: list[list[int]], mode: str, compiled: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        kwargs = {"attn_implementation": "sdpa", "dtype": torch.float32}
        if "num_experts" in json.loads((folder / "config.json").read_text()):
            kwargs["experts_implementation"] = "grouped_mm"
        self.model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
        self.model.train()
        if compiled:
            for layer in self.model.model.layers:
                layer.compile(dynamic=True)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        lengths = [len(d) for d in docs]
        groups = buckets(lengths) if mode == "buckets" else [[i] for i in range(len(docs))]
        self.loss_tokens = sum(n - 1 for n in lengths)
        self.batches = []
        for group in groups:
            longest = max(lengths[i] for i in group)
            ids = torch.zeros(len(group), longest, dtype=torch.long)
            labels = torch.full((len(group), longest), -100)
            mask = torch.zeros(len(group), longest, dtype=torch.long)
            for row, i in enumerate(group):
                n = lengths[i]
                ids[row, :n] = torch.tensor(docs[i])
                labels[row, : n - 1] = ids[row, 1:n]
                mask[row, :n] = 1
            padded = len(group) > 1
            self.batches.append((ids, mask if padded else None, labels))

    def step(self) -> dict[str, float]:
        torch = self.torch
        begin = time.perf_counter()
        cpu = time.process_time()
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for ids, mask, labels in self.batches:
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100
            )
            loss = loss / self.loss_tokens
            loss.backward()
            total += float(loss.detach())
        self.optimizer.step()
        return {
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - cpu,
            "loss": total,
        }


def serve(folder: Path, documents_path: Path, mode: str, compiled: bool) -> None:
    """A step for every line of standard input; the peak of resident memory at its end."""
    docs = [json.loads(line)["tokens"] for line in documents_path.read_text().splitlines()]
    side = TransformersStep(folder, docs, mode, compiled)
    for _ in sys.stdin:
        print(json.dumps(side.step()), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "1")
