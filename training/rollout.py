"""A policy over many environments at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlrc_ros.vla.action_codec import ActionCodec
from rlrc_ros.vla.openvla import Inputs, OpenVLA
from rlrc_ros.vla.processor import Processor
from training.common import compute_dtype
from training.envs.tabletop import decode_text


class Batcher:
    """Observations of many environments to a batch the model takes."""

    def __init__(self, processor: Processor, device: torch.device) -> None:
        self._processor, self._device = processor, device
        self._ids: dict[bytes, list[int]] = {}

    def __call__(self, observation: dict[str, NDArray[Any] | Tensor]) -> Inputs:
        """From `image` (B, H, W, 3) uint8, `proprioception` (B, P), `instruction` (B, TEXT_BYTES)."""  # FIXLEN
        return self.inputs(
            torch.as_tensor(observation["image"]).to(self._device, non_blocking=True),
            torch.as_tensor(observation["proprioception"]).to(self._device, non_blocking=True),
            [
                decode_text(row)
                for row in np.asarray(torch.as_tensor(observation["instruction"]).cpu())
            ],
        )

    def inputs(self, images: Tensor, proprioception: Tensor, instructions: list[str]) -> Inputs:
        """From tensors on the device, and as many instructions."""
        ids, mask = self._processor.batch_token_ids(instructions)
        return Inputs(
            ids.to(self._device),
            None if mask is None else mask.to(self._device),
            self._processor.pixel_values(images),
            self._processor.normalise_proprioception(proprioception)
            if self._processor.config.proprioception
            else None,
        )


class Actor:
    """Acts greedily in many environments.

    Weights may be in training, arithmetic is the device's.
    """

    def __init__(
        self, model: OpenVLA, processor: Processor, codec: ActionCodec, device: torch.device
    ) -> None:
        self._model, self._codec, self._device = model, codec, device
        self._batch = Batcher(processor, device)

    @torch.no_grad()
    def act(self, observation: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
        """(B, D) actions."""
        dtype = compute_dtype(self._device)
        with torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32):
            bins = self._model.generate(self._batch(observation))[0]
        return self._codec.decode(bins.cpu().numpy())
