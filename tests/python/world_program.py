"""One rank of a world that `Communicator.from_env` finds; prints what it saw as a JSON object."""

import json
import sys

import torch

import meshloom

comm = meshloom.Communicator.from_env(meshloom.GroupOptions(timeout=60.0))
tensor = torch.full((1_000,), comm.rank + 1.0)
comm.all_reduce_(tensor, purpose="gradients").wait()
rows = [r + 1 for r in range(comm.size)]
gathered = comm.all_gather(torch.full((rows[comm.rank],), comm.rank), rows).result()
half = comm.split(comm.rank % 2, 0, "half")
half.barrier().wait()
seen = {
    "rank": comm.rank,
    "size": comm.size,
    "backend": comm.backend,
    "sum": tensor[0].item(),
    "gathered": gathered.tolist(),
    "half": half.size,
    "sent": comm.traffic()["gradients"].sent_bytes,
}
if comm.backend == "torch":
    import torch.distributed as dist

    own = meshloom.Communicator.from_process_group(dist.group.WORLD)
    again = torch.ones(2)
    own.all_reduce_(again).wait()
    dist.all_reduce(again)  # the group serves torch as before
    seen["again"] = again[0].item()
print(json.dumps(seen))
sys.stdout.flush()
if comm.backend == "torch":
    # As torch asks of every program: its threads may need the interpreter while they end.
    del comm, half, own
    dist.destroy_process_group()
