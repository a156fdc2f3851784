"""PPO with critic warm-up and BC regularization: what recovers a pruned policy beyond SFT.

    rlrc rl CONFIG --policy BUNDLE --demonstrations DIR --out BUNDLE --seed 0

stable-baselines3's PPO. The log-probability of an OpenVLA's action is the sum over its tokens; the
value is a small MLP on the hidden state that the first action token is predicted from, so actor and
critic share the backbone. How pi0 comes by both is said in `training.flow_policy`. The reward is 1
when the task is done, else 0.

RLRC (arXiv 2506.17639) adds two things, whose settings it does not publish. Critic warm-up: for
some updates the value head alone learns, so that no random critic steers the actor. BC
regularization: the SFT loss on demonstrations joins PPO's in every optimiser step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import explained_variance, obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from rlrc_ros.errors import UserError
from training.actor_critic import Actions, TokenActions, TokenPolicy, VlaPolicy
from training.bundles import Trainable
from training.common import (
    MetricsLog,
    load_checkpoint,
    numpy_rng_tensors,
    optimizer_tensors,
    restore_numpy_rng,
    restore_optimizer,
    restore_rng,
    rng_tensors,
    save_checkpoint,
)
from training.config import RlConfig, stated
from training.data.batches import DemonstrationBatches
from training.envs.macro import MacroSteps
from training.envs.vector import make_vector, none_yet
from training.flow_policy import ChunkActions, FlowPolicy, flow_settings
from training.lora import Adapters, refuse_new
from training.ranks import ALONE, Ranks
from training.rollout import Batcher, Decoder


class RecoveryPPO(PPO):
    """PPO whose update adds critic warm-up, BC regularization, Huber value loss and exact resume.

    Every update starts with a reset of all environments into scenes that follow from the update's
    number, so that a run which was killed goes on exactly as if it had not been.
    """

    def __init__(
        self,
        policy: type[VlaPolicy],
        env: Actions,
        config: RlConfig,
        demonstrations: DemonstrationBatches,
        work: Path,
        adapters: Adapters | None = None,
        ranks: Ranks = ALONE,
        **kwargs: Any,
    ) -> None:
        self.config, self.demonstrations, self.work = config, demonstrations, work
        self.update_number = self.executed = 0
        self._simulator, self._adapters, self._ranks = env, adapters, ranks
        self._bc_batch = ranks.share_of(config.bc_batch, "rl: 'bc_batch'")
        super().__init__(
            policy,
            env,
            learning_rate=config.learning_rate,
            n_steps=config.steps_per_update,
            batch_size=ranks.share_of(config.minibatch, "rl: 'minibatch'"),
            n_epochs=config.epochs,
            gamma=config.gamma**env.replan_steps,
            gae_lambda=config.gae_lambda,
            clip_range=config.clip,
            max_grad_norm=config.max_grad_norm,
            **kwargs,
        )
        self._learning = {n: p for n, p in self.policy.named_parameters() if p.requires_grad}
        ranks.reseed()

    def collect_rollouts(
        self, env: Any, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int
    ) -> bool:
        """Roll out from fresh scenes, counting episodes and successes.

        One half of the environments is simulated while the other half's actions are decided.
        """
        self._begin_update(env)
        policy, simulator = self.policy, self._simulator
        policy.set_training_mode(False)
        rollout_buffer.reset()
        callback.on_rollout_start()
        going, seen = True, env.reset()
        for step in range(n_rollout_steps):
            for half in simulator.halves:
                if step:
                    self._observe(env, step - 1, half, seen)
                self._act(step, half, {name: value[half] for name, value in seen.items()})
            self.num_timesteps += env.num_envs
            going &= callback.on_step()
        for half in simulator.halves:
            self._observe(env, n_rollout_steps - 1, half, seen)
        with torch.no_grad():
            values = policy.predict_values(obs_as_tensor(seen, self.device))
        rollout_buffer.pos, rollout_buffer.full = n_rollout_steps, True
        rollout_buffer.compute_returns_and_advantage(values, self._last_episode_starts)
        callback.on_rollout_end()
        self._rolled_out = time.perf_counter()
        return going

    def _begin_update(self, env: VecEnv) -> None:
        """Give every environment its scenes, the policy its temperature and its weights."""
        self._began, self._simulated = time.perf_counter(), self._simulator.seconds
        self._ended: list[tuple[bool, int]] = []
        self._lengths, self._executed = np.zeros(env.num_envs, int), 0
        first = self.config.first_seed + 1_000_000 * (self.seed or 0)
        for i in range(env.num_envs):
            place = self._ranks.number * env.num_envs + i
            start = first + (self.update_number * self.config.environments + place) * 100
            env.env_method("set_seeds", range(start, start + 100), indices=i)
        assert isinstance(self.policy, VlaPolicy)
        sampled = sampling(self.update_number, self.config)
        self.policy.temperature, self.policy.optimizer.param_groups[0]["lr"] = sampled
        with self._adapters.folded() if self._adapters else nullcontext():
            self.policy.refresh()
        self._last_episode_starts = np.ones(env.num_envs, bool)

    @torch.no_grad()
    def _act(self, step: int, half: slice, seen: dict[str, NDArray[Any]]) -> None:
        """Decide for one half of the environments, and let them step."""
        buffer: Any = self.rollout_buffer
        actions, values, log_probability = self.policy(obs_as_tensor(seen, self.device))
        for name, value in seen.items():  # while a GPU decides
            buffer.observations[name][step, half] = value
        assert self._last_episode_starts is not None
        buffer.episode_starts[step, half] = self._last_episode_starts[half]
        chosen = actions.cpu().numpy()
        self._simulator.send(half, chosen)
        buffer.actions[step, half] = chosen.reshape(len(chosen), -1)
        buffer.values[step, half] = values.cpu().numpy()
        buffer.log_probs[step, half] = log_probability.cpu().numpy()

    def _observe(self, env: Any, step: int, half: slice, seen: dict[str, NDArray[Any]]) -> None:
        """What a half's step led to; what is seen now goes to `seen`."""
        following, rewards, dones, infos = self._simulator.receive(half)
        for name, value in env.transpose_observations(following).items():
            seen[name][half] = value
        executed = np.array([info.get("executed", 1) for info in infos])
        self._lengths[half] += executed
        self._executed += int(executed.sum())
        for i in np.flatnonzero(dones):
            self._ended.append((infos[i]["success"], int(self._lengths[half][i])))
            self._lengths[half][i] = 0
        # What a time limit cuts off would have gone on: Pardo et al., arXiv 1712.00378.
        cut = [i for i in np.flatnonzero(dones) if infos[i].get("TimeLimit.truncated")]
        if cut:
            last = [infos[i]["terminal_observation"] for i in cut]
            stacked = {name: np.stack([each[name] for each in last]) for name in seen}
            reached = obs_as_tensor(env.transpose_observations(stacked), self.device)
            with torch.no_grad():
                values = self.policy.predict_values(reached)
            rewards[cut] += self.gamma * values.cpu().numpy()
        self.rollout_buffer.rewards[step, half] = rewards
        assert self._last_episode_starts is not None
        self._last_episode_starts[half] = dones

    def train(self) -> None:
        """One PPO update."""
        config, policy = self.config, self.policy
        assert isinstance(policy, VlaPolicy)
        policy.set_training_mode(True)
        warming = self.update_number < config.critic_warmup
        actor = [p for n, p in self._learning.items() if n.startswith("model.")]
        for parameter in actor:
            parameter.requires_grad_(not warming)
        if config.bfloat16:
            self._rate_anew()
        sums: dict[str, list[float]] = {}
        for _ in range(self.n_epochs):
            for batch in self.rollout_buffer.get(self.batch_size):
                policy.optimizer.zero_grad(set_to_none=True)
                seen = self._add_gradients(batch, warming)
                self._ranks.average_gradients(policy.parameters())
                nn.utils.clip_grad_norm_(policy.parameters(), self.max_grad_norm)
                policy.optimizer.step()
                for name, value in seen.items():
                    sums.setdefault(name, []).append(value.item())
        for parameter in actor:
            parameter.requires_grad_(True)
        self._n_updates += self.n_epochs
        means = torch.tensor([np.mean(values) for values in sums.values()])
        shared = dict(zip(sums, self._ranks.mean(means).tolist(), strict=True))
        self._record(shared, warming)
        self.update_number += 1
        self.save_state()

    def _add_gradients(self, batch: Any, warming: bool) -> dict[str, Tensor]:
        """Of PPO's losses and BC's, part by part; returns what there is to watch."""
        config, policy = self.config, self.policy
        assert isinstance(policy, VlaPolicy)
        advantages = self._normalised(batch.advantages)
        seen: dict[str, Tensor] = {}
        for rows, weight in self._parts(len(advantages)):
            observations = {name: value[rows] for name, value in batch.observations.items()}
            with self._autocast():
                values, log_probability, entropy = policy.evaluate_actions(
                    observations, batch.actions[rows]
                )
            assert entropy is not None
            log_ratio = log_probability - batch.old_log_prob[rows]
            ratio = log_ratio.exp()
            clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
            gain = torch.min(advantages[rows] * ratio, advantages[rows] * clipped)
            old = batch.old_values[rows]
            losses = {
                "policy_loss": -gain.mean(),
                "value_loss": _value_loss(values, old, batch.returns[rows], config),
                "bc_loss": torch.zeros((), device=self.device),
                "entropy": entropy.mean(),
                # Schulman's estimator of the reverse KL divergence,
                # http://joschu.net/blog/kl-approx.html
                "kl": (ratio - 1 - log_ratio).mean(),
                "clip_share": ((ratio - 1).abs() > config.clip).float().mean(),
            }
            loss = losses["value_loss"] if warming else losses["policy_loss"] + losses["value_loss"]
            (weight * loss).backward()
            for name, value in losses.items():
                seen[name] = seen.get(name, 0) + weight * value.detach()
        coefficient = bc_coefficient(self.update_number, config)
        if coefficient and not warming:
            shown = policy.shown(self.demonstrations, self._bc_batch)
            for rows, _ in self._parts(len(shown)):
                with self._autocast():
                    loss = policy.bc_loss(shown, rows)
                (coefficient * loss).backward()
                seen["bc_loss"] += loss.detach()
        return seen

    def _parts(self, size: int) -> Iterator[tuple[slice, float]]:
        """A batch in parts that fit the memory, and what share of it each is."""
        step = self.config.micro_batch or size
        for start in range(0, size, step):
            rows = slice(start, min(start + step, size))
            yield rows, (rows.stop - rows.start) / size

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bool(self.config.bfloat16))

    def _normalised(self, advantages: Tensor) -> Tensor:
        """Mean 0 and standard deviation 1 over the minibatches of all processes."""
        if not self._ranks.many:
            return (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        mean = self._ranks.mean(advantages.mean())
        count = len(advantages) * self._ranks.count
        squares = self._ranks.mean((advantages - mean).square().sum()) * self._ranks.count
        return (advantages - mean) / ((squares / (count - 1)).sqrt() + 1e-8)

    @torch.no_grad()
    def _rate_anew(self) -> None:
        """Take the log-probabilities of what was done as they will be taken in learning."""
        buffer: Any = self.rollout_buffer
        flat = {k: v.reshape(-1, *v.shape[2:]) for k, v in buffer.observations.items()}
        done = buffer.actions.reshape(-1, buffer.actions.shape[-1])
        found = buffer.log_probs.reshape(-1)  # a view
        for start in range(0, len(done), self.config.micro_batch or self.batch_size):
            rows = slice(start, start + (self.config.micro_batch or self.batch_size))
            seen = {name: buffer.to_torch(value[rows]) for name, value in flat.items()}
            with self._autocast():
                rated = self.policy.evaluate_actions(seen, buffer.to_torch(done[rows]))[1]
            found[rows] = rated.float().cpu().numpy()

    def _record(self, losses: dict[str, float], warming: bool) -> None:
        learned, ranks, buffer = time.perf_counter(), self._ranks, self.rollout_buffer
        counts = [len(self._ended), sum(s for s, _ in self._ended), sum(n for _, n in self._ended)]
        counts.append(self._executed)
        rollout = self._rolled_out - self._began
        simulator = self._simulator.seconds - self._simulated
        times = [rollout, simulator, learned - self._rolled_out]
        facts = ranks.mean(torch.tensor([*counts, *times]))
        episodes, successes, steps, executed = (facts[:4] * ranks.count).round().int().tolist()
        rollout, simulator, learning = facts[4:].tolist()
        self.executed += executed
        values, returns = (
            torch.cat(ranks.gather(torch.from_numpy(x.flatten()))).numpy()
            for x in (buffer.values, buffer.returns)
        )
        row: dict[str, Any] = {
            "step": self.update_number,
            "environment_steps": self.executed,
            "episodes": episodes,
            "success": successes / max(1, episodes),
            "episode_steps": steps / max(1, episodes),
            "critic_warmup": int(warming),
            **losses,
            "bc_coefficient": 0.0 if warming else bc_coefficient(self.update_number, self.config),
            "explained_variance": float(explained_variance(values, returns)),
            "rollout_s": rollout,
            "learning_s": learning,
            "simulator_s": simulator,
            "inference_s": rollout - simulator,
            "environment_steps_per_s": executed / (rollout + learning),
        }
        if ranks.first:
            self._log.write(**row)
            for name, value in row.items():
                self._board.add_scalar(f"rl/{name}", value, self.update_number)
            self._board.flush()

    def save_state(self) -> None:
        """Write everything the next update depends on."""
        tensors: dict[str, Tensor] = {f"policy.{n}": p for n, p in self._learning.items()}
        tensors |= optimizer_tensors(self.policy.optimizer)
        # The rollout buffer shuffles with NumPy's global generator.
        tensors |= self._ranks.everyones({**rng_tensors(self.device), **numpy_rng_tensors()})
        facts = {
            "update": self.update_number,
            "timesteps": self.num_timesteps,
            "executed": self.executed,
            "ranks": self._ranks.count,
        }
        if self._ranks.first:
            save_checkpoint(self.work / "checkpoint", tensors, facts)

    @torch.no_grad()
    def restore_state(self) -> None:
        """Go on where an earlier run in the same directory was."""
        from torch.utils.tensorboard import SummaryWriter

        place, ranks = self.work / "checkpoint", self._ranks
        saved = ranks.from_first(load_checkpoint(place) if ranks.first else None)
        if saved:
            tensors, facts = saved
            ranks.require(facts.get("ranks", 1), place)
            if "rng.gauss" not in tensors:
                raise UserError(f"{place}: is of an earlier version; delete it to begin anew")
            for name, parameter in self._learning.items():
                parameter.copy_(tensors[f"policy.{name}"])
            restore_optimizer(self.policy.optimizer, tensors)
            names = [*rng_tensors(self.device), *numpy_rng_tensors()]
            own = ranks.mine(tensors, names)
            restore_rng(own, self.device)
            restore_numpy_rng(own)
            self.update_number, self.num_timesteps = facts["update"], facts["timesteps"]
            self.executed = facts.get("executed", self.num_timesteps * ranks.count)
        if ranks.first:
            self._log = MetricsLog(self.work / "log.csv", self.update_number)
            board = str(self.work / "tensorboard")
            self._board = SummaryWriter(board, purge_step=self.update_number)


def sampling(update: int, config: RlConfig) -> tuple[float, float]:
    """An update's temperature and the actor's learning rate."""
    cooling = config.cooling
    if cooling is None or update < cooling.at_update:
        return config.temperature, config.learning_rate
    return cooling.temperature, cooling.learning_rate


def bc_coefficient(update: int, config: RlConfig) -> float:
    """BC's part in an update's loss: constant, or in a straight line to its final value."""
    if config.bc_final is None:
        return config.bc_coefficient
    learning = max(1, config.updates - 1 - config.critic_warmup)
    share = min(1.0, max(0, update - config.critic_warmup) / learning)
    return config.bc_coefficient + share * (config.bc_final - config.bc_coefficient)


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
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train in place, resuming from `work` where an earlier run was killed.

    Returns the stage's facts. Rollouts are float32, and so is learning unless the configuration
    says otherwise: log-probabilities of what was sampled, one token or one step of denoising after
    the other, must equal those of all at once for the ratio to start at 1, and in bfloat16 they do
    not.

    batches: for pi0 `training.flow.FlowBatches`.
    ranks: who trains together, each with its part of the environments; the first one has `work`.

    Raises:
        UserError: the policy gives no probabilities, or does not fit the environment or the
            configuration; or numbers cannot be divided among `ranks`.
    """
    if trainable.config.architecture.action_head is not None:
        raise UserError(
            "rl: PPO takes probabilities of actions, and the policy gives chunks of continuous "
            "actions without any; recover it by sft alone"
        )
    if ranks.sharded:
        raise UserError("rl: rollouts take a whole policy; launch without FSDP")
    flow = flow_settings(config, trainable)
    environments = ranks.share_of(config.environments, "rl: 'environments'")
    work.mkdir(parents=True, exist_ok=True)
    codec, model = trainable.codec, trainable.model
    began = time.perf_counter()
    adapters = None
    if config.lora:
        refuse_new(trainable, "rl")
        torch.manual_seed(seed)
        adapters = Adapters(model, config.lora, torch.float32)
    venv = make_vector(
        none_yet,  # each update gives every environment its scenes
        environments,
        environment,
        partial(MacroSteps, actions=flow.replan_steps, gamma=config.gamma) if flow else None,
        latency=latency,
        image_size=trainable.config.architecture.towers[0].image_size,
    )
    kind: type[VlaPolicy]
    actions: Actions
    try:
        _refuse_other_images(trainable, venv, environment)
        if flow is None:
            kind, actions = TokenPolicy, TokenActions(venv, codec)
            with adapters.folded() if adapters else nullcontext():
                half = actions.halves[0]
                options: dict[str, Any] = {"decoder": Decoder(model, half.stop)}
        else:
            kind, actions = FlowPolicy, ChunkActions(venv, codec, model.config.expert, flow)
            options = {"flow": flow, "dimensions": codec.config.dimensions}
        algorithm = RecoveryPPO(
            kind,
            actions,
            config,
            batches,
            work,
            adapters,
            ranks,
            policy_kwargs={
                "model": model,
                "batcher": Batcher(trainable.processor, device),
                "value_learning_rate": config.value_learning_rate,
                "temperature": config.temperature,
                **options,
            },
            seed=seed,
            device=device,
        )
        algorithm.restore_state()
        total = config.updates * environments * config.steps_per_update
        if algorithm.num_timesteps < total:
            algorithm.learn(total - algorithm.num_timesteps, reset_num_timesteps=False)
    finally:
        venv.close()
    if adapters:
        adapters.fold()
    model.eval().requires_grad_(True)
    facts = {"seed": seed, "seconds": time.perf_counter() - began, **ranks.facts}
    return {**facts, **stated(replace(config, flow=flow))}


def _refuse_other_images(trainable: Trainable, venv: VecEnv, environment: str) -> None:
    """Say that the policy looks at something else than the environment shows."""
    architecture = trainable.config.architecture
    spaces: Any = venv.observation_space
    height, width = spaces["image"].shape[:2]
    size = architecture.towers[0].image_size
    if architecture.images != 1 or (height, width) != (size, size):
        raise UserError(
            f"rl: {environment} shows one image of {height}×{width}, and the policy takes "
            f"{architecture.images} of {size}×{size}"
        )
