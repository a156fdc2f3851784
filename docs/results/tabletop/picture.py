"""The README's picture: original and compressed on scenes 11 to 13, at equal time intervals.

MUJOCO_GL=egl python docs/results/tabletop/picture.py [PICTURE]
"""

import sys

import cv2
import numpy as np

from rlrc_ros.sim.tabletop import CONTROL_RATE, TabletopEnv
from rlrc_ros.vla import load_policy
from rlrc_ros.vla.processor import Observation

FRAMES, SIZE, MARGIN = 6, (216, 162), 26  # pictures in a row, their pixels, the line above them


def row(policy, name, env, seed):
    """A policy's episode as one strip."""
    seen, _ = env.reset(seed=seed)
    frames, ended, success = [env.render()], False, False
    while not ended:
        image = {policy.config.cameras[0].name: seen["image"]}
        observation = Observation(image, seen["instruction"], seen["proprioception"])
        seen, _, success, cut, _ = env.step(policy.act(observation).actions[0])
        frames.append(env.render())
        ended = success or cut
    chosen = np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)
    small = [cv2.resize(frames[i], SIZE, interpolation=cv2.INTER_AREA) for i in chosen]
    strip = np.full((MARGIN + SIZE[1], FRAMES * SIZE[0], 3), 255, np.uint8)
    strip[MARGIN:] = np.concatenate(small, 1)
    seconds = (len(frames) - 1) / CONTROL_RATE
    end = f"done after {seconds:.1f} s" if success else f"not done after {seconds:.0f} s"
    text = f"{name}: {seen['instruction']} ({end})"
    cv2.putText(strip, text, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return strip


def main():
    path = sys.argv[1] if sys.argv[1:] else "docs/images/tabletop.png"
    names = ("original", "compressed")
    policies = {name: load_policy(f"tabletop-{name}") for name in names}
    env = TabletopEnv(render_mode="rgb_array")
    rows = [row(policies[name], name, env, seed) for seed in (11, 12, 13) for name in names]
    cv2.imwrite(path, np.concatenate(rows)[..., ::-1])


if __name__ == "__main__":
    main()
