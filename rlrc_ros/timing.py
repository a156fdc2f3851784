"""How long an action takes, on what, and how two series of times compare.

What is slow to import is imported where it is used: the command line reads this for its help.
"""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlrc_ros.vla import Observation, Policy
    from rlrc_ros.vla.config import BundleConfig

INSTRUCTION = "put the red cube on the blue plate"
"""What the shipped policies are asked where nothing else is said."""
OBSERVATIONS = 8
"""Different ones that the rounds go through."""
WARM_UP_ROUNDS = 5
RESAMPLES = 2000
"""Of the bootstrap."""


def synthetic_observation(config: BundleConfig, instruction: str, seed: int) -> Observation:
    """What a policy's contract asks for, with noise in the image and the joints near their mean."""
    import numpy as np

    from rlrc_ros.vla import Observation

    rng = np.random.default_rng(seed)
    images = {
        camera.name: rng.integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
        for camera in config.cameras
    }
    joints = config.proprioception
    proprioception = None if joints is None else rng.normal(joints.mean, joints.std)
    return Observation(images, instruction, proprioception)


def timed(policy: Policy, observation: Observation) -> float:
    """One action from observation to numbers, in ms; nothing is left to do on a GPU after it."""
    import torch

    on_gpu = policy.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(policy.device)
    start = time.perf_counter()
    policy.act(observation)
    if on_gpu:
        torch.cuda.synchronize(policy.device)
    return (time.perf_counter() - start) * 1e3


def interleaved(policies: Sequence[Policy], instruction: str, rounds: int) -> Iterator[list[float]]:
    """One action's time of each policy in each round, in ms; rounds to warm up come before.

    All of them act in every round, so that whatever slows the machine down meets all alike; their
    order in a round is random, so that none always follows the same one.
    """
    seen = [
        [synthetic_observation(policy.config, instruction, seed) for seed in range(OBSERVATIONS)]
        for policy in policies
    ]
    order = random.Random(0)
    for number in range(WARM_UP_ROUNDS + rounds):
        times = [0.0] * len(policies)
        for i in order.sample(range(len(policies)), len(policies)):
            times[i] = timed(policies[i], seen[i][number % OBSERVATIONS])
        if number >= WARM_UP_ROUNDS:
            yield times


def percentiles(times_ms: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile."""
    import numpy as np

    p50, p99 = np.percentile(times_ms, [50, 99])
    return float(p50), float(p99)


def ratio_interval(times: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """95% interval of the ratio of the medians of two equally long series, by the bootstrap.

    Whole rounds are resampled (the percentile method, Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, section 13.3): what slowed a round down slowed both series down.
    """
    import numpy as np

    both = np.array([times, reference])
    rng = np.random.default_rng(0)
    ratios = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        rounds = rng.integers(both.shape[1], size=both.shape[1])
        median, reference_median = np.median(both[:, rounds], axis=1)
        ratios[i] = median / reference_median
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def machine() -> dict[str, Any]:
    """What was measured on: JSON-able."""
    import torch

    cpu = platform.processor()
    if (facts := Path("/proc/cpuinfo")).is_file():
        lines = facts.read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = models[0] if models else cpu
    return {
        "cpu": cpu or platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
