"""Run 5: PPO goes on from a policy for a given time, nearer to how it acts: at a low temperature.

python docs/results/tabletop/run-5/rl.py POLICY DEMONSTRATIONS OUT SEED SECONDS [CONFIG]

Sampling at a temperature of 1 walks out of states that greedy decoding stays in for ever; PPO at
that temperature never learns about them. Environments render on all GPUs in turn.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

import torch

from training import rl
from training.bundles import load_trainable
from training.common import pick_device, seed_everything
from training.config import load_config
from training.sft import DemonstrationBatches

BEGAN = time.monotonic()
LATENCY = (0.0, 0.04)  # s


class TimedPPO(rl.RecoveryPPO):
    """Ends after the update in which its time is up."""

    until = 0.0

    def train(self):
        """One update."""
        super().train()
        TimedPPO.updates = self.update_number
        if time.monotonic() - BEGAN > self.until:
            self.num_timesteps = 10**12


def main():
    policy, demonstrations, out, seed, seconds, *rest = sys.argv[1:]
    config = load_config(Path(rest[0] if rest else "config/training/tabletop.yaml"))
    wanted = dataclasses.replace(
        config.rl,
        updates=10_000,
        temperature=float(os.environ.get("TEMPERATURE", "0.2")),
        learning_rate=float(os.environ.get("LEARNING_RATE", "1e-5")),
        first_seed=20_000_000,
    )
    TimedPPO.until = float(seconds)
    rl.RecoveryPPO = TimedPPO
    device = pick_device(None)
    trainable = load_trainable(policy, device)
    batches = DemonstrationBatches(trainable.processor, trainable.codec, device)
    batches.take(Path(demonstrations))
    seed_everything(int(seed))
    work = Path(f"{out}-work")
    facts = rl.run(
        wanted, trainable, batches, seed=int(seed), device=device, work=work, latency=LATENCY
    )
    trainable.save(Path(out), "rl", **{**facts, "updates": TimedPPO.updates})
    print("saved", TimedPPO.updates, torch.cuda.is_available(), flush=True)


if __name__ == "__main__":
    main()
