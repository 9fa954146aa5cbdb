"""torch's own side of `layouts_step.py`: DDP, FSDP2, DTensor or pipelining over Gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

RANKS = 2
MICRO_BATCHES = 4  # of the pipeline


def load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", dtype=torch.float32
    )
    return model.train()


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100
    )


def adamw(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )


class Replicas:
    """DDP or FSDP2: each rank has half of the documents in one batch."""

    def __init__(self, folder: Path, compiled: bool, ids: torch.Tensor, labels: torch.Tensor,
                 sharded: bool) -> None:
        model = load(folder)
        if compiled:
            for layer in model.model.layers:
                layer.compile()
        if sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (RANKS,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            self.model = model
        else:
            self.model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.optimizer = adamw(self.model.parameters())
        half = len(ids) // RANKS
        own = slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)
        # Both take the mean over ranks.
        self.scale = RANKS / float((labels != -100).sum())
        self.ids, self.labels = ids[own], labels[own]

    def step(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(input_ids=self.ids, use_cache=False).logits
        loss = summed_loss(logits, self.labels) * self.scale
        loss.backward()
        self.optimizer.step()
        total = loss.detach() / RANKS
        dist.all_reduce(total)
        return float(total)


class Tensors:
    """DTensor: heads, features and vocabulary split, the loss over vocabulary parts."""

    def __init__(self, folder: Path, compiled: bool, ids: torch.Tensor,
                 labels: torch.Tensor) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Replicate, Shard
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        mesh = init_device_mesh("cpu", (RANKS,))
        plan: dict[str, object] = {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        }
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj",
                     "mlp.up_proj"):
            plan[f"model.layers.*.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"model.layers.*.{name}"] = RowwiseParallel()
        self.model = parallelize_module(load(folder), mesh, plan)
        if compiled:
            for layer in self.model.model.layers:
                layer.compile()
        # One fused call takes tensors of one kind; norms are whole on both ranks.
        split = [p for p in self.model.parameters() if isinstance(p, DTensor)]
        whole = [p for p in self.model.parameters() if not isinstance(p, DTensor)]
        self.optimizers = adamw(split), adamw(whole)
        self.ids, self.labels = ids, labels
        self.scale = 1.0 / float((labels != -100).sum())

    def step(self) -> float:
        from torch.distributed.tensor.parallel import loss_parallel

        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with loss_parallel():
            logits = self.model(input_ids=self.ids, use_cache=False).logits
            loss = summed_loss(logits, self.labels) * self.scale
            loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return float(loss.full_tensor() if hasattr(loss, "full_tensor") else loss)


class Half(nn.Module):
    """One of two stages of a Llama."""

    def __init__(self, model: nn.Module, rank: int, compiled: bool) -> None:
        super().__init__()
        layers = model.model.layers
        middle = len(layers) // RANKS
        self.layers = layers[:middle] if rank == 0 else layers[middle:]
        self.rotary = model.model.rotary_emb
        self.embedding = model.model.embed_tokens if rank == 0 else None
        self.norm = model.model.norm if rank else None
        self.head = model.lm_head if rank else None
        if compiled:
            for layer in self.layers:
                layer.compile()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        positions = torch.arange(x.shape[1])[None]
        rotary = self.rotary(x, positions)
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return self.head(self.norm(x)) if self.head is not None else x


class Pipeline:
    """torch.distributed.pipelining's 1F1B."""

    def __init__(self, folder: Path, compiled: bool, ids: torch.Tensor,
                 labels: torch.Tensor) -> None:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        rank = dist.get_rank()
        self.half = Half(load(folder), rank, compiled)
        stage = PipelineStage(self.half, rank, RANKS, torch.device("cpu"))
        self.scale = 1.0 / float((labels != -100).sum())
        self.schedule = Schedule1F1B(
            stage, MICRO_BATCHES, loss_fn=lambda y, t: summed_loss(y, t) * self.scale,
            scale_grads=False,
        )
        self.optimizer = adamw(self.half.parameters())
        self.ids, self.labels, self.rank = ids, labels, rank

    def step(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[torch.Tensor] = []
        if self.rank == 0:
            self.schedule.step(self.ids)
        else:
            self.schedule.step(target=self.labels, losses=losses)
        self.optimizer.step()
        total = torch.stack(losses).sum().detach() if losses else torch.zeros(())
        dist.broadcast(total, RANKS - 1)
        return float(total)


def build(mode: str, compiled: bool, folder: Path, docs: list[list[int]]) -> Callable[[], float]:
    ids = torch.tensor(docs)
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    if mode == "tensor":
        return Tensors(folder, compiled, ids, labels).step
    if mode == "pipeline":
        return Pipeline(folder, compiled, ids, labels).step
    return Replicas(folder, compiled, ids, labels, sharded=mode == "fsdp2").step


def serve(folder: Path, documents: Path, mode: str, compiled: bool) -> None:
    """A step for every line of rank 0's standard input."""
    docs = [json.loads(line)["tokens"] for line in documents.read_text().splitlines()]
    torch.set_num_threads(1)
    step = build(mode, compiled, folder, docs)
    go = torch.zeros(1, dtype=torch.long)
    while True:
        if dist.get_rank() == 0:
            go.fill_(1 if sys.stdin.readline() else 0)
        dist.broadcast(go, 0)
        if not go:
            break
        begin, cpu = time.perf_counter(), time.process_time()
        loss = step()
        dist.barrier()
        if dist.get_rank() == 0:
            answer = {
                "seconds": time.perf_counter() - begin,
                "cpu_seconds": time.process_time() - cpu,
                "loss": loss,
            }
            print(json.dumps(answer), flush=True)
    if dist.get_rank() == 0:
        print(json.dumps({"peak_bytes": 0}), flush=True)


def main() -> None:
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                       "WORLD_SIZE": str(RANKS), "GLOO_SOCKET_IFNAME": "lo"}
        other = subprocess.Popen(
            [sys.executable, *sys.argv], env=os.environ | {"RANK": "1"}, stdin=subprocess.DEVNULL
        )
        os.environ["RANK"] = "0"
    else:
        other = None
    dist.init_process_group("gloo")
    serve(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "1")
    dist.destroy_process_group()
    if other is not None:
        other.wait()


if __name__ == "__main__":
    main()
