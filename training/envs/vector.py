"""Many environments at once, each in a process of its own, for batched rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from gymnasium import Env
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

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

    @property
    def halves(self) -> tuple[slice, ...]:
        """What can step on its own: two halves where they are of one size, else all as one."""
        half = self.num_envs // 2
        halves = slice(0, half), slice(half, self.num_envs)
        return halves if 2 * half == self.num_envs else (slice(0, self.num_envs),)

    def send(self, half: slice, actions: NDArray[Any]) -> None:
        """Let one of `halves` step."""
        for remote, action in zip(self.remotes[half], actions, strict=True):
            remote.send(("step", action))

    def receive(self, half: slice) -> VecEnvStepReturn:
        """What it answered; `reset_infos` stay as they are."""
        answers = [remote.recv() for remote in self.remotes[half]]
        seen, rewards, dones, infos, _ = zip(*answers, strict=True)
        stacked = {name: np.stack([each[name] for each in seen]) for name in seen[0]}
        return stacked, np.stack(rewards), np.stack(dones), list(infos)


class InProcess(DummyVecEnv):
    """Environments in this process, one after another."""

    @property
    def halves(self) -> tuple[slice, ...]:
        """All as one."""
        return (slice(0, self.num_envs),)

    def send(self, _: slice, actions: NDArray[Any]) -> None:
        """Keep their actions."""
        self.step_async(actions)

    def receive(self, _: slice) -> VecEnvStepReturn:
        """Step."""
        return self.step_wait()


def make_vector(
    seeds: Callable[[int, int], Iterable[int]],
    environments: int,
    environment: str = "tabletop",
    wrap: Callable[[Env], Env] | None = None,
    **kwargs: Any,
) -> Environments | InProcess:
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
        return InProcess(makers)  # type: ignore[arg-type]
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
