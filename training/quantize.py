"""Quantize a policy's linear layers to NF4 with bitsandbytes.

    rlrc quantize CONFIG --policy BUNDLE --out BUNDLE

The last stage: quantized weights have no gradients. What is not quantized is stored as bfloat16.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from rlrc_ros.vla import quantization
from rlrc_ros.vla.config import QuantizationConfig
from training.bundles import Trainable


def run(config: QuantizationConfig, trainable: Trainable) -> dict[str, Any]:
    """Quantize in place; returns the stage's facts."""
    before = {name: quantization.weight_bytes(part) for name, part in trainable.model.parts.items()}
    quantization.quantize(trainable.model, config)
    trainable.config = replace(trainable.config, quantization=config)
    return {**asdict(config), "float32_bytes": before}
