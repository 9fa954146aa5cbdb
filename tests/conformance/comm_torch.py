"""Runs the communicator's conformance suite over Gloo; started by torchrun, one process a rank."""

import sys

import comm_conformance_torch
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
failed = torch.tensor([comm_conformance_torch.run_all(dist.group.WORLD)])
dist.all_reduce(failed, op=dist.ReduceOp.MAX)
dist.destroy_process_group()
sys.exit(int(failed.item() != 0))
