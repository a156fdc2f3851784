"""Evaluate a policy over many scenes.

    rlrc eval --policy tabletop-original --env tabletop --episodes 200 --seed 0
    rlrc eval --policy runs/libero/original --env libero_object --episodes 500

Scene `seed + i` is episode i, for every policy the same. On a CPU each process runs its own policy,
one observation at a time, as a robot would, so the latencies are a robot's too. On a GPU many
environments share a batch; latency is then measured afterwards, on single observations.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from rlrc_ros.errors import UserError
from rlrc_ros.files import write_atomically
from rlrc_ros.trials.statistics import clopper_pearson, paired_difference
from rlrc_ros.video import write_webm
from rlrc_ros.vla.bundle import Bundle, open_bundle
from rlrc_ros.vla.policy import empty_model
from training.common import cpu_count, parallel_map, pick_device
from training.config import benchmark_scenes
from training.envs import libero
from training.envs.registry import at_once, contract, make_environment
from training.envs.vector import make_vector, none_yet
from training.rollout import Actor, roll

ENVIRONMENTS = 128
"""Side by side on a GPU: a step's fixed cost is shared by them."""


@dataclass(frozen=True)
class EpisodeResult:
    """How one episode went; latencies are empty where episodes shared a batch."""

    seed: int
    family: str
    instruction: str
    success: bool
    steps: int
    latency_ms: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What to evaluate, and on what."""

    policy: Path
    episodes: int
    seed: int
    environment: str = "tabletop"
    """One of `training.envs.registry.ENVIRONMENTS`."""
    swap_instruction: bool = False
    """Show another valid instruction than the one that success is judged by."""
    latency: tuple[float, float] = (0.0, 0.0)
    """s; how late commands take effect in the simulator."""
    engine: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class Films:
    """Which scenes to film, by seed, and where to put the videos, `SEED.webm`."""

    seeds: tuple[int, ...] = ()
    directory: Path = Path()

    def path(self, seed: int) -> Path:
        """Where the video of a scene is."""
        return self.directory / f"{seed}.webm"

    def write(self, seed: int, frames: list[NDArray[np.uint8]], environment: str) -> None:
        """Write what the policy saw in a scene.

        Raises:
            UserError: this OpenCV cannot write VP8.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.path(seed)
        if not write_webm(path, frames, contract(environment).control_rate):
            raise UserError(f"{path}: this OpenCV cannot write VP8; evaluate without videos")


def evaluate(
    task: Evaluation,
    device: str | None = None,
    workers: int | None = None,
    log: Path | None = None,
    films: Films = Films(),
) -> list[EpisodeResult]:
    """Run the episodes; those in `log`, from a run that was interrupted, are not run again.

    Returns them in the order of seeds.

    Raises:
        UserError: the policy is damaged or does not fit, there are not so many scenes, the log
            belongs to another evaluation or has a scene that should be filmed, the device cannot be
            used or not with this engine or dtype, or a worker process died.
    """
    on_libero = task.environment != "tabletop"
    scenes = benchmark_scenes(task.environment)
    if on_libero and task.seed + task.episodes > scenes:
        raise UserError(
            f"{task.environment} has the scenes 0 to {scenes - 1}, and the evaluation "
            f"asks for {task.seed} to {task.seed + task.episodes - 1}"
        )
    contract(task.environment)  # imports what it takes, here rather than in a worker
    bundle = open_bundle(task.policy)
    empty_model(bundle)  # or say now, in one line, what is wrong with it
    feels = bundle.config.proprioception
    if feels is not None and feels.ee_pose:
        raise UserError(
            f"{task.policy} takes the end effector's pose, and {task.environment} gives positions "
            "of joints"
        )
    run = _on_gpu if pick_device(device).type == "cuda" else _on_cpu
    if run is _on_gpu and (task.engine, task.dtype) != ("auto", "auto"):
        raise UserError(
            "on a GPU, episodes share batches in float32; engines and dtypes are for device 'cpu'"
        )
    seeds = list(range(task.seed, task.seed + task.episodes))
    results = _resume(log, task, bundle.hash) if log else {}
    missing = [seed for seed in seeds if seed not in results]
    done = [seed for seed in films.seeds if seed not in missing]
    if unfilmed := [seed for seed in done if not films.path(seed).exists()]:
        reason = "in the log already; name another" if unfilmed[0] in seeds else "not evaluated"
        raise UserError(f"scene {unfilmed[0]} cannot be filmed: it is {reason}")
    if on_libero:  # the scenes of a task one after another
        missing.sort(key=partial(libero.scene_of, task.environment))
    file = log.open("a") if log else None
    with tqdm(
        total=len(seeds), initial=len(results), desc=f"eval {task.policy.name}", unit="episode"
    ) as bar:
        for result in run(task, missing, workers, films):
            results[result.seed] = result
            if file:
                file.write(json.dumps(asdict(result)) + "\n")
                file.flush()
                os.fsync(file.fileno())
            bar.update()
            bar.set_postfix(success=f"{np.mean([r.success for r in results.values()]):.3f}")
    if file:
        file.close()
    return [results[seed] for seed in seeds]


def _resume(log: Path, task: Evaluation, policy: str) -> dict[int, EpisodeResult]:
    """The episodes in the log of this policy, given by its bundle's hash.

    Leaves the log with whole lines only, the header at least.
    """
    stated = asdict(task)
    if task.environment == "tabletop":  # as before there was a choice
        del stated["environment"]
    header = json.dumps({**stated, "policy": policy}) + "\n"
    written = log.read_text(errors="replace") if log.exists() else ""
    lines = [line for line in written.splitlines(keepends=True) if line.endswith("\n")]
    if not lines and header.startswith(written):  # new, or killed while writing its first line
        lines = [header]
    if not lines or lines[0] != header:
        raise UserError(f"{log}: holds another evaluation; name another file, or delete this one")
    log.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(log, "".join(lines))
    rows = [json.loads(line) for line in lines[1:]]
    return {
        row["seed"]: EpisodeResult(**{**row, "latency_ms": tuple(row["latency_ms"])})
        for row in rows
    }


def _units(bundle: Bundle, environment: str) -> NDArray[np.float64]:
    """(D,): what the policy's 1 is, in metres, radians and opening.

    A checkpoint that was trained on LIBERO's own demonstrations acts in its controller's units.
    """
    keys = [stage.get("unnorm_key") or "" for stage in bundle.provenance.get("stages", [])]
    units = np.ones(bundle.config.action_codec.dimensions)
    if environment != "tabletop" and any("libero" in key for key in keys):
        units[:6] = libero.ACTION_HIGH[:6]
    return units


def _on_cpu(
    task: Evaluation, seeds: list[int], workers: int | None, films: Films
) -> Iterator[EpisodeResult]:
    count = min(workers or cpu_count(), max(1, len(seeds)))
    yield from parallel_map(_episode, seeds, count, _start, (task, films))


_worker: dict[str, Any] = {}


def _start(task: Evaluation, films: Films) -> None:
    """Give this process its own policy and environment, on one thread."""
    import torch

    from rlrc_ros.vla.policy import load_policy

    torch.set_num_threads(1)
    policy = load_policy(task.policy, engine=task.engine, dtype=task.dtype)  # type: ignore[arg-type]
    policy.warm_up()
    _worker.update(policy=policy, films=films, environment=task.environment)
    _worker["units"] = _units(policy.bundle, task.environment)
    _worker["env"] = make_environment(
        task.environment,
        [],
        image_size=policy.config.architecture.towers[0].image_size,
        latency=task.latency,
        swap_instruction=task.swap_instruction,
    )


def _episode(seed: int) -> EpisodeResult:
    from rlrc_ros.vla.processor import Observation

    policy, env = _worker["policy"], _worker["env"]
    camera = policy.config.cameras[0].name
    env.set_seeds([seed])
    seen, told = env.reset()
    latencies: list[float] = []
    frames: list[NDArray[np.uint8]] = []
    filmed = seed in _worker["films"].seeds
    ended = False
    while not ended:
        if filmed:
            frames.append(seen["image"])
        chunk = policy.act(
            Observation({camera: seen["image"]}, told["instruction"], seen["proprioception"])
        )
        latencies.append(chunk.latency_ms["total"])
        action = chunk.actions[0] * _worker["units"]
        seen, _, terminated, truncated, told = env.step(action)
        ended = terminated or truncated
    if filmed:
        _worker["films"].write(seed, [*frames, seen["image"]], _worker["environment"])
    return EpisodeResult(
        seed,
        told["family"],
        told["instruction"],
        told["success"],
        len(latencies),
        tuple(round(x, 3) for x in latencies),
    )


def _on_gpu(
    task: Evaluation, seeds: list[int], workers: int | None, films: Films
) -> Iterator[EpisodeResult]:
    from rlrc_ros.vla.action_codec import ActionCodec
    from rlrc_ros.vla.policy import load_model, processor_of

    device = pick_device("cuda")
    bundle = open_bundle(task.policy)
    codec, units = bundle.config.action_codec, _units(bundle, task.environment)
    scaled = replace(codec, q01=tuple(codec.q01 * units), q99=tuple(codec.q99 * units))
    actor = Actor(
        load_model(bundle, device),
        processor_of(bundle.config, bundle.tokenizer()),
        ActionCodec(scaled),
        device,
        min(workers or at_once(task.environment, ENVIRONMENTS), max(1, len(seeds))),
    )
    yield from batched_episodes(actor, seeds, task, films)


def batched_episodes(
    actor: Actor,
    seeds: list[int],
    task: Evaluation,
    films: Films = Films(),
) -> Iterator[EpisodeResult]:
    """One policy for all environments, a batch a step."""
    venv = make_vector(
        none_yet,
        actor.environments,
        task.environment,
        image_size=actor.image_size,
        latency=task.latency,
        swap_instruction=task.swap_instruction,
    )
    steps = np.zeros(actor.environments, int)
    frames: dict[int, list[NDArray[np.uint8]]] = {}
    for step in roll(actor, venv, seeds):
        steps[step.which] += 1
        for i in step.which:
            if (seed := step.told[i]["seed"]) in films.seeds:
                frames.setdefault(seed, []).append(step.observation["image"][i].copy())
        for i in step.ended:
            told = step.infos[i]
            facts = {key: told[key] for key in ("seed", "family", "instruction", "success")}
            if told["seed"] in frames:
                films.write(told["seed"], frames.pop(told["seed"]), task.environment)
            yield EpisodeResult(**facts, steps=int(steps[i]))
            steps[i] = 0


def summarise(results: Iterable[EpisodeResult]) -> dict[str, Any]:
    """Success with its Clopper-Pearson interval, overall and by family, and latency percentiles."""
    results = list(results)
    latencies = [
        ms for result in results for ms in result.latency_ms[1:]
    ]  # the first is colder than the rest
    families = sorted({result.family for result in results})
    summary = _rate(results)
    summary["families"] = {f: _rate([r for r in results if r.family == f]) for f in families}
    summary["mean_steps"] = float(np.mean([result.steps for result in results]))
    p50, p99 = np.percentile(latencies, [50, 99]) if latencies else (None, None)
    summary["latency_ms"] = {"p50": p50 and float(p50), "p99": p99 and float(p99)}
    return summary


def _rate(results: list[EpisodeResult]) -> dict[str, Any]:
    successes = sum(result.success for result in results)
    interval = clopper_pearson(successes, len(results))
    return {
        "success_rate": successes / len(results),
        "ci95": [interval.low, interval.high],
        "successes": successes,
        "episodes": len(results),
    }


def compare(results: list[EpisodeResult], other: list[EpisodeResult]) -> dict[str, Any]:
    """First minus second on the same scenes: the paired difference with Tango's 95% interval."""
    both = sum(a.success and b.success for a, b in zip(results, other, strict=True))
    first = sum(a.success for a in results) - both
    second = sum(b.success for b in other) - both
    neither = len(results) - both - first - second
    found = paired_difference(both, second, first, neither)
    return {
        "difference": found.estimate,
        "ci95": [found.interval.low, found.interval.high],
        "both": both,
        "first_only": first,
        "second_only": second,
        "neither": neither,
    }
