"""The engine for a CPU: the whole action as one OpenVINO graph.

OpenVINO was chosen by measurement: docs/results/backbones.md. It is an optional dependency:
`pip install openvino`.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrc_ros.errors import UserError
from rlrc_ros.vla import matrices
from rlrc_ros.vla.openvla import Inputs, OpenVLA
from rlrc_ros.vla.quantization import weight_bytes

PROMPT_LENGTHS = (16, 32)
"""Tokens of a prompt, BOS included, that graphs are compiled for."""

log = logging.getLogger(__name__)


class _Layer(nn.Module):
    """One decoder layer over (1, T, hidden); keys and values are handed on, not kept."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    norm1: Tensor
    norm2: Tensor

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.size, self.eps = attention.head_dim, layer.input_layernorm.variance_epsilon
        self.heads = attention.q_proj.out_features // self.size
        self.kv_heads = attention.k_proj.out_features // self.size
        groups = {
            "qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
            "out": [attention.o_proj],
            "gate_up": [mlp.gate_proj, mlp.up_proj],
            "down": [mlp.down_proj],
        }
        for name, linears in groups.items():
            matrix = matrices.held(linears, dtype)
            self.register_buffer(name, matrices.dense(matrix, dtype, matrices))
        self.register_buffer("norm1", layer.input_layernorm.weight.detach())
        self.register_buffer("norm2", layer.post_attention_layernorm.weight.detach())

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        past: list[Tensor],
        only: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The layer's output, of one row alone if `only` says which; and its keys and values."""
        tokens = x.shape[1]
        qkv = F.linear(_rms(x, self.norm1, self.eps), self.qkv)
        parts = qkv.view(1, tokens, self.heads + 2 * self.kv_heads, self.size).transpose(1, 2)
        both, value = parts[:, : self.heads + self.kv_heads], parts[:, self.heads + self.kv_heads :]
        first, second = both.chunk(2, -1)
        both = both * cos + torch.cat([-second, first], -1) * sin
        key = both[:, self.heads :]
        if past:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        repeated, group = [key, value], self.heads // self.kv_heads
        if group > 1:
            repeated = [t.repeat_interleave(group, 1) for t in repeated]
        query = both[:, : self.heads]
        if only is not None:
            query, mask = query.index_select(2, only), mask.index_select(2, only)
            x, tokens = x.index_select(1, only), 1
        scores = query @ repeated[0].transpose(2, 3) * self.size**-0.5
        mixed = torch.softmax(scores + mask, -1) @ repeated[1]
        x = x + F.linear(mixed.transpose(1, 2).reshape(1, tokens, -1), self.out)
        gate, up = F.linear(_rms(x, self.norm2, self.eps), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down), [key, value]


def _rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * gain


class _Action(nn.Module):
    """Image and a padded prompt to bins, all steps unrolled."""

    embedding: Tensor
    head: Tensor
    rows: Tensor
    norm: Tensor
    cos: Tensor
    sin: Tensor
    causal: Tensor

    def __init__(self, model: OpenVLA, length: int) -> None:
        super().__init__()
        llama, first = model.language_model.model, model.first_action_id
        self.vision, self.projector = model.vision_backbone, model.projector
        self.proprio_projector = model.proprio_projector
        self.tokens = model.action_tokens
        dtype = llama.norm.weight.dtype
        self.layers = nn.ModuleList(_Layer(layer, dtype) for layer in llama.layers)
        self.register_buffer("embedding", llama.embed_tokens.weight.detach())
        head = model.language_model.lm_head.weight.detach()
        self.register_buffer("head", head[first : first + model.n_bins].clone())
        self.register_buffer("rows", self.embedding[first : first + model.n_bins].clone())
        self.register_buffer("norm", llama.norm.weight.detach())
        self.eps = llama.norm.variance_epsilon
        self.context = model.config.towers[0].patches + (model.proprio_projector is not None)
        self.width = length + self.context
        positions = torch.arange(self.width + self.tokens)[None]
        cos, sin = llama.rotary_emb(self.norm.float(), positions)
        self.register_buffer("cos", cos[0])
        self.register_buffer("sin", sin[0])
        causal = torch.full((self.width, self.width), -1e30).triu(1)
        self.register_buffer("causal", causal[None, None])

    def forward(
        self, ids: Tensor, last: Tensor, pixels: Tensor, proprioception: Tensor | None = None
    ) -> Tensor:
        """(1, T), (1,), (1, 3 × towers, H, W), (1, P) -> bins, then 1 if all is finite."""
        text = F.embedding(ids, self.embedding)
        seen = [self.projector(self.vision(pixels))]
        if self.proprio_projector is not None:
            seen.append(self.proprio_projector(proprioception)[:, None])
        x = torch.cat([text[:, :1], *seen, text[:, 1:]], 1)
        pasts: list[list[Tensor]] = []
        cos, sin = self.cos[: self.width], self.sin[: self.width]
        for i, layer in enumerate(self.layers):
            only = last if i == len(self.layers) - 1 else None
            x, past = layer(x, cos, sin, self.causal, [], only)
            pasts.append(past)
        state = _rms(x[:, 0], self.norm, self.eps)
        finite = torch.isfinite(state).all().reshape(1).long()
        bins = [F.linear(state, self.head).argmax(-1)]
        padding = (torch.arange(self.width) > last).float()[None, None, None] * -1e30
        for number in range(1, self.tokens):
            x = F.embedding(bins[-1], self.rows)[:, None]
            place = last + number
            mask = torch.cat([padding, torch.zeros(1, 1, 1, number)], -1)
            turn = self.cos.index_select(0, place), self.sin.index_select(0, place)
            for i, layer in enumerate(self.layers):
                x, pasts[i] = layer(x, *turn, mask, pasts[i])
            state = _rms(x[:, 0], self.norm, self.eps)
            bins.append(F.linear(state, self.head).argmax(-1))
        return torch.cat([*bins, finite])


class OpenVINOEngine:
    """One observation at a time on a CPU.

    Args:
        model: float32, quantized or not; its weights are taken over dense.
        lengths: of prompts that graphs are compiled for, each when it is first needed or by
            `prepare`.
        precision: `f32`, or `bf16` where the CPU has that: faster, and tokens may differ.

    Raises:
        UserError: OpenVINO is not installed.
    """

    name = "openvino"
    takes_bytes = False

    def __init__(
        self, model: OpenVLA, lengths: Sequence[int] = PROMPT_LENGTHS, precision: str = "f32"
    ) -> None:
        try:
            import openvino
        except ImportError as error:
            raise UserError(
                f"the engine 'openvino' needs OpenVINO ({error}); run: pip install openvino"
            ) from error
        self._library, self._model, self._precision = openvino, model, precision
        self._lengths = sorted(lengths)
        self._compiled: dict[int, Any] = {}

    def prepare(self) -> float:
        """Compile every graph; returns the seconds it took."""
        start = time.perf_counter()
        for length in self._lengths:
            self._graph(length)
        return time.perf_counter() - start

    def bins(self, inputs: Inputs) -> Tensor:
        """Greedy action bins, (1, action_tokens).

        Raises:
            UserError: the policy's state is not finite.
        """
        if len(inputs) != 1:
            raise ValueError("the openvino engine takes one observation at a time")
        length = inputs.input_ids.shape[1]
        fitting = [number for number in self._lengths if number >= length]
        padded = fitting[0] if fitting else length
        if not fitting:
            log.warning("a prompt of %d tokens is longer than any that was prepared for", length)
        out = torch.from_numpy(self._graph(padded)(self._arguments(inputs, padded))[0])
        if not out[-1]:
            raise UserError("the policy's state is not finite; its weights or inputs are broken")
        return out[None, :-1]

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the model's weights, by part; each graph holds its own copy beside them."""
        return {name: weight_bytes(part) for name, part in self._model.parts.items()}

    def _arguments(self, inputs: Inputs, length: int) -> list[Any]:
        ids = inputs.input_ids
        model = self._model
        context = model.config.towers[0].patches + (model.proprio_projector is not None)
        last = torch.tensor([ids.shape[1] + context - 1])
        arguments = [F.pad(ids, (0, length - ids.shape[1])), last, inputs.pixel_values]
        if inputs.proprioception is not None:
            arguments.append(inputs.proprioception)
        return [tensor.numpy() for tensor in arguments]

    def _graph(self, length: int) -> Any:
        if length not in self._compiled:
            tower = self._model.config.towers[0]
            pixels = torch.zeros(1, 3 * len(self._model.config.towers), *(tower.image_size,) * 2)
            proprioception = None
            if self._model.proprio_projector is not None:
                proprioception = torch.zeros(1, self._model.config.proprioception)
            inputs = Inputs(torch.ones(1, length, dtype=torch.long), None, pixels, proprioception)
            example = tuple(map(torch.from_numpy, self._arguments(inputs, length)))
            with torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*trace")  # sizes are meant to stay
                graph = self._library.convert_model(
                    _Action(self._model, length).eval(),
                    example_input=example,
                    input=[tuple(t.shape) for t in example],
                )
            settings = {
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "INFERENCE_PRECISION_HINT": self._precision,
                "PERFORMANCE_HINT": "LATENCY",
            }
            self._compiled[length] = self._library.compile_model(graph, "CPU", settings)
        return self._compiled[length]
