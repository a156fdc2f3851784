"""The engine for a GPU: a whole action in one CUDA graph, one graph for each length of prompt.

At batch 1 a VLA waits for launches, not for arithmetic. So nothing here depends on the data:
prompts are padded to one of a few lengths, keys and values lie in fixed places, the towers run side
by side, and what lies between the image's bytes and the action's bins is captured once and then
replayed by a single call. Projections with the same input are one matrix, the head has the action's
rows only, and where Triton is installed a decode step takes five kernels a layer
(`rlrc_ros.vla.kernels`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrc_ros.errors import UserError
from rlrc_ros.vla import matrices
from rlrc_ros.vla.captured import CapturedEngine, Room, Slots, operations_for, side_stream
from rlrc_ros.vla.matrices import Linear, Matrix
from rlrc_ros.vla.openvla import Inputs, OpenVLA, VisionTower
from rlrc_ros.vla.quantization import weight_bytes

Hold = Callable[[list[Any], torch.dtype], Matrix]

PROMPT_LENGTHS = (16, 24, 32, 48)
"""Tokens of a prompt, BOS included, that graphs are captured for."""


class _Tower:
    """One vision transformer over (N, 3, H, W): its features, (N · patches, width)."""

    def __init__(self, tower: VisionTower, swap: Callable[[nn.Module], None], ops: Any) -> None:
        self._ops, whole = ops, tower.kind == "vit"
        if not whole:
            tower.blocks = tower.blocks[:-1]  # the last one is never run, nor the pooling head
            if tower.kind == "siglip":
                del tower.attn_pool
        swap(tower)
        convolution = tower.patch_embed.proj
        self._patch = convolution.kernel_size[0]
        self._embedding = convolution.weight.detach().flatten(1)
        self._bias = convolution.bias
        self._prefix = None
        if tower.kind == "dinov2":
            self._prefix = torch.cat([tower.cls_token, tower.reg_token], 1)[0].detach()
        self._position = tower.pos_embed[0].detach()
        self._blocks: list[Any] = list(tower.blocks)
        self._final = tower.norm if whole else None

    def __call__(self, pixels: Tensor) -> Tensor:
        count, patch, rows = len(pixels), self._patch, pixels.shape[2] // self._patch
        squares = pixels.reshape(count, 3, rows, patch, rows, patch).permute(0, 2, 4, 1, 3, 5)
        squares = squares.reshape(count, rows * rows, -1).to(self._embedding.dtype)
        x = F.linear(squares, self._embedding, self._bias) + self._position
        skipped = 0
        if self._prefix is not None:
            skipped = len(self._prefix)
            x = torch.cat([self._prefix.expand(count, -1, -1), x], 1)
        tokens, x = x.shape[1], x.flatten(0, 1)
        delta, factor = None, None
        for block in self._blocks:
            attention, mlp = block.attn, block.mlp
            h = self._norm(x, block.norm1, delta, factor)
            shape = (count, tokens, 3, attention.heads, -1)
            q, k, v = attention.qkv(h).view(shape).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
            delta, factor = attention.proj(mixed), getattr(block.ls1, "scale_factor", None)
            h = self._norm(x, block.norm2, delta, factor)
            delta, factor = mlp.fc2(_gelu(mlp.fc1, h)), getattr(block.ls2, "scale_factor", None)
        if self._final is not None:
            return self._norm(x, self._final, delta, factor)
        if delta is not None:
            x = x + (delta if factor is None else delta * factor)
        return x.view(count, tokens, -1)[:, skipped:].flatten(0, 1)

    def _norm(
        self, x: Tensor, norm: nn.LayerNorm, delta: Tensor | None, factor: Tensor | None
    ) -> Tensor:
        """Add to x in place, then normalise."""
        return self._ops.norm(x, norm.weight, norm.eps, norm.bias, delta, factor)


def _gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU of a linear layer; of halves on a GPU in the product's own kernel, in its tanh form.

    That form is off by 5e-4 at most, less than a half's rounding of what is above 0.1.
    """
    if x.is_cuda and x.dtype != torch.float32 and isinstance(layer, nn.Linear):
        return torch._addmm_activation(layer.bias, x, layer.weight.T, use_gelu=True)
    return F.gelu(layer(x))


class _Layer:
    """One decoder layer, its projections fused."""

    def __init__(self, layer: Any, matrix: Callable[[list[Any]], Matrix], ops: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._ops, self.head_dim = ops, attention.head_dim
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self._norm1, self._norm2 = (
            norm.weight.detach() for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        self._eps = layer.input_layernorm.variance_epsilon
        # Tensor cores multiply halves, and no small matrices.
        fast = self._norm1.dtype != torch.float32 and self.head_dim >= 32
        self._attend = (ops if fast else matrices).attend
        self._qkv = matrix([attention.q_proj, attention.k_proj, attention.v_proj])
        self._out = matrix([attention.o_proj])
        self._gate_up, self._down = matrix([mlp.gate_proj, mlp.up_proj]), matrix([mlp.down_proj])
        parts = (self._qkv, self._out, self._gate_up, self._down, self._norm1, self._norm2)
        self.nbytes = sum(part.nbytes for part in parts)

    def prompt(
        self, x: Tensor, cache: Tensor, cos: Tensor, sin: Tensor, only: Tensor | None
    ) -> Tensor:
        """(T, hidden) -> (T, hidden), or the one row `only` of it; x is overwritten."""
        ops = self._ops
        qkv = self._times(ops.norm(x, self._norm1, self._eps), self._qkv)
        query = ops.rope(qkv, cos, sin, cache, self.heads)
        mixed = F.scaled_dot_product_attention(
            query[None],
            cache[:1, :, : len(x)],
            cache[1:, :, : len(x)],
            is_causal=True,
            enable_gqa=self.heads != self.kv_heads,
        )[0]
        return self._after(x, mixed.transpose(0, 1).reshape(len(x), -1), only)

    def both_ways(
        self, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor, only: Tensor | None
    ) -> Tensor:
        """The same where every token attends to the first `seen`; `only` may be several rows."""
        qkv = self._times(self._ops.norm(x, self._norm1, self._eps), self._qkv)
        return self._after(x, self._attend(qkv, cos, sin, seen, self.heads, self.kv_heads), only)

    def _after(self, x: Tensor, mixed: Tensor, only: Tensor | None) -> Tensor:
        """From attention to the layer's end."""
        ops = self._ops
        if only is not None:
            x, mixed = x.index_select(0, only), mixed.index_select(0, only)
        x = self._plus(x, mixed, self._out)
        h = ops.gate(self._times(ops.norm(x, self._norm2, self._eps), self._gate_up))
        return self._plus(x, h, self._down)

    def step(self, x: Tensor, cache: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> None:
        """One token's (hidden,), in place."""
        ops, eps = self._ops, self._eps
        qkv = ops.gemv(x, self._qkv, x.new_empty(self._qkv.shape[0]), self._norm1, eps)
        mixed = ops.decode_attention(qkv, cos, sin, cache, position, self.heads)
        ops.gemv(mixed, self._out, x, residual=True)
        h = x.new_empty(self._down.shape[1])
        ops.gemv(x, self._gate_up, h, self._norm2, eps, gated=True)
        ops.gemv(h, self._down, x, residual=True)

    def _times(self, x: Tensor, weight: Matrix) -> Tensor:
        return matrices.times(x, weight, self._ops)

    def _plus(self, x: Tensor, y: Tensor, weight: Matrix) -> Tensor:
        return matrices.add_product(x, y, weight, self._ops)


class OpenVLAEngine(CapturedEngine):
    """An OpenVLA taken apart: what comes before its actions' decoding.

    Args:
        model: is taken apart; its weights live on in fused form.
        lengths: of prompts that graphs are captured for; none on a CPU.
        hold: how linear layers with the same input become one `Matrix`.
        hold_rest: the same for what is not the decoder's; like `hold` if not given.
        operations: where the arithmetic is; by default Triton's on a GPU that has it.
    """

    def __init__(
        self,
        model: OpenVLA,
        lengths: Sequence[int] = PROMPT_LENGTHS,
        hold: Hold = matrices.held,
        hold_rest: Hold | None = None,
        operations: ModuleType | None = None,
    ) -> None:
        llama, config = model.language_model.model, model.config
        self._norm, self._eps = llama.norm.weight.detach(), llama.norm.variance_epsilon
        super().__init__(
            self._norm.device,
            self._norm.dtype,
            llama.embed_tokens.weight,
            (config.images, *(config.towers[0].image_size,) * 2, 3),
            config.proprioception,
            lengths,
        )
        llama.embed_tokens = nn.Identity()
        self._ops = operations or operations_for(self._device, config.decoder.head_dim)
        model.language_model.lm_head = nn.Identity()
        self._rotary = llama.rotary_emb
        self._layers: list[_Layer] = []

        def matrix(linears: list[Any]) -> Matrix:
            return hold(linears, self._norm.dtype)

        for i in range(len(llama.layers)):  # each let go as soon as it is fused: memory
            self._layers.append(_Layer(llama.layers[i], matrix, self._ops))
            llama.layers[i] = nn.Identity()

        def swap(module: nn.Module) -> None:
            self._swap(module, hold_rest or hold)

        backbone = model.vision_backbone
        towers = [t for t in (backbone.featurizer, backbone.fused_featurizer) if t is not None]
        self._towers = [_Tower(tower, swap, self._ops) for tower in towers]
        self._scales = [
            torch.tensor([t.mean, t.std], device=self._device)[:, :, None, None]
            for t in config.towers
        ]
        for module in (model.projector, model.proprio_projector):
            if module is not None:
                swap(module)
        self._model, self._tokens, self._context = model, model.action_tokens, config.context
        beside = range(1, len(self._towers)) if self._on_gpu else ()
        self._streams = [side_stream(self._device, number) for number in beside]
        self._room = self._make_room(max(self._lengths, default=32))

    def _swap(self, root: nn.Module, hold: Hold) -> None:
        """Linear layers below `root` that are not to be dense become so."""
        for path, module in list(root.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, attribute = path.rpartition(".")
                weight = hold([module], self._norm.dtype)
                if weight.scales is not None:
                    layer = Linear(weight, module.bias, self._ops)
                    setattr(root.get_submodule(parent), attribute, layer)

    def _needed(self, length: int) -> int:
        """Tokens of a sequence whose prompt has `length`."""
        return length + self._context + self._tokens

    def _make_room(self, length: int) -> Room:
        capacity = self._needed(length)
        positions = torch.arange(capacity, device=self._device)
        cos, sin = self._rotary(self._norm.float(), positions[None])
        caches = [self._cache(layer, capacity) for layer in self._layers]
        return Room(caches, positions, cos[0].contiguous(), sin[0].contiguous())

    def _cache(self, layer: _Layer, capacity: int) -> Tensor:
        """Room for a layer's keys and values."""
        return self._norm.new_zeros(2, layer.kv_heads, capacity, layer.head_dim)

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights held in memory, by part; the embedding's are on the host."""
        parts = {}
        for name, part in self._model.parts.items():
            packed = sum(m.nbytes for m in part.modules() if isinstance(m, Linear))
            parts[name] = weight_bytes(part) + packed
        parts["llm"] += self._embedding.nbytes + sum(layer.nbytes for layer in self._layers)
        return parts

    def _embed(self, slots: Slots) -> Tensor:
        """The decoder's input, (T, hidden)."""
        text = self._text(slots)
        pixels = slots.images.permute(0, 3, 1, 2).float() / 255
        scaled = [(pixels - mean) / std for mean, std in self._scales]
        features = self._see(scaled)
        context = [self._model.projector(features)]
        if slots.state is not None and self._model.proprio_projector is not None:
            context.append(self._model.proprio_projector(slots.state))
        return torch.cat([text[:1], *context, text[1:]])

    def _text(self, slots: Slots) -> Tensor:
        """What of the sequence is words, (tokens, hidden)."""
        return slots.words

    def _see(self, scaled: list[Tensor]) -> Tensor:
        """All towers' features side by side, each tower in a stream of its own on a GPU."""
        if not self._streams:
            return torch.cat([t(p) for t, p in zip(self._towers, scaled, strict=True)], 1)
        main, features = torch.cuda.current_stream(), []
        for stream in self._streams:
            stream.wait_stream(main)
        for stream, tower, pixels in zip(self._streams, self._towers[1:], scaled[1:], strict=True):
            with torch.cuda.stream(stream):
                features.append(tower(pixels))
        features.insert(0, self._towers[0](scaled[0]))
        for stream in self._streams:
            main.wait_stream(stream)
        return torch.cat(features, 1)


class GraphEngine(OpenVLAEngine):
    """Action tokens, one after another; takes what `OpenVLAEngine` takes."""

    def __init__(self, model: OpenVLA, *arguments: Any, **options: Any) -> None:
        first = model.first_action_id
        rows = model.language_model.lm_head.weight.detach()[first : first + model.n_bins].clone()
        self._head = Matrix(rows, (model.n_bins, rows.shape[1]))
        super().__init__(model, *arguments, **options)
        self._action_rows = self._embedding[first : first + model.n_bins].to(self._device)

    def bins(self, inputs: Inputs) -> Tensor:
        """Greedy action bins, (1, action_tokens), on the CPU.

        Args:
            inputs: one observation on the CPU, its `pixel_values` (1, H, W, 3) uint8.

        Raises:
            UserError: the policy's state is not finite.
        """
        *bins, finite = self._out(inputs).tolist()
        if not finite:
            raise UserError("the policy's state is not finite; its weights or inputs are broken")
        return torch.tensor([bins])

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights held in memory, by part."""
        parts = super().weight_bytes()
        return parts | {"llm": parts["llm"] + self._head.nbytes}

    def _act(self, slots: Slots) -> Tensor:
        """Bins, then 1 if the state behind them is finite, else 0: (action_tokens + 1,) int64."""
        x, last = self._embed(slots), slots.count + (self._context - 1)
        for i, (layer, cache) in enumerate(zip(self._layers, self._room.caches, strict=True)):
            only = last if i == len(self._layers) - 1 else None
            x = layer.prompt(x, cache, self._room.cos, self._room.sin, only)
        state = x[0]
        finite = state.isfinite().all()[None].long()
        bins = [self._choose(state)]
        for number in range(1, self._tokens):
            token = self._action_rows.index_select(0, bins[-1])[0]
            position = last + number
            for layer, cache in zip(self._layers, self._room.caches, strict=True):
                layer.step(token, cache, self._room.cos, self._room.sin, position)
            bins.append(self._choose(token))
        return torch.cat([*bins, finite])

    def _choose(self, state: Tensor) -> Tensor:
        logits = torch.empty(self._head.shape[0], dtype=torch.float32, device=state.device)
        self._ops.gemv(state, self._head, logits, self._norm, self._eps)
        return logits.argmax(-1, keepdim=True)
