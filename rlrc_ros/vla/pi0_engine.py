"""Engines of pi0: the modules as they are, and on a GPU a whole chunk in one CUDA graph.

At batch 1 a denoising step waits for launches, not for arithmetic, and a chunk takes ten of them.
So `Pi0GraphEngine` does everything in fixed places: images and prompt go through the language model
once and leave keys and values; the proprioception, which sees no action, once through the expert;
then only the noisy actions in every step, with what the steps' times add worked out beforehand. All
query heads of a key-value head are one matrix of queries, since all may see the same keys. Of the
language model's last layer only keys and values are computed: nothing else of it is used. What lies
between the images' bytes and the actions is captured once for each length of prompt.
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
from rlrc_ros.vla.captured import CapturedEngine, Room, Slots, operations_for
from rlrc_ros.vla.matrices import Matrix
from rlrc_ros.vla.openvla import Inputs
from rlrc_ros.vla.pi0 import Pi0, embedding_scale, start_noise, time_embedding
from rlrc_ros.vla.quantization import weight_bytes

PROMPT_LENGTHS = (16, 32, 48)
"""Tokens of a prompt that graphs are captured for; 48 is the longest that pi0 is trained with."""
ALIGNMENT = 16
"""Numbers of keys are multiples of this, which fused attention with a mask wants."""


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
        return matrices.times(x, matrix, self._ops, bias)

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
        return matrices.add_product(x, y, weight, self._ops)


class Pi0GraphEngine(CapturedEngine):
    """One observation at a time.

    Args:
        model: is taken apart; its weights live on in fused form.
        noise: (chunk, action_width) to start from; by default the same in every process.
        lengths: of prompts that graphs are captured for; none on a CPU.
        hold: how linear layers with the same input become one `Matrix`.
        operations: where the arithmetic is; by default Triton's on a GPU that has it.
    """

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
        self._config, size = expert, config.towers[0].image_size
        embedding = model.language_model.model.embed_tokens.weight.detach()
        device, dtype = embedding.device, embedding.dtype
        images = (config.images, size, size, 3)
        super().__init__(device, dtype, embedding, images, expert.state_width, lengths)
        self._scale = embedding_scale(embedding)
        del embedding
        model.language_model.model.embed_tokens = nn.Identity()
        self._ops = operations or operations_for(self._device, config.decoder.head_dim)
        self._noise = (start_noise(expert) if noise is None else noise).to(self._device)

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
        self._suffix = _aligned(1 + expert.chunk)
        self._room = self._make_room(max(self._lengths, default=ALIGNMENT))

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

    def _words(self, length: int) -> int:
        return _aligned(length)

    def _needed(self, length: int) -> int:
        return _aligned(self._context + _aligned(length)) + self._suffix

    def _make_room(self, length: int) -> Room:
        capacity = self._needed(length)
        positions = torch.arange(capacity, device=self._device)
        cos, sin = self._rotary(self._noise, positions[None])
        kind: dict[str, Any] = {"dtype": self._dtype, "device": self._device}
        caches = [
            torch.zeros(2, layer.kv_heads, capacity, layer.head_dim, **kind)
            for layer in self._layers
        ]
        return Room(caches, positions, cos[0].contiguous(), sin[0].contiguous())

    def chunk(self, inputs: Inputs) -> Tensor:
        """Normalised actions, (1, chunk, action_width) float32 on the CPU.

        Args:
            inputs: one observation on the CPU, its `pixel_values` (1, cameras, H, W, 3) uint8.

        Raises:
            UserError: they are not finite.
        """
        return _finite(self._out(inputs)[None])

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights held in memory, by part; the embedding's are on the host."""
        layers = [sum(x.nbytes for x in group) for group in (self._layers, self._expert_layers)]
        heads = [self._times, self._actions_in, *self._heads.parameters()]
        return self._vision.nbytes | {
            "llm": layers[0] + self._embedding.nbytes,
            "expert": layers[1] + sum(tensor.nbytes for tensor in heads),
        }

    def _act(self, slots: Slots) -> Tensor:
        """Denoised actions, (chunk, action_width) float32."""
        expert, chunk = self._heads, self._config.chunk
        x = self._embed(slots)
        length, dtype = len(x), x.dtype
        read = self._context + slots.count  # places of the prefix that are no padding
        mask, state_mask = self._masks(length, read, dtype)
        last = len(self._layers) - 1
        for i, (layer, cache) in enumerate(zip(self._layers, self._room.caches, strict=True)):
            if i < last:
                x = layer(x, cache, 0, self._room.cos, self._room.sin, mask[:, :length])
            else:
                layer.keys(x, cache, 0, self._room.cos, self._room.sin)
        positions = read + self._room.positions[: 1 + chunk]
        cos, sin = (table.index_select(0, positions) for table in (self._room.cos, self._room.sin))
        assert slots.state is not None
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
        place = self._room.positions[: length + self._suffix]
        prefix, state = place < read, place == length
        actions = (place > length) & (place <= length + self._config.chunk)
        masks = [
            torch.zeros_like(place, dtype=dtype).masked_fill(~seen, -torch.inf)[None]
            for seen in (prefix | state | actions, prefix | state)
        ]
        return masks[0], masks[1]

    def _through(self, x: Tensor, start: int, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Through the expert's layers."""
        for layer, cache in zip(self._expert_layers, self._room.caches, strict=True):
            x = layer(x, cache, start, cos, sin, mask)
        return x

    def _embed(self, slots: Slots) -> Tensor:
        """The language model's input, (L, hidden)."""
        text = slots.words * self._scale
        mean, std = self._normal
        pixels = slots.images.permute(0, 3, 1, 2).float() / 255
        return torch.cat([self._vision((pixels - mean) / std), text])


def _aligned(number: int) -> int:
    return -(-number // ALIGNMENT) * ALIGNMENT
