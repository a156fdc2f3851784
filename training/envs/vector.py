"""Many tabletops at once, each in a process of its own, for batched rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from training.common import fork_server
from training.envs.tabletop import SeededTabletop


def make_vector(
    seeds: Callable[[int, int], Iterable[int]], environments: int, **kwargs: Any
) -> VecEnv:
    """Environments side by side; a single one runs in this process.

    Args:
        seeds: called with (index, environments), gives that environment's seeds.
        environments: how many.
        kwargs: passed on to `SeededTabletop`.
    """
    makers = [
        partial(SeededTabletop, seeds(i, environments), **kwargs) for i in range(environments)
    ]
    if environments == 1:
        return DummyVecEnv(makers)  # type: ignore[arg-type]
    fork_server()
    return SubprocVecEnv(makers, start_method="forkserver")  # type: ignore[arg-type]
