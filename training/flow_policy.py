"""pi0 as PPO wants it: its sampler made stochastic, so that what it samples has a log-probability.

pi0 solves an ODE, x ← x − v/K in K steps from noise at time 1 to actions at time 0: given the noise
there is nothing random in it, and the density of what comes out cannot be computed. Flow-GRPO (Liu
et al., arXiv 2505.05470, eq. 8) adds noise and takes out what the noise would change of the
marginals, with times as here, from 1, noise, down:

    dx = [v + σ²/(2t) · (x + (1 − t) v)] dt + σ dw,    σ = a √(t / (1 − t)),    dt < 0

At every time x has the distribution that the ODE gives it, and a step of it (eq. 9) is Gaussian. So
the log-probability of a path of denoising is a sum of Gaussian log-densities, which is what PPO's
ratio is of. πRL (Chen et al., arXiv 2510.25889, "Flow-SDE") does so with pi0, and a = 0.5. Its
other way, and ReinFlow's (arXiv 2505.22094), is a network that learns how much noise to add. Here
the noise is fixed: nothing has to be trained, saved or thrown away beside the policy, and the ODE
that acts after training has the distribution that was trained, which a learnt noise does not give.

The first k actions of a chunk are executed before the next decision, as one step of a semi-Markov
decision process: see `training.envs.macro`. All of the path is noisy, or its marginals would be
others. The log-probability is of the k actions that are executed, without the padding: the rest of
the chunk is as much a part of what they are conditioned on as the observation is. With pi0's chunks
of 50 × 32 the rest would be nearly all of the sum, and the ratio noise. πRL's code does the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlrc_ros.errors import UserError
from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.config import ExpertConfig
from rlrc_ros.vla.openvla import Inputs
from rlrc_ros.vla.pi0 import Prefix, start_noise
from training.actor_critic import Actions, VlaPolicy
from training.bundles import Trainable
from training.config import FlowRlConfig, RlConfig
from training.data.batches import DemonstrationBatches
from training.envs.vector import Environments, InProcess
from training.flow import FlowBatch, flow_loss

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Noisy actions (B, chunk, action_width) and times (B,) to the flow there."""


def step_times(steps: int, device: torch.device) -> Tensor:
    """(steps,): the time that each step starts at, from 1 down."""
    return torch.tensor([1.0 - number / steps for number in range(steps)], device=device)


def step_deviations(steps: int, level: float, device: torch.device) -> Tensor:
    """(steps,): standard deviation of the noise that each step adds, σ √Δ.

    With Δ = 1/steps, σ = level √(t / (1 − t)) comes to level √(t / i) at step i. At the first step,
    where σ is infinite, 1 − t is taken to be Δ, as upstream's code takes it.
    """
    number = torch.arange(steps, device=device).clamp(min=1)
    return level * (step_times(steps, device) / number).sqrt()


def step_mean(x: Tensor, flow: Tensor, time: Tensor, deviation: Tensor, steps: int) -> Tensor:
    """Where a step leads but for its noise (Flow-GRPO, eq. 9), for times that fall.

    Args:
        x: (…, chunk, action_width).
        flow: there, noise − actions.
        time: where the step starts; as `deviation`, anything that broadcasts with x.
        deviation: of its noise, σ √Δ.
        steps: of the whole path.
    """
    return x - flow / steps - deviation.square() / (2 * time) * (x + (1 - time) * flow)


def sample_path(
    velocity: Velocity, start: Tensor, steps: int, level: float
) -> tuple[Tensor, Tensor]:
    """Denoise, keeping everything on the way.

    Args:
        velocity: the flow.
        start: (B, chunk, action_width), from the standard normal distribution.
        steps: K.
        level: a; at 0 these are the steps of the ODE.

    Returns:
        The path, (B, K + 1, chunk, action_width), the actions last; and the means of its steps,
        (B, K, chunk, action_width).
    """
    times = step_times(steps, start.device)
    deviations = step_deviations(steps, level, start.device)
    path, means = [start], []
    for time, deviation in zip(times, deviations, strict=True):
        x = path[-1]
        means.append(step_mean(x, velocity(x, time.expand(len(x))), time, deviation, steps))
        path.append(means[-1] + deviation * torch.randn_like(x))
    return torch.stack(path, 1), torch.stack(means, 1)


class ChunkActions(Actions):
    """Takes paths of denoising, of which the first actions at their end are executed."""

    def __init__(
        self,
        venv: Environments | InProcess,
        codec: ActionCodec,
        expert: ExpertConfig,
        flow: FlowRlConfig,
    ) -> None:
        most = float(np.finfo(np.float32).max)  # stable-baselines3 wants limits, and clips to them
        shape = (expert.steps + 1, expert.chunk, expert.action_width)
        super().__init__(venv, gym.spaces.Box(-most, most, shape))
        self.replan_steps, self._codec = flow.replan_steps, codec

    def decode(self, sampled: NDArray[np.float32]) -> NDArray[np.float64]:
        """(B, K + 1, chunk, action_width) -> (B, replan_steps, D)."""
        actions = sampled[:, -1, : self.replan_steps, : self._codec.config.dimensions]
        return self._codec.unscale(actions.astype(np.float64))


class FlowPolicy(VlaPolicy):
    """A pi0, sampled by the SDE; what PPO calls its action is the path of denoising.

    The value is told from the action expert's last hidden state at the proprioception: it has seen
    images, instruction and proprioception, and no action, so the critic knows what the actor knows
    and is the same for whatever is sampled. (πRL averages over the states at the noisy actions.)

    The start of a path is drawn anew for each decision, the one noise that a gradient knows nothing
    of. Nobody but PPO samples so: engines and evaluation solve the ODE.

    Args:
        arguments: as of `VlaPolicy`; the action space is `ChunkActions`'s.
        flow: how much noise there is at a temperature of 1, which scales it, and how many actions
            are executed.
        dimensions: of an action, without the padding.
        options: as of `VlaPolicy`.
    """

    def __init__(
        self, *arguments: Any, flow: FlowRlConfig, dimensions: int, **options: Any
    ) -> None:
        self._flow, self._dimensions = flow, dimensions
        super().__init__(*arguments, **options)

    @property
    def _expert(self) -> ExpertConfig:
        return self._vla[0].config.expert

    @property
    def state_width(self) -> int:
        """The action expert's."""
        return self._expert.hidden_size

    def refresh(self) -> None:
        """Rollouts run the modules as they are."""

    def shown(self, demonstrations: DemonstrationBatches, size: int) -> FlowBatch:
        """With noise and times drawn."""
        batch: Any = demonstrations.sample(size)
        return batch.disturbed()

    def bc_loss(self, shown: FlowBatch, rows: slice) -> Tensor:
        """Error of the flow, by the rows' share of the actions that are known."""
        share = shown.known[rows].sum() / shown.known.sum()
        return share * flow_loss(self.model, shown[rows])

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Sample: paths (B, K + 1, chunk, action_width), values (B,), log-probabilities (B,).

        deterministic: the ODE's path from the noise that every engine starts from.
        """
        inputs, expert = self._inputs(obs), self._expert
        prefix = self.model.prefix(inputs)

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            return self.model.velocity(prefix, inputs.proprioception, x, time)

        size, device = (len(inputs), expert.chunk, expert.action_width), prefix.mask.device
        if deterministic:
            start, level = start_noise(expert).to(device).expand(size), 0.0
        else:
            start, level = torch.randn(size, device=device), self._noise_level
        path, means = sample_path(velocity, start, expert.steps, level)
        value = self._value(prefix, inputs)
        if deterministic:
            return path, value, torch.zeros_like(value)
        return path, value, self._log_probability(path, means)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values, log-probabilities and entropies of given paths, (B,).

        All steps of all paths go through the expert at once. The entropy is that of the noise, the
        same for whatever the weights are.
        """
        inputs, expert = self._inputs(obs), self._expert
        steps, batch = expert.steps, len(inputs)
        path = actions.view(batch, steps + 1, expert.chunk, expert.action_width)
        prefix = self.model.prefix(inputs)
        x, times = path[:, :-1], step_times(steps, path.device)
        felt = inputs.proprioception
        flow = self.model.velocity(
            _repeated(prefix, steps),
            None if felt is None else felt.repeat_interleave(steps, 0),
            x.flatten(0, 1),
            times.repeat(batch),
        )
        deviations = self._deviations(path.device)
        means = step_mean(
            x, flow.view_as(x), times[:, None, None], deviations[:, None, None], steps
        )
        places = self._flow.replan_steps * self._dimensions
        entropy = places * (0.5 * math.log(2 * math.pi * math.e) + deviations.log()).sum()
        value = self._value(prefix, inputs)
        return value, self._log_probability(path, means), entropy.expand_as(value)

    def predict_values(self, obs: Any) -> Tensor:
        """Values, (B,)."""
        inputs = self._inputs(obs)
        return self._value(self.model.prefix(inputs), inputs)

    def _value(self, prefix: Prefix, inputs: Inputs) -> Tensor:
        return self.value_head(self.model.state(prefix, inputs.proprioception))

    @property
    def _noise_level(self) -> float:
        return self._flow.noise_level * self.temperature

    def _deviations(self, device: torch.device) -> Tensor:
        return step_deviations(self._expert.steps, self._noise_level, device)

    def _log_probability(self, path: Tensor, means: Tensor) -> Tensor:
        """(B,): of the executed actions' places, over all steps."""
        executed = (..., slice(self._flow.replan_steps), slice(self._dimensions))
        scale = self._deviations(path.device)[:, None, None]
        found = torch.distributions.Normal(means[executed], scale).log_prob(path[:, 1:][executed])
        return found.sum((1, 2, 3))


def flow_settings(config: RlConfig, trainable: Trainable) -> FlowRlConfig | None:
    """How a pi0 is sampled, everything decided; None of another policy.

    Raises:
        UserError: they are for another policy.
    """
    expert = trainable.config.architecture.expert
    if expert is None:
        if config.flow is not None:
            raise UserError("rl: 'flow' is about the sampler of a pi0 policy; leave it out")
        return None
    flow = config.flow or FlowRlConfig()
    if flow.replan_steps > expert.chunk:
        raise UserError(
            f"rl: 'replan_steps' is {flow.replan_steps}, and the policy's chunks have "
            f"{expert.chunk} actions"
        )
    return replace(flow, replan_steps=flow.replan_steps or math.ceil(expert.chunk / 2))


def _repeated(prefix: Prefix, times: int) -> Prefix:
    """Each observation's so many times, in a row."""
    keys, values = (
        [tensor.repeat_interleave(times, 0) for tensor in tensors]
        for tensors in (prefix.keys, prefix.values)
    )
    return Prefix(keys, values, prefix.mask.repeat_interleave(times, 0))
