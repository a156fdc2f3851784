"""A policy's success on scenes 0 to 95 by the temperature that its tokens are sampled at.

MUJOCO_GL=egl python docs/results/tabletop/run-5/temperatures.py POLICY TEMPERATURE…
"""

import json
import sys
from pathlib import Path

import torch

from training.bundles import load_trainable
from training.evaluate import Evaluation, batched_episodes
from training.rollout import Actor

SCENES = list(range(96))


def main():
    policy, *temperatures = sys.argv[1:]
    device = torch.device("cpu")
    trainable = load_trainable(policy, device)
    task = Evaluation(policy=Path(policy), episodes=len(SCENES), seed=0)
    for temperature in map(float, temperatures):
        torch.manual_seed(0)
        actor = Actor(trainable.model, trainable.processor, trainable.codec, device, 12)

        def act(seen, actor=actor, temperature=temperature):
            bins = actor._decoder(actor._batch(seen), temperature)[0]
            return trainable.codec.decode(bins.numpy())

        actor.act = act
        results = list(batched_episodes(actor, SCENES, task))
        row = {"policy": policy, "temperature": temperature, "episodes": len(results)}
        row["successes"] = sum(result.success for result in results)
        row["mean_steps"] = sum(result.steps for result in results) / len(results)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
