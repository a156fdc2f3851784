"""The tabletop over a list of scenes, as rollouts want it.

Observations hold numbers only, as stable-baselines3 wants them: the instruction travels as the
bytes of its text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rlrc_ros.sim.expert import expert_action
from rlrc_ros.sim.tabletop import TabletopEnv
from rlrc_ros.sim.world import World
from training.data.demonstrations import encode_png

TEXT_BYTES = 100


def encode_text(text: str) -> NDArray[np.uint8]:
    """Text as (TEXT_BYTES,) uint8, zeros behind it."""
    data = text.encode()
    return np.frombuffer(data.ljust(TEXT_BYTES, b"\0"), np.uint8)


def decode_text(row: NDArray[np.uint8]) -> str:
    """The inverse of `encode_text`."""
    return row.tobytes().rstrip(b"\0").decode()


class SeededTabletop(gym.Env):
    """A tabletop that takes its scenes from a list of seeds, one a reset.

    Args:
        seeds: what to go through; when they are used up, resets repeat the last scene and
            `info["exhausted"]` is set. `set_seeds` replaces them.
        latency: passed on to `TabletopEnv`.
        swap_instruction: show another valid instruction than the one success is judged by.
        label: put what a demonstration needs into the infos of reset and step: `expert_action`,
            `grounding`, and the image as a PNG file, `png`.
        max_steps: passed on to `TabletopEnv`.
    """

    def __init__(
        self,
        seeds: Iterable[int],
        latency: tuple[float, float],
        swap_instruction: bool = False,
        label: bool = False,
        max_steps: int = 120,
    ) -> None:
        self._env = TabletopEnv(latency=latency, max_steps=max_steps)
        self._seeds: Iterator[int] = iter(seeds)
        self._seed, self._exhausted = 0, False
        self._swap, self._label = swap_instruction, label
        spaces = dict(self._env.observation_space.spaces)  # type: ignore[attr-defined]
        spaces["instruction"] = gym.spaces.Box(0, 255, (TEXT_BYTES,), np.uint8)
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = self._env.action_space

    @property
    def world(self) -> World:
        """The simulation."""
        return self._env.world

    def set_seeds(self, seeds: Iterable[int]) -> None:
        """Take scenes from another list from the next reset on."""
        self._seeds = iter(seeds)

    def reset(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start the next seed's episode; what Gymnasium's reset takes is not used."""
        following = next(self._seeds, None)
        self._exhausted = following is None
        self._seed = self._seed if following is None else following
        observation, info = self._env.reset(seed=self._seed)
        self._instruction = observation["instruction"]
        if self._swap:
            others = [text for text in self._env.world.scene.goals if text != self._instruction]
            self._instruction = others[np.random.default_rng([self._seed, 7]).integers(len(others))]
        return self._seen(observation), self._told(info)

    def step(
        self, action: NDArray[np.floating]
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One control step."""
        observation, reward, terminated, truncated, info = self._env.step(action)
        return self._seen(observation), reward, terminated, truncated, self._told(info)

    def close(self) -> None:
        """Free the renderer."""
        self._env.close()

    def _seen(self, observation: dict[str, Any]) -> dict[str, Any]:
        self._image = observation["image"]
        return {**observation, "instruction": encode_text(self._instruction)}

    def _told(self, info: dict[str, Any]) -> dict[str, Any]:
        told = {"success": info["success"], "seed": self._seed, "exhausted": self._exhausted}
        told |= {"family": self._env.world.scene.family, "instruction": self._instruction}
        if self._label:
            world = self._env.world
            told |= {"expert_action": expert_action(world), "grounding": world.grounding()}
            told["png"] = encode_png(self._image)
        return told
