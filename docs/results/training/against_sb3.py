"""Environment steps per second of this project's PPO against stock stable-baselines3's.

    python docs/results/training/against_sb3.py against_sb3.json

The same policy, environments (each in a process), steps, minibatches and epochs. Stock is
`stable_baselines3.PPO` as it is over the policy's plain modules: actions by `OpenVLA.generate`,
float32, its own losses. Ours is `training.rl`, critic warm-up ended, without BC regularization,
which stock does not have, and with it; and with learning in bfloat16, which the configuration calls
`bfloat16`. Several updates each; the first ones are left out.
"""

import argparse
import csv
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from stable_baselines3 import PPO
from two_gpus import made_up, model_of

from rlrc_ros.timing import machine
from training import rl
from training.actor_critic import TokenActions, TokenPolicy
from training.config import RlConfig
from training.envs.vector import make_vector
from training.rollout import Batcher

UPDATES = 5
"""Of each; the first two are left out: kernels are compiled in them."""


class Generate:
    """`OpenVLA.generate` in the place of `training.rollout.Decoder`."""

    def __init__(self, model):
        self._model = model

    def refresh(self):
        """The modules themselves are run."""

    def __call__(self, inputs, temperature=0.0):
        """Bins, log-probabilities, states."""
        with torch.no_grad():
            return self._model.generate(inputs, temperature)


class Stock(PPO):
    """Untouched but for clocks."""

    def collect_rollouts(self, *args, **kwargs):
        """Begin an update."""
        self.began = time.perf_counter()
        going = super().collect_rollouts(*args, **kwargs)
        self.rolled_out = time.perf_counter()
        return going

    def train(self):
        """End it."""
        super().train()
        ended = time.perf_counter()
        self.times.append((self.rolled_out - self.began, ended - self.rolled_out))


def stock(config, policy, device):
    """(rollout, learning) seconds of each update."""
    size = policy.config.architecture.towers[0].image_size
    environments = config.environments
    venv = make_vector(
        lambda i, _: range(100 * i, 100 * i + 100 * UPDATES), environments, image_size=size
    )
    try:
        algorithm = Stock(
            TokenPolicy,
            TokenActions(venv, policy.codec),
            learning_rate=config.learning_rate,
            n_steps=config.steps_per_update,
            batch_size=config.minibatch,
            n_epochs=config.epochs,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            clip_range=config.clip,
            max_grad_norm=config.max_grad_norm,
            policy_kwargs={
                "model": policy.model,
                "decoder": Generate(policy.model),
                "batcher": Batcher(policy.processor, device),
                "value_learning_rate": config.value_learning_rate,
                "temperature": config.temperature,
            },
            seed=0,
            device=device,
        )
        algorithm.times = []
        algorithm.learn(UPDATES * environments * config.steps_per_update)
        return algorithm.times
    finally:
        venv.close()


def ours(config, policy, batches, device):
    """(rollout, learning) seconds of each update."""
    with tempfile.TemporaryDirectory() as name:
        common = {"seed": 0, "device": device, "work": Path(name), "latency": (0.0, 0.0)}
        rl.run(config, policy, batches, **common)
        with (Path(name) / "log.csv").open() as file:
            return [(float(r["rollout_s"]), float(r["learning_s"])) for r in csv.DictReader(file)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="a tiny policy, to try it on a CPU")
    parser.add_argument("--environments", type=int, default=64)
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.small else "cuda")
    shape = model_of("tiny" if arguments.small else "tabletop")
    environments, steps = (2, 6) if arguments.small else (arguments.environments, 64)
    total = environments * steps
    config = RlConfig(
        seeds=(0,),
        updates=UPDATES,
        environments=environments,
        steps_per_update=steps,
        minibatch=total // 4,
        critic_warmup=0,
        bc_batch=total // 8,
    )
    rows = {}
    changes = {
        "ours": {"bc_coefficient": 0.0},
        "ours with BC": {},
        "ours in bfloat16": {"bc_coefficient": 0.0, "bfloat16": True},
    }
    for name in ("stock", *changes):
        policy, batches = made_up(shape, device)
        if name == "stock":
            times = stock(config, policy, device)
        else:
            times = ours(dataclasses.replace(config, **changes[name]), policy, batches, device)
        rollout, learning = np.median(np.array(times)[2:], axis=0)
        rows[name] = {
            "environment_steps_per_s": total / float(rollout + learning),
            "rollout_s": float(rollout),
            "learning_s": float(learning),
            "updates": [list(row) for row in times],
        }
        print(name, rows[name], file=sys.stderr, flush=True)
    speeds = {name: row["environment_steps_per_s"] for name, row in rows.items()}
    result = {
        "machine": machine(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "config": {**dataclasses.asdict(config), "seeds": [0]},
        "rows": rows,
        "ratios": {name: speed / speeds["stock"] for name, speed in speeds.items()},
    }
    text = json.dumps(result, indent=1)
    arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
