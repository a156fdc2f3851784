"""Engines: how the model's arithmetic is run for one action.

`eager` runs the modules as they are, with the KV cache of `transformers`. `unrolled` is for one
observation at a time on a CPU: projections fused, keys and values in plain preallocated tensors,
the head cut to the action rows, quantized weights dequantized where they are used. On small and
pruned decoders most of eager's time is Python and cache bookkeeping between kernels; this removes
it. For a GPU there is `rlrc_ros.vla.graph_engine`. All give the same tokens in float32.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrc_ros.errors import UserError
from rlrc_ros.vla import matrices
from rlrc_ros.vla.captured import operations_for
from rlrc_ros.vla.openvla import Inputs, OpenVLA
from rlrc_ros.vla.quantization import (
    Int8Linear,
    is_quantized,
    nf4_scales,
    unpack_nf4,
    weight_bytes,
)


class Engine(Protocol):
    """Runs a model."""

    name: str
    takes_bytes: bool
    """Whether it wants its inputs on the CPU, the image in bytes: it brings them over itself."""

    def bins(self, inputs: Inputs) -> Tensor:
        """Greedy action bins, (B, action_tokens)."""
        ...

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights held in memory, by part: vision, projector, llm."""
        ...

    def prepare(self) -> float:
        """Do what would make the first actions late; returns the seconds it took."""
        ...


@runtime_checkable
class ChunkEngine(Protocol):
    """Runs a model whose actions are continuous."""

    name: str
    takes_bytes: bool

    def chunk(self, inputs: Inputs) -> Tensor:
        """(B, chunk, dimensions) float32, scaled as the action codec has it."""
        ...

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights held in memory, by part."""
        ...

    def prepare(self) -> float:
        """Do what would make the first actions late; returns the seconds it took."""
        ...


class EagerEngine:
    """The modules as they are; any batch, any device."""

    name = "eager"
    takes_bytes = False

    def __init__(self, model: OpenVLA) -> None:
        self._model = model

    @torch.inference_mode()
    def bins(self, inputs: Inputs) -> Tensor:
        """Greedy action bins, (B, action_tokens)."""
        return _finite(*self._model.generate(inputs))

    def prepare(self) -> float:
        """Nothing to do."""
        return 0.0

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights held in memory, by part."""
        return {name: weight_bytes(part) for name, part in self._model.parts.items()}


def _finite(bins: Tensor, _: Tensor, state: Tensor) -> Tensor:
    """The bins, unless the state behind them is not finite: argmax takes NaN for a maximum."""
    if not state.isfinite().all():
        raise UserError("the policy's state is not finite; its weights or inputs are broken")
    return bins


class _Dense:
    """Several weight matrices with the same inputs as one."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        self._weight = torch.cat([linear.weight.detach() for linear in linears])
        self.nbytes = self._weight.nbytes

    def refresh(self, linears: list[nn.Linear]) -> None:
        torch.cat([linear.weight.detach() for linear in linears], out=self._weight)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight)


class _NF4:
    """Several NF4 matrices with the same inputs as one, dequantized at every use.

    Blocks of 64 weights never straddle two of the matrices, so packed bytes and block scales simply
    follow one another. The block scales are kept as float32: their own quantization saves memory on
    disk, but not here, where it would cost a second dequantization at every use.
    """

    def __init__(self, linears: list[Any], dtype: torch.dtype) -> None:
        weights = [linear.weight for linear in linears]
        states = [weight.quant_state for weight in weights]
        assert all(state.shape.numel() % state.blocksize == 0 for state in states)
        self._packed = torch.cat([weight.data.reshape(-1, 1) for weight in weights])
        self._scales = torch.cat([nf4_scales(weight) for weight in weights])
        self._shape = (sum(state.shape[0] for state in states), states[0].shape[1])
        self._block, self._dtype = states[0].blocksize, dtype
        self.nbytes = self._packed.nbytes + self._scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        weight = unpack_nf4(self._packed, self._scales, self._block, self._shape, self._dtype)
        return F.linear(x, weight)


class _Places(NamedTuple):
    """The rotation of every position, (length, head_dim); where each row's token is, (B,)."""

    cos: Tensor
    sin: Tensor
    number: Tensor


class _Layer:
    """One decoder layer over (B, tokens, hidden), its projections fused."""

    def __init__(self, layer: Any, eps: float) -> None:
        attention = layer.self_attn
        self._head = attention.head_dim
        self._kv_heads = attention.k_proj.out_features // self._head
        self._heads = attention.q_proj.out_features // self._head
        self._norm1 = layer.input_layernorm.weight.detach()
        self._norm2 = layer.post_attention_layernorm.weight.detach()
        self._eps, self._hidden = eps, self._norm1.shape
        self._qkv, self._out, self._gate_up, self._down = map(self._fuse, self._groups(layer))
        fused = (self._qkv, self._out, self._gate_up, self._down, self._norm1, self._norm2)
        self.nbytes = sum(weight.nbytes for weight in fused)

    @staticmethod
    def _groups(layer: Any) -> list[list[Any]]:
        attention, mlp = layer.self_attn, layer.mlp
        return [
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        ]

    def _fuse(self, linears: list[Any]) -> Any:
        if isinstance(linears[0], Int8Linear):
            return Int8Linear.joined(linears)
        return _NF4(linears, self._norm1.dtype) if is_quantized(linears[0]) else _Dense(linears)

    def refresh(self, layer: Any) -> None:
        """Take over the weights that the layer has by now."""
        fused = (self._qkv, self._out, self._gate_up, self._down)
        for weight, linears in zip(fused, self._groups(layer), strict=True):
            weight.refresh(linears)

    def cache(self, batch: int, length: int) -> Tensor:
        """Room for keys and values: (2, batch, kv_heads, length, head_dim)."""
        return self._norm1.new_zeros(2, batch, self._kv_heads, length, self._head)

    def __call__(self, x: Tensor, cache: Tensor, start: int, places: _Places) -> Tensor:
        batch, tokens, _ = x.shape
        end = start + tokens
        cos, sin = places.cos[:, None], places.sin[:, None]
        keys, values = cache
        qkv = self._qkv(F.rms_norm(x, self._hidden, self._norm1, self._eps))
        qkv = qkv.view(batch, tokens, -1, self._head)
        rotated = qkv[:, :, : self._heads + self._kv_heads]  # queries and keys turn together
        half = self._head // 2
        turned = torch.cat([-rotated[..., half:], rotated[..., :half]], -1)
        rotated = (rotated * cos[start:end] + turned * sin[start:end]).transpose(1, 2)
        keys[:, :, start:end] = rotated[:, self._heads :]
        values[:, :, start:end] = qkv[:, :, self._heads + self._kv_heads :].transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            rotated[:, : self._heads],
            keys[:, :, :end],
            values[:, :, :end],
            is_causal=tokens > 1,
            enable_gqa=self._heads != self._kv_heads,
        )
        x = x + self._out(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        gate, up = self._gate_up(F.rms_norm(x, self._hidden, self._norm2, self._eps)).chunk(2, -1)
        return x + self._down(F.silu(gate).mul_(up))


class _KernelLayer(_Layer):
    """With one token a sequence few launches: `operations` are those of the graph engine."""

    def __init__(self, layer: Any, eps: float, operations: ModuleType) -> None:
        super().__init__(layer, eps)
        self._ops = operations

    def __call__(self, x: Tensor, cache: Tensor, start: int, places: _Places) -> Tensor:
        if x.shape[1] > 1:
            return super().__call__(x, cache, start, places)
        ops, rows = self._ops, x[:, 0]
        qkv = self._qkv(ops.norm(rows, self._norm1, self._eps))
        mixed = ops.decode_attention(qkv, *places[:2], cache, places.number, self._heads)
        h = ops.norm(rows, self._norm2, self._eps, delta=self._out(mixed))
        return (rows + self._down(ops.gate(self._gate_up(h))))[:, None]


class Unrolled:
    """A decode with everything static: fused projections, preallocated keys and values.

    Small and pruned decoders spend most of their time between kernels; here little is left there,
    and what is left can be captured in a CUDA graph.

    Args:
        model: its weights are copied where they are fused, and shared elsewhere.
        batch: observations at a time.
        operations: where a token's arithmetic is; by default Triton's on a GPU that has it.

    Attributes:
        takes_masks: whether prompts of a batch may have different lengths.
    """

    def __init__(
        self, model: OpenVLA, batch: int = 1, operations: ModuleType | None = None
    ) -> None:
        self._model, llama, self._batch = model, model.language_model.model, batch
        eps = llama.norm.variance_epsilon
        found = operations_for(llama.norm.weight.device, model.config.decoder.head_dim)
        if operations is None and found is not matrices:
            operations = found
        self.takes_masks = operations is not None
        kind = partial(_KernelLayer, operations=operations) if operations else _Layer
        self._layers = [kind(layer, eps) for layer in llama.layers]
        self._embedding = llama.embed_tokens.weight.detach()
        first = model.first_action_id
        self._action_rows = self._embedding[first : first + model.n_bins]
        head = model.language_model.lm_head.weight.detach()
        self._head = head[first : first + model.n_bins].clone()
        self._norm, self._eps = llama.norm.weight.detach(), llama.norm.variance_epsilon
        self._rotary = llama.rotary_emb
        self.nbytes = self._head.nbytes + sum(layer.nbytes for layer in self._layers)
        self._allocate(128)

    def _allocate(self, length: int) -> None:
        """Make room for sequences of `length` tokens."""
        self._length = length
        self._caches = [layer.cache(self._batch, length) for layer in self._layers]
        positions = torch.arange(length, device=self._norm.device)[None]
        self._cos, self._sin = (table[0] for table in self._rotary(self._norm, positions))

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights that the model has by now; what is shared follows by itself."""
        language_model, first = self._model.language_model, self._model.first_action_id
        self._head.copy_(language_model.lm_head.weight[first : first + self._model.n_bins])
        for mine, layer in zip(self._layers, language_model.model.layers, strict=True):
            mine.refresh(layer)

    @torch.no_grad()
    def __call__(
        self, inputs: Inputs, temperature: float = 0.0, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `OpenVLA.generate` gives: bins (B, action_tokens), log-probabilities (B,), states.

        A row of a shorter prompt writes its action's tokens where its padding was, which nothing
        that counts has looked at.

        noise: (B, action_tokens, n_bins) from the standard Gumbel distribution; added to the logits
            it makes their largest a sample.
        """
        model, ids = self._model, inputs.input_ids
        text = self._embedding[ids]
        context = [model.projector(model.vision_backbone(inputs.pixel_values))]
        if model.proprio_projector is not None:
            assert inputs.proprioception is not None
            context.append(model.proprio_projector(inputs.proprioception)[:, None])
        x = torch.cat([text[:, :1], *context, text[:, 1:]], 1)
        if (needed := x.shape[1] + model.action_tokens) > self._length:
            self._allocate(needed)
        last = ids.new_full((len(x),), x.shape[1] - 1)  # where each row's last token is
        if inputs.attention_mask is not None:
            assert self.takes_masks
            last += inputs.attention_mask.sum(1) - ids.shape[1]
        places = _Places(self._cos, self._sin, last)
        position = 0
        states: list[Tensor] = []
        bins: list[Tensor] = []
        log_probability = torch.zeros(len(x), device=x.device)
        for token in range(model.action_tokens):
            tokens = x.shape[1]
            for layer, cache in zip(self._layers, self._caches, strict=True):
                x = layer(x, cache, position, places)
            x = x[:, -1] if token or inputs.attention_mask is None else _rows(x, places.number)
            position += tokens
            places = places._replace(number=places.number + 1)
            states.append(F.rms_norm(x, self._norm.shape, self._norm, self._eps))
            logits = F.linear(states[-1], self._head)
            if noise is None:
                bins.append(logits.argmax(-1))
            else:
                log_p = (logits.float() / temperature).log_softmax(-1)
                bins.append((log_p + noise[:, token]).argmax(-1))
                log_probability += log_p.gather(1, bins[-1][:, None])[:, 0]
            x = self._action_rows[bins[-1]][:, None]
        return torch.stack(bins, 1), log_probability, states[0]


def _rows(x: Tensor, number: Tensor) -> Tensor:
    """(B, tokens, hidden) at the places (B,) -> (B, hidden)."""
    return x.gather(1, number[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]


class UnrolledEngine:
    """One observation at a time on a CPU."""

    name = "unrolled"
    takes_bytes = False

    def __init__(self, model: OpenVLA) -> None:
        language_model = model.language_model
        self._model, self._unrolled = model, Unrolled(model)
        # From here on the layers live in fused form only, and the head as its action rows.
        language_model.model.layers = nn.ModuleList()
        language_model.lm_head = nn.Identity()

    @torch.inference_mode()
    def bins(self, inputs: Inputs) -> Tensor:
        """Greedy action bins, (1, action_tokens)."""
        if len(inputs) != 1:
            raise ValueError("the unrolled engine takes one observation at a time")
        return _finite(*self._unrolled(inputs))

    def prepare(self) -> float:
        """Nothing to do."""
        return 0.0

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights held in memory, by part."""
        parts = {name: weight_bytes(part) for name, part in self._model.parts.items()}
        # The decoder's module holds the embedding and the final norm; the rest is here.
        parts["llm"] += self._unrolled.nbytes
        return parts
