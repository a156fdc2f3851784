"""Quantize a policy's linear layers with bitsandbytes: to NF4, or to int8.

    rlrc quantize CONFIG --policy BUNDLE --out BUNDLE

The last stage: quantized weights have no gradients. What is not quantized is stored in half
precision.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rlrc_ros.errors import UserError
from rlrc_ros.vla import quantization
from rlrc_ros.vla.bundle import open_bundle
from rlrc_ros.vla.config import QuantizationConfig
from rlrc_ros.vla.policy import build_model, empty_model
from training.bundles import Trainable


def run(config: QuantizationConfig, trainable: Trainable) -> dict[str, Any]:
    """Quantize in place; returns the stage's facts."""
    quantization.quantize(trainable.model, config)
    trainable.config = replace(trainable.config, quantization=config)
    return facts(trainable)


def facts(quantized: Trainable) -> dict[str, Any]:
    """How it was quantized, and what its parts took before, in float32."""
    assert quantized.config.quantization is not None
    with torch.device("meta"):
        whole = build_model(replace(quantized.config, architecture=quantized.model.config))
    before = {name: quantization.weight_bytes(part) for name, part in whole.parts.items()}
    return {**asdict(quantized.config.quantization), "float32_bytes": before}


def load_quantized(
    policy: str | Path, config: QuantizationConfig, device: torch.device
) -> Trainable:
    """A policy read from a bundle straight into quantized layers.

    There is never more in memory than what the quantized policy holds and one matrix.

    Raises:
        UserError: the bundle is damaged, or is quantized.
    """
    bundle = open_bundle(policy)
    if bundle.config.quantization:
        raise UserError(f"{bundle.path}: is quantized; quantize its parent instead")
    model, tensors = empty_model(bundle), bundle.tensors()
    quantization.quantize_while_loading(model, config, tensors, device)
    rest = {name: tensors.pop(name).to(device).half() for name in list(tensors)}
    model.load_state_dict(rest, strict=False, assign=True)
    model.rebuild_buffers()
    made = replace(bundle.config, quantization=config)
    return Trainable(model.to(device).eval(), made, bundle.tokenizer(), bundle)
