"""Small pi0 policies with random weights, and transformers' own pi0 with the same."""

import torch
from transformers import PI0Config, PI0ForConditionalGeneration

from rlrc_ros.vla.config import (
    ActionCodecConfig,
    ArchitectureConfig,
    CameraConfig,
    DecoderConfig,
    ExpertConfig,
    LayerWidths,
    TowerConfig,
)
from rlrc_ros.vla.openvla import Inputs
from rlrc_ros.vla.pi0 import Pi0
from tests.conftest import bundle_config

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
VOCABULARY = 96


def architecture(layers=((4, 1, 128),) * 3, expert=((4, 1, 64),) * 3, proprioception=8, **changes):
    half = (0.5, 0.5, 0.5)
    sizes = {"width": 32, "depth": 2, "heads": 2, "ffn": 48, "patch": 8, "image_size": 32}
    tower = TowerConfig(kind="paligemma", mean=half, std=half, **sizes)
    decoder = DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        head_dim=16,
        layers=tuple(LayerWidths(*w) for w in layers),
        max_positions=512,
        bos_token_id=2,
    )
    options = {"chunk": 6, "action_width": 10, "state_width": 12, "steps": 4, **changes}
    widths = tuple(LayerWidths(*w) for w in expert)
    return ArchitectureConfig(
        towers=(tower,),
        decoder=decoder,
        proprioception=proprioception,
        expert=ExpertConfig(hidden_size=32, layers=widths, **options),
    )


def pi0_config(cameras=CAMERAS, **shape):
    """Actions with a mean of 0.01, and a standard deviation of 0.02 (the gripper 0.5 and 0.5)."""
    fields = {}
    if shape.get("proprioception", 8) == 0:
        fields["proprioception"] = None
    return bundle_config(
        architecture=architecture(**shape),
        action_codec=ActionCodecConfig(
            q01=(-0.01,) * 6 + (0.0,), q99=(0.03,) * 6 + (1.0,), mask=(True,) * 7
        ),
        cameras=tuple(CameraConfig(name=name, height=32, width=32) for name in cameras),
        instruction_template="{instruction}\n",
        **fields,
    )


def random_pi0(config, seed=0):
    """Weights large enough that every part of the model shows in its actions."""
    torch.manual_seed(seed)
    model = Pi0(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif "layers" in name:
            parameter.data *= 2
        elif "embed_tokens" in name:
            parameter.data *= 0.2
    return model


def observed(config, tokens=7, batch=1, seed=0, lengths=None):
    """Inputs of a batch; `lengths` of its prompts, where they differ."""
    generator = torch.Generator().manual_seed(seed)
    size, cameras = config.towers[0].image_size, 3
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)
    mask = None
    if lengths is not None:
        mask = torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]
        ids = ids.masked_fill(~mask, 0)
    pixels = torch.rand(batch, cameras, 3, size, size, generator=generator) * 2 - 1
    state = None
    if config.proprioception:
        state = torch.randn(batch, config.proprioception, generator=generator)
    return Inputs(ids, mask, pixels, state)


def noise(config, batch=1, seed=1):
    shape = (batch, config.expert.chunk, config.expert.action_width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


UPSTREAM = (
    ("vision_backbone.", "model.vlm.vision_tower."),
    ("projector.", "model.vlm.multi_modal_projector."),
    ("language_model.model.", "model.vlm.language_model."),
    ("expert.model.", "model.dit."),
    ("expert.action_out_proj.", "action_out_proj."),
    ("expert.", "embed_action_time."),
)


def upstream_names(names):
    """What transformers calls our tensors."""
    found = {}
    for name in names:
        mine, theirs = next(pair for pair in UPSTREAM if name.startswith(pair[0]))
        found[name] = theirs + name[len(mine) :]
    return found


def upstream(model):
    """transformers' own pi0 over the same weights."""
    config, expert = model.config, model.config.expert
    tower, decoder = config.towers[0], config.decoder
    gemma = {"model_type": "gemma", "head_dim": decoder.head_dim}
    first = decoder.layers[0]
    theirs = PI0ForConditionalGeneration(
        PI0Config(
            vlm_config={
                "model_type": "paligemma",
                "text_config": {
                    **gemma,
                    "hidden_size": decoder.hidden_size,
                    "num_hidden_layers": len(decoder.layers),
                    "intermediate_size": first.ffn,
                    "num_attention_heads": first.heads,
                    "num_key_value_heads": first.kv_heads,
                    "vocab_size": decoder.vocab_size,
                },
                "vision_config": {
                    "model_type": "siglip_vision_model",
                    "intermediate_size": tower.ffn,
                    "hidden_size": tower.width,
                    "patch_size": tower.patch,
                    "image_size": tower.image_size,
                    "num_hidden_layers": tower.depth,
                    "num_attention_heads": tower.heads,
                    "vision_use_head": False,
                },
                "projection_dim": decoder.hidden_size,
                "image_token_id": decoder.vocab_size,
            },
            dit_config={
                **gemma,
                "hidden_size": expert.hidden_size,
                "num_hidden_layers": len(expert.layers),
                "intermediate_size": expert.layers[0].ffn,
                "num_attention_heads": expert.layers[0].heads,
                "num_key_value_heads": expert.layers[0].kv_heads,
            },
            chunk_size=expert.chunk,
            max_state_dim=expert.state_width,
            max_action_dim=expert.action_width,
            num_inference_steps=expert.steps,
        )
    ).eval()
    state = model.state_dict()
    renamed = {theirs: state[name] for name, theirs in upstream_names(state).items()}
    left = theirs.load_state_dict(renamed, strict=False)
    assert left.missing_keys == ["model.dit.embed_tokens.weight"] and not left.unexpected_keys
    return theirs


def upstream_inputs(config, inputs):
    """As transformers' own processor lays out what we hold."""
    batch, cameras = inputs.pixel_values.shape[:2]
    patches = cameras * config.towers[0].patches
    images = inputs.input_ids.new_full((batch, patches), config.decoder.vocab_size)
    mask = inputs.attention_mask
    mask = torch.ones_like(inputs.input_ids, dtype=torch.bool) if mask is None else mask
    state = torch.zeros(batch, config.expert.state_width)
    if inputs.proprioception is not None:
        state[:, : inputs.proprioception.shape[1]] = inputs.proprioception
    return {
        "state": state,
        "input_ids": torch.cat([images, inputs.input_ids], 1),
        "pixel_values": inputs.pixel_values,
        "attention_mask": torch.cat([mask.new_ones(batch, patches), mask], 1).long(),
        "pixel_attention_mask": torch.ones(batch, cameras, dtype=torch.bool),
    }
