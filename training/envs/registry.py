"""The environments by name: what `rlrc eval --env` and a configuration's `environment` choose from.

All of them observe and act alike: an image, joint positions and gripper opening, an instruction;
end-effector steps in metres and radians, and the gripper's opening.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rlrc_ros.errors import UserError
from rlrc_ros.sim import tabletop
from rlrc_ros.sim.tasks import VOCABULARY
from training.common import cpu_count
from training.config import TOGETHER
from training.envs import libero
from training.envs.tabletop import SeededTabletop

ENVIRONMENTS = ("tabletop", *libero.SUITES, TOGETHER)


@dataclass(frozen=True)
class Contract:
    """What a policy for an environment has to know of it.

    Attributes:
        words: every word of its instructions.
        action_low, action_high: (7,) what its actions are clipped to: m, rad, opening.
        control_rate: Hz.
    """

    words: tuple[str, ...]
    action_low: NDArray[np.float32]
    action_high: NDArray[np.float32]
    control_rate: float


def contract(environment: str) -> Contract:
    """The contract of one of ENVIRONMENTS."""
    on_tabletop = environment == "tabletop"
    module: Any = tabletop if on_tabletop else libero
    words = VOCABULARY if on_tabletop else libero.vocabulary()
    return Contract(tuple(words), module.ACTION_LOW, module.ACTION_HIGH, float(module.CONTROL_RATE))


def at_once(environment: str, wanted: int) -> int:
    """How many environments to have side by side: one of LIBERO's takes 1 to 2 GB of memory."""
    return wanted if environment == "tabletop" else min(wanted, 2 * cpu_count())


def training_scenes(environment: str, first: int, count: int) -> Sequence[int]:
    """Numbers of so many scenes to train on, from `first` on; of LIBERO's tasks evenly."""
    if environment == "tabletop":
        return range(first, first + count)
    return libero.sampled_scenes(environment, first, count)


def make_environment(
    environment: str,
    seeds: Iterable[int],
    *,
    image_size: int = 128,
    latency: tuple[float, float] = (0.0, 0.0),
    swap_instruction: bool = False,
    label: bool = False,
    max_steps: int | None = None,
) -> gym.Env:
    """One of ENVIRONMENTS over a list of scenes; see `SeededTabletop` and `SeededLibero`.

    Raises:
        UserError: it cannot do what is asked of it.
    """
    if environment == "tabletop":
        limit = {} if max_steps is None else {"max_steps": max_steps}
        return SeededTabletop(seeds, latency, swap_instruction, label, **limit)
    if any(latency):
        raise UserError(f"{environment}: the published protocol knows no latency; set it to 0")
    if swap_instruction:
        raise UserError(f"{environment}: has no other instruction; there is {environment}_task")
    return libero.SeededLibero(environment, seeds, label, max_steps, image_size)
