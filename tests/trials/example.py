"""A synthetic trial to test with: what people would have run, with every special case in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from rlrc_ros.trials.frames import EpisodeFrames, FrameStrip
from rlrc_ros.trials.records import EpisodeRecord

ARMS = ("original", "compressed")
TASKS = {"pick": "pick up the red block", "place": "put the red block on the plate"}


def record(pair: int = 0, arm: str = "original", **changes: Any) -> EpisodeRecord:
    """One episode, plain unless changed."""
    task = sorted(TASKS)[pair % 2]
    plain = EpisodeRecord(
        trial_id="trial-1",
        pair=pair,
        order=ARMS.index(arm) if arm in ARMS else 0,
        arm=arm,
        episode_id=f"{pair:04d}-{arm}",
        seed=1000 + pair,
        task=task,
        instruction=TASKS[task],
        outcome="success",
        score=None,
        termination_reason="finished",
        steps=100,
        duration_s=20.0,
        latency_ms_p50=50.0,
        latency_ms_p99=80.0,
        deadline_misses=0,
        skipped_steps=0,
        guard={"limited_linear_speed": 0},
        bag_uri=f"bags/{pair:04d}-{arm}",
        message="",
    )
    return dataclasses.replace(plain, **changes)


def trial(
    pairs: int, rates: tuple[float, float] = (0.85, 0.8), seed: int = 0
) -> list[EpisodeRecord]:
    """Random outcomes at the given success rates, original and compressed, with latencies."""
    rng = np.random.default_rng(seed)
    records = []
    for pair in range(pairs):
        order = rng.permutation(2)
        episodes = []
        for i, arm in enumerate(ARMS):
            success = rng.random() < rates[i]
            p50 = float((260.0, 31.0)[i] * rng.lognormal(0, 0.05))
            steps = int(rng.integers(60, 160) if success else 200)
            episodes.append(
                record(
                    pair,
                    arm,
                    order=int(order[i]),
                    outcome="success" if success else "failure",
                    termination_reason="finished" if success else "timeout",
                    steps=steps,
                    duration_s=steps / 5,
                    latency_ms_p50=p50,
                    latency_ms_p99=p50 * float(rng.uniform(1.1, 1.6)),
                    deadline_misses=int(rng.poisson((20, 0.2)[i])),
                    guard={"limited_linear_speed": int(rng.poisson(2)), "rejected_stale": 0},
                )
            )
        records += sorted(episodes, key=lambda r: r.order)
    return records


def policies() -> dict[str, dict[str, Any]]:
    """What `rlrc inspect --json` would print for both arms."""
    rng = np.random.default_rng(1)
    full = {"vision": 0.74e9, "projector": 0.07e9, "llm": 6.73e9}
    cut = {"vision": 0.74e9, "projector": 0.07e9, "llm": 1.29e9}

    def policy(name: str, parts: dict[str, float], size: float, **more: Any) -> dict[str, Any]:
        parameters = {part: int(count) for part, count in parts.items()}
        weights = {part: int(size * count) for part, count in parts.items()}
        return {
            "name": name,
            "parameters": {**parameters, "total": sum(parameters.values())},
            "bytes": {**weights, "total": sum(weights.values())},
            "memory": {**weights, "total": sum(weights.values())},
            "bundle_bytes": sum(weights.values()) + 2_000_000,
            **more,
        }

    layers = [{"heads": 32, "kv_heads": 32, "ffn": 11008}] * 32
    pruned = [
        {"heads": int(h), "kv_heads": int(h), "ffn": int(64 * f)}
        for h, f in zip(rng.integers(2, 6, 30), rng.integers(12, 24, 30), strict=True)
    ]
    return {
        "original": policy(
            "openvla-7b", full, 2, hash="9f2c" * 16, layers=layers, quantization=None, provenance={}
        ),
        "compressed": policy(
            "openvla-7b-rlrc",
            cut,
            0.9,
            hash="41ab" * 16,
            layers=[layers[0], *pruned, layers[-1]],
            quantization="nf4",
            provenance={
                "parent": "9f2c" * 16,
                "command": "rlrc compress openvla-7b --out openvla-7b-rlrc --seed 3",
                "seed": 3,
                "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
                "metrics": {"prune": {"sparsity": 0.81}, "sft": {"loss": 0.213}},
            },
        ),
    }


def strip(pair: int = 0) -> FrameStrip:
    """A disc that crosses the picture; the compressed policy's episode ends earlier."""
    times = [float(t) for t in range(8)]

    def frames(count: int, colour: tuple[int, int, int]) -> list[np.ndarray]:
        y, x = np.mgrid[0:96, 0:128]
        pictures = []
        for i in range(count):
            picture = np.full((96, 128, 3), 210, np.uint8)
            picture[60:] = (150, 120, 90)
            picture[(x - 15 - 14 * i) ** 2 + (y - 50) ** 2 < 100] = colour
            pictures.append(picture)
        return pictures

    return FrameStrip(
        times=times,
        episodes={
            "original": EpisodeFrames(frames(8, (200, 30, 30)), "success", 7.4),
            "compressed": EpisodeFrames(frames(6, (30, 30, 200)), "failure", 5.2),
        },
        pair=pair,
    )


STAGES = [
    {"stage": "prune", "seconds": 41.5, "parameters": 2_100_000_000, "success": None},
    {
        "stage": "sft",
        "seconds": 3600.0,
        "parameters": 2_100_000_000,
        "success": 0.71,
        "loss": 0.213,
    },
    {"stage": "rl", "seconds": 7200.0, "parameters": 2_100_000_000, "success": 0.88},
    {"stage": "quantize", "seconds": 12.0, "parameters": 2_100_000_000, "success": 0.87},
]
