"""Engines: how the model's arithmetic is run for one action.

`eager` runs the modules as they are, with the KV cache of `transformers`. `unrolled` is for one
observation at a time on a CPU: projections fused, keys and values in plain preallocated tensors,
the head cut to the action rows, quantized weights dequantized where they are used. On small and
pruned decoders most of eager's time is Python and cache bookkeeping between kernels; this removes
it. Both give the same tokens in float32.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrc_ros.vla.openvla import Inputs, OpenVLA
from rlrc_ros.vla.quantization import bitsandbytes, is_quantized, weight_bytes


class Engine(Protocol):
    """Runs a model."""

    name: str

    def bins(self, inputs: Inputs) -> Tensor:
        """Greedy action bins, (B, action_tokens)."""
        ...

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights held in memory, by part: vision, projector, llm."""
        ...


class EagerEngine:
    """The modules as they are; any batch, any device."""

    name = "eager"

    def __init__(self, model: OpenVLA) -> None:
        self._model = model

    @torch.inference_mode()
    def bins(self, inputs: Inputs) -> Tensor:
        """Greedy action bins, (B, action_tokens)."""
        return self._model.generate(inputs)[0]

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights held in memory, by part."""
        return {name: weight_bytes(part) for name, part in self._model.parts.items()}


class _Dense:
    """A weight matrix as it is."""

    def __init__(self, weights: list[nn.Linear]) -> None:
        self._weight = torch.cat([linear.weight.detach() for linear in weights])
        self.nbytes = self._weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight)


class _NF4:
    """Several NF4 matrices with the same inputs as one, dequantized at every use.

    Blocks of 64 weights never straddle two of the matrices, so packed bytes and block scales simply
    follow one another. The block scales are kept as float32: their own quantization saves memory on
    disk, but not here, where it would cost a second dequantization at every use.
    """

    def __init__(self, linears: list[Any], dtype: torch.dtype) -> None:
        functional = bitsandbytes().functional
        packed, scales, rows = [], [], 0
        for linear in linears:
            state = linear.weight.quant_state
            absmax = state.absmax
            if state.nested:
                absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
            assert state.shape.numel() % state.blocksize == 0
            packed.append(linear.weight.data.reshape(-1, 1))
            scales.append(absmax.float())
            rows += state.shape[0]
        self._packed, self._scales = torch.cat(packed), torch.cat(scales)
        self._shape, self._block, self._dtype = (
            [rows, linears[0].weight.quant_state.shape[1]],
            state.blocksize,
            dtype,
        )
        self._dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
        self.nbytes = self._packed.nbytes + self._scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._dequantize(
            self._packed, self._scales, self._block, "nf4", self._shape, self._dtype
        )
        return F.linear(x, weight)


def _fuse(linears: list[Any], dtype: torch.dtype) -> _Dense | _NF4:
    return _NF4(linears, dtype) if is_quantized(linears[0]) else _Dense(linears)


class _Layer:
    """One decoder layer over a (tokens, hidden) sequence."""

    def __init__(self, layer: Any, eps: float) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        norm = layer.input_layernorm.weight
        self._head = attention.head_dim
        self._kv_heads = attention.k_proj.out_features // self._head
        self._heads = attention.q_proj.out_features // self._head
        self._norm1, self._norm2 = norm.detach(), layer.post_attention_layernorm.weight.detach()
        self._eps, self._hidden = eps, (norm.numel(),)
        self._qkv = _fuse([attention.q_proj, attention.k_proj, attention.v_proj], norm.dtype)
        self._out = _fuse([attention.o_proj], norm.dtype)
        self._gate_up = _fuse([mlp.gate_proj, mlp.up_proj], norm.dtype)
        self._down = _fuse([mlp.down_proj], norm.dtype)
        self.nbytes = sum(
            w.nbytes
            for w in (self._qkv, self._out, self._gate_up, self._down, self._norm1, self._norm2)
        )

    def cache(self, length: int) -> Tensor:
        """Room for keys and values: (2, kv_heads, length, head_dim)."""
        return torch.zeros(2, self._kv_heads, length, self._head, dtype=self._norm1.dtype)

    def __call__(self, x: Tensor, cache: Tensor, start: int, cos: Tensor, sin: Tensor) -> Tensor:
        tokens = len(x)
        end = start + tokens
        keys, values = cache
        qkv = self._qkv(F.rms_norm(x, self._hidden, self._norm1, self._eps)).view(
            tokens, -1, self._head
        )
        rotated = qkv[:, : self._heads + self._kv_heads]  # queries and keys turn together
        half = self._head // 2
        turned = torch.cat([-rotated[..., half:], rotated[..., :half]], -1)
        rotated = (rotated * cos[start:end] + turned * sin[start:end]).transpose(0, 1)
        keys[:, start:end] = rotated[self._heads :]
        values[:, start:end] = qkv[:, self._heads + self._kv_heads :].transpose(0, 1)
        mixed = F.scaled_dot_product_attention(
            rotated[None, : self._heads],
            keys[None, :, :end],
            values[None, :, :end],
            is_causal=tokens > 1,
            enable_gqa=self._heads != self._kv_heads,
        )
        x = x + self._out(mixed[0].transpose(0, 1).reshape(tokens, -1))
        gate, up = self._gate_up(F.rms_norm(x, self._hidden, self._norm2, self._eps)).chunk(2, -1)
        return x + self._down(F.silu(gate).mul_(up))


class UnrolledEngine:
    """One observation at a time on a CPU."""

    name = "unrolled"

    def __init__(self, model: OpenVLA) -> None:
        self._model, llama = model, model.language_model.model
        first = model.first_action_id
        self._embedding = llama.embed_tokens.weight.detach()
        self._action_rows = self._embedding[first : first + model.n_bins]
        self._head = model.language_model.lm_head.weight.detach()[
            first : first + model.n_bins
        ].clone()
        self._norm, self._eps = llama.norm.weight.detach(), model.config.decoder.rms_norm_eps
        self._hidden = self._norm.shape
        self._layers = [_Layer(layer, self._eps) for layer in llama.layers]
        # From here on the layers and the head live in this form only; the modules' own copies are
        # let go.
        llama.layers = nn.ModuleList()
        model.language_model.lm_head = nn.Identity()
        self._allocate(128)

    def _allocate(self, length: int) -> None:
        """Make room for sequences of `length` tokens."""
        self._length = length
        self._caches = [layer.cache(length) for layer in self._layers]
        cos, sin = self._model.language_model.model.rotary_emb(
            self._norm, torch.arange(length)[None]
        )
        self._cos, self._sin = cos[0, :, None], sin[0, :, None]

    @torch.inference_mode()
    def bins(self, inputs: Inputs) -> Tensor:
        """Greedy action bins, (1, action_tokens)."""
        if len(inputs) != 1:
            raise ValueError("the unrolled engine takes one observation at a time")
        ids, model = inputs.input_ids[0], self._model
        text = self._embedding[ids]
        context = [model.projector(model.vision_backbone(inputs.pixel_values))[0]]
        if model.proprio_projector is not None:
            assert inputs.proprioception is not None
            context.append(model.proprio_projector(inputs.proprioception))
        x = torch.cat([text[:1], *context, text[1:]])
        if (needed := len(x) + model.action_tokens) > self._length:
            self._allocate(needed)
        position, bins = 0, []
        for _ in range(model.action_tokens):
            tokens = len(x)
            for layer, cache in zip(self._layers, self._caches, strict=True):
                x = layer(x, cache, position, self._cos, self._sin)
            position += tokens
            last = F.rms_norm(x[-1:], self._hidden, self._norm, self._eps)
            bins.append(F.linear(last, self._head).argmax(-1))
            x = self._action_rows[bins[-1]]
        return torch.stack(bins, 1)

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights held in memory, by part."""
        parts = {name: weight_bytes(part) for name, part in self._model.parts.items()}
        # The decoder's module holds the embedding and the final norm; the rest is here.
        parts["llm"] += self._head.nbytes + sum(layer.nbytes for layer in self._layers)
        return parts
