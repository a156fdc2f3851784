"""Many environments at once, each in a process of its own, for batched rollouts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from itertools import pairwise
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np
from gymnasium import Env
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from training.common import fork_server, leave_ctrl_c_to_parent, render_on
from training.envs.registry import make_environment


class Answer(NamedTuple):
    """What one environment answered to an action; after an episode's end it has been reset.

    Attributes:
        observation: after the action, or after the reset.
        reward: of the action.
        done: whether it ended the episode.
        info: what the environment told after the action.
        reset_info: what it told after its last reset.
    """

    observation: dict[str, Any]
    reward: float
    done: bool
    info: dict[str, Any]
    reset_info: dict[str, Any]


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

    def begin(self, which: Collection[int], actions: NDArray[Any]) -> None:
        """Let some of them step."""
        for i, action in zip(which, actions, strict=True):
            self.remotes[i].send(("step", action))

    def answers(self, which: Collection[int], at_least: int) -> dict[int, Answer]:
        """What those answered that were the first to, of those that step: so many, or all."""
        waiting: dict[Any, int] = {self.remotes[i]: i for i in which}
        answers: dict[int, Answer] = {}
        while waiting and len(answers) < at_least:
            ready: list[Any] = wait(list(waiting))
            for remote in ready:
                answers[waiting.pop(remote)] = Answer(*remote.recv())
        return answers

    def send(self, half: slice, actions: NDArray[Any]) -> None:
        """Let one of `halves` step."""
        self.begin(range(self.num_envs)[half], actions)

    def receive(self, half: slice) -> VecEnvStepReturn:
        """What it answered; `reset_infos` stay as they are."""
        which = range(self.num_envs)[half]
        answers = self.answers(which, len(which))
        seen, rewards, dones, infos, _ = zip(*(answers[i] for i in which), strict=True)
        stacked = {name: np.stack([each[name] for each in seen]) for name in seen[0]}
        return stacked, np.stack(rewards), np.stack(dones), list(infos)


class InProcess(DummyVecEnv):
    """Environments in this process, one after another."""

    @property
    def halves(self) -> tuple[slice, ...]:
        """All as one."""
        return (slice(0, self.num_envs),)

    def begin(self, _: Collection[int], actions: NDArray[Any]) -> None:
        """Keep the actions, of all."""
        self.step_async(actions)

    def answers(self, which: Collection[int], _: int) -> dict[int, Answer]:
        """Step, and what all answered."""
        seen, rewards, dones, infos = self.step_wait()
        rows: Any = seen
        return {
            i: Answer(
                {name: values[i] for name, values in rows.items()},
                float(rewards[i]),
                bool(dones[i]),
                infos[i],
                self.reset_infos[i],
            )
            for i in which
        }

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
    workers = [partial(_in_worker, i, make) for i, make in enumerate(makers)]
    return Environments(workers, start_method="forkserver")  # type: ignore[arg-type]


def _made(wrap: Callable[[Env], Env] | None, *arguments: Any, **kwargs: Any) -> Env:
    env = make_environment(*arguments, **kwargs)
    return wrap(env) if wrap else env


def none_yet(_: int, __: int) -> tuple[int, ...]:
    """No seeds: whoever has the environments deals them out."""
    return ()


class Scenes:
    """Scenes dealt out to environments.

    Each has its part of the list, in a row, since neighbours are often of the same task; whose part
    is used up takes from the end of the longest.
    """

    def __init__(self, seeds: Sequence[int], environments: int) -> None:
        bounds = [len(seeds) * i // environments for i in range(environments + 1)]
        self._parts = [deque(seeds[a:b]) for a, b in pairwise(bounds)]

    def take(self, environment: int) -> list[int]:
        """The next one for an environment; empty when there are none left."""
        if own := self._parts[environment]:
            return [own.popleft()]
        longest = max(self._parts, key=len)
        return [longest.pop()] if longest else []


def _in_worker(number: int, make: Callable[[], Env]) -> Env:
    leave_ctrl_c_to_parent()
    render_on(number)
    return make()
