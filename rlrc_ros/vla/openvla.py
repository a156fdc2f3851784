"""OpenVLA as plain torch modules and the Llama decoder of `transformers`.

No timm, no torchvision, no remote code. The module tree carries the names of upstream's checkpoint
(`openvla/openvla-7b`), so its tensors load key for key. Widths come from the configuration, per
layer, so that the same code runs a 7 B checkpoint, a pruned one, and the small tabletop policy.
Reference: Kim et al., OpenVLA, arXiv 2406.09246; the proprioception token is OpenVLA-OFT's (arXiv
2502.19645).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlrc_ros.vla.config import ArchitectureConfig, DecoderConfig, LayerWidths, TowerConfig


@dataclass
class Inputs:
    """A batch, preprocessed.

    Attributes:
        input_ids: (B, T) token ids, BOS first, shorter prompts padded at their end.
        attention_mask: (B, T) bool, False at padding; None when there is none.
        pixel_values: (B, 3 × towers × images, H, W), normalised: of each image one RGB triple for
            each tower; or (B, H, W, 3) uint8 for an engine that normalises, (B, images, H, W, 3)
            where there are several.
        proprioception: (B, P), normalised; None when the policy takes none.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    pixel_values: Tensor
    proprioception: Tensor | None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Inputs:
        """Moved to a device, the floating-point parts cast to `dtype`."""
        return Inputs(
            self.input_ids.to(device),
            None if self.attention_mask is None else self.attention_mask.to(device),
            self.pixel_values.to(device, dtype),
            None if self.proprioception is None else self.proprioception.to(device, dtype),
        )

    def __getitem__(self, rows: slice | Tensor) -> Inputs:
        return Inputs(
            self.input_ids[rows],
            None if self.attention_mask is None else self.attention_mask[rows],
            self.pixel_values[rows],
            None if self.proprioception is None else self.proprioception[rows],
        )

    def __len__(self) -> int:
        return len(self.input_ids)


class LayerScale(nn.Module):
    """A learnt factor a channel; upstream renamed timm's `gamma` to `scale_factor`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class TowerAttention(nn.Module):
    """Bidirectional self-attention with one fused projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        shape = (batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(x).view(shape).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class TowerMlp(nn.Module):
    """Two layers with the exact GELU."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ffn)
        self.fc2 = nn.Linear(ffn, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TowerBlock(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        scaled = config.kind == "dinov2"
        self.norm1 = nn.LayerNorm(config.width, 1e-6)
        self.attn = TowerAttention(config.width, config.heads)
        self.ls1 = LayerScale(config.width) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width, 1e-6)
        self.mlp = TowerMlp(config.width, config.ffn)
        self.ls2 = LayerScale(config.width) if scaled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class AttentionPool(nn.Module):
    """SigLIP's pooling head. Never run: it is here because its tensors are in the checkpoint."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, config.width))
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, 1e-6)
        self.mlp = TowerMlp(config.width, config.ffn)


class PatchEmbed(nn.Module):
    """(B, 3, H, W) -> (B, patches, width)."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch, config.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class VisionTower(nn.Module):
    """The part of timm's VisionTransformer that OpenVLA's two towers use.

    `forward` takes (B, 3, H, W) and gives (B, patches, width).
    """

    REGISTERS = 4

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.kind = config.kind
        if config.kind == "dinov2":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
            self.reg_token = nn.Parameter(torch.zeros(1, self.REGISTERS, config.width))
        self.pos_embed = nn.Parameter(torch.randn(1, config.patches, config.width) * 0.02)
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(TowerBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, 1e-6)
        if config.kind == "siglip":
            self.attn_pool = AttentionPool(config)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels) + self.pos_embed
        if self.kind == "vit":
            for block in self.blocks:
                x = block(x)
            return self.norm(x)
        prefix = 0
        if self.kind == "dinov2":
            tokens = torch.cat([self.cls_token, self.reg_token], 1).expand(len(x), -1, -1)
            x, prefix = torch.cat([tokens, x], 1), tokens.shape[1]
        for block in self.blocks[:-1]:
            x = block(x)
        return x[:, prefix:]


class VisionBackbone(nn.Module):
    """One or two towers, their features side by side; one image after the other.

    (B, 3 × towers × images, H, W) -> (B, images × patches, sum of widths).
    """

    def __init__(self, towers: Sequence[TowerConfig]) -> None:
        super().__init__()
        self.featurizer = VisionTower(towers[0])
        self.fused_featurizer = VisionTower(towers[1]) if len(towers) > 1 else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        channels = 3 if self.fused_featurizer is None else 6
        images = pixel_values.unflatten(1, (-1, channels)).flatten(0, 1)
        features = self.featurizer(images[:, :3])
        if self.fused_featurizer is not None:
            features = torch.cat([features, self.fused_featurizer(images[:, 3:])], 2)
        return features.reshape(len(pixel_values), -1, features.shape[2])


class Projector(nn.Module):
    """Vision features to the decoder's width.

    Two layers behind one tower, three behind two, as upstream has it.
    """

    def __init__(self, vision_width: int, hidden_size: int, towers: int) -> None:
        super().__init__()
        inner = hidden_size if towers == 1 else 4 * vision_width
        self.fc1 = nn.Linear(vision_width, inner)
        self.fc2 = nn.Linear(inner, hidden_size)
        self.fc3 = nn.Linear(hidden_size, hidden_size) if towers > 1 else None

    def forward(self, features: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(features)))
        return x if self.fc3 is None else self.fc3(F.gelu(x))


class ProprioProjector(nn.Module):
    """Proprioception to one token: (B, P) -> (B, hidden)."""

    def __init__(self, proprioception: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(proprioception, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, proprioception: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(proprioception)))


def set_layer_widths(language_model: Any, layers: Sequence[LayerWidths]) -> None:
    """Give each decoder layer fresh projections of its own widths.

    Llama's and Gemma's attention reshapes with -1, so `num_key_value_groups` is all that has to
    follow the heads.
    """
    for layer, widths in zip(language_model.model.layers, layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        hidden, head = attention.o_proj.out_features, attention.head_dim

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        attention.q_proj = linear(hidden, widths.heads * head)
        attention.k_proj = linear(hidden, widths.kv_heads * head)
        attention.v_proj = linear(hidden, widths.kv_heads * head)
        attention.o_proj = linear(widths.heads * head, hidden)
        attention.num_key_value_groups = widths.heads // widths.kv_heads
        mlp.gate_proj, mlp.up_proj = linear(hidden, widths.ffn), linear(hidden, widths.ffn)
        mlp.down_proj = linear(widths.ffn, hidden)
        mlp.intermediate_size = widths.ffn


def layer_widths(language_model: Any) -> tuple[LayerWidths, ...]:
    """The widths that the decoder's layers have now, read off the projections."""
    return tuple(
        LayerWidths(
            heads=layer.self_attn.q_proj.out_features // layer.self_attn.head_dim,
            kv_heads=layer.self_attn.k_proj.out_features // layer.self_attn.head_dim,
            ffn=layer.mlp.gate_proj.out_features,
        )
        for layer in language_model.model.layers
    )


def _llama_config(decoder: DecoderConfig) -> LlamaConfig:
    first = decoder.layers[0]
    config = LlamaConfig(
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        head_dim=decoder.head_dim,
        intermediate_size=first.ffn,
        num_hidden_layers=len(decoder.layers),
        # Heads differ between layers: `set_layer_widths` gives each its own.
        num_attention_heads=1,
        num_key_value_heads=1,
        rms_norm_eps=decoder.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": decoder.rope_theta},
        max_position_embeddings=decoder.max_positions,
        bos_token_id=decoder.bos_token_id,
        pad_token_id=decoder.pad_token_id,
        tie_word_embeddings=False,
        attention_bias=False,
    )
    config._attn_implementation = "sdpa"
    return config


class OpenVLA(nn.Module):
    """Image, proprioception and instruction in, action tokens out.

    The sequence is BOS, patches, proprioception (if any), the rest of the prompt, action tokens.
    Token ids of an action are the `n_bins` last ones before the vocabulary's padding.
    """

    def __init__(self, config: ArchitectureConfig, n_bins: int, action_tokens: int) -> None:
        super().__init__()
        decoder = config.decoder
        self.config = config
        self.n_bins, self.action_tokens = n_bins, action_tokens
        self.first_action_id = decoder.vocab_size - decoder.pad_to_multiple_of - n_bins
        self.vision_backbone = VisionBackbone(config.towers)
        vision_width = sum(tower.width for tower in config.towers)
        self.projector = Projector(vision_width, decoder.hidden_size, len(config.towers))
        self.proprio_projector = (
            ProprioProjector(config.proprioception, decoder.hidden_size)
            if config.proprioception
            else None
        )
        self.language_model = LlamaForCausalLM(_llama_config(decoder))
        set_layer_widths(self.language_model, decoder.layers)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts that parameters and bytes are reported by."""
        projector = nn.ModuleList([self.projector])
        if self.proprio_projector is not None:
            projector.append(self.proprio_projector)
        return {"vision": self.vision_backbone, "projector": projector, "llm": self.language_model}

    def embed(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """The decoder's input, (B, L, hidden), and its mask, (B, L) or None."""
        text = self.language_model.model.embed_tokens(inputs.input_ids)
        seen = [self.projector(self.vision_backbone(inputs.pixel_values))]
        if self.proprio_projector is not None:
            if inputs.proprioception is None:
                raise ValueError("this policy takes proprioception, and none was given")
            seen.append(self.proprio_projector(inputs.proprioception)[:, None])
        context = torch.cat(seen, 1).to(text.dtype)
        mask = inputs.attention_mask
        if mask is not None:
            mask = torch.cat([mask.new_ones(context.shape[:2]), mask], 1)
        return torch.cat([text[:, :1], context, text[:, 1:]], 1), mask

    def forward(self, inputs: Inputs, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher-forced pass over given actions.

        Args:
            inputs: the batch.
            actions: (B, action_tokens) bins in [0, n_bins), all but the last of them fed back.

        Returns:
            Logits over the bins, (B, action_tokens, n_bins); and the hidden state that the first
            action token is predicted from, (B, hidden).
        """
        prefix, mask = self.embed(inputs)
        fed = self.language_model.model.embed_tokens(actions[:, :-1] + self.first_action_id)
        embeds, tokens = torch.cat([prefix, fed.to(prefix.dtype)], 1), fed.shape[1]
        if mask is None:
            hidden = self._decode(embeds)[:, prefix.shape[1] - 1 :]
        else:
            # A row's action follows its own prompt; what pads it comes last, where nothing sees it.
            last = mask.sum(1, keepdim=True) - 1
            place = torch.arange(embeds.shape[1], device=embeds.device)
            moved = torch.where(
                place > last + tokens, place - tokens, place - last - 1 + prefix.shape[1]
            )
            hidden = self._decode(_at(embeds, torch.where(place > last, moved, place)))
            hidden = _at(hidden, last + place[: tokens + 1])
        return self.bin_logits(hidden), hidden[:, 0]

    def state(self, inputs: Inputs) -> Tensor:
        """The hidden state that the first action token is predicted from, (B, hidden)."""
        prefix, mask = self.embed(inputs)
        return _last_of_prompt(self._decode(prefix), mask)

    def _decode(self, embeds: Tensor) -> Tensor:
        model = self.language_model.model
        # What transformers does then, without its look at the positions, for which the host waits.
        positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
        rotary = model.rotary_emb(embeds, position_ids=positions)
        for layer in model.layers:
            embeds = layer(embeds, attention_mask=None, position_embeddings=rotary)
        return model.norm(embeds)

    def bin_logits(self, hidden: Tensor) -> Tensor:
        """(…, hidden) -> (…, n_bins).

        The head's rows of the action tokens alone, lowest token id first.
        """
        first = self.first_action_id
        return F.linear(hidden, self.language_model.lm_head.weight[first : first + self.n_bins])

    @torch.no_grad()
    def generate(
        self, inputs: Inputs, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode an action with a KV cache, restricted to the action tokens.

        Args:
            inputs: the batch.
            temperature: 0 takes the likeliest bin; otherwise bins are sampled at this temperature.
            generator: source of randomness for sampling.

        Returns:
            Bins (B, action_tokens); their log-probability at `temperature` (1 where it is 0),
            summed over the tokens, (B,); and the hidden state behind the first token, (B, hidden).
        """
        embeds, mask = self.embed(inputs)
        positions, past = _positions(mask), None
        states: list[Tensor] = []
        chosen: list[Tensor] = []
        log_probability = torch.zeros(len(embeds), device=embeds.device)
        for _ in range(self.action_tokens):
            out = self.language_model.model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=past,
                use_cache=True,
            )
            past = out.past_key_values
            states.append(
                out.last_hidden_state[:, -1]
                if states
                else _last_of_prompt(out.last_hidden_state, mask)
            )
            log_p = (self.bin_logits(states[-1]).float() / (temperature or 1.0)).log_softmax(-1)
            if temperature:
                bins = torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0]
            else:
                bins = log_p.argmax(-1)
            log_probability += log_p.gather(1, bins[:, None])[:, 0]
            chosen.append(bins)
            embeds = self.language_model.model.embed_tokens((bins + self.first_action_id)[:, None])
            mask = _extend(mask, 1)
            positions = None if mask is None else mask.sum(1, keepdim=True) - 1
        return torch.stack(chosen, 1), log_probability, states[0]

    def rebuild_buffers(self) -> None:
        """Compute the rotary frequencies: not stored, and lost when built on the meta device."""
        rotary = self.language_model.model.rotary_emb
        if rotary.inv_freq.is_meta:
            with torch.device("cpu"):
                self.language_model.model.rotary_emb = type(rotary)(rotary.config)


def _positions(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)


def _extend(mask: Tensor | None, tokens: int) -> Tensor | None:
    return None if mask is None else F.pad(mask, (0, tokens), value=True)


def _last_of_prompt(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The state at each row's last token that is no padding: (B, L, hidden) -> (B, hidden)."""
    if mask is None:
        return hidden[:, -1]
    return _at(hidden, mask.sum(1, keepdim=True) - 1)[:, 0]


def _at(x: Tensor, places: Tensor) -> Tensor:
    """(B, L, hidden) at the places (B, N) of each row -> (B, N, hidden)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
