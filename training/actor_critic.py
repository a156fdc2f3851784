"""Policies as stable-baselines3's actor-critic, and their actions on the way to environments.

`TokenPolicy` decides by action tokens (OpenVLA); `training.flow_policy` has pi0's. `training.rl` is
the same for both.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn, VecEnvWrapper
from torch import Tensor, nn

from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.openvla import Inputs
from training.data.batches import DemonstrationBatches
from training.envs.vector import Environments, InProcess
from training.rollout import Batcher, Decoder
from training.sft import bc_loss


class Actions(VecEnvWrapper):
    """Takes what a policy samples, hands continuous actions on.

    Attributes:
        replan_steps: actions that are executed between two decisions.
        halves: environments that step on their own.
        seconds: that environments have been waited for so far.
    """

    replan_steps = 1

    def __init__(self, venv: Environments | InProcess, sampled: gym.spaces.Space) -> None:
        super().__init__(venv, action_space=sampled)
        self._stepped, self.halves = venv, venv.halves
        self.seconds = 0.0

    @abstractmethod
    def decode(self, sampled: NDArray[Any]) -> NDArray[np.float64]:
        """What the environments take: m, rad, gripper opening."""

    def reset(self) -> Any:
        """Start every environment's next episode."""
        self._began = time.perf_counter()
        return self._timed(self.venv.reset())

    def step_async(self, actions: NDArray[Any]) -> None:
        """Decode and step."""
        self._began = time.perf_counter()
        self.venv.step_async(self.decode(actions))

    def step_wait(self) -> Any:
        """What the environments answered."""
        return self._timed(self.venv.step_wait())

    def send(self, half: slice, sampled: NDArray[Any]) -> None:
        """Decode, and let one of `halves` step."""
        self._stepped.send(half, self.decode(sampled))

    def receive(self, half: slice) -> VecEnvStepReturn:
        """What it answered."""
        self._began = time.perf_counter()
        return self._timed(self._stepped.receive(half))

    def _timed(self, answer: Any) -> Any:
        self.seconds += time.perf_counter() - self._began
        return answer


class ValueHead(nn.Module):
    """(B, hidden) -> (B,). RL4VLA's sizes."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        last = nn.Linear(128, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(
            nn.Linear(hidden, 512), nn.SiLU(), nn.Linear(512, 128), nn.SiLU(), last
        )

    def forward(self, state: Tensor) -> Tensor:
        """The value of each state, in float32 whatever the policy is in."""
        with torch.autocast(state.device.type, enabled=False):
            return self.layers(state.float())[:, 0]


class VlaPolicy(ActorCriticPolicy):
    """A vision-language-action model whose value head shares its backbone.

    Args:
        observation_space: as `SeededTabletop` has it.
        action_space: of what it samples.
        lr_schedule: the actor's learning rate.
        model: the policy to train, on its device.
        batcher: observations to the model's inputs.
        value_learning_rate: the value head's.
        temperature: at which actions are sampled and log-probabilities taken.
    """

    def __init__(
        self,
        observation_space: gym.spaces.Space,
        action_space: gym.spaces.Space,
        lr_schedule: Callable[[float], float],
        *,
        model: Any,
        batcher: Batcher,
        value_learning_rate: float,
        temperature: float,
        **kwargs: Any,
    ) -> None:
        # In a tuple: modules cannot be registered before super().__init__.
        self._vla = (model,)
        self._batcher = batcher
        self._value_learning_rate, self.temperature = value_learning_rate, temperature
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    @property
    @abstractmethod
    def state_width(self) -> int:
        """Of the hidden state that values are told from."""

    @abstractmethod
    def refresh(self) -> None:
        """Take over the weights that the model has by now, for a rollout."""

    @abstractmethod
    def shown(self, demonstrations: DemonstrationBatches, size: int) -> Any:
        """A batch of demonstrations, with whatever its loss draws at random drawn."""

    @abstractmethod
    def bc_loss(self, shown: Any, rows: slice) -> Tensor:
        """The part that some rows have in the batch's SFT loss."""

    def _build(self, lr_schedule: Callable[[float], float]) -> None:
        self.model = self._vla[0]
        self.value_head = ValueHead(self.state_width)
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for p in self.model.parameters() if p.requires_grad],
                    "lr": lr_schedule(1),
                },
                {"params": list(self.value_head.parameters()), "lr": self._value_learning_rate},
            ],
            weight_decay=0.0,
        )

    def _inputs(self, obs: Any) -> Inputs:
        # stable-baselines3 moves the channels of everything that looks like an image to the front.
        return self._batcher({**obs, "image": obs["image"].permute(0, 2, 3, 1)})

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return self.forward(observation, deterministic)[0]


class TokenActions(Actions):
    """Takes action tokens."""

    def __init__(self, venv: Environments | InProcess, codec: ActionCodec) -> None:
        super().__init__(
            venv, gym.spaces.MultiDiscrete([codec.config.n_bins] * codec.config.dimensions)
        )
        self._codec = codec

    def decode(self, sampled: NDArray[np.int64]) -> NDArray[np.float64]:
        """(B, D) bins -> (B, D)."""
        return self._codec.decode(sampled)


class TokenPolicy(VlaPolicy):
    """An OpenVLA: categorical distributions over the action's tokens.

    Args:
        arguments: as of `VlaPolicy`; the action space is MultiDiscrete over the tokens.
        decoder: the same model, for rollouts.
        options: as of `VlaPolicy`.
    """

    def __init__(self, *arguments: Any, decoder: Decoder, **options: Any) -> None:
        self._decoder = (decoder,)
        super().__init__(*arguments, **options)

    @property
    def state_width(self) -> int:
        """The decoder's: the state is where the first action token is predicted from."""
        return self._vla[0].config.decoder.hidden_size

    def refresh(self) -> None:
        """Fuse the weights anew."""
        self._decoder[0].refresh()

    def shown(self, demonstrations: DemonstrationBatches, size: int) -> Any:
        """A `Batch`."""
        return demonstrations.sample(size)

    def bc_loss(self, shown: Any, rows: slice) -> Tensor:
        """Cross-entropy of the demonstrated tokens, by its share of the rows."""
        share = (rows.stop - rows.start) / len(shown)
        return share * bc_loss(self.model, shown[rows])

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Sample: bins (B, D), values (B,), log-probabilities (B,)."""
        temperature = 0.0 if deterministic else self.temperature
        bins, log_probability, state = self._decoder[0](self._inputs(obs), temperature)
        return bins, self.value_head(state), log_probability

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values, log-probabilities and entropies of given bins, (B,), summed over tokens."""
        bins = actions.long()
        logits, state = self.model(self._inputs(obs), bins)
        log_p = (logits.float() / self.temperature).log_softmax(-1)
        chosen = log_p.gather(-1, bins[..., None])[..., 0].sum(-1)
        return self.value_head(state), chosen, -(log_p.exp() * log_p).sum((-1, -2))

    def predict_values(self, obs: Any) -> Tensor:
        """Values, (B,)."""
        return self.value_head(self.model.state(self._inputs(obs)))
