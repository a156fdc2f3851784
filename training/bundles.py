"""Bundles as training sees them: a model with gradients, and back to a directory."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from rlrc_ros.errors import UserError
from rlrc_ros.sim.model import JOINT_NAMES
from rlrc_ros.vla import quantization
from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.bundle import Bundle, open_bundle, provenance, write_bundle
from rlrc_ros.vla.config import (
    ActionCodecConfig,
    ActionHeadConfig,
    ArchitectureConfig,
    BundleConfig,
    CameraConfig,
    DecoderConfig,
    ExpertConfig,
    LayerWidths,
    ProprioceptionConfig,
)
from rlrc_ros.vla.policy import build_model, load_model, load_openvla, processor_of
from rlrc_ros.vla.processor import Processor, word_tokenizer
from training.config import ModelConfig
from training.envs.registry import contract

TEMPLATE = "in: {instruction} out:"


@dataclass
class Trainable:
    """A policy in float32 on a device, and what belongs to it.

    Attributes:
        model: its module: an OpenVLA, or where the stage can take one a Pi0.
        config: what its bundle's `config.json` says; the model's own `config` rules where they
            differ.
        tokenizer: its tokenizer.
        parent: the bundle it was loaded from, if any.
    """

    model: Any
    config: BundleConfig
    tokenizer: Tokenizer
    parent: Bundle | None

    @property
    def processor(self) -> Processor:
        """Its preprocessing."""
        return processor_of(self.config, self.tokenizer)

    @property
    def codec(self) -> ActionCodec:
        """Its action codec."""
        return ActionCodec(self.config.action_codec)

    def save(self, path: Path, stage: str, **facts: Any) -> Bundle:
        """Write it as a bundle, in half precision; `facts` go into the provenance."""
        config = replace(self.config, architecture=self.model.config, dtype="float16")
        tensors = {
            name: tensor.half()
            if tensor.dtype == torch.float32 and not _statistic(name)
            else tensor
            for name, tensor in quantization.stored(self.model).items()
        }
        origin = provenance(self.parent, stage, machine=_machine(), **facts)
        return write_bundle(path, config, tensors, self.tokenizer, origin)


def _statistic(name: str) -> bool:
    """Whether a tensor is part of a quantized weight, whose precision is its own."""
    return ".weight." in name


def _machine() -> str:
    return (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    )


def load_trainable(policy: str | Path, device: torch.device, pi0: bool = False) -> Trainable:
    """Load a bundle to train it further.

    pi0: whether the stage can take such a policy.

    Raises:
        UserError: it is damaged, or quantized: such weights have no gradients; or it is pi0.
    """
    bundle = open_bundle(policy)
    bundle.require_action_scale()
    if bundle.config.quantization:
        raise UserError(f"{bundle.path}: is quantized; train its parent instead, and quantize last")
    model = (load_model if pi0 else load_openvla)(bundle, device)
    return Trainable(model, bundle.config, bundle.tokenizer(), bundle)


def new_trainable(
    model: ModelConfig,
    proprioception: NDArray[np.float32],
    device: torch.device,
    environment: str = "tabletop",
) -> Trainable:
    """A policy for an environment with fresh weights.

    Proprioception is scaled by the demonstrations' (N, P), actions by the environment's own limits.
    """
    known = contract(environment)
    tokenizer = word_tokenizer([*known.words, *["in", ":", "out"]])
    text = -(-tokenizer.get_vocab_size() // 64) * 64
    codec = ActionCodecConfig(
        q01=tuple(map(float, known.action_low)),
        q99=tuple(map(float, known.action_high)),
        mask=(True,) * len(known.action_low),
    )
    head = model.chunk and ActionHeadConfig(chunk=model.chunk, dimensions=codec.dimensions)
    felt = len(JOINT_NAMES) + 1
    expert = None
    if model.expert is not None:
        expert = ExpertConfig(
            hidden_size=model.expert.hidden_size,
            layers=(LayerWidths(model.heads, model.kv_heads, model.expert.ffn),) * model.layers,
            chunk=model.expert.chunk,
            action_width=codec.dimensions,
            state_width=felt,
            steps=model.expert.steps,
        )
    config = BundleConfig(
        architecture=ArchitectureConfig(
            action_head=head or None,
            expert=expert,
            towers=(model.tower,),
            decoder=DecoderConfig(
                vocab_size=text + (0 if expert else codec.n_bins),
                hidden_size=model.hidden_size,
                head_dim=model.head_dim,
                layers=model.widths,
                max_positions=256,
            ),
            proprioception=felt,
        ),
        action_codec=codec,
        cameras=(
            CameraConfig(name="front", height=model.tower.image_size, width=model.tower.image_size),
        ),
        proprioception=ProprioceptionConfig(
            joints=JOINT_NAMES,
            gripper=True,
            mean=tuple(proprioception.mean(0).tolist()),
            std=tuple(np.maximum(proprioception.std(0), 1e-3).tolist()),
        ),
        control_rate=known.control_rate,
        instruction_template=TEMPLATE,
        dtype="float32",
    )
    return Trainable(build_model(config).to(device), config, tokenizer, None)
