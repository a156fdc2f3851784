"""Record demonstrations from the scripted expert, and corrections of a policy by it.

python -m training.data.collect --config config/training/tabletop.yaml --out runs/demos
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from rlrc_ros.errors import UserError
from training.common import cpu_count, parallel_map, render_on
from training.config import CorrectionsConfig, DemonstrationsConfig, load_config
from training.data.demonstrations import (
    EPISODES_PER_SHARD,
    Episode,
    write_shard,
    write_shards,
)
from training.envs.registry import contract, make_environment, training_scenes
from training.envs.vector import make_vector, none_yet
from training.rollout import Actor, roll


def collect_demonstrations(
    out: Path,
    config: DemonstrationsConfig,
    workers: int | None = None,
    environment: str = "tabletop",
    image_size: int = 128,
) -> None:
    """Record successful episodes of the expert.

    Shards that are there already are not made again.

    Raises:
        UserError: there is no expert for this environment, or it solved none of a shard's scenes.
    """
    contract(environment)  # imports what it takes, here rather than in a worker
    out.mkdir(parents=True, exist_ok=True)
    seeds = training_scenes(environment, config.first_seed, config.episodes)
    chunks = [seeds[i : i + EPISODES_PER_SHARD] for i in range(0, len(seeds), EPISODES_PER_SHARD)]
    paths = [out / f"shard-{i:05d}.safetensors" for i in range(len(chunks))]
    jobs = [
        (i, path, chunk, config, environment, image_size)
        for i, (path, chunk) in enumerate(zip(paths, chunks, strict=True))
        if not path.exists()
    ]
    with tqdm(
        total=len(chunks), initial=len(chunks) - len(jobs), desc="demonstrations", unit="shard"
    ) as bar:
        for _ in parallel_map(_record_shard, jobs, workers or cpu_count()):
            bar.update()


def _record_shard(job: tuple[int, Path, Sequence[int], DemonstrationsConfig, str, int]) -> None:
    number, path, seeds, config, environment, size = job
    render_on(number)
    env = make_environment(environment, [], latency=config.latency, label=True, image_size=size)
    try:
        episodes = [_record_episode(env, seed, config) for seed in seeds]
    finally:
        env.close()
    solved = [episode for episode in episodes if episode.facts["success"]]
    if not solved:
        raise UserError(
            f"{environment}: the expert solved none of the scenes {seeds[0]} to {seeds[-1]}; "
            "lower the noise, or take other scenes"
        )
    write_shard(path, solved)


def _record_episode(env: Any, seed: int, config: DemonstrationsConfig) -> Episode:
    rng = np.random.default_rng([seed, 11])
    # Every disturbed episode has its own strength, up to twice the mean.
    strength = rng.uniform(0, 2) if rng.random() < config.disturbed_share else 0.0
    recording = _Recording()
    env.set_seeds([seed])
    observation, told = env.reset()
    ended = False
    while not ended:
        label = told["expert_action"]
        recording.add(told["png"], observation["proprioception"], label, told["grounding"])
        if config.vary_view:
            env.world.change_view(rng)
        if config.jumps and rng.random() < config.jumps.share:
            env.world.displace(rng, config.jumps.distance)
        action = _disturb(label, strength, config, rng)
        observation, _, success, truncated, told = env.step(action)
        ended = success or truncated
    facts = {key: told[key] for key in ("seed", "family", "instruction", "success")}
    return recording.episode(**facts, source="expert")


def _disturb(
    action: NDArray[np.float64],
    strength: float,
    config: DemonstrationsConfig,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    noise = np.zeros(7)
    noise[:3] = rng.normal(0, config.translation_noise, 3)
    noise[5] = rng.normal(0, config.rotation_noise)
    executed = action + strength * noise
    if rng.random() < strength * config.gripper_flips:
        executed[6] = 1 - executed[6]
    return executed


class _Recording:
    """An episode being recorded."""

    def __init__(self) -> None:
        self._images: list[bytes] = []
        self._steps: list[tuple[NDArray[np.floating], ...]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(
        self,
        png: bytes,
        proprioception: NDArray[np.float32],
        action: NDArray[np.float64],
        grounding: NDArray[np.float64],
    ) -> None:
        self._images.append(png)
        self._steps.append((proprioception, action, grounding))

    def episode(self, **facts: Any) -> Episode:
        columns = zip(*self._steps, strict=True)
        proprioception, actions, grounding = (np.asarray(c, np.float32) for c in columns)
        return Episode(self._images, proprioception, actions, grounding, facts)


def collect_corrections(
    out: Path,
    actor: Actor,
    config: CorrectionsConfig,
    latency: tuple[float, float],
    environment: str = "tabletop",
) -> float:
    """Let a policy act greedily and record what the expert would have done in every state.

    Returns how many of the episodes the policy brought to success by itself, as a share.

    Raises:
        UserError: the expert, who was to take over, solved none of the scenes.
    """
    venv = make_vector(
        none_yet,
        actor.environments,
        environment,
        image_size=actor.image_size,
        latency=latency,
        label=True,
        max_steps=config.max_steps,
    )
    finished: list[Episode] = []
    alone: list[bool] = []
    recordings = [_Recording() for _ in range(actor.environments)]

    @cache
    def patience(seed: int) -> int:
        """Control steps before the expert takes over."""
        first, last = config.takeover or (config.max_steps, config.max_steps)
        return int(np.random.default_rng([seed, 13]).integers(first, last, endpoint=True))

    def instead(environment: int, told: dict[str, Any]) -> NDArray[np.float64] | None:
        over = len(recordings[environment]) >= patience(told["seed"])
        return told["expert_action"] if over else None

    with tqdm(total=config.episodes, desc="corrections", unit="episode") as bar:
        seeds = training_scenes(environment, config.first_seed, config.episodes)
        for step in roll(actor, venv, seeds, instead):
            for i in step.which:
                told, proprioception = step.told[i], step.observation["proprioception"][i].copy()
                label, grounding = told["expert_action"], told["grounding"]
                recordings[i].add(told["png"], proprioception, label, grounding)
            for i in step.ended:
                told = step.infos[i]
                facts = {key: told[key] for key in ("seed", "family", "instruction", "success")}
                alone.append(told["success"] and len(recordings[i]) <= patience(told["seed"]))
                if told["success"] or not config.takeover:
                    finished.append(recordings[i].episode(**facts, source="corrections"))
                recordings[i] = _Recording()
                bar.update()
                bar.set_postfix(success=f"{np.mean(alone):.3f}")
    if not finished:
        raise UserError(
            f"{environment}: no correction succeeded, though the expert took over; give it more "
            "time ('max_steps'), or let it take over earlier ('takeover')"
        )
    finished.sort(key=lambda episode: episode.facts["seed"])  # not who was done first
    unfinished = out.with_name(f"{out.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write_shards(unfinished, finished)
    unfinished.rename(out)
    return float(np.mean(alone))


def main() -> None:
    """Record demonstrations from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for the shards")
    parser.add_argument("--config", type=Path, default=Path("config/training/tabletop.yaml"))
    parser.add_argument("--episodes", type=int, help="instead of the configuration's")
    parser.add_argument("--first-seed", type=int, help="instead of the configuration's")
    arguments = parser.parse_args()
    given = {"episodes": arguments.episodes, "first_seed": arguments.first_seed}
    config = load_config(arguments.config)
    wanted = {k: v for k, v in given.items() if v is not None}
    demonstrations = dataclasses.replace(config.demonstrations, **wanted)
    size = config.model.tower.image_size
    collect_demonstrations(
        arguments.out, demonstrations, environment=config.environment, image_size=size
    )


if __name__ == "__main__":
    main()
