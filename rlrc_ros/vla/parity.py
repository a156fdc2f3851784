"""Whether this program gets from a checkpoint what upstream's own code got from it.

`expected.json` beside the checkpoint holds upstream's results, one entry an image: the prompt's
`input_ids`, the greedily `generated` tokens of the action, `actions` by `unnorm_key`, the five
largest logits of the first token, and mean and standard deviation of the pixel values.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rlrc_ros.errors import UserError
from rlrc_ros.schema import from_dict, read_json
from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.bundle import open_bundle
from rlrc_ros.vla.openvla import Inputs, OpenVLA
from rlrc_ros.vla.openvla_checkpoint import Checkpoint, is_checkpoint, read_checkpoint
from rlrc_ros.vla.policy import load_openvla
from rlrc_ros.vla.processor import Processor

EXPECTED = "expected.json"
ACTIONS, LOGITS, PIXELS = 1e-6, 1e-3, 1e-4
"""Largest differences that count as agreement: upstream's results are from float32 too."""


@dataclass(frozen=True)
class Logits:
    """Some logits of the first action token."""

    ids: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Case:
    """What upstream got from one image and prompt."""

    image: str
    input_ids: tuple[int, ...]
    generated: tuple[int, ...]
    actions: dict[str, tuple[float, ...]]
    first_logits_top5: Logits
    pixel_values_mean: float
    pixel_values_std: float


def parity(directory: str | Path) -> dict[str, Any]:
    """Compare in float32 on the CPU.

    Returns:
        `agree`, and of each of the `cases`: `image`, `tokens_equal`, `max_action_diff` (over all
        data sets' statistics), `max_logit_diff` and `max_pixel_stat_diff`.

    Raises:
        UserError: the directory is no OpenVLA checkpoint, or its files make no sense.
    """
    bundle = open_bundle(directory)
    if not is_checkpoint(bundle.path):
        raise UserError(f"{bundle.path}: is a bundle; parity compares OpenVLA checkpoints")
    checkpoint = read_checkpoint(bundle.path)
    if checkpoint.architecture.action_head is not None:
        raise UserError(
            f"{bundle.path}: is an OpenVLA-OFT checkpoint, and parity compares action tokens"
        )
    cases = _cases(checkpoint)
    codecs = {
        key: ActionCodec(checkpoint.bundle_config(key).action_codec)
        for case in cases
        for key in case.actions
    }
    processor = Processor(bundle.config, None)
    # What is wrong with an image shall be known before the weights are read.
    pixels = [
        processor.pixel_values(processor.resized(read_rgb(bundle.path / case.image))[None])
        for case in cases
    ]
    model = load_openvla(bundle)
    results = [_compare(model, codecs, *each) for each in zip(cases, pixels, strict=True)]
    return {"agree": all(map(_agrees, results)), "cases": results}


def _agrees(result: dict[str, Any]) -> bool:
    return (
        result["tokens_equal"]
        and result["max_action_diff"] <= ACTIONS
        and result["max_logit_diff"] <= LOGITS
        and result["max_pixel_stat_diff"] <= PIXELS
    )


@torch.inference_mode()
def _compare(
    model: OpenVLA, codecs: dict[str, ActionCodec], case: Case, pixels: torch.Tensor
) -> dict[str, Any]:
    inputs = Inputs(torch.tensor([case.input_ids]), None, pixels, None)
    bins, _, state = model.generate(inputs)
    rows = model.language_model.lm_head.weight[list(case.first_logits_top5.ids)]
    logits = F.linear(state, rows)[0].numpy()
    actions = [
        np.abs(codecs[key].decode(bins[0].numpy()) - values) for key, values in case.actions.items()
    ]
    statistics = [
        pixels.mean().item() - case.pixel_values_mean,
        pixels.std().item() - case.pixel_values_std,
    ]
    return {
        "image": case.image,
        "tokens_equal": (bins[0] + model.first_action_id).tolist() == list(case.generated),
        "max_action_diff": float(np.max(actions)),
        "max_logit_diff": float(np.abs(logits - case.first_logits_top5.values).max()),
        "max_pixel_stat_diff": float(np.abs(statistics).max()),
    }


def _cases(checkpoint: Checkpoint) -> list[Case]:
    file, decoder = checkpoint.path / EXPECTED, checkpoint.architecture.decoder
    content = read_json(file)
    if not isinstance(content, list) or not content:
        raise UserError(f"{file}: expected a list of cases")
    tokens = checkpoint.bundle_config(None).action_codec.dimensions
    room = decoder.max_positions - checkpoint.architecture.towers[0].patches - tokens
    known, cases = {field.name for field in fields(Case)}, []
    for number, entry in enumerate(content):
        where = f"{file}: case {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{where}: expected keys and values")
        case = from_dict(Case, {k: v for k, v in entry.items() if k in known}, where)
        ids = (*case.input_ids, *case.first_logits_top5.ids)
        if Path(case.image).name != case.image:
            raise UserError(f"{where}: '{case.image}' is not a file of this directory")
        if not case.actions or not case.input_ids or not case.first_logits_top5.ids:
            raise UserError(f"{where}: actions, input_ids or first_logits_top5 are empty")
        if not all(0 <= token < decoder.vocab_size for token in ids):
            raise UserError(
                f"{where}: a token id is outside the vocabulary of {decoder.vocab_size}"
            )
        if any(len(values) != tokens for values in (*case.actions.values(), case.generated)):
            raise UserError(
                f"{where}: expected {tokens} values for each data set, and as many tokens"
            )
        if len(case.input_ids) > room:
            raise UserError(
                f"{where}: the prompt has {len(case.input_ids)} tokens, and the policy's context "
                f"has room for {room}"
            )
        cases.append(case)
    return cases


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """An image file as (H, W, 3) uint8 RGB.

    Raises:
        UserError: it cannot be read, or is anything but three channels of 8 bits: which of them to
            drop, or how to scale them, is not this program's to guess.
    """
    try:
        with Image.open(path) as image:
            raw = str(image.tile[0][3]) if image.tile else ""
            kind = f"{image.mode} (16 bits)" if "16" in raw else image.mode
            pixels = np.asarray(image) if kind == "RGB" else None
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{path}: not a readable image ({error})") from None
    if pixels is None:
        raise UserError(f"{path}: is {kind}; convert it to RGB with 8 bits a channel and no alpha")
    return pixels
