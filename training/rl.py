"""PPO with critic warm-up and BC regularization: what recovers a pruned policy beyond SFT.

    rlrc rl CONFIG --policy BUNDLE --demonstrations DIR --out BUNDLE --seed 0

stable-baselines3's PPO over action tokens. The policy's log-probability is the sum over the
action's tokens; the value is a small MLP on the hidden state that the first action token is
predicted from, so actor and critic share the backbone. The reward is 1 when the task is done, else
0.

RLRC (arXiv 2506.17639) adds two things, whose settings it does not publish. Critic warm-up: for
some updates the value head alone learns, so that no random critic steers the actor. BC
regularization: the SFT loss on demonstrations joins PPO's in every optimiser step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper
from torch import Tensor, nn

from rlrc_ros.errors import UserError
from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.openvla import Inputs, OpenVLA
from training.bundles import Trainable
from training.common import (
    MetricsLog,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    restore_rng,
    rng_tensors,
    save_checkpoint,
)
from training.config import RlConfig
from training.data.batches import DemonstrationBatches
from training.envs.vector import make_vector
from training.rollout import Batcher, Decoder
from training.sft import bc_loss


class TokenActions(VecEnvWrapper):
    """Takes action tokens, hands continuous actions on."""

    def __init__(self, venv: VecEnv, codec: ActionCodec) -> None:
        bins = gym.spaces.MultiDiscrete([codec.config.n_bins] * codec.config.dimensions)
        super().__init__(venv, action_space=bins)
        self._codec = codec

    def reset(self) -> Any:
        """Start every environment's next episode."""
        return self.venv.reset()

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Decode the tokens and step."""
        self.venv.step_async(self._codec.decode(actions))

    def step_wait(self) -> Any:
        """What the environments answered."""
        return self.venv.step_wait()


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
        """The value of each state."""
        return self.layers(state.float())[:, 0]


class TokenPolicy(ActorCriticPolicy):
    """An OpenVLA as stable-baselines3's actor-critic.

    Args:
        observation_space: as `SeededTabletop` has it.
        action_space: MultiDiscrete over the action's tokens.
        lr_schedule: the actor's learning rate.
        model: the policy to train, on its device.
        decoder: the same model, for rollouts.
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
        model: OpenVLA,
        decoder: Decoder,
        batcher: Batcher,
        value_learning_rate: float,
        temperature: float,
        **kwargs: Any,
    ) -> None:
        # In a tuple: modules cannot be registered before super().__init__.
        self._vla = (model,)
        self._batcher = batcher
        self._decoder = (decoder,)
        self._value_learning_rate, self.temperature = value_learning_rate, temperature
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    @property
    def decoder(self) -> Decoder:
        """The model as rollouts use it."""
        return self._decoder[0]

    def _build(self, lr_schedule: Callable[[float], float]) -> None:
        self.model = self._vla[0]
        self.value_head = ValueHead(self.model.config.decoder.hidden_size)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.model.parameters()), "lr": lr_schedule(1)},
                {"params": list(self.value_head.parameters()), "lr": self._value_learning_rate},
            ],
            weight_decay=0.0,
        )

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Sample: bins (B, D), values (B,), log-probabilities (B,)."""
        temperature = 0.0 if deterministic else self.temperature
        bins, log_probability, state = self.decoder(self._inputs(obs), temperature)
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

    def _inputs(self, obs: Any) -> Inputs:
        # stable-baselines3 moves the channels of everything that looks like an image to the front.
        return self._batcher({**obs, "image": obs["image"].permute(0, 2, 3, 1)})

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return self.forward(observation, deterministic)[0]


class RecoveryPPO(PPO):
    """PPO whose update adds critic warm-up, BC regularization, Huber value loss and exact resume.

    Every update starts with a reset of all environments into scenes that follow from the update's
    number, so that a run which was killed goes on exactly as if it had not been.
    """

    def __init__(
        self,
        policy: type[TokenPolicy],
        env: VecEnv,
        config: RlConfig,
        demonstrations: DemonstrationBatches,
        work: Path,
        **kwargs: Any,
    ) -> None:
        self.config, self.demonstrations, self.work = config, demonstrations, work
        self.update_number = 0
        super().__init__(
            policy,
            env,
            learning_rate=config.learning_rate,
            n_steps=config.steps_per_update,
            batch_size=config.minibatch,
            n_epochs=config.epochs,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            clip_range=config.clip,
            max_grad_norm=config.max_grad_norm,
            **kwargs,
        )

    def collect_rollouts(self, env: VecEnv, *args: Any, **kwargs: Any) -> bool:
        """Roll out from fresh scenes, counting episodes and successes."""
        self._began = time.perf_counter()
        self._ended: list[tuple[bool, int]] = []
        self._lengths = np.zeros(env.num_envs, int)
        first = self.config.first_seed + 1_000_000 * (self.seed or 0)
        for i in range(env.num_envs):
            start = first + (self.update_number * env.num_envs + i) * 100
            env.env_method("set_seeds", range(start, start + 100), indices=i)
        assert isinstance(self.policy, TokenPolicy)
        self.policy.decoder.refresh()
        self._last_obs = env.reset()  # type: ignore[assignment]
        self._last_episode_starts = np.ones(env.num_envs, bool)
        going = super().collect_rollouts(env, *args, **kwargs)
        self._rolled_out = time.perf_counter()
        return going

    def _update_info_buffer(
        self, infos: list[dict[str, Any]], dones: NDArray[np.bool_] | None = None
    ) -> None:
        self._lengths += 1
        for i in np.flatnonzero(dones if dones is not None else []):
            self._ended.append((infos[i]["success"], int(self._lengths[i])))
            self._lengths[i] = 0

    def train(self) -> None:
        """One PPO update."""
        config, policy = self.config, self.policy
        assert isinstance(policy, TokenPolicy)
        policy.set_training_mode(True)
        warming = self.update_number < config.critic_warmup
        for parameter in policy.model.parameters():
            parameter.requires_grad_(not warming)
        sums: dict[str, list[float]] = {}
        for _ in range(self.n_epochs):
            for batch in self.rollout_buffer.get(self.batch_size):
                values, log_probability, entropy = policy.evaluate_actions(
                    batch.observations, batch.actions
                )
                advantages = batch.advantages
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                log_ratio = log_probability - batch.old_log_prob
                ratio = log_ratio.exp()
                clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
                policy_loss = -torch.min(advantages * ratio, advantages * clipped).mean()
                value_loss = _value_loss(values, batch.old_values, batch.returns, config)
                loss = value_loss if warming else policy_loss + value_loss
                bc = torch.zeros(())
                if config.bc_coefficient and not warming:
                    bc = bc_loss(policy.model, self.demonstrations.sample(config.bc_batch))
                    loss = loss + config.bc_coefficient * bc
                policy.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), self.max_grad_norm)
                policy.optimizer.step()
                seen = {
                    "policy_loss": policy_loss,
                    "value_loss": value_loss,
                    "bc_loss": bc,
                    "entropy": entropy.mean(),
                    # Schulman's estimator of the reverse KL divergence,
                    # http://joschu.net/blog/kl-approx.html
                    "kl": (ratio - 1 - log_ratio).mean(),
                    "clip_share": ((ratio - 1).abs() > config.clip).float().mean(),
                }
                for name, value in seen.items():
                    sums.setdefault(name, []).append(value.item())
        for parameter in policy.model.parameters():
            parameter.requires_grad_(True)
        self._n_updates += self.n_epochs
        self._record({name: float(np.mean(values)) for name, values in sums.items()}, warming)
        self.update_number += 1
        self.save_state()

    def _record(self, losses: dict[str, float], warming: bool) -> None:
        learned = time.perf_counter()
        successes = [success for success, _ in self._ended]
        buffer = self.rollout_buffer
        row: dict[str, Any] = {
            "step": self.update_number,
            "environment_steps": self.num_timesteps,
            "episodes": len(self._ended),
            "success": float(np.mean(successes)) if successes else 0.0,
            "episode_steps": float(np.mean([steps for _, steps in self._ended]))
            if successes
            else 0.0,
            "critic_warmup": int(warming),
            **losses,
            "explained_variance": float(
                explained_variance(buffer.values.flatten(), buffer.returns.flatten())
            ),
            "rollout_s": self._rolled_out - self._began,
            "learning_s": learned - self._rolled_out,
        }
        self._log.write(**row)
        for name, value in row.items():
            self.logger.record(f"rl/{name}", value)

    def save_state(self) -> None:
        """Write everything the next update depends on."""
        tensors = {f"policy.{k}": v for k, v in self.policy.state_dict().items()}
        tensors |= optimizer_tensors(self.policy.optimizer) | rng_tensors(self.device)
        # The rollout buffer shuffles with NumPy's global generator.
        _, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
        tensors["rng.numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
        facts = {"update": self.update_number, "timesteps": self.num_timesteps, "rng": rest}
        save_checkpoint(self.work / "checkpoint", tensors, facts)

    def restore_state(self) -> None:
        """Go on where an earlier run in the same directory was."""
        saved = load_checkpoint(self.work / "checkpoint")
        if saved:
            tensors, facts = saved
            weights = {
                k.removeprefix("policy."): v for k, v in tensors.items() if k.startswith("policy.")
            }
            self.policy.load_state_dict(weights)
            restore_optimizer(self.policy.optimizer, tensors)
            restore_rng(tensors, self.device)
            keys = tensors["rng.numpy"].numpy().astype(np.uint32)
            np.random.set_state(("MT19937", keys, *facts["rng"]))  # noqa: NPY002
            self.update_number, self.num_timesteps = facts["update"], facts["timesteps"]
        self._log = MetricsLog(self.work / "log.csv", self.update_number)


def _value_loss(values: Tensor, old_values: Tensor, returns: Tensor, config: RlConfig) -> Tensor:
    """Huber loss, the worse of the clipped and the free prediction."""
    near = old_values + (values - old_values).clamp(-config.value_clip, config.value_clip)
    free = F.huber_loss(values, returns, reduction="none", delta=config.huber_delta)
    held = F.huber_loss(near, returns, reduction="none", delta=config.huber_delta)
    return torch.max(free, held).mean()


def run(
    config: RlConfig,
    trainable: Trainable,
    batches: DemonstrationBatches,
    *,
    seed: int,
    device: torch.device,
    work: Path,
    latency: tuple[float, float],
    environment: str = "tabletop",
) -> dict[str, Any]:
    """Train in place, resuming from `work` where an earlier run was killed.

    Returns the stage's facts. Everything is float32: log-probabilities of the sampled tokens, taken
    with the KV cache, must equal the teacher-forced ones for the ratio to start at 1, and in
    bfloat16 they do not.
    """
    if trainable.config.architecture.action_head is not None:
        raise UserError(
            "rl: PPO here is over action tokens, and the policy gives chunks of continuous "
            "actions; recover it by sft alone"
        )
    work.mkdir(parents=True, exist_ok=True)
    processor, codec = trainable.processor, trainable.codec
    began = time.perf_counter()
    # Each update gives every environment its scenes.
    size = trainable.config.architecture.towers[0].image_size
    venv = make_vector(
        lambda *_: range(0), config.environments, environment, latency=latency, image_size=size
    )
    algorithm = RecoveryPPO(
        TokenPolicy,
        TokenActions(venv, codec),
        config,
        batches,
        work,
        policy_kwargs={
            "model": trainable.model,
            "decoder": Decoder(trainable.model, config.environments),
            "batcher": Batcher(processor, device),
            "value_learning_rate": config.value_learning_rate,
            "temperature": config.temperature,
        },
        seed=seed,
        device=device,
    )
    try:
        algorithm.restore_state()
        total = config.updates * config.environments * config.steps_per_update
        if algorithm.num_timesteps < total:
            algorithm.learn(total - algorithm.num_timesteps, reset_num_timesteps=False)
    finally:
        venv.close()
    trainable.model.eval()
    return {"seed": seed, "seconds": time.perf_counter() - began, **asdict(config)}
