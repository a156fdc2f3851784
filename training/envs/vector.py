"""Many tabletops at once, each in a process of its own, for batched rollouts."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

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
    # The processes are forked from one that has the slow imports behind it. The simulator is not
    # among them: its renderer may open a connection to the GPU on import, which must not be shared.
    multiprocessing.set_forkserver_preload(["stable_baselines3.common.vec_env.subproc_vec_env"])
    return SubprocVecEnv(makers, start_method="forkserver")  # type: ignore[arg-type]
