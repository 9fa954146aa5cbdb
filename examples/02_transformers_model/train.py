"""Trains an unmodified transformers model on documents of any length, spread over ranks.

    torchrun --nproc-per-node 4 examples/02_transformers_model/train.py HF_FOLDER DOCUMENTS.jsonl
    mpirun -n 4 python examples/02_transformers_model/train.py HF_FOLDER DOCUMENTS.jsonl

A line of DOCUMENTS.jsonl is {"tokens": [...]}, with an optional "loss_mask".
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

import meshloom as ml
from meshloom.integrations import transformers

folder, documents_file = sys.argv[1:3]
with open(documents_file) as file:
    documents = [json.loads(line) for line in file]
longest = max(len(document["tokens"]) for document in documents)

transformers.register()
model = AutoModelForCausalLM.from_pretrained(
    folder, attn_implementation="meshloom", dtype=torch.float32
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
world = ml.make_world()
session = ml.PlanSession(world, capacity_tokens=-(-longest // world.size))

for step in range(5):
    loss = torch.zeros(())
    for unit in session.plan(documents):  # this rank's share, in order
        part = unit.weighted_loss(model(**unit.inputs).logits)
        part.backward()
        loss += part.detach()
    session.sync_gradients(model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    world.all_reduce_(loss).wait()
    if world.rank == 0:
        print(f"step {step}: loss {loss.item():.6f}", flush=True)
