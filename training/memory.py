"""What trains a large policy in little memory: activations computed anew instead of kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlrc_ros.errors import UserError


def transformer_blocks(model: Any) -> dict[str, list[nn.Module]]:
    """The blocks that a pass goes through: `decoder`, with pi0's expert, and `vision`."""
    decoders = [model.language_model, *([model.expert] if hasattr(model, "expert") else [])]
    blocks = [layer for decoder in decoders for layer in decoder.model.layers]
    return {"decoder": blocks, "vision": _vision_blocks(model.vision_backbone)}


def _vision_blocks(backbone: Any) -> list[nn.Module]:
    if not hasattr(backbone, "featurizer"):  # pi0's, of transformers
        return list(getattr(backbone, "vision_model", backbone).encoder.layers)
    towers = [backbone.featurizer, backbone.fused_featurizer]
    # Of a pretrained tower the last block but one is what is looked at.
    return [
        block
        for tower in towers
        if tower is not None
        for block in (tower.blocks if tower.kind == "vit" else tower.blocks[:-1])
    ]


@contextmanager
def recomputed(blocks: Iterable[nn.Module], compiled: bool) -> Iterator[None]:
    """Keep of each block its input alone; its inside is computed once more in the backward pass.

    A block must not draw random numbers, and must not be called with a cache that it adds to.

    compiled: compile the inside, as `Module.compile` would the whole.
    """
    changed = list(blocks)
    for block in changed:
        inside = torch.compile(block.forward, dynamic=False) if compiled else block.forward
        block.forward = partial(checkpoint, inside, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in changed:
            del block.forward


def refuse_recomputing(model: Any) -> None:
    """Say that a pi0's layers cannot be computed twice: they hand each other a cache that grows.

    Raises:
        UserError: it is one.
    """
    if hasattr(model, "expert"):
        raise UserError(
            "sft: 'gradient_checkpointing' is not there for a pi0 policy; leave it out, and take a "
            "smaller 'micro_batch'"
        )
