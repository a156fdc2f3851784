"""What became of scenes of libero_spatial: a JSON line for each.

python docs/results/libero/failures.py BUNDLE libero_object+libero_spatial SCENE... > failures.jsonl

held: control steps in which the fingers held the thing. off: mm from the place's middle at the end
(30 count as on it). away: mm from the thing to the hand at the end. flips: how often the command to
the gripper changed.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from rlrc_ros.vla.policy import load_policy
from rlrc_ros.vla.processor import Observation
from training.envs.libero import SeededLibero
from training.envs.libero_expert import Expert


def watch(policy, env, scene):
    """One episode."""
    env.set_seeds([scene])
    seen, told = env.reset()
    world, camera = env.world, policy.config.cameras[0].name
    expert, held, fingers, ended = Expert(world), 0, [], False
    while not ended:
        image = {camera: seen["image"]}
        action = policy.act(Observation(image, told["instruction"], seen["proprioception"]))
        expert.action()
        held += expert._holding()
        fingers.append(action.actions[0, 6] > 0.5)
        seen, _, done, cut, told = env.step(action.actions[0])
        ended = done or cut
    thing, place = (world.position(name) for name in world.goal)
    hand = world.data.site_xpos[world.robot.eef_site_id]
    return {
        "seed": scene,
        "task": told["family"],
        "success": bool(told["success"]),
        "steps": len(fingers),
        "held": int(held),
        "off": round(1e3 * float(np.hypot(*(thing - place)[:2])), 1),
        "away": round(1e3 * float(np.linalg.norm(thing - hand)), 1),
        "flips": int(np.abs(np.diff(np.array(fingers, int))).sum()),
    }


if __name__ == "__main__":
    bundle, environment, *scenes = sys.argv[1:]
    torch.set_num_threads(1)
    policy = load_policy(Path(bundle))
    size = policy.config.architecture.towers[0].image_size
    env = SeededLibero(environment, [], image_size=size)
    for scene in map(int, scenes):
        print(json.dumps(watch(policy, env, scene)), flush=True)
