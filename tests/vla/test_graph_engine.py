import copy
import logging

import pytest
import torch

from rlrc_ros.errors import UserError
from rlrc_ros.vla import load_policy, matrices, quantization
from rlrc_ros.vla.config import QuantizationConfig
from rlrc_ros.vla.engine import EagerEngine
from rlrc_ros.vla.graph_engine import GraphEngine
from rlrc_ros.vla.openvla import Inputs, OpenVLA
from rlrc_ros.vla.processor import Processor
from tests.conftest import bundle_config, random_model
from tests.vla.checkpoints import architecture
from tests.vla.test_openvla import SHAPES

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EVERYTHING = QuantizationConfig(method="bitsandbytes-nf4", parts=("llm", "vision", "projector"))


def observed(config, tokens=9, seed=0):
    """The same observation for an engine that normalises, and for one that does not."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 20, (1, tokens), generator=generator)
    size = config.architecture.towers[0].image_size
    image = torch.randint(0, 256, (1, size, size, 3), generator=generator, dtype=torch.uint8)
    joints = torch.randn(1, 8, generator=generator) if config.proprioception else None
    pixels = Processor(config, None).pixel_values(image)
    return Inputs(ids, None, image, joints), Inputs(ids, None, pixels, joints)


def assert_same_tokens(config, model, device="cpu", lengths=(9, 12, 9, 30, 70), **options):
    eager = EagerEngine(copy.deepcopy(model).to(device))
    engine = GraphEngine(model.to(device), **options)
    engine.prepare()
    for seed, tokens in enumerate(lengths):
        raw, normalised = observed(config, tokens, seed)
        expected = eager.bins(normalised.to(device)).cpu()
        assert torch.equal(engine.bins(raw), expected), (seed, tokens)


@pytest.mark.parametrize("layers", SHAPES.values(), ids=SHAPES)
def test_without_a_graph_it_gives_eager_tokens(layers):
    config = bundle_config(layers)
    assert_same_tokens(config, random_model(config))


@pytest.mark.parametrize("layers", [((2, 2, 64),) * 3, ((4, 2, 64), (2, 2, 128), (2, 1, 96))])
def test_quantized_everywhere_it_gives_eager_tokens(layers):
    config = bundle_config(layers)
    model = random_model(config)
    quantization.quantize(model, EVERYTHING)
    assert_same_tokens(config, model)


def openvla(**shape):
    """The two towers of OpenVLA, and no proprioception."""
    config = bundle_config(architecture=architecture(**shape), proprioception=None)
    torch.manual_seed(0)
    model = OpenVLA(config.architecture, 256, 7).eval()
    for parameter in model.language_model.parameters():
        parameter.data *= 3
    return config, model


@pytest.mark.parametrize("shape", [{}, {"dino": None}, {"layers": 1, "heads": 2, "kv_heads": 1}])
def test_the_towers_of_openvla(shape):
    assert_same_tokens(*openvla(**shape))


def test_packing_without_bitsandbytes_is_what_bitsandbytes_does():
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 96, bias=False)
    bnb = quantization.bitsandbytes()
    data, state = bnb.functional.quantize_4bit(
        linear.weight.detach(), blocksize=64, quant_type="nf4"
    )
    theirs = bnb.functional.dequantize_4bit(data, state)
    matrix = matrices.packed([linear], torch.float32)
    assert torch.equal(matrix.data.reshape(-1, 1), data)
    torch.testing.assert_close(matrices.unpack(matrix, torch.float32), theirs)
    assert matrix.nbytes == 128 * 96 // 2 + 128 * 96 // 64 * 4


@pytest.mark.parametrize("hold", [matrices.held, matrices.rounded, matrices.packed])
def test_a_matrix_in_pieces_is_the_matrix(hold, monkeypatch):
    layer, x, bias = torch.nn.Linear(128, 200, bias=False), torch.randn(3, 128), torch.randn(200)
    matrix = hold([layer], torch.float32)
    whole = x @ matrices.dense(matrix, torch.float32, matrices).T
    monkeypatch.setattr(matrices, "UNPACKED", 128 * 100)
    rows = [piece.shape[0] for _, piece in matrix.slices()]
    assert rows == ([200] if matrix.scales is None else [64, 64, 64, 8])
    torch.testing.assert_close(matrices.times(x, matrix, matrices), whole)
    torch.testing.assert_close(matrices.times(x, matrix, matrices, bias), whole + bias)
    y = torch.ones(3, 200)
    assert matrices.add_product(y, x, matrix, matrices) is y
    torch.testing.assert_close(y, whole + 1)


def test_weights_are_counted_once_and_the_last_block_not_at_all():
    _, model = openvla()
    expected = {name: quantization.weight_bytes(part) for name, part in model.parts.items()}
    unused = [tower.blocks[-1] for tower in model.vision_backbone.children()]
    unused.append(model.vision_backbone.fused_featurizer.attn_pool)
    expected["vision"] -= sum(map(quantization.weight_bytes, unused))
    expected["llm"] -= (32064 - 256) * 32 * 4  # rows of the head that are no action's
    assert GraphEngine(model).weight_bytes() == expected


def test_places_that_are_filled_again_hold_the_last_prompt():
    config = bundle_config()
    model = random_model(config)
    embedding = model.language_model.model.embed_tokens.weight.detach().clone()
    engine = GraphEngine(model)
    slots = engine._slots(12)
    for tokens, seed in ((9, 0), (9, 0), (9, 1), (12, 2), (9, 1)):
        raw, _ = observed(config, tokens, seed)
        engine._fill(slots, raw)
        assert torch.equal(slots.words[:tokens], embedding[raw.input_ids[0]])
        assert slots.count.item() == tokens and torch.equal(slots.images, raw.pixel_values)


def test_a_broken_state_is_no_action():
    config = bundle_config()
    model = random_model(config)
    model.language_model.model.norm.weight.data[0] = float("nan")
    model.language_model.model.layers[0].input_layernorm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        GraphEngine(model).bins(observed(config)[0])


def test_a_policy_acts_alike_in_either_engine(make_bundle, observation):
    path = make_bundle().path
    eager, graph = (load_policy(path, engine=engine) for engine in ("eager", "graph"))
    assert graph.warm_up() > 0
    assert (eager.act(observation).actions == graph.act(observation).actions).all()


@on_gpu
@pytest.mark.parametrize("operations", ["kernels", "matrices"])
@pytest.mark.parametrize("layers", SHAPES.values(), ids=SHAPES)
def test_the_graph_gives_eager_tokens(layers, operations):
    operations = pytest.importorskip(f"rlrc_ros.vla.{operations}")
    config = bundle_config(layers)
    model = random_model(config)
    assert_same_tokens(config, model, "cuda", (9, 14, 30, 9), operations=operations)


@on_gpu
def test_the_graph_of_two_towers_gives_eager_tokens():
    assert_same_tokens(*openvla(), "cuda", (9, 30))


@on_gpu
def test_a_prompt_longer_than_any_graph_is_answered_rightly_and_noted(caplog):
    config = bundle_config()
    with caplog.at_level(logging.WARNING):
        model = random_model(config)
        eager = EagerEngine(copy.deepcopy(model).to("cuda"))
        engine = GraphEngine(model.to("cuda"), lengths=(16,))
        for seed, tokens in enumerate((70, 9, 70)):
            raw, normalised = observed(config, tokens, seed)
            assert torch.equal(engine.bins(raw), eager.bins(normalised.to("cuda")).cpu()), tokens
    assert caplog.text.count("longer than any that was prepared for (16)") == 2


@on_gpu
@pytest.mark.parametrize("hold", [matrices.rounded, matrices.packed], ids=["int8", "nf4"])
def test_quantized_the_graph_gives_the_tokens_of_plain_arithmetic(hold):
    kernels = pytest.importorskip("rlrc_ros.vla.kernels")
    config = bundle_config(((2, 2, 64), (2, 2, 128)))
    plain, engine = (
        GraphEngine(random_model(config).cuda(), hold=hold, operations=operations)
        for operations in (matrices, kernels)
    )
    for seed in range(4):
        raw, _ = observed(config, 12, seed)
        assert torch.equal(engine.bins(raw), plain.bins(raw)), seed


@on_gpu
def test_a_gpu_too_small_is_told_before_anything_is_read(make_bundle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 2000))
    with pytest.raises(UserError, match=r"its weights take .* GB as torch.bfloat16, and cuda has"):
        load_policy(make_bundle().path, "cuda")
