import re

import pytest
import torch

from rlrc_ros.vla.config import ArchitectureConfig, DecoderConfig, LayerWidths
from rlrc_ros.vla.openvla import Inputs, OpenVLA, layer_widths
from tests.conftest import bundle_config, random_model, tower

SHAPES = {
    "heads": ((2, 2, 64),) * 3,
    "grouped queries": ((4, 2, 64), (2, 1, 32)),
    "uneven": ((1, 1, 32), (3, 3, 96), (2, 2, 64)),
}


def batch(size=3, tokens=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 20, (size, tokens), generator=generator)
    pixels = torch.randn(size, 3, 64, 64, generator=generator)
    return Inputs(ids, None, pixels, torch.randn(size, 8, generator=generator))


@pytest.mark.parametrize("layers", SHAPES.values(), ids=SHAPES)
def test_log_probabilities_of_sampled_tokens_equal_the_teacher_forced_ones(layers):
    model, inputs = random_model(bundle_config(layers)), batch()
    torch.manual_seed(0)
    bins, log_probability, state = model.generate(inputs, temperature=0.7)
    logits, forced_state = model(inputs, bins)
    log_p = (logits / 0.7).log_softmax(-1).gather(-1, bins[..., None]).sum((1, 2))
    torch.testing.assert_close(log_p, log_probability, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(forced_state, state, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.state(inputs), state, atol=1e-5, rtol=1e-4)


def test_a_padded_batch_gives_each_row_what_it_gives_alone():
    model, whole = random_model(bundle_config()), batch(2)
    lengths = (9, 6)
    mask = torch.tensor([[i < n for i in range(9)] for n in lengths])
    padded = Inputs(whole.input_ids * mask, mask, whole.pixel_values, whole.proprioception)
    bins, _, state = model.generate(padded)
    logits, _ = model(padded, bins)
    for row, length in enumerate(lengths):
        alone = whole[slice(row, row + 1)]
        alone.input_ids = alone.input_ids[:, :length]
        alone_bins, _, alone_state = model.generate(alone)
        assert (alone_bins[0] == bins[row]).all()
        torch.testing.assert_close(alone_state[0], state[row], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            model(alone, alone_bins)[0][0], logits[row], atol=1e-4, rtol=1e-4
        )


def test_every_input_matters():
    model, inputs = random_model(bundle_config()), batch(1)
    state = model.state(inputs)
    for name in ("input_ids", "pixel_values", "proprioception"):
        changed = Inputs(**vars(inputs))
        value = getattr(inputs, name).clone()
        value[0, -1] += 1
        setattr(changed, name, value)
        assert not torch.allclose(model.state(changed), state), name


def test_tensors_are_named_as_in_upstreams_checkpoint():
    decoder = DecoderConfig(
        vocab_size=32064, hidden_size=64, head_dim=32, layers=(LayerWidths(2, 2, 64),) * 2,
        pad_to_multiple_of=64,
    )  # fmt: skip
    towers = (
        tower(kind="dinov2", patch=16, depth=3),
        tower(kind="siglip", patch=16, width=48, depth=2, heads=2),
    )
    with torch.device("meta"):
        model = OpenVLA(ArchitectureConfig(towers=towers, decoder=decoder), 256, 7)
    names = {re.sub(r"\.\d+\.", ".N.", name) for name in model.state_dict()}
    block = [
        *(f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")),
        *(f"attn.{p}.{kind}" for p in ("qkv", "proj") for kind in ("weight", "bias")),
        *(f"mlp.{p}.{kind}" for p in ("fc1", "fc2") for kind in ("weight", "bias")),
    ]
    both = ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    both += ["norm.weight", "norm.bias", *(f"blocks.N.{name}" for name in block)]
    dino = ["cls_token", "reg_token", "blocks.N.ls1.scale_factor", "blocks.N.ls2.scale_factor"]
    pool = ["latent", "q.weight", "q.bias", "kv.weight", "kv.bias", "proj.weight", "proj.bias"]
    pool += ["norm.weight", "norm.bias"]
    pool += [f"mlp.{p}.{kind}" for p in ("fc1", "fc2") for kind in ("weight", "bias")]
    layer = [f"self_attn.{p}_proj.weight" for p in "qkvo"]
    layer += [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    assert names == {
        *(f"vision_backbone.featurizer.{name}" for name in both + dino),
        *(f"vision_backbone.fused_featurizer.{name}" for name in both),
        *(f"vision_backbone.fused_featurizer.attn_pool.{name}" for name in pool),
        *(f"projector.fc{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")),
        *(f"language_model.model.layers.N.{name}" for name in layer),
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
    }
    assert model.first_action_id == 31744


@pytest.mark.parametrize("layers", SHAPES.values(), ids=SHAPES)
def test_widths_are_as_configured(layers):
    assert layer_widths(random_model(bundle_config(layers)).language_model) == tuple(
        LayerWidths(*widths) for widths in layers
    )
