"""pi0: PaliGemma sees and reads, an action expert denoises a chunk of actions (flow matching).

Black et al., pi0, arXiv 2410.24164. The modules are SigLIP and Gemma of `transformers`, put
together here so that their names are the same in all its versions, that every layer has widths of
its own, and that what pi0 never uses takes no memory (the expert's embedding). A test compares with
`transformers`' own class. Names of the parts are those that pruning and quantization know from
`rlrc_ros.vla.openvla`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GemmaConfig,
    GemmaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from rlrc_ros.vla.config import (
    ArchitectureConfig,
    DecoderConfig,
    ExpertConfig,
    LayerWidths,
    TowerConfig,
)
from rlrc_ros.vla.openvla import Inputs, set_layer_widths

NOISE_SEED = 0
"""Of the noise that every chunk starts from: the same observation always gives the same actions."""


def start_noise(expert: ExpertConfig, seed: int = NOISE_SEED) -> Tensor:
    """What denoising starts from, (chunk, action_width) float32; the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(expert.chunk, expert.action_width, generator=generator)


def time_embedding(expert: ExpertConfig, time: Tensor) -> Tensor:
    """(B,) in [0, 1] -> (B, hidden) float32: sines, then cosines (openpi, `posemb_sincos`)."""
    fraction = torch.linspace(0, 1, expert.hidden_size // 2, device=time.device)
    period = expert.min_period * (expert.max_period / expert.min_period) ** fraction
    angle = time.float()[:, None] * (1.0 / period * 2 * math.pi)[None]
    return torch.cat([angle.sin(), angle.cos()], 1)


class Projector(nn.Module):
    """Vision features to the decoder's width."""

    def __init__(self, vision_width: int, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(vision_width, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """(…, vision width) -> (…, hidden)."""
        return self.linear(features)


class Decoder(nn.Module):
    """PaliGemma's Gemma, without a head: only its keys and values are used."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.model = _gemma(config, config.hidden_size, config.layers)
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        set_layer_widths(self, config.layers)


class ActionExpert(nn.Module):
    """Gemma over proprioception and noisy actions, and the layers to and from them."""

    def __init__(self, config: ExpertConfig, decoder: DecoderConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.model = _gemma(decoder, hidden, config.layers)
        self.model.embed_tokens = nn.Identity()
        set_layer_widths(self, config.layers)
        self.state_proj = nn.Linear(config.state_width, hidden)
        self.action_in_proj = nn.Linear(config.action_width, hidden)
        self.action_time_mlp_in = nn.Linear(2 * hidden, hidden)
        self.action_time_mlp_out = nn.Linear(hidden, hidden)
        self.action_out_proj = nn.Linear(hidden, config.action_width)


@dataclass
class Prefix:
    """Images and instruction, gone through the language model.

    Attributes:
        keys: of each layer, (B, kv_heads, L, head_dim), rotated.
        values: of each layer, the same shape.
        mask: (B, L) bool, False at padding.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor


class Pi0(nn.Module):
    """Images, proprioception and instruction in, a chunk of continuous actions out.

    The prefix is the patches of each camera in turn, then the prompt; all of it sees all of it. The
    suffix is the proprioception, which sees the prefix, and the noisy actions, which see
    everything. `Inputs.pixel_values` is (B, cameras, 3, H, W).
    """

    def __init__(self, config: ArchitectureConfig) -> None:
        super().__init__()
        assert config.expert is not None
        tower, decoder = config.towers[0], config.decoder
        self.config = config
        self.vision_backbone = SiglipVisionModel(_siglip_config(tower))
        self.projector = Projector(tower.width, decoder.hidden_size)
        self.proprio_projector = None  # proprioception goes to the expert
        self.language_model = Decoder(decoder)
        self.expert = ActionExpert(config.expert, decoder)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts that parameters and bytes are reported by."""
        return {
            "vision": self.vision_backbone,
            "projector": self.projector,
            "llm": self.language_model,
            "expert": self.expert,
        }

    def embed(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The language model's input, (B, L, hidden), and its mask, (B, L) bool."""
        batch, cameras = inputs.pixel_values.shape[:2]
        seen = self.vision_backbone(inputs.pixel_values.flatten(0, 1)).last_hidden_state
        seen = self.projector(seen)
        seen = seen.reshape(batch, cameras * seen.shape[1], seen.shape[2])
        embedding = self.language_model.model.embed_tokens.weight
        text = F.embedding(inputs.input_ids, embedding) * embedding_scale(embedding)
        mask = inputs.attention_mask
        if mask is None:
            mask = torch.ones(inputs.input_ids.shape, dtype=torch.bool, device=text.device)
        mask = F.pad(mask, (seen.shape[1], 0), value=True)
        return torch.cat([seen.to(text.dtype), text], 1), mask

    def prefix(self, inputs: Inputs) -> Prefix:
        """Images and instruction through the language model."""
        embeds, mask = self.embed(inputs)
        cache = DynamicCache()
        self.language_model.model(
            inputs_embeds=embeds,
            attention_mask=mask[:, None, None].expand(-1, 1, embeds.shape[1], -1),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        layers: Any = cache.layers
        return Prefix([layer.keys for layer in layers], [layer.values for layer in layers], mask)

    def velocity(
        self, prefix: Prefix, proprioception: Tensor | None, noisy: Tensor, time: Tensor
    ) -> Tensor:
        """The flow at noisy actions.

        Args:
            prefix: of the observation.
            proprioception: (B, P), normalised; None where the policy takes none.
            noisy: (B, chunk, action_width): time · noise + (1 − time) · actions.
            time: (B,), 1 pure noise, 0 the actions.

        Returns:
            (B, chunk, action_width) float32: noise − actions.
        """
        state = self.embed_state(proprioception, len(noisy))
        suffix = torch.cat([state, self.embed_actions(noisy, time)], 1)
        return self.expert.action_out_proj(self._hidden(prefix, suffix)[:, 1:]).float()

    def state(self, prefix: Prefix, proprioception: Tensor | None) -> Tensor:
        """The expert's last hidden state at the proprioception, (B, its hidden).

        It sees the whole prefix and no action, so it is a function of the observation alone.
        """
        return self._hidden(prefix, self.embed_state(proprioception, len(prefix.mask)))[:, 0]

    def _hidden(self, prefix: Prefix, suffix: Tensor) -> Tensor:
        """Proprioception and actions through the expert, (B, T, its hidden)."""
        cache = DynamicCache()
        for i, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            cache.update(keys, values, i)
        length, tokens = prefix.mask.shape[1], suffix.shape[1]
        mask = F.pad(prefix.mask, (0, tokens), value=True)[:, None, None]
        mask = mask.repeat(1, 1, tokens, 1)
        mask[:, :, 0, length + 1 :] = False  # the proprioception sees no action
        steps = torch.arange(tokens, device=suffix.device)
        return self.expert.model(
            inputs_embeds=suffix,
            attention_mask=mask,
            position_ids=prefix.mask.sum(1, keepdim=True) + steps[None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def embed_state(self, proprioception: Tensor | None, batch: int) -> Tensor:
        """(B, P) -> (B, 1, expert's hidden)."""
        weight = self.expert.state_proj.weight
        if proprioception is None:
            proprioception = weight.new_zeros(batch, 0)
        padded = F.pad(proprioception, (0, weight.shape[1] - proprioception.shape[1]))
        return self.expert.state_proj(padded.to(weight.dtype))[:, None]

    def embed_actions(self, noisy: Tensor, time: Tensor) -> Tensor:
        """(B, chunk, action_width) and (B,) -> (B, chunk, expert's hidden)."""
        expert = self.expert
        actions = expert.action_in_proj(noisy.to(expert.action_in_proj.weight.dtype))
        assert self.config.expert is not None
        when = time_embedding(self.config.expert, time)[:, None].expand_as(actions)
        both = torch.cat([actions, when.to(actions.dtype)], 2)
        return expert.action_time_mlp_out(F.silu(expert.action_time_mlp_in(both)))

    @torch.no_grad()
    def generate(self, inputs: Inputs, noise: Tensor) -> Tensor:
        """A chunk of actions: Euler steps along the flow from noise at time 1 to time 0.

        Args:
            inputs: the batch.
            noise: (B, chunk, action_width), from the standard normal distribution.

        Returns:
            (B, chunk, action_width) float32, normalised, padding included.
        """
        assert self.config.expert is not None
        prefix, steps = self.prefix(inputs), self.config.expert.steps
        actions = noise.float()
        for number in range(steps):
            time = actions.new_full((len(actions),), 1.0 - number / steps)
            flow = self.velocity(prefix, inputs.proprioception, actions, time)
            actions = actions - flow / steps
        return actions

    def rebuild_buffers(self) -> None:
        """Compute what is not stored, and lost when built on the meta device."""
        for model in (self.language_model.model, self.expert.model):
            rotary = model.rotary_emb
            if rotary.inv_freq.is_meta:
                with torch.device("cpu"):
                    model.rotary_emb = type(rotary)(rotary.config)
        embeddings: Any = self.vision_backbone.embeddings
        if embeddings.position_ids.is_meta:
            embeddings.position_ids = torch.arange(embeddings.num_positions)[None]


def embedding_scale(weight: Tensor) -> float:
    """What Gemma multiplies its embeddings by, √hidden, rounded as the weights are."""
    return torch.tensor(weight.shape[1] ** 0.5, dtype=weight.dtype).item()


def _gemma(decoder: DecoderConfig, hidden_size: int, layers: tuple[LayerWidths, ...]) -> Any:
    config = GemmaConfig(
        vocab_size=1,  # the embedding is replaced
        hidden_size=hidden_size,
        head_dim=decoder.head_dim,
        intermediate_size=1,
        num_hidden_layers=len(layers),
        # Widths differ between layers: `set_layer_widths` gives each its own.
        num_attention_heads=1,
        num_key_value_heads=1,
        rms_norm_eps=decoder.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": decoder.rope_theta},
        max_position_embeddings=decoder.max_positions,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = "sdpa"
    return GemmaModel(config)


def _siglip_config(tower: TowerConfig) -> SiglipVisionConfig:
    config = SiglipVisionConfig(
        hidden_size=tower.width,
        intermediate_size=tower.ffn,
        num_hidden_layers=tower.depth,
        num_attention_heads=tower.heads,
        image_size=tower.image_size,
        patch_size=tower.patch,
        vision_use_head=False,
    )
    config._attn_implementation = "sdpa"
    return config
