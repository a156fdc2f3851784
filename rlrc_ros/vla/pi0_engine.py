"""Engines of pi0: the modules as they are, and on a GPU a whole chunk in one CUDA graph.

At batch 1 a denoising step waits for launches, not for arithmetic, and a chunk takes ten of them.
So `Pi0GraphEngine` does everything in fixed places: images and prompt go through the language model
once and leave keys and values; the proprioception, which sees no action, once through the expert;
then only the noisy actions in every step, with what the steps' times add worked out beforehand. All
query heads of a key-value head are one matrix of queries, since all may see the same keys. Of the
language model's last layer only keys and values are computed: nothing else of it is used. What lies
between the images' bytes and the actions is captured once for each length of prompt.

The same code runs without a graph: on a CPU, and for prompts longer than any that was captured.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrc_ros.errors import UserError
from rlrc_ros.vla import matrices
from rlrc_ros.vla.graph_engine import operations_for
from rlrc_ros.vla.matrices import Matrix
from rlrc_ros.vla.openvla import Inputs
from rlrc_ros.vla.pi0 import Pi0, embedding_scale, start_noise, time_embedding
from rlrc_ros.vla.quantization import weight_bytes

PROMPT_LENGTHS = (16, 32, 48)
"""Tokens of a prompt that graphs are captured for; 48 is the longest that pi0 is trained with."""
ALIGNMENT = 16
"""Numbers of keys are multiples of this, which fused attention with a mask wants."""

log = logging.getLogger(__name__)


class Pi0EagerEngine:
    """The modules as they are; any batch, any device.

    Args:
        model: the policy.
        noise: (chunk, action_width) to start from; by default the same in every process.
    """

    name = "eager"
    takes_bytes = False

    def __init__(self, model: Pi0, noise: Tensor | None = None) -> None:
        assert model.config.expert is not None
        self._model = model
        self._noise = start_noise(model.config.expert) if noise is None else noise

    @torch.inference_mode()
    def chunk(self, inputs: Inputs) -> Tensor:
        """Normalised actions, (B, chunk, action_width) float32 on the CPU.

        Raises:
            UserError: they are not finite.
        """
        noise = self._noise.to(inputs.input_ids.device)[None].expand(len(inputs), -1, -1)
        return _finite(self._model.generate(inputs, noise).cpu())

    def prepare(self) -> float:
        """Nothing to do."""
        return 0.0

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights held in memory, by part."""
        return {name: weight_bytes(part) for name, part in self._model.parts.items()}


def _finite(actions: Tensor) -> Tensor:
    if not actions.isfinite().all():
        raise UserError("the policy's actions are not finite; its weights or inputs are broken")
    return actions


class _Vision:
    """SigLIP over all cameras' images at once, and the projector."""

    def __init__(self, model: Pi0, matrix: Callable[[list[Any]], Matrix], ops: Any) -> None:
        tower: Any = model.vision_backbone
        convolution, self._ops = tower.embeddings.patch_embedding, ops
        self._patch = convolution.kernel_size[0]
        self._embedding = convolution.weight.detach().flatten(1)
        self._bias = convolution.bias
        self._position = tower.embeddings.position_embedding.weight.detach()
        self._heads = model.config.towers[0].heads
        self._final = tower.post_layernorm
        self._blocks = []
        held = [self._embedding, self._bias, self._position, *self._final.parameters()]
        for i in range(len(tower.encoder.layers)):  # each let go as soon as it is fused: memory
            layer = tower.encoder.layers[i]
            attention = layer.self_attn
            groups = (
                [attention.q_proj, attention.k_proj, attention.v_proj],
                [attention.out_proj],
                [layer.mlp.fc1],
                [layer.mlp.fc2],
            )
            linears = [
                (matrix(group), torch.cat([linear.bias.detach() for linear in group]))
                for group in groups
            ]
            norms = (layer.layer_norm1, layer.layer_norm2)
            self._blocks.append((norms, linears))
            held += [tensor for pair in linears for tensor in pair]
            held += [parameter for norm in norms for parameter in norm.parameters()]
            tower.encoder.layers[i] = nn.Identity()
        projector: Any = model.projector
        linear = projector.linear
        self._projector = (matrix([linear]), linear.bias.detach())
        projector.linear = nn.Identity()
        self.nbytes = {
            "vision": sum(tensor.nbytes for tensor in held),
            "projector": sum(tensor.nbytes for tensor in self._projector),
        }

    def __call__(self, images: Tensor) -> Tensor:
        """(C, 3, H, W) float32, normalised -> (C · patches, decoder's hidden)."""
        cameras, patch, rows = len(images), self._patch, images.shape[2] // self._patch
        squares = images.reshape(cameras, 3, rows, patch, rows, patch).permute(0, 2, 4, 1, 3, 5)
        squares = squares.reshape(cameras, rows * rows, -1).to(self._embedding.dtype)
        x = F.linear(squares, self._embedding, self._bias) + self._position
        x = x.flatten(0, 1)
        delta: Tensor | None = None
        for (norm1, norm2), (qkv, out, first, second) in self._blocks:
            h = self._linear(self._norm(x, norm1, delta), qkv)
            shape = (cameras, rows * rows, 3, self._heads, -1)
            q, k, v = h.view(shape).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
            delta = self._linear(mixed, out)
            h = self._linear(self._norm(x, norm2, delta), first)
            delta = self._linear(F.gelu(h, approximate="tanh"), second)
        return self._linear(self._norm(x, self._final, delta), self._projector)

    def _linear(self, x: Tensor, weight: tuple[Matrix, Tensor]) -> Tensor:
        matrix, bias = weight
        return F.linear(x, matrices.dense(matrix, x.dtype, self._ops), bias)

    def _norm(self, x: Tensor, norm: nn.LayerNorm, delta: Tensor | None) -> Tensor:
        """Add to x in place, then normalise."""
        return self._ops.norm(x, norm.weight, norm.eps, norm.bias, delta)


class _Layer:
    """One layer of a Gemma, its projections fused.

    Args:
        layer: of `transformers`.
        matrix: makes one of linear layers with the same input.
        ops: the arithmetic.
        keys_only: nothing but its keys and values will be asked for.
    """

    def __init__(
        self, layer: Any, matrix: Callable[[list[Any]], Matrix], ops: Any, keys_only: bool = False
    ) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._ops, self.head_dim = ops, attention.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.heads = 0 if keys_only else attention.q_proj.out_features // self.head_dim
        self._eps = layer.input_layernorm.eps
        # Gemma's gain is 1 + weight, in float32.
        self._norm1, self._norm2 = (
            norm.weight.detach().float() + 1
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        queries = [] if keys_only else [attention.q_proj]
        self._qkv = matrix([*queries, attention.k_proj, attention.v_proj])
        self.nbytes = self._qkv.nbytes + self._norm1.nbytes
        if not keys_only:
            self._out = matrix([attention.o_proj])
            self._gate_up = matrix([mlp.gate_proj, mlp.up_proj])
            self._down = matrix([mlp.down_proj])
            parts = (self._out, self._gate_up, self._down, self._norm2)
            self.nbytes += sum(part.nbytes for part in parts)

    def keys(self, x: Tensor, cache: Tensor, start: int, cos: Tensor, sin: Tensor) -> Tensor:
        """Put x's keys and values in the cache, (2, kv_heads, capacity, head_dim), from `start` on.

        Returns:
            Its queries, (heads, T, head_dim).
        """
        h = self._ops.norm(x, self._norm1, self._eps)
        qkv = matrices.times(h, self._qkv, self._ops)
        return self._ops.rope(qkv, cos, sin, cache[:, :, start:], self.heads)

    def __call__(
        self,
        x: Tensor,
        cache: Tensor,
        start: int,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """(T, hidden) -> (T, hidden), x overwritten.

        mask: (1, K), added to the scores of the first K keys in the cache.
        """
        ops, tokens = self._ops, len(x)
        query = self.keys(x, cache, start, cos, sin)
        seen = mask.shape[1]
        mixed = F.scaled_dot_product_attention(
            query.reshape(1, self.kv_heads, -1, self.head_dim),
            cache[:1, :, :seen],
            cache[1:, :, :seen],
            attn_mask=mask,
        )
        mixed = mixed.reshape(self.heads, tokens, -1).transpose(0, 1).reshape(tokens, -1)
        x = self._plus(x, mixed, self._out)
        h = matrices.times(ops.norm(x, self._norm2, self._eps), self._gate_up, ops)
        return self._plus(x, ops.gate(h, gelu=True), self._down)

    def _plus(self, x: Tensor, y: Tensor, weight: Matrix) -> Tensor:
        return x.addmm_(y, matrices.dense(weight, x.dtype, self._ops).T)


@dataclass
class _Slots:
    """Where a chunk's inputs are put, for one length of prompt."""

    images: Tensor
    """(cameras, H, W, 3) uint8."""
    words: Tensor
    """Embedded, (tokens, hidden)."""
    count: Tensor
    """Tokens of the prompt that are no padding, (1,)."""
    state: Tensor
    """(1, state_width), normalised."""


class Pi0GraphEngine:
    """One observation at a time.

    Args:
        model: is taken apart; its weights live on in fused form.
        noise: (chunk, action_width) to start from; by default the same in every process.
        lengths: of prompts that graphs are captured for; none on a CPU.
        hold: how linear layers with the same input become one `Matrix`.
        operations: where the arithmetic is; by default Triton's on a GPU that has it.
    """

    name = "graph"
    takes_bytes = True

    def __init__(
        self,
        model: Pi0,
        noise: Tensor | None = None,
        lengths: Sequence[int] = PROMPT_LENGTHS,
        hold: Callable[[list[Any], torch.dtype], Matrix] = matrices.held,
        operations: ModuleType | None = None,
    ) -> None:
        config, expert = model.config, model.config.expert
        assert expert is not None
        self._config = expert
        embedding = model.language_model.model.embed_tokens.weight.detach()
        self._device, dtype = embedding.device, embedding.dtype
        self._kind: dict[str, Any] = {"device": self._device, "dtype": dtype}
        self._scale = embedding_scale(embedding)
        # Some rows an action: they are looked up on the host, and a GPU has room for other things.
        self._embedding = embedding.cpu()
        del embedding
        model.language_model.model.embed_tokens = nn.Identity()
        self._ops = operations or operations_for(self._device, config.decoder.head_dim)
        self._noise = (start_noise(expert) if noise is None else noise).to(self._device)
        self._on_gpu = self._device.type == "cuda"

        def matrix(linears: list[Any]) -> Matrix:
            return hold(linears, dtype)

        self._vision = _Vision(model, matrix, self._ops)
        tower = config.towers[0]
        self._normal = torch.tensor([tower.mean, tower.std], device=self._device)[:, :, None, None]
        self._layers = self._taken(model.language_model.model.layers, matrix, keys_only_last=True)
        self._expert_layers = self._taken(model.expert.model.layers, matrix)
        self._rotary = model.language_model.model.rotary_emb
        self._take_heads(model)
        self._context = config.context
        self._images = (config.images, tower.image_size, tower.image_size, 3)
        self._suffix = _aligned(1 + expert.chunk)
        self._lengths = sorted(lengths) if self._on_gpu else []
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, _Slots, Tensor]] = {}
        self._allocate(max(self._lengths, default=ALIGNMENT))

    def _taken(
        self,
        layers: nn.ModuleList,
        matrix: Callable[[list[Any]], Matrix],
        keys_only_last: bool = False,
    ) -> list[_Layer]:
        taken = []
        for i in range(len(layers)):  # each let go as soon as it is fused: memory
            last = keys_only_last and i == len(layers) - 1
            taken.append(_Layer(layers[i], matrix, self._ops, last))
            layers[i] = nn.Identity()
        return taken

    def _take_heads(self, model: Pi0) -> None:
        """What leads into the expert and out of it, and what the times of the steps add there."""
        expert: Any = model.expert
        steps, self._heads = self._config.steps, expert
        self._final = expert.model.norm.weight.detach().float() + 1
        self._eps = expert.model.norm.eps
        hidden = self._config.hidden_size
        weight, bias = expert.action_time_mlp_in.weight.detach(), expert.action_time_mlp_in.bias
        times = 1.0 - torch.arange(steps, device=self._device) / steps
        when = time_embedding(self._config, times).to(weight.dtype).float()
        self._times = (when @ weight[:, hidden:].float().T + bias.detach().float()).to(weight.dtype)
        self._actions_in = weight[:, :hidden].clone()
        expert.action_time_mlp_in = nn.Identity()

    def _allocate(self, length: int) -> None:
        """Room for a prompt of `length` tokens, a multiple of ALIGNMENT."""
        self._capacity = _aligned(self._context + length) + self._suffix
        self._caches = [
            torch.zeros(2, layer.kv_heads, self._capacity, layer.head_dim, **self._kind)
            for layer in self._layers
        ]
        self._places = torch.arange(self._capacity, device=self._device)
        cos, sin = self._rotary(self._noise, self._places[None])
        self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()

    def prepare(self) -> float:
        """Capture every graph, so that no robot waits for one.

        Returns the seconds it took.
        """
        start = time.perf_counter()
        with self._current_device():
            for length in reversed(self._lengths):
                if length not in self._graphs:
                    self._capture(length)
        return time.perf_counter() - start

    @torch.inference_mode()
    def chunk(self, inputs: Inputs) -> Tensor:
        """Normalised actions, (1, chunk, action_width) float32 on the CPU.

        Args:
            inputs: one observation on the CPU, its `pixel_values` (1, cameras, H, W, 3) uint8.

        Raises:
            UserError: they are not finite.
        """
        if len(inputs) != 1 or inputs.pixel_values.dtype != torch.uint8:
            raise ValueError("the graph engine takes one observation at a time, its image in bytes")
        with self._current_device():
            return _finite(self._run(inputs).cpu()[None])

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights held in memory, by part; the embedding's are on the host."""
        layers = [sum(x.nbytes for x in group) for group in (self._layers, self._expert_layers)]
        heads = [self._times, self._actions_in, *self._heads.parameters()]
        return self._vision.nbytes | {
            "llm": layers[0] + self._embedding.nbytes,
            "expert": layers[1] + sum(tensor.nbytes for tensor in heads),
        }

    def _run(self, inputs: Inputs) -> Tensor:
        """By the smallest graph that has room; without one where none has."""
        length = inputs.input_ids.shape[1]
        fitting = [number for number in self._lengths if number >= length]
        if fitting:
            if fitting[0] not in self._graphs:
                self._capture(fitting[0])
            graph, slots, out = self._graphs[fitting[0]]
            self._fill(slots, inputs)
            graph.replay()
            return out
        if self._lengths:
            log.warning(
                "a prompt of %d tokens is longer than any that was prepared for (%d): this action "
                "takes longer",
                length,
                self._lengths[-1],
            )
        slots = self._slots(_aligned(length))
        self._fill(slots, inputs)
        return self._beyond(slots)

    def _slots(self, length: int) -> _Slots:
        device = self._device
        return _Slots(
            torch.zeros(self._images, dtype=torch.uint8, device=device),
            torch.zeros(length, self._embedding.shape[1], **self._kind),
            torch.ones(1, dtype=torch.long, device=device),
            torch.zeros(1, self._config.state_width, **self._kind),
        )

    def _fill(self, slots: _Slots, inputs: Inputs) -> None:
        ids = inputs.input_ids[0]
        slots.images.copy_(self._ready(inputs.pixel_values[0]), non_blocking=True)
        padded = F.pad(ids, (0, len(slots.words) - len(ids)))
        slots.words.copy_(self._ready(self._embedding[padded]), non_blocking=True)
        slots.count.fill_(len(ids))
        if inputs.proprioception is not None:
            state = slots.state[:, : inputs.proprioception.shape[1]]
            state.copy_(self._ready(inputs.proprioception), non_blocking=True)

    def _ready(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._on_gpu else tensor

    def _current_device(self) -> AbstractContextManager[Any]:
        """Triton and graphs use whichever GPU is current."""
        return torch.cuda.device(self._device) if self._on_gpu else nullcontext()

    def _capture(self, length: int) -> None:
        slots = self._slots(length)
        with torch.inference_mode():
            stream = torch.cuda.Stream(self._device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # kernels are compiled, libraries get ready
                    self._act(slots)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
            with torch.cuda.graph(graph, pool=pool):
                out = self._act(slots)
        self._graphs[length] = (graph, slots, out)

    def _beyond(self, slots: _Slots) -> Tensor:
        """Without a graph; where the prompt has no room, in other places for this once."""
        if self._context + len(slots.words) + self._suffix <= self._capacity:
            return self._act(slots)
        kept = self._capacity, self._caches, self._places, self._cos, self._sin
        try:
            self._allocate(len(slots.words))
            return self._act(slots)
        finally:
            if self._graphs:
                self._capacity, self._caches, self._places, self._cos, self._sin = kept

    def _act(self, slots: _Slots) -> Tensor:
        """Denoised actions, (chunk, action_width) float32."""
        expert, chunk = self._heads, self._config.chunk
        x = self._embed(slots)
        length, dtype = len(x), x.dtype
        read = self._context + slots.count  # places of the prefix that are no padding
        mask, state_mask = self._masks(length, read, dtype)
        last = len(self._layers) - 1
        for i, (layer, cache) in enumerate(zip(self._layers, self._caches, strict=True)):
            if i < last:
                x = layer(x, cache, 0, self._cos, self._sin, mask[:, :length])
            else:
                layer.keys(x, cache, 0, self._cos, self._sin)
        positions = read + self._places[: 1 + chunk]
        cos, sin = (table.index_select(0, positions) for table in (self._cos, self._sin))
        state = F.linear(slots.state, expert.state_proj.weight, expert.state_proj.bias)
        self._through(state, length, cos[:1], sin[:1], state_mask)
        actions, steps = self._noise, self._config.steps
        for number in range(steps):
            h = F.linear(
                actions.to(dtype), expert.action_in_proj.weight, expert.action_in_proj.bias
            )
            h = F.silu(F.linear(h, self._actions_in, self._times[number]))
            h = expert.action_time_mlp_out(h)
            h = self._through(h, length + 1, cos[1:], sin[1:], mask)
            flow = expert.action_out_proj(self._ops.norm(h, self._final, self._eps))
            actions = actions - flow.float() / steps
        return actions

    def _masks(self, length: int, read: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the actions see, and what the proprioception sees, which is no action: (1, K)."""
        place = self._places[: length + self._suffix]
        prefix, state = place < read, place == length
        actions = (place > length) & (place <= length + self._config.chunk)
        masks = [
            torch.zeros_like(place, dtype=dtype).masked_fill(~seen, -torch.inf)[None]
            for seen in (prefix | state | actions, prefix | state)
        ]
        return masks[0], masks[1]

    def _through(self, x: Tensor, start: int, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Through the expert's layers."""
        for layer, cache in zip(self._expert_layers, self._caches, strict=True):
            x = layer(x, cache, start, cos, sin, mask)
        return x

    def _embed(self, slots: _Slots) -> Tensor:
        """The language model's input, (L, hidden)."""
        text = slots.words * self._scale
        mean, std = self._normal
        pixels = slots.images.permute(0, 3, 1, 2).float() / 255
        return torch.cat([self._vision((pixels - mean) / std), text])


def _aligned(number: int) -> int:
    return -(-number // ALIGNMENT) * ALIGNMENT
