"""Several actions between two decisions."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray


class MacroSteps(gym.Wrapper):
    """Executes a whole sequence of actions in one step, or as much as the episode takes.

    A semi-Markov decision process (Sutton, Precup and Singh, Artificial Intelligence 112, 1999,
    section 3): rewards of later actions are discounted on their own, and with `gamma` to the power
    of `actions` between decisions returns are those of single steps. Only of an episode that its
    time limit cuts off in the middle of a sequence is the value discounted as after a whole one.

    `info["executed"]` says how many actions were.

    Args:
        env: takes (D,) actions; this takes (actions, D).
        actions: how many.
        gamma: discount of a single step.
    """

    def __init__(self, env: gym.Env, actions: int, gamma: float) -> None:
        super().__init__(env)
        single: Any = env.action_space
        low, high = (np.tile(limit, (actions, 1)) for limit in (single.low, single.high))
        self.action_space = gym.spaces.Box(low, high)
        self._gamma = gamma

    def step(
        self, action: NDArray[np.floating]
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """What is seen after the last action, and the discounted sum of rewards."""
        reward = 0.0
        for number, single in enumerate(action):
            seen, earned, terminated, truncated, told = self.env.step(single)
            reward += self._gamma**number * float(earned)
            if terminated or truncated:
                break
        return seen, reward, terminated, truncated, {**told, "executed": number + 1}
