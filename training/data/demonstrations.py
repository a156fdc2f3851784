"""Demonstrations on disk and in memory.

A directory of shards, `shard-00000.safetensors` and so on, each some dozens of episodes: frames as
PNG (lossless, a tenth of the size), proprioception, actions, and the episodes' facts as JSON in the
header. A shard is written under a temporary name and renamed, so every shard there is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlrc_ros.errors import UserError

EPISODES_PER_SHARD = 32


@dataclass
class Episode:
    """One recorded episode of T control steps.

    Attributes:
        images: frames as PNG files, T times as many as cameras; a step's are side by side.
        proprioception: (T, P) float32.
        actions: (T, D) float32, what the expert did or would have done.
        grounding: (T, G) float32, where the things are that words can mean, m in the base frame;
            the simulator tells. NaN where nobody knows.
        facts: seed, family, instruction, success, and so on.
    """

    images: list[bytes]
    proprioception: NDArray[np.float32]
    actions: NDArray[np.float32]
    grounding: NDArray[np.float32]
    facts: dict[str, Any]


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """(H, W, 3) RGB as a PNG file."""
    return cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def write_shard(path: Path, episodes: Sequence[Episode]) -> None:
    """Write episodes to one file, whole or not at all."""
    frames = [image for episode in episodes for image in episode.images]
    tensors: dict[str, NDArray[Any]] = {
        "png": np.frombuffer(b"".join(frames), np.uint8),
        "png_ends": np.cumsum([len(frame) for frame in frames]).astype(np.int64),
        "proprioception": np.concatenate([episode.proprioception for episode in episodes]),
        "actions": np.concatenate([episode.actions for episode in episodes]),
        "grounding": np.concatenate([episode.grounding for episode in episodes]),
    }
    facts = [{**episode.facts, "steps": len(episode.actions)} for episode in episodes]
    cameras = len(frames) // len(tensors["actions"])
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {"episodes": json.dumps(facts), "cameras": str(cameras)})
    partial.replace(path)


def write_shards(directory: Path, episodes: Iterable[Episode]) -> int:
    """Write episodes into a directory that is there and empty; returns how many."""
    count, rest = 0, iter(episodes)
    while shard := list(islice(rest, EPISODES_PER_SHARD)):
        number = count // EPISODES_PER_SHARD
        write_shard(directory / f"shard-{number:05d}.safetensors", shard)
        count += len(shard)
    return count


@dataclass
class Demonstrations:
    """Every step of some episodes, in memory.

    Attributes:
        images: (N, H, W, 3) uint8, or (N, cameras, H, W, 3) where there are several.
        proprioception: (N, P) float32.
        actions: (N, D) float32.
        grounding: (N, G) float32, NaN where it is not known.
        prompts: (N,) index into `instructions`.
        instructions: the different instructions.
        episodes: the episodes' facts, in order; `steps` of them add up to N.
    """

    images: NDArray[np.uint8]
    proprioception: NDArray[np.float32]
    actions: NDArray[np.float32]
    grounding: NDArray[np.float32]
    prompts: NDArray[np.int64]
    instructions: list[str]
    episodes: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.actions)


def read(directory: Path) -> Demonstrations:
    """Load every shard of a directory.

    Raises:
        UserError: there is none, one is damaged, or not all hold frames of as many cameras.
    """
    paths = _shards(directory)
    with ThreadPoolExecutor() as pool:
        shards = list(pool.map(_read_shard, paths))
        if len(counts := sorted({shard.cameras for shard in shards})) > 1:
            raise UserError(
                f"{directory}: some shards hold frames of {counts[0]} camera, others of {counts[1]}"
            )
        # Into one array at once: there is not always room for the images twice.
        ends = np.cumsum([len(shard.pngs) for shard in shards])
        first = _decode_png(shards[0].pngs[0])
        images = np.empty((ends[-1], *first.shape), np.uint8)
        list(pool.map(_decode_into, np.split(images, ends[:-1]), shards))
    episodes = [facts for shard in shards for facts in shard.facts]
    instructions = sorted({facts["instruction"] for facts in episodes})
    prompts = [instructions.index(facts["instruction"]) for facts in episodes]
    return Demonstrations(
        images=images if counts == [1] else images.reshape(-1, counts[0], *first.shape),
        proprioception=np.concatenate([shard.proprioception for shard in shards]),
        actions=np.concatenate([shard.actions for shard in shards]),
        grounding=np.concatenate([shard.grounding for shard in shards]),
        prompts=np.repeat(prompts, [facts["steps"] for facts in episodes]).astype(np.int64),
        instructions=instructions,
        episodes=episodes,
    )


def read_proprioception(directory: Path) -> NDArray[np.float32]:
    """(N, P) of every step in a directory, without its images.

    Raises:
        UserError: there is none, or one is damaged.
    """
    return np.concatenate([_read_shard(path).proprioception for path in _shards(directory)])


def _shards(directory: Path) -> list[Path]:
    paths = sorted(directory.glob("shard-*.safetensors"))
    if not paths:
        raise UserError(f"{directory}: no demonstrations there (shard-*.safetensors)")
    return paths


class _Shard(NamedTuple):
    pngs: list[NDArray[np.uint8]]
    proprioception: NDArray[np.float32]
    actions: NDArray[np.float32]
    grounding: NDArray[np.float32]
    facts: list[dict[str, Any]]
    cameras: int


def _read_shard(path: Path) -> _Shard:
    names = ("png", "png_ends", "proprioception", "actions", "grounding")
    try:
        with safe_open(str(path), framework="np") as file:
            facts = json.loads(file.metadata()["episodes"])
            cameras = int(file.metadata().get("cameras", 1))
            data, ends, proprioception, actions, grounding = map(file.get_tensor, names)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(
            f"{path}: not a readable shard of demonstrations ({error}); delete it and record again"
        ) from None
    return _Shard(np.split(data, ends[:-1]), proprioception, actions, grounding, facts, cameras)


def _decode_into(images: NDArray[np.uint8], shard: _Shard) -> None:
    for image, png in zip(images, shard.pngs, strict=True):
        image[:] = _decode_png(png)


def _decode_png(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert image is not None  # written by this module
    return image[..., ::-1].astype(np.uint8, copy=False)
