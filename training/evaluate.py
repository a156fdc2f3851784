"""Evaluate a policy over many scenes.

    rlrc eval --policy tabletop-original --env tabletop --episodes 200 --seed 0

Scene `seed + i` is episode i, for every policy the same. On a CPU each process runs its own policy,
one observation at a time, as a robot would, so the latencies are a robot's too. On a GPU many
environments share a batch; latency is then measured afterwards, on single observations.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rlrc_ros.errors import UserError
from rlrc_ros.files import write_atomically
from rlrc_ros.trials.statistics import clopper_pearson, paired_difference
from rlrc_ros.vla.bundle import open_bundle
from rlrc_ros.vla.policy import empty_model
from training.common import cpu_count, parallel_map, pick_device
from training.envs.tabletop import SeededTabletop
from training.envs.vector import make_vector
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
    swap_instruction: bool = False
    """Show another valid instruction than the one that success is judged by."""
    latency: tuple[float, float] = (0.0, 0.0)
    """s; how late commands take effect in the simulator."""
    engine: str = "auto"
    dtype: str = "auto"


def evaluate(
    task: Evaluation, device: str | None = None, workers: int | None = None, log: Path | None = None
) -> list[EpisodeResult]:
    """Run the episodes; those in `log`, from a run that was interrupted, are not run again.

    Returns them in the order of seeds.

    Raises:
        UserError: the policy is damaged or does not fit, the log belongs to another evaluation, the
            device cannot be used or not with this engine or dtype, or a worker process died.
    """
    bundle = open_bundle(task.policy)
    empty_model(bundle)  # or say now, in one line, what is wrong with it
    run = _on_gpu if pick_device(device).type == "cuda" else _on_cpu
    if run is _on_gpu and (task.engine, task.dtype) != ("auto", "auto"):
        raise UserError(
            "on a GPU, episodes share batches in float32; engines and dtypes are for device 'cpu'"
        )
    seeds = list(range(task.seed, task.seed + task.episodes))
    results = _resume(log, task, bundle.hash) if log else {}
    missing = [seed for seed in seeds if seed not in results]
    file = log.open("a") if log else None
    with tqdm(
        total=len(seeds), initial=len(results), desc=f"eval {task.policy.name}", unit="episode"
    ) as bar:
        for result in run(task, missing, workers):
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
    header = json.dumps({**asdict(task), "policy": policy}) + "\n"
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


def _on_cpu(task: Evaluation, seeds: list[int], workers: int | None) -> Iterator[EpisodeResult]:
    count = min(workers or cpu_count(), max(1, len(seeds)))
    yield from parallel_map(_episode, seeds, count, _start, (task,))


_worker: dict[str, Any] = {}


def _start(task: Evaluation) -> None:
    """Give this process its own policy and environment, on one thread."""
    import torch

    from rlrc_ros.vla.policy import load_policy

    torch.set_num_threads(1)
    _worker["policy"] = load_policy(task.policy, engine=task.engine, dtype=task.dtype)  # type: ignore[arg-type]
    _worker["policy"].warm_up()
    _worker["env"] = SeededTabletop([], task.latency, task.swap_instruction)


def _episode(seed: int) -> EpisodeResult:
    from rlrc_ros.vla.processor import Observation

    policy, env = _worker["policy"], _worker["env"]
    camera = policy.config.cameras[0].name
    env.set_seeds([seed])
    seen, told = env.reset()
    latencies: list[float] = []
    ended = False
    while not ended:
        chunk = policy.act(
            Observation({camera: seen["image"]}, told["instruction"], seen["proprioception"])
        )
        latencies.append(chunk.latency_ms["total"])
        seen, _, terminated, truncated, told = env.step(chunk.actions[0])
        ended = terminated or truncated
    return EpisodeResult(
        seed,
        told["family"],
        told["instruction"],
        told["success"],
        len(latencies),
        tuple(round(x, 3) for x in latencies),
    )


def _on_gpu(task: Evaluation, seeds: list[int], workers: int | None) -> Iterator[EpisodeResult]:
    from rlrc_ros.vla.action_codec import ActionCodec
    from rlrc_ros.vla.policy import load_openvla
    from rlrc_ros.vla.processor import Processor

    device = pick_device("cuda")
    bundle = open_bundle(task.policy)
    actor = Actor(
        load_openvla(bundle, device),
        Processor(bundle.config, bundle.tokenizer()),
        ActionCodec(bundle.config.action_codec),
        device,
        min(workers or ENVIRONMENTS, max(1, len(seeds))),
    )
    yield from batched_episodes(actor, seeds, task.latency, task.swap_instruction)


def batched_episodes(
    actor: Actor, seeds: list[int], latency: tuple[float, float], swap_instruction: bool = False
) -> Iterator[EpisodeResult]:
    """One policy for all environments, a batch a step."""
    venv = make_vector(
        lambda i, n: seeds[i::n],
        actor.environments,
        latency=latency,
        swap_instruction=swap_instruction,
    )
    steps = np.zeros(actor.environments, int)
    for step in roll(actor, venv):
        steps += 1
        for i in step.ended:
            told = step.infos[i]
            facts = {key: told[key] for key in ("seed", "family", "instruction", "success")}
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
