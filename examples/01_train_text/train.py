"""Trains what a config file describes.

    mpirun -n 4 build/env/bin/python examples/01_train_text/train.py examples/01_train_text/config.yaml

Without a launcher it is a world of one rank.
"""

import sys

import meshloom as ml

config = ml.TrainConfig.load(sys.argv[1])
if len(sys.argv) > 2:
    config.data.paths = sys.argv[2:]

world = ml.make_world()
trainer = ml.make_trainer(config, world)
for step in trainer:
    if world.rank == 0:
        print(f"step {step.step}: loss {step.loss:.4f}, {step.tokens_per_second:,.0f} tokens/s,"
              f" balance {step.balance_efficiency:.3f}", flush=True)
