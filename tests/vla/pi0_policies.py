"""Small pi0 policies with random weights."""

import torch

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


def architecture(
    layers=((4, 1, 128),) * 3, expert=((4, 1, 64),) * 3, proprioception=8, images=3, **changes
):
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
        images=images,
        expert=ExpertConfig(hidden_size=32, layers=widths, **options),
    )


def pi0_config(cameras=CAMERAS, **shape):
    """Actions with a mean of 0.01, and a standard deviation of 0.02 (the gripper 0.5 and 0.5)."""
    fields = {}
    if shape.get("proprioception", 8) == 0:
        fields["proprioception"] = None
    return bundle_config(
        architecture=architecture(images=len(cameras), **shape),
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
    size, cameras = config.towers[0].image_size, config.images
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
