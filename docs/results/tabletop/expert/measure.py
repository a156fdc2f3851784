"""How often the scripted expert solves unseen scenes.

MUJOCO_GL=egl python docs/results/tabletop/expert/measure.py > result.json
"""

import json
import sys

from rlrc_ros.sim.expert import expert_action
from rlrc_ros.sim.tabletop import TabletopEnv
from rlrc_ros.sim.tasks import FAMILIES
from rlrc_ros.trials.statistics import clopper_pearson

env, found = TabletopEnv(), {}
for family in FAMILIES:
    episodes = []
    for seed in range(80_000, 80_100):
        env.reset(seed=seed, options={"family": family})
        steps, done = 0, False
        while not done:
            _, _, success, truncated, _ = env.step(expert_action(env.world))
            steps, done = steps + 1, success or truncated
        episodes.append({"seed": seed, "success": bool(success), "steps": steps})
    n = sum(e["success"] for e in episodes)
    interval = clopper_pearson(n, len(episodes))
    found[family] = {"successes": n, "ci95": [interval.low, interval.high], "episodes": episodes}
    print(family, n, file=sys.stderr)
json.dump(found, sys.stdout)
