import copy
import logging

import pytest
import torch

from rlrc_ros.errors import UserError
from rlrc_ros.vla import matrices, quantization
from rlrc_ros.vla.config import QuantizationConfig
from rlrc_ros.vla.openvla import Inputs
from rlrc_ros.vla.pi0_engine import Pi0EagerEngine, Pi0GraphEngine
from tests.vla.pi0_policies import VOCABULARY, architecture, noise, random_pi0
from tests.vla.test_pi0 import SHAPES

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EVERY_WIDTH = {
    "layers": ((4, 1, 128), (1, 1, 64), (2, 1, 32)),
    "expert": ((2, 1, 64), (4, 1, 32), (1, 1, 64)),
}


def both(config, tokens=7, seed=0):
    """The same observation for an engine that normalises, and for one that does not."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (1, tokens), generator=generator)
    size = config.towers[0].image_size
    images = torch.randint(0, 256, (1, config.images, size, size, 3), generator=generator)
    state = torch.randn(1, 8, generator=generator) if config.proprioception else None
    pixels = images.permute(0, 1, 4, 2, 3) / 255 * 2 - 1
    return Inputs(ids, None, images.to(torch.uint8), state), Inputs(ids, None, pixels, state)


def assert_same_actions(model, lengths=(7, 16, 21), device="cpu", **options):
    config = model.config
    start = noise(config)[0]
    eager = Pi0EagerEngine(copy.deepcopy(model).to(device), start)
    engine = Pi0GraphEngine(model.to(device), start, **options)
    engine.prepare()
    for seed, tokens in enumerate(lengths):
        raw, normalised = both(config, tokens, seed)
        expected = eager.chunk(normalised.to(device))
        assert (expected - start).abs().max() > 0.1
        torch.testing.assert_close(engine.chunk(raw), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [*SHAPES.values(), EVERY_WIDTH], ids=[*SHAPES, "every width"])
def test_without_a_graph_it_gives_eager_actions(shape):
    assert_same_actions(random_pi0(architecture(**shape)))


@pytest.mark.parametrize("cameras", [1, 2])
def test_fewer_cameras(cameras):
    assert_same_actions(random_pi0(architecture(images=cameras)))


def test_padding_of_the_prompt_changes_nothing():
    config = architecture()
    model = random_pi0(config)
    engine = Pi0GraphEngine(copy.deepcopy(model))
    raw, _ = both(config, 5)
    plain = engine.chunk(raw)
    slots = engine._slots(48)
    engine._fill(slots, raw)
    slots.words[5:] = 17  # whatever is there
    torch.testing.assert_close(engine._beyond(slots, 48), plain[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["bitsandbytes-nf4", "bitsandbytes-int8"])
def test_quantized_it_gives_eager_actions(method):
    parts = ("llm", "vision", "projector", "expert")
    model = random_pi0(architecture())
    quantization.quantize(model, QuantizationConfig(method=method, parts=parts))
    if method.endswith("nf4"):
        assert_same_actions(model)
    else:  # whose inputs only eager rounds
        assert Pi0GraphEngine(model).chunk(both(model.config)[0]).isfinite().all()


def test_weights_are_counted_once_and_what_is_never_used_not_at_all():
    model = random_pi0(architecture())
    expected = {name: quantization.weight_bytes(part) for name, part in model.parts.items()}
    last = model.language_model.model.layers[-1]
    unused = [last.self_attn.q_proj, last.self_attn.o_proj, last.mlp]
    unused += [last.post_attention_layernorm, model.language_model.model.norm]
    expected["llm"] -= sum(map(quantization.weight_bytes, unused))
    found = Pi0GraphEngine(model).weight_bytes()
    assert abs(found["expert"] - expected["expert"]) < 0.1 * expected["expert"]  # times, worked out
    for part in ("vision", "projector", "llm"):
        buffers = sum(b.nbytes for b in model.parts[part].buffers())
        assert found[part] == expected[part] - buffers


def test_broken_weights_give_no_action():
    model = random_pi0(architecture())
    model.expert.model.norm.weight.data[0] = float("nan")
    raw, normalised = both(model.config)
    eager, graph = Pi0EagerEngine(copy.deepcopy(model)), Pi0GraphEngine(model)
    for engine, inputs in ((eager, normalised), (graph, raw)):
        with pytest.raises(UserError, match="not finite"):
            engine.chunk(inputs)


def test_one_observation_at_a_time():
    model = random_pi0(architecture())
    _, normalised = both(model.config)
    with pytest.raises(ValueError, match="its image in bytes"):
        Pi0GraphEngine(model).chunk(normalised)


@on_gpu
@pytest.mark.parametrize("shape", [*SHAPES.values(), EVERY_WIDTH], ids=[*SHAPES, "every width"])
@pytest.mark.parametrize("operations", [None, matrices], ids=["kernels", "plain"])
def test_with_graphs_it_gives_eager_actions(shape, operations, caplog):
    with caplog.at_level(logging.WARNING):
        assert_same_actions(
            random_pi0(architecture(**shape)),
            lengths=(7, 16, 21, 60, 9),
            device="cuda",
            operations=operations,
        )
    assert "a prompt of 60 tokens is longer" in caplog.text
