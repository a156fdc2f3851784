"""A policy node whose policies misbehave from their sixth action on, a script to be run.

How, their bundle's directory says: nan, raises, hangs, or anything else for a sound one.
"""

import sys
import time
from pathlib import Path

import numpy as np

from rlrc_ros.nodes import common
from rlrc_ros.nodes.policy_node import PolicyNode

GOOD_ACTIONS = 5
HANG_TIME = 10.0


class FaultyPolicyNode(PolicyNode):
    def _load(self, path):
        policy = super()._load(path)
        fault, sound, acted = Path(path).name, policy.act, 0

        def act(observation):
            nonlocal acted
            acted += 1
            chunk = sound(observation)
            if fault == "moves" or acted % 100 <= GOOD_ACTIONS:
                # The same slow way for all, so that a test can see the arm move.
                chunk.actions[:] = [0.002, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
            elif fault == "nan":
                chunk.actions[:] = np.nan
            elif fault == "raises":
                raise RuntimeError("the weights have melted")
            elif fault == "hangs":
                time.sleep(HANG_TIME)
            return chunk

        policy.act = act
        return policy


if __name__ == "__main__":
    sys.exit(common.run(FaultyPolicyNode, FaultyPolicyNode.leave))
