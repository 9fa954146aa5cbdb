"""Runs the communicator's conformance suite over Gloo: comm_torch.py RANKS.

One process a rank, forked from one that has torch loaded; the ranks meet through a file and talk
over the loopback interface.
"""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile

import comm_conformance_torch
import torch
import torch.distributed as dist


def run_rank(rank: int, ranks: int, folder: str) -> int:
    """0 if all tests passed on all ranks."""
    store = pathlib.Path(folder, "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    failed = torch.tensor([comm_conformance_torch.run_all(dist.group.WORLD)])
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)  # the group serves torch as before
    dist.destroy_process_group()
    return int(failed.item() != 0)


def main() -> int:
    ranks = int(sys.argv[1])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = run_rank(rank, ranks, folder)
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    bad = {rank: code for rank, code in enumerate(codes) if code != 0}
    if bad:
        print(f"exit codes of failed ranks: {bad}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
