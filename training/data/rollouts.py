"""Recorded rollouts as demonstrations: what `rlrc sft` trains from, out of bags."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlrc_ros.rollouts.alignment import Step
from rlrc_ros.rollouts.export import Rollout
from rlrc_ros.vla.config import BundleConfig
from rlrc_ros.vla.processor import Processor
from training.data.demonstrations import Episode, encode_png, write_shards


class SftStep(NamedTuple):
    """A control step as a shard holds it."""

    pngs: tuple[bytes, ...]
    """One of each camera."""
    proprioception: NDArray[np.float32]
    action: NDArray[np.float32]


class SftEncoder:
    """Steps as a policy is trained on them: the images as its towers see them, to the last bit."""

    def __init__(self, config: BundleConfig) -> None:
        self._processor = Processor(config, None)

    def __call__(self, step: Step) -> SftStep:
        """Resize, encode, round to float32."""
        observation = step.observation
        values = observation.proprioception
        return SftStep(
            tuple(map(encode_png, self._processor.images(observation))),
            np.zeros(0, np.float32) if values is None else values.astype(np.float32),
            step.action.astype(np.float32),
        )


def write_sft(directory: Path, rollouts: Iterable[Rollout[SftStep]]) -> None:
    """Write shards of episodes into a directory that is there and empty."""
    write_shards(directory, map(_episode, rollouts))


def _episode(rollout: Rollout[SftStep]) -> Episode:
    pngs, proprioception, actions = zip(*rollout.steps, strict=True)
    # No simulator tells where the things are.
    grounding = np.full((len(pngs), 1), np.nan, np.float32)
    frames = [png for step in pngs for png in step]
    return Episode(frames, np.stack(proprioception), np.stack(actions), grounding, rollout.facts)
