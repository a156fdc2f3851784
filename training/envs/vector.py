"""Many environments at once, each in a process of its own, for batched rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from gymnasium import Env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from training.common import fork_server, leave_ctrl_c_to_parent
from training.envs.registry import make_environment


class Environments(SubprocVecEnv):
    """Environments in processes of their own, which end at once.

    The base class first waits for answers to what it asked, and after an interruption in the middle
    of a step some of these have been taken already.
    """

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()
        self.closed = True


def make_vector(
    seeds: Callable[[int, int], Iterable[int]],
    environments: int,
    environment: str = "tabletop",
    wrap: Callable[[Env], Env] | None = None,
    **kwargs: Any,
) -> VecEnv:
    """Environments side by side; a single one runs in this process.

    Args:
        seeds: called with (index, environments), gives that environment's seeds.
        environments: how many.
        environment: which.
        wrap: put around each; importable by name.
        kwargs: passed on to `make_environment`.
    """
    makers = [
        partial(_made, wrap, environment, seeds(i, environments), **kwargs)
        for i in range(environments)
    ]
    if environments == 1:
        return DummyVecEnv(makers)  # type: ignore[arg-type]
    fork_server()
    return Environments([partial(_in_worker, make) for make in makers], start_method="forkserver")


def _made(wrap: Callable[[Env], Env] | None, *arguments: Any, **kwargs: Any) -> Env:
    env = make_environment(*arguments, **kwargs)
    return wrap(env) if wrap else env


def share(seeds: Sequence[int], index: int, environments: int) -> Sequence[int]:
    """One environment's part of a list, in a row: neighbours are often of the same task."""
    return seeds[len(seeds) * index // environments : len(seeds) * (index + 1) // environments]


def _in_worker(make: Callable[[], Env]) -> Env:
    leave_ctrl_c_to_parent()
    return make()
