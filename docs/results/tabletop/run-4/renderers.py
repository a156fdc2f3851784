"""How far pictures rendered here are from those of the GPU, of scenes 0 to 2.

MUJOCO_GL=egl python docs/results/tabletop/run-4/renderers.py
"""

import json
from pathlib import Path

import cv2
import numpy as np

from rlrc_ros.sim.tabletop import TabletopEnv

env = TabletopEnv()
for seed in range(3):
    here = env.reset(seed=seed)[0]["image"].astype(int)
    there = cv2.imread(str(Path(__file__).with_name(f"nvidia-{seed}.png")))[..., ::-1]
    error = np.abs(here - there)
    print(json.dumps({"seed": seed, "mean": round(error.mean(), 5), "max": int(error.max())}))
