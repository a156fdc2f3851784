"""Engines for OpenVLA-OFT: a chunk of actions from one pass.

`eager` runs the modules as they are. `graph` is the engine for a GPU, one CUDA graph for each
length of prompt (`rlrc_ros.vla.graph_engine`): the same towers and layers, no causal mask, and in
the last layer only what the action head reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlrc_ros.vla.captured import Slots
from rlrc_ros.vla.graph_engine import OpenVLAEngine
from rlrc_ros.vla.openvla import Inputs
from rlrc_ros.vla.openvla_oft import OpenVLAOFT
from rlrc_ros.vla.quantization import weight_bytes

ALIGNMENT = 16
"""Sequences are a multiple of so many tokens long, which matrices are multiplied in."""


class EagerChunkEngine:
    """The modules as they are; any batch, any device."""

    name = "eager"
    takes_bytes = False

    def __init__(self, model: OpenVLAOFT) -> None:
        self._model = model

    @torch.inference_mode()
    def chunk(self, inputs: Inputs) -> Tensor:
        """(B, chunk, dimensions) float32, scaled as the action codec has it."""
        return self._model(inputs).float()

    def prepare(self) -> float:
        """Nothing to do."""
        return 0.0

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights held in memory, by part."""
        return {name: weight_bytes(part) for name, part in self._model.parts.items()}


class GraphChunkEngine(OpenVLAEngine):
    """One observation at a time: BOS, context, prompt, places, stop token, padding nobody sees.

    Takes what `OpenVLAEngine` takes.
    """

    def __init__(self, model: OpenVLAOFT, *arguments: Any, **options: Any) -> None:
        head = model.config.action_head
        assert head is not None
        self._head, self._shape = model.action_head, (1, head.chunk, head.dimensions)
        self._padding_id = head.stop_token_id
        super().__init__(model, *arguments, **options)
        self._places = torch.arange(self._tokens, device=self._device)

    def chunk(self, inputs: Inputs) -> Tensor:
        """(1, chunk, dimensions) float32 on the CPU, scaled as the action codec has it.

        Args:
            inputs: one observation on the CPU, its `pixel_values` uint8.
        """
        return self._out(inputs).view(self._shape)

    def _needed(self, length: int) -> int:
        tokens = self._context + length + self._tokens + 1
        return -(-tokens // ALIGNMENT) * ALIGNMENT

    def _cache(self, *_: Any) -> Tensor:
        """Keys and values are used once, where they are."""
        return self._norm.new_empty(0)

    def _words(self, length: int) -> int:
        return length + 1  # the last one is the stop token in any case

    def _text(self, slots: Slots) -> Tensor:
        """The prompt, zeros where the actions are to be, and from there on the stop token."""
        words = super()._text(slots)
        stop = len(words) - 1
        place = torch.arange(self._needed(stop) - self._context, device=self._device)
        row, after = torch.where(place < slots.count, place, stop), place - slots.count
        return words[row] * ((after < 0) | (after >= self._tokens))[:, None]

    def _act(self, slots: Slots) -> Tensor:
        """The chunk, (chunk · dimensions,) float32."""
        last = slots.count + (self._context - 1)
        x, seen = self._embed(slots), last + self._tokens + 2
        for layer in self._layers[:-1]:
            x = layer.both_ways(x, self._room.cos, self._room.sin, seen, None)
        read = last + self._places
        x = self._layers[-1].both_ways(x, self._room.cos, self._room.sin, seen, read)
        states = self._ops.norm(x, self._norm, self._eps)
        return self._head(states[None]).float().flatten()
