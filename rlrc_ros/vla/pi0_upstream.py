"""What `transformers` makes of pi0: its names for our tensors, and its own class over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PI0Config, PI0ForConditionalGeneration

from rlrc_ros.vla.config import ArchitectureConfig
from rlrc_ros.vla.openvla import Inputs
from rlrc_ros.vla.pi0 import Pi0

NAMES = (
    ("vision_backbone.", "model.vlm.vision_tower."),
    ("projector.", "model.vlm.multi_modal_projector."),
    ("language_model.model.", "model.vlm.language_model."),
    ("expert.model.", "model.dit."),
    ("expert.action_out_proj.", "action_out_proj."),
    ("expert.", "embed_action_time."),
)
"""Beginnings of names: ours, and those of `transformers`; the first that fits counts."""
UNUSED = "model.dit.embed_tokens.weight"
"""The expert's embedding, which `transformers` has and nothing uses."""


def upstream_name(name: str) -> str:
    """What `transformers` calls a tensor of ours."""
    ours, theirs = next(pair for pair in NAMES if name.startswith(pair[0]))
    return theirs + name[len(ours) :]


def upstream_config(config: ArchitectureConfig) -> PI0Config:
    """As `transformers` says it; of an architecture whose layers all have the same widths."""
    expert, tower, decoder = config.expert, config.towers[0], config.decoder
    assert expert is not None and len({*decoder.layers}) == len({*expert.layers}) == 1

    def gemma(hidden_size: int, layers: Any) -> dict[str, Any]:
        return {
            "model_type": "gemma",
            "hidden_size": hidden_size,
            "num_hidden_layers": len(layers),
            "intermediate_size": layers[0].ffn,
            "num_attention_heads": layers[0].heads,
            "num_key_value_heads": layers[0].kv_heads,
            "head_dim": decoder.head_dim,
            "vocab_size": decoder.vocab_size,
            "rms_norm_eps": decoder.rms_norm_eps,
            "max_position_embeddings": decoder.max_positions,
            "rope_parameters": {"rope_type": "default", "rope_theta": decoder.rope_theta},
        }

    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": tower.width,
        "intermediate_size": tower.ffn,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "patch_size": tower.patch,
        "image_size": tower.image_size,
        "vision_use_head": False,
    }
    return PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": gemma(decoder.hidden_size, decoder.layers),
            "vision_config": vision,
            "projection_dim": decoder.hidden_size,
            "image_token_id": decoder.vocab_size,
        },
        dit_config=gemma(expert.hidden_size, expert.layers),
        chunk_size=expert.chunk,
        max_state_dim=expert.state_width,
        max_action_dim=expert.action_width,
        num_inference_steps=expert.steps,
        min_period=expert.min_period,
        max_period=expert.max_period,
    )


def upstream_model(model: Pi0) -> PI0ForConditionalGeneration:
    """The class of `transformers` over the same tensors, which it shares; on their device."""
    state = {upstream_name(name): tensor for name, tensor in model.state_dict().items()}
    with torch.device(next(model.parameters()).device):
        theirs: Any = PI0ForConditionalGeneration(upstream_config(model.config))
    left = theirs.load_state_dict(state, strict=False, assign=True)
    assert left.missing_keys == [UNUSED] and not left.unexpected_keys
    theirs.model.dit.embed_tokens = nn.Identity()
    return theirs.eval()


def upstream_inputs(config: ArchitectureConfig, inputs: Inputs) -> dict[str, Tensor]:
    """A batch as the processor of `transformers` lays it out: places for patches in the prompt."""
    assert config.expert is not None
    batch, cameras = inputs.pixel_values.shape[:2]
    patches = cameras * config.towers[0].patches
    ids = inputs.input_ids
    places = ids.new_full((batch, patches), config.decoder.vocab_size)
    mask = inputs.attention_mask
    mask = torch.ones_like(ids) if mask is None else mask.long()
    pixels = inputs.pixel_values
    state = pixels.new_zeros(batch, config.expert.state_width)
    if inputs.proprioception is not None:
        state[:, : inputs.proprioception.shape[1]] = inputs.proprioception
    return {
        "state": state,
        "input_ids": torch.cat([places, ids], 1),
        "pixel_values": pixels,
        "attention_mask": torch.cat([torch.ones_like(places), mask], 1),
        "pixel_attention_mask": torch.ones(batch, cameras, dtype=torch.bool, device=ids.device),
    }
